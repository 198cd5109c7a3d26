"""The window's forward that ends with the gated sum of all branches, against its plain forward and float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from inputs import cu_seqlens
from nsa_cuda._ops import BACKENDS
from nsa_cuda._range_ops import COMPRESSED, WINDOW, OtherBranches, range_attention_forward, range_forward
from poison import poisoned_memory
from targets import ALL, CPU_TARGETS, CUDA_HEAD_DIMS, ONE_EACH, Target
from torch import Tensor

GATE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Window:
    q: Tensor
    k: Tensor
    v: Tensor
    others: list[Tensor]
    problem: tuple[Any, ...]

    def plain(self) -> tuple[Tensor, Tensor]:
        return range_attention_forward(self.q, self.k, self.v, *self.problem)

    def summed(self, gates: Tensor, keep_o: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        others = OtherBranches(self.others[0], self.others[1], gates)
        with poisoned_memory():
            o, lse, total = range_forward(self.q, self.k, self.v, *self.problem, others=others, keep_o=keep_o)
        assert total is not None and (o is not None) == keep_o
        return o, lse, total


def make(
    target: Target, dims: tuple[int, int] = (64, 64), kind: str = "window", B: int = 2, T: int = 150, Hq: int = 8,
    Hkv: int = 2, lengths: tuple[int, ...] | None = None, offset: int = -20,
) -> Window:  # fmt: skip
    """Rows before position 0, and packed those outside every sequence, are dead."""
    generator = torch.Generator().manual_seed(11)
    packed = lengths is not None
    lead, rows = ((T,), T) if packed else ((B, T), B * T)

    def draw(heads: int, dim: int) -> Tensor:
        x = torch.randn(rows, heads, dim, generator=generator, dtype=torch.float64)
        return x.view(*lead, heads, dim).to(target.device, target.dtype)

    q, k, v = draw(Hq, dims[0]), draw(Hkv, dims[0]), draw(Hkv, dims[1])
    others = [draw(Hq, dims[1]), draw(Hq, dims[1])]
    vector = None if lengths is None else cu_seqlens(lengths).to(target.device)
    mask, sizes = (WINDOW, (40, 1, 1, T)) if kind == "window" else (COMPRESSED, (0, 4, 2, 2 * T + 2))
    problem = (vector, vector, None, offset, mask, *sizes, True, None, BACKENDS[target.backend])
    return Window(q, k, v, others, problem)


def gates_of(window: Window, dtype: torch.dtype) -> Tensor:
    """Of both signs, and 0 for a tenth of them."""
    generator = torch.Generator().manual_seed(12)
    shape = (*window.q.shape[:-1], 3)
    x = torch.rand(shape, generator=generator) * 3 - 1.5
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(window.q.device, dtype)


def check(window: Window, gates: Tensor) -> None:
    """o and lse are those of the plain forward; the sum is rounded once, of an o that isn't."""
    o, lse = window.plain()
    found, found_lse, total = window.summed(gates)
    assert found is not None
    assert torch.equal(found, o) and torch.equal(found_lse, lse)
    g = gates.double()
    terms = [g[..., c, None] * x.double() for c, x in enumerate((*window.others, o))]
    eps = torch.finfo(total.dtype).eps
    accumulated = torch.finfo(lse.dtype).eps
    exact, sizes = sum(terms), sum(x.abs() for x in terms)
    own = torch.finfo(o.dtype).tiny * g[..., 2, None].abs()
    bound = 0.5 * eps * (1 + eps) * (exact.abs() + terms[2].abs() * (1 + eps)) + 32 * accumulated * sizes + own
    assert bool(((total.double() - exact).abs() <= bound + torch.finfo(total.dtype).tiny).all())
    alone, lse_alone, total_alone = window.summed(gates, keep_o=False)
    assert alone is None and torch.equal(lse_alone, lse) and torch.equal(total_alone, total)


@pytest.mark.parametrize("gate_dtype", GATE_DTYPES.values(), ids=GATE_DTYPES)
@pytest.mark.parametrize("kind", ["window", "compressed"])
@pytest.mark.parametrize("target", ALL)
def test_sum(target: Target, kind: str, gate_dtype: torch.dtype) -> None:
    window = make(target, kind=kind)
    check(window, gates_of(window, gate_dtype))


