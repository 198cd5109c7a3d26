"""native_sparse_attention as a citizen of torch: opcheck, compile, autocast, checkpoints, and the bytes it keeps."""

from __future__ import annotations

from typing import Any

import nsa_cuda
import pytest
import torch
from native_inputs import LEAVES, NativeCase, NativeInputs, call, make
from targets import ONE_EACH, Target
from test_torch import RecordOps
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CALLS = [
    NativeCase("torch_plain", Tq=70, Tk=70),
    NativeCase("torch_shared", Tq=70, Tk=70, shared=True),
    NativeCase("torch_dense", Tq=60, Tk=60),
    NativeCase("torch_tensors", Tq=50, Tk=70, q_offset=(3, -4)),
    NativeCase("torch_packed", seqlens_q=(40, 0, 33), seqlens_k=(40, 0, 33)),
]
CASE = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CALLS])
RECOMPUTE = pytest.mark.parametrize("recompute", [False, "window", True])


@pytest.mark.parametrize("target", ONE_EACH)
@CASE
@RECOMPUTE
def test_opcheck(target: Target, case: NativeCase, recompute: Any):
    """The schemas, fake implementations and aliasing of both operators, with lists of their own and given ones."""
    made = make(case, target)
    for options in ({}, {"block_indices": made.lists(), "block_counts": 3}):
        with RecordOps() as record:
            made.run(target.backend, recompute=recompute, **options)
        calls = [c for c in record.calls if "native_sparse" in str(c[0])]
        assert len(calls) == 2, "one operator forward, one backward"
        for func, args, kwargs in calls:
            args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def loss_of(made: NativeInputs, target: Target, **options: Any):
    def loss(*leaves: Tensor) -> Tensor:
        x = dict(zip(made.tensors, leaves, strict=True)) | {"q": leaves[0] * 2.0, "v": leaves[2] + 1.0}
        o = call(nsa_cuda, x, backend=target.backend, **made.options, **options)
        return (o.float() * made.dout.float()).sum()

    return loss


