"""The gradients as autograd sees them: gradcheck, needs_input_grad, the double backward, dlse."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from accuracy import INPUTS, check, run
from cases import Case, named
from inputs import Inputs, make
from nsa_cuda import selected_attention
from poison import poisoned_memory
from targets import ALL, CPU_TARGETS, ONE_EACH, Target
from torch.autograd import gradcheck

FLOAT64 = CPU_TARGETS[0]
SMALL = [
    Case("causal", B=2, Tq=5, Tk=5, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=2, indices="sink"),
    Case("full", Tq=5, Tk=9, Hq=3, Hkv=1, Dk=2, Dv=3, block_size=4, S=2, causal=False),
    Case("all", Tq=5, Tk=9, Hq=2, Hkv=2, Dk=4, Dv=4, block_size=2, S=5, indices="all"),
    Case(
        "packed", seqlens_q=(3, 0, 4), seqlens_k=(5, 0, 4), Hq=2, Hkv=1, Dk=3, Dv=3, block_size=2, S=2, indices="sink"
    ),
    Case("counts", Tq=6, Tk=8, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=4, indices="sink", block_counts=4),
    Case("heads_first", Tq=6, Tk=8, Hq=4, Hkv=2, Dk=3, Dv=2, block_size=2, S=3, indices="sink", layout="heads_first"),
]


def leaves_of(made: Inputs, needed: tuple[bool, ...] = (True, True, True)) -> list[torch.Tensor]:
    tensors = (made.q, made.k, made.v)
    return [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in SMALL])
def test_gradcheck(case: Case):
    made = make(case, FLOAT64)

    def operation(q, k, v):
        return selected_attention(q, k, v, made.block_indices, return_lse=True, **made.options)

    assert gradcheck(operation, leaves_of(made), atol=1e-7, rtol=1e-5)


def test_gradcheck_with_dead_rows():
    """lse is -inf there, which finite differences cannot take: o alone."""
    made = make(Case("dead", Tq=6, Tk=8, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=2, indices="some_empty"), FLOAT64)
    assert gradcheck(lambda q, k, v: selected_attention(q, k, v, made.block_indices, **made.options), leaves_of(made))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("name", ["wild", "packed_padding"])
def test_every_subset_of_gradients(target: Target, name: str):
    """Each wanted gradient has the bits it has when all are wanted; the others are not computed."""
    made = make(named(name), target)
    everything = run(made, target.backend)
    for needed in product([True, False], repeat=3):
        if not any(needed):
            continue
        leaves = leaves_of(made, needed)
        with poisoned_memory():
            o, lse = selected_attention(
                *leaves, made.block_indices, return_lse=True, backend=target.backend, **made.options
            )
            # Whether lse requires a gradient when v alone does is the implementation's choice.
            wanted = [(x, dx) for x, dx in ((o, made.dout), (lse, made.dlse)) if x.requires_grad]
            torch.autograd.backward([x for x, _ in wanted], [dx for _, dx in wanted])
        for leaf, need, letter in zip(leaves, needed, INPUTS, strict=True):
            if need:
                assert torch.equal(leaf.grad, everything[f"d{letter}"]), (needed, letter)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("target", ALL)
def test_no_gradient_wanted(target: Target):
    made = make(named("wild"), target)
    o, lse = selected_attention(
        made.q, made.k, made.v, made.block_indices, return_lse=True, backend=target.backend, **made.options
    )
    assert not o.requires_grad
    assert not lse.requires_grad
    with torch.no_grad():
        again = selected_attention(*leaves_of(made), made.block_indices, backend=target.backend, **made.options)
    assert not again.requires_grad
    assert torch.equal(o, again)
    with torch.inference_mode():
        assert torch.equal(o, selected_attention(made.q, made.k, made.v, made.block_indices, backend=target.backend,
                                                 **made.options))  # fmt: skip


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("used", ["o", "lse"])
def test_only_one_result_used(target: Target, used: str):
    """A loss of o alone, or of lse alone, while both are returned."""
    made = make(named("d64"), target)
    leaves = leaves_of(made)
    o, lse = selected_attention(*leaves, made.block_indices, return_lse=True, backend=target.backend, **made.options)
    out, gradient = (o, made.dout) if used == "o" else (lse, made.dlse)
    grads = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
    found = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    if found["dv"] is None:
        assert used == "lse"
        found["dv"] = torch.zeros_like(made.v)
    made.dout, made.dlse = (made.dout, made.dlse * 0) if used == "o" else (made.dout * 0, made.dlse)
    if used == "lse":
        assert (found["dv"] == 0).all()
    both = run(made, target.backend)
    for name, x in found.items():
        slack = max(1e-3, 2 * torch.finfo(target.dtype).eps)
        torch.testing.assert_close(x, both[name], rtol=slack, atol=1e-3 * float(both[name].abs().max()))
    check(made, target, {"o": o.detach(), "lse": lse.detach(), "dq": found["dq"]})


@pytest.mark.parametrize("target", ONE_EACH)
def test_double_backward_raises(target: Target):
    made = make(named("d64"), target)
    leaves = leaves_of(made)
    o = selected_attention(*leaves, made.block_indices, backend=target.backend, **made.options)
    grads = torch.autograd.grad(o, leaves, made.dout, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves)


@pytest.mark.parametrize("target", ONE_EACH)
def test_backward_twice_over_a_retained_graph(target: Target):
    made = make(named("d64_no_lse"), target)
    leaves = leaves_of(made)
    o = selected_attention(*leaves, made.block_indices, backend=target.backend, **made.options)
    first = torch.autograd.grad(o, leaves, made.dout, retain_graph=True)
    second = torch.autograd.grad(o, leaves, made.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("target", ONE_EACH)
def test_changing_an_input_before_backward_is_caught(target: Target):
    """Saved tensors are autograd's: a change in place between forward and backward raises."""
    made = make(named("d64_no_lse"), target)
    leaves = leaves_of(made)
    k = leaves[1] * 1
    o = selected_attention(leaves[0], k, leaves[2], made.block_indices, backend=target.backend, **made.options)
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
