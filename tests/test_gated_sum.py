"""gated_sum: o = sum over branches of g_c o_c and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from nsa_cuda._checks import lse_dtype
from nsa_cuda._gated_ops import gated_sum_backward, gated_sum_forward
from targets import ALL, CPU_TARGETS, CUDA_TARGETS, ONE_EACH, Target
from torch import Tensor

GATE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# [.., Hq, Dv]: one and several rows a warp, a head dim of several chunks, one that fills no vector
SHAPES = {"d64": (2, 37, 4, 64), "d128_packed": (61, 16, 128), "d256": (1, 9, 3, 256), "d40": (2, 5, 2, 40),
          "d520": (7, 1, 520), "empty": (0, 5, 2, 64)}  # fmt: skip


def make(shape: tuple[int, ...], target: Target, gate_dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """dout and the three branches, the gates."""
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(shape, generator=generator).to(target.device, target.dtype) for _ in range(4)]
    gates = torch.rand((*shape[:-1], 3), generator=generator).to(target.device, gate_dtype)
    return tensors, gates


def poisoned(function, *arguments):
    """Results, computed in memory that held NaN."""
    shape = arguments[0].shape
    keep = [torch.full(shape, float("nan"), dtype=x.dtype, device=x.device) for x in arguments[:2] for _ in range(2)]
    del keep
    return function(*arguments)


def assert_rounded_once(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """found is exact but for one rounding to its dtype and float32 sums: eps / 2 of the value, and of the terms' sizes
    what float32 loses."""
    eps = torch.finfo(found.dtype).eps
    accumulated = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    bound = 0.5 * eps * exact.abs() + 32 * accumulated * terms + torch.finfo(found.dtype).tiny
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("gate_dtype", GATE_DTYPES.values(), ids=GATE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("target", ALL)
def test_forward(target: Target, shape: tuple[int, ...], gate_dtype: torch.dtype) -> None:
    (_, *branches), gates = make(shape, target, gate_dtype)
    # float64 gates lose what float32 sums lose
    g = gates.double()
    products = torch.stack([g[..., c, None] * branches[c].double() for c in range(3)])
    o = poisoned(gated_sum_forward, *branches, gates)
    assert o.dtype == target.dtype
    assert_rounded_once(o, products.sum(0), products.abs().sum(0))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("target", ALL)
def test_backward(target: Target, shape: tuple[int, ...]) -> None:
    (dout, *branches), _ = make(shape, target, torch.float32)
    dots = torch.stack([dout.double() * x.double() for x in branches], -1)  # [.., Hq, Dv, 3]
    dgates = poisoned(gated_sum_backward, dout, *branches)
    assert dgates.dtype == lse_dtype(target.dtype)
    assert_rounded_once(dgates, dots.sum(-2), dots.abs().sum(-2))
    for c in range(3):
        only = [x if c == i else None for i, x in enumerate(branches)]
        assert torch.equal(gated_sum_backward(dout, *only)[..., c], dgates[..., c])


@pytest.mark.parametrize("target", ONE_EACH)
def test_strides(target: Target) -> None:
    """Views need no copies by the caller: heads first, gates transposed and sliced, a row repeated."""
    (dout, *branches), gates = make((2, 6, 4, 64), target, torch.float32)
    expected = gated_sum_forward(*branches, gates), gated_sum_backward(dout, *branches)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, *branches)]
    views[1] = torch.cat([views[1], views[1]], -2)[..., :4, :]
    strided = torch.stack([gates, gates], -1).permute(3, 2, 1, 4, 0).contiguous().permute(4, 2, 1, 0, 3)[..., 0]
    assert strided.stride() != gates.stride() and torch.equal(strided, gates)
    found = gated_sum_forward(*views[1:], strided), gated_sum_backward(*views)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    one = gates[:, :1].expand_as(gates)
    assert torch.equal(gated_sum_forward(*branches, one), gated_sum_forward(*branches, one.clone()))


@pytest.mark.parametrize("target", ONE_EACH)
def test_dead_rows_add_nothing(target: Target) -> None:
    """o_c = 0 adds 0 to o and to the gates' gradients, whatever the gate and dout hold there."""
    (dout, *branches), gates = make((1, 8, 2, 64), target, torch.float32)
    branches[1][:, 3] = 0
    expected = gated_sum_forward(*branches, gates)
    gates[:, 3, :, 1] = float("nan")
    assert torch.equal(gated_sum_forward(*branches, gates), expected)
    for x in branches:
        x[:, 5] = 0
    dout[:, 5] = float("nan")
    dgates = gated_sum_backward(dout, *branches)
    assert bool((dgates[:, 5] == 0).all())


@pytest.mark.parametrize("target", ONE_EACH)
def test_opcheck(target: Target) -> None:
    (dout, *branches), gates = make((2, 5, 4, 64), target, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(gated_sum_forward, (*branches, gates), test_utils=tests)
    torch.library.opcheck(gated_sum_backward, (dout, *branches), test_utils=tests)
    torch.library.opcheck(gated_sum_backward, (dout, None, branches[1], None), test_utils=tests)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_do_not_depend_on_threads(threads: int, one_thread) -> None:
    (dout, *branches), gates = make((300, 16, 128), CPU_TARGETS[1], torch.float32)
    torch.set_num_threads(1)
    expected = gated_sum_forward(*branches, gates), gated_sum_backward(dout, *branches)
    torch.set_num_threads(threads)
    found = gated_sum_forward(*branches, gates), gated_sum_backward(dout, *branches)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_refusals() -> None:
    (dout, *branches), gates = make((2, 5, 4, 64), CPU_TARGETS[1], torch.float32)
    with pytest.raises(ValueError, match="gates"):
        gated_sum_forward(*branches, gates[..., :2])
    with pytest.raises(ValueError, match="gates"):
        gated_sum_forward(branches[0], branches[1][:1], branches[2], gates)
    with pytest.raises(ValueError, match="gates"):
        gated_sum_backward(dout, branches[0], None, branches[2][:1])


@pytest.mark.gpu
@pytest.mark.parametrize("target", [pytest.param(t, id=t.id) for t in CUDA_TARGETS])
def test_cuda_refuses_odd_head_dims(target: Target) -> None:
    (_, *branches), gates = make((2, 5, 4, 36), target, torch.float32)
    with pytest.raises(NotImplementedError, match="head_dim"):
        gated_sum_forward(*branches, gates)