def value_and_grads(function: Any, made: NativeInputs) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in made.tensors.values()]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("target", ONE_EACH)
@CASE
@RECOMPUTE
def test_compile_without_graph_breaks(target: Target, case: NativeCase, recompute: Any):
    made = make(case, target)
    loss = loss_of(made, target, recompute=recompute)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_grads(loss, made), value_and_grads(compiled, made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_activation_checkpointing(target: Target, reentrant: bool):
    made = make(CALLS[0], target)
    loss = loss_of(made, target)

    def backward(function: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in made.tensors.values()]
        value = function(*leaves)
        value.backward()
        return [value.detach(), *[x.grad for x in leaves]]

    found = backward(lambda *x: checkpoint(loss, *x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(backward(loss), found, strict=True))


@pytest.mark.parametrize("target", ONE_EACH)
def test_autocast(target: Target):
    """float32 inputs, gates apart, are cast; gradients come back in float32."""
    made = make(CALLS[0], target)
    leaves = {name: x.float().requires_grad_() for name, x in made.tensors.items()}
    with torch.autocast(target.device, torch.bfloat16):
        o = call(nsa_cuda, leaves, backend=target.backend, **made.options)
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o, list(leaves.values()), made.dout.bfloat16())
    assert all(x.dtype == torch.float32 for x in gradients)
    low = {name: x.detach() if name == "gates" else x.detach().bfloat16() for name, x in leaves.items()}
    by_hand = NativeInputs(made.case, low, made.dout.bfloat16(), made.options).run(target.backend)
    assert torch.equal(o, by_hand["o"])
    for name, x in zip(leaves, gradients, strict=True):
        assert torch.equal(x, by_hand[f"d{name}"].float()), name


@pytest.mark.parametrize("target", ONE_EACH)
@RECOMPUTE
def test_second_derivative_raises(target: Target, recompute: Any):
    made = make(CALLS[0], target)
    leaves = {name: x.detach().requires_grad_() for name, x in made.tensors.items()}
    o = call(nsa_cuda, leaves, backend=target.backend, recompute=recompute, **made.options)
    (first,) = torch.autograd.grad(o.float().square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="native_sparse_attention has no second derivative"):
        first.sum().backward()


def kept_bytes(made: NativeInputs, target: Target, recompute: Any) -> int:
    """Of all storages that autograd holds between forward and backward."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = {name: x.detach().requires_grad_() for name, x in made.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = call(nsa_cuda, leaves, backend=target.backend, recompute=recompute, **made.options)
    assert o.requires_grad and o.untyped_storage().data_ptr() not in sizes
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("recompute", "alone", "with_o"), [(False, 2.04, 2.51), ("window", 1.57, 2.04), (True, 0.64, 1.10)]
)
@pytest.mark.parametrize("target", ONE_EACH)
def test_kept_bytes(target: Target, recompute: Any, alone: float, with_o: float):
    """Against dense flash attention's q, k, v, o and lse, for 64 query and 4 key heads of 128 in bfloat16."""
    T, Hq, Hkv, D = 640, 64, 4, 128
    sizes = {"kernel_size": 32, "kernel_stride": 16, "block_size": 16, "topk": 16}
    case = NativeCase("kept", B=1, Tq=T, Tk=T, Hq=Hq, Hkv=Hkv, Dk=D, Dv=D, **sizes)
    made = make(case, Target(target.device, torch.bfloat16, target.backend))
    found = kept_bytes(made, target, recompute)
    inputs = 2 * T * (Hq * D + 4 * Hkv * D + 3 * Hq) + 2 * ((T - 32) // 16 + 1) * Hkv * 2 * D
    branches = {False: 3, "window": 2, True: 0}[recompute]
    assert found == inputs + 2 * T * Hq * D * branches + 12 * T * Hq + 4 * T * Hkv * 16
    o = 2 * T * Hq * D
    dense = 2 * o + 2 * 2 * T * Hkv * D + 4 * T * Hq
    assert found / dense <= alone
    assert (found + o) / dense <= with_o


@pytest.mark.parametrize("target", ONE_EACH)
def test_without_gradients_nothing_is_kept(target: Target):
    made = make(CALLS[0], target)
    with RecordOps() as record, torch.no_grad():
        o = call(nsa_cuda, made.tensors, backend=target.backend, **made.options)
    assert not o.requires_grad
    (arguments,) = (args for func, args, _ in record.calls if "native_sparse" in str(func))
    assert arguments[-2] == 7, "all branch outputs are dropped inside the operator"


REFUSED = [
    ({"window_size": 0}, ValueError, "window_size: must be at least 1, was 0"),
    ({"kernel_stride": 3}, ValueError, "kernel_stride: must divide kernel_size = 8, was 3"),
    ({"block_size": 6}, ValueError, "kernel_stride: must divide block_size = 6, was 4"),
    ({"topk": 2}, ValueError, r"topk: must be at least init_blocks \+ local_blocks = 1 \+ 2, was 2"),
    ({"recompute": "all"}, ValueError, "recompute: must be False, \"window\" or True, was 'all'"),
    ({"gates": 2}, ValueError, r"gates: must be \[B, Tq, Hq, 3\] = \[2, 70, 4, 3\], was \[2, 70, 4, 2\]"),
    ({"v_win": None}, ValueError, "v_win: k_win and v_win come together or not at all, was None"),
    ({"k_win": 9}, ValueError, r"v_win: must be \[B, Tk, Hkv, Dv\] = \[2, 9, 2, Dv\] like k_win"),
    ({"k_cmp": 3, "v_cmp": 3}, ValueError, "k_cmp: must have at least 16 rows for seqlen_k = 70 tokens, had 3"),
    ({"q_offset": 1.5}, TypeError, "q_offset: must be an int or an int32 tensor"),
    ({"backend": "x"}, ValueError, "backend: must be one of None, 'cpu', 'sm80', 'sm90', 'reference', was 'x'"),
]


@pytest.mark.parametrize(("change", "exception", "message"), REFUSED, ids=[str(next(iter(r[0]))) for r in REFUSED])
def test_refusals(change: dict[str, Any], exception: type[Exception], message: str):
    made = make(CALLS[0], ONE_EACH[0].values[0])
    tensors, options = dict(made.tensors), dict(made.options)
    for name, value in change.items():
        if name == "gates":
            tensors[name] = tensors[name][..., :value]
        elif name in LEAVES:
            tensors[name] = None if value is None else tensors[name][:, :value]
        else:
            options[name] = value
    with pytest.raises(exception, match=message):
        call(nsa_cuda, tensors, **options)


def test_other_heads_of_a_branch_are_refused():
    made = make(CALLS[0], ONE_EACH[0].values[0])
    tensors = dict(made.tensors, k_cmp=made.tensors["k_cmp"][:, :, :1], v_cmp=made.tensors["v_cmp"][:, :, :1])
    with pytest.raises(ValueError, match=r"k_cmp: Hkv and Dk must be k's \[2, 64\], were \[1, 64\]"):
        call(nsa_cuda, tensors, **made.options)