@pytest.mark.parametrize("dims", CUDA_HEAD_DIMS, ids=str)
@pytest.mark.parametrize("target", ALL)
def test_head_dims(target: Target, dims: tuple[int, int]) -> None:
    window = make(target, dims, B=1, T=70)
    check(window, gates_of(window, target.dtype))


@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (6, 2), (16, 1)])
@pytest.mark.parametrize("target", ONE_EACH)
def test_packed(target: Target, Hq: int, Hkv: int) -> None:
    """Rows outside every sequence are dead, and yet the other branches count there."""
    window = make(target, T=140, Hq=Hq, Hkv=Hkv, lengths=(70, 0, 3, 50), offset=-2)
    check(window, gates_of(window, torch.float32))


def test_head_dim_of_several_chunks() -> None:
    window = make(CPU_TARGETS[2], (24, 700), B=1, T=9, offset=0)
    check(window, gates_of(window, torch.float32))


@pytest.mark.parametrize("target", ONE_EACH)
def test_without_keys_and_without_queries(target: Target) -> None:
    window = make(target)
    gates = gates_of(window, torch.float32)
    none = Window(window.q, window.k[:, :0], window.v[:, :0], window.others, window.problem)
    check(none, gates)
    nobody = Window(window.q[:, :0], window.k, window.v, [x[:, :0] for x in window.others], window.problem)
    check(nobody, gates[:, :0])


@pytest.mark.parametrize("target", ONE_EACH)
def test_strides(target: Target) -> None:
    """Views need no copies by the caller: heads first, gates transposed, one gate for all rows, batches reversed."""
    window = make(target)
    gates = gates_of(window, torch.float32)
    _, _, expected = window.summed(gates)
    by_branch = gates.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert by_branch.stride() != gates.stride()
    first = window.others[0].transpose(1, 2).contiguous().transpose(1, 2)
    second = torch.stack([window.others[1], window.others[1]], 3).flatten(2, 3)[:, :, ::2]
    views = Window(window.q, window.k, window.v, [first, second], window.problem)
    assert torch.equal(views.summed(by_branch)[2], expected)
    odd = [torch.cat([x, x], -1)[..., 1:][..., :64].copy_(x) for x in window.others]  # CUDA loads 16 bytes at a time
    assert torch.equal(Window(window.q, window.k, window.v, odd, window.problem).summed(gates)[2], expected)
    one = gates[:, :1].expand_as(gates)
    assert torch.equal(window.summed(one)[2], window.summed(one.clone())[2])


@pytest.mark.parametrize("target", ALL)
def test_gates_of_dead_rows_hold_anything(target: Target) -> None:
    window = make(target)
    gates = gates_of(window, target.dtype)
    window.others[0][:, 30] = 0
    _, lse, expected = window.summed(gates)
    dead = lse == -torch.inf
    assert bool(dead[:, :20].all()) and not bool(dead[:, 20:].any())
    gates[..., 2][dead] = torch.nan
    gates[:, 30, :, 0] = torch.inf
    assert torch.equal(window.summed(gates)[2], expected)


@pytest.mark.parametrize("target", ONE_EACH)
def test_nan_shows(target: Target) -> None:
    """A gate that isn't finite, or another branch's output, where it counts: in its own row and head alone."""
    window = make(target)
    gates = gates_of(window, torch.float32)
    _, _, expected = window.summed(gates)
    gates[0, 50, 3, 2] = torch.nan
    window.others[1][1, 60, 2, 5] = torch.nan
    gates[1, 60, 2, 1] = 0.5
    found = window.summed(gates)[2]
    assert bool(found[0, 50, 3].isnan().all()) and bool(found[1, 60, 2, 5].isnan())
    same = found == expected
    same[0, 50, 3] = same[1, 60, 2] = True
    assert bool(same.all())


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_do_not_depend_on_threads(threads: int, one_thread) -> None:
    window = make(CPU_TARGETS[1])
    gates = gates_of(window, torch.float32)
    torch.set_num_threads(1)
    expected = window.summed(gates)[2]
    torch.set_num_threads(threads)
    assert torch.equal(window.summed(gates)[2], expected)


def test_shapes_are_refused() -> None:
    window = make(CPU_TARGETS[1])
    gates = gates_of(window, torch.float32)
    with pytest.raises(ValueError, match="gates"):
        window.summed(gates[..., :2])
    window.others[1] = window.others[1][:, :-1]
    with pytest.raises(ValueError, match="gates"):
        window.summed(gates)
