"""The backward of one gated branch: gate and delta in the place of a gated dout, and dq added to what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nsa_cuda._ops import BACKENDS, Gated, selected_attention_forward, selected_backward
from nsa_cuda._range_ops import COMPRESSED, WINDOW, range_attention_forward, range_backward
from targets import ALL, CPU_TARGETS, Target
from torch import Tensor

B, T, HQ, HKV, D = 2, 150, 8, 2, 64
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass
class Branch:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    problem: tuple[Any, ...]
    differentiate: Callable[..., Gradients]
    o: Tensor
    lse: Tensor

    def backward(self, dout: Tensor, gated: Gated | None = None) -> Gradients:
        o = self.o if gated is None or gated.delta is None else None
        return self.differentiate(
            self.q, self.k, self.v, o, self.lse, dout, None, *self.problem, True, True, True, gated=gated
        )

    def gated(self, gate: Tensor, dq: Tensor | None = None) -> Gradients:
        live = self.lse.unsqueeze(-1) != -torch.inf
        delta = (self.dout.to(self.lse.dtype) * self.o.to(self.lse.dtype)).where(live, torch.nan).sum(-1)
        return self.backward(self.dout, Gated(gate, delta, dq))


def make(kind: str, target: Target) -> Branch:
    """Rows before position 0 are dead, and hold NaN in dout and delta."""
    generator = torch.Generator().manual_seed(7)

    def draw(heads: int) -> Tensor:
        x = torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64)
        return x.to(target.device, target.dtype)

    q, k, v, dout = draw(HQ), draw(HKV), draw(HKV), draw(HQ)
    backend, offset = BACKENDS[target.backend], -20
    positions = (None, None, None, offset)
    if kind == "selected":
        lists = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(B * T * HKV)])
        lists[:, 0] = 0  # so that a row at or past position 0 sees a key
        lists = lists.view(B, T, HKV, 2).int().to(target.device)
        problem: tuple[Any, ...] = (lists, None, *positions, None, 64, True, None, backend)
        o, lse = selected_attention_forward(q, k, v, *problem)
        function = selected_backward
    else:
        mask, sizes = (WINDOW, (40, 1, 1, T)) if kind == "window" else (COMPRESSED, (0, 4, 2, 2 * T + 2))
        problem = (*positions, mask, *sizes, True, None, backend)
        o, lse = range_attention_forward(q, k, v, *problem)
        function = range_backward
    dout[lse == -torch.inf] = torch.nan
    assert bool((lse[:, :20] == -torch.inf).all())
    return Branch(q, k, v, dout, problem, function, o, lse)


def gates(target: Target, dtype: torch.dtype, signed: bool = True) -> Tensor:
    """Strided, as a column of all branches' gates is; a few of them are 0."""
    generator = torch.Generator().manual_seed(8)
    x = torch.rand(B, T, HQ, 3, generator=generator)
    x = (x * 3 - 1.5 if signed else x).masked_fill(torch.rand(x.shape, generator=generator) < 0.1, 0.0)
    return x.to(target.device, dtype)[..., 1]


def assert_close(found: Gradients, expected: Gradients, dtype: torch.dtype) -> None:
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(y.double().abs().max())
        error = float((x.double() - y.double()).abs().max())
        assert error <= bound, (name, error, bound)


KIND = pytest.mark.parametrize("kind", ["compressed", "selected", "window"])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@KIND
def test_gate_is_a_factor_of_dout(target: Target, kind: str, gate_dtype: torch.dtype) -> None:
    branch, gate = make(kind, target), gates(target, gate_dtype)
    scaled = (gate.double().unsqueeze(-1) * branch.dout.double()).to(target.dtype)
    assert_close(branch.gated(gate), branch.backward(scaled), target.dtype)


@pytest.mark.parametrize("target", ALL)
@KIND
def test_sign_of_the_gates_is_that_of_the_gradients(target: Target, kind: str) -> None:
    branch, gate = make(kind, target), gates(target, target.dtype, signed=False)
    dq, dk, dv = branch.gated(-gate)
    assert_close((-dq, -dk, -dv), branch.gated(gate), target.dtype)


@pytest.mark.parametrize("target", ALL)
@KIND
def test_gates_of_dead_rows_hold_anything(target: Target, kind: str) -> None:
    branch, gate = make(kind, target), gates(target, target.dtype).clone()
    expected = branch.gated(gate)
    gate[branch.lse == -torch.inf] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(branch.gated(gate), expected, strict=True))
    assert bool((expected[0][:, :20] == 0).all())


@pytest.mark.parametrize("target", ALL)
@KIND
def test_dq_is_added(target: Target, kind: str) -> None:
    """With one rounding of the sum; a dead row's stays as it is."""
    branch, gate = make(kind, target), gates(target, target.dtype)
    dq, *rest = branch.gated(gate)
    base = branch.q.clone()
    found, *others = branch.gated(gate, base)
    assert found.data_ptr() == base.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
    eps = torch.finfo(target.dtype).eps
    exact = branch.q.double() + dq.double()
    # dq itself was rounded once
    bound = 0.5 * eps * (1 + eps) * (exact.abs() + dq.double().abs()) + 4 * torch.finfo(branch.lse.dtype).eps
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert torch.equal(found[:, :20], branch.q[:, :20])


@pytest.mark.parametrize("target", ALL)
@KIND
def test_dq_is_added_without_a_gate(target: Target, kind: str) -> None:
    """A gated dout and o in the place of gate and delta, as float16's kernels take them."""
    branch = make(kind, target)
    dq, *rest = branch.backward(branch.dout)
    base = branch.q.clone()
    found, *others = branch.backward(branch.dout, Gated(None, None, base))
    assert found.data_ptr() == base.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
    bound = 2 * torch.finfo(target.dtype).eps * float((branch.q.double().abs() + dq.double().abs()).max())
    assert float((found.double() - branch.q.double() - dq.double()).abs().max()) <= bound


@pytest.mark.parametrize("threads", [1, 2, 7])
@KIND
def test_bits_do_not_depend_on_threads(threads: int, kind: str, one_thread) -> None:
    branch, gate = make(kind, CPU_TARGETS[1]), gates(CPU_TARGETS[1], torch.float32)
    torch.set_num_threads(1)
    expected = branch.gated(gate, branch.q.clone())
    torch.set_num_threads(threads)
    found = branch.gated(gate, branch.q.clone())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
