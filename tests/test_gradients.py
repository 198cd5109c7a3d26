"""The gradients as autograd sees them: gradcheck, needs_input_grad, the double backward, dlse."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from accuracy import INPUTS, check, run
from cases import Case, named
from inputs import Inputs, make
from poison import poisoned_memory
from range_cases import both
from range_cases import named as range_named
from targets import ALL, CPU_TARGETS, ONE_EACH, Target
from torch.autograd import gradcheck

FLOAT64 = CPU_TARGETS[0]
SIZES = {"Tq": 6, "Tk": 9, "Hq": 2, "Hkv": 1, "Dk": 3, "Dv": 2, "window_size": 3, "kernel_size": 4, "kernel_stride": 2}
LENGTHS = {"seqlens_q": (3, 0, 4), "seqlens_k": (5, 1, 9)}
SMALL = [
    Case("causal", B=2, Tq=5, Tk=5, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=2, indices="sink"),
    Case("full", Tq=5, Tk=9, Hq=3, Hkv=1, Dk=2, Dv=3, block_size=4, S=2, causal=False),
    Case("all", Tq=5, Tk=9, Hq=2, Hkv=2, Dk=4, Dv=4, block_size=2, S=5, indices="all"),
    Case(
        "packed", seqlens_q=(3, 0, 4), seqlens_k=(5, 0, 4), Hq=2, Hkv=1, Dk=3, Dv=3, block_size=2, S=2, indices="sink"
    ),
    Case("counts", Tq=6, Tk=8, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=4, indices="sink", block_counts=4),
    Case("heads_first", Tq=6, Tk=8, Hq=4, Hkv=2, Dk=3, Dv=2, block_size=2, S=3, indices="sink", layout="heads_first"),
    # Every row sees a key: lse = -inf has no finite differences.
    *both("causal", q_offset=3, **SIZES),
    *both("full", causal=False, **SIZES),
    *both("packed", causal=False, **{**SIZES, "kernel_size": 1, "kernel_stride": 1}, **LENGTHS),
    *both("heads_first", causal=False, layout="heads_first", **{**SIZES, "Hq": 4, "Hkv": 2}),
]
# One of each operation.
NAMED = [named("d64"), range_named("window_d64"), range_named("compressed_d64")]
NAMED_NO_LSE = [named("d64_no_lse"), range_named("window_no_lse"), range_named("compressed_no_lse")]
SUBSETS = [named("wild"), named("packed_padding")]
SUBSETS += [
    range_named(f"{mask}_{name}") for mask in ("window", "compressed") for name in ("tq_tk_odd", "packed_padding")
]


def by_name(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases])


def leaves_of(made: Inputs, needed: tuple[bool, ...] = (True, True, True)) -> list[torch.Tensor]:
    tensors = (made.q, made.k, made.v)
    return [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]


@by_name(SMALL)
def test_gradcheck(case: Case):
    made = make(case, FLOAT64)

    def operation(*leaves):
        return made.attend(leaves, None, return_lse=True)

    assert gradcheck(operation, leaves_of(made), atol=1e-7, rtol=1e-5)


DEAD = [
    Case("some_empty", Tq=6, Tk=8, Hq=2, Hkv=1, Dk=3, Dv=2, block_size=2, S=2, indices="some_empty"),
    *both("negative_offset", q_offset=-3, **SIZES),
]


@by_name(DEAD)
def test_gradcheck_with_dead_rows(case: Case):
    """lse is -inf there, which finite differences cannot take: o alone."""
    made = make(case, FLOAT64)
    assert gradcheck(lambda *leaves: made.attend(leaves, None), leaves_of(made))


@pytest.mark.parametrize("target", ALL)
@by_name(SUBSETS)
def test_every_subset_of_gradients(target: Target, case: Case):
    """Each wanted gradient has the bits it has when all are wanted; the others are not computed."""
    made = make(case, target)
    everything = run(made, target.backend)
    for needed in product([True, False], repeat=3):
        if not any(needed):
            continue
        leaves = leaves_of(made, needed)
        with poisoned_memory():
            o, lse = made.attend(leaves, target.backend, return_lse=True)
            # Whether lse requires a gradient when v alone does is the implementation's choice.
            wanted = [(x, dx) for x, dx in ((o, made.dout), (lse, made.dlse)) if x.requires_grad]
            torch.autograd.backward([x for x, _ in wanted], [dx for _, dx in wanted])
        for leaf, need, letter in zip(leaves, needed, INPUTS, strict=True):
            if need:
                assert torch.equal(leaf.grad, everything[f"d{letter}"]), (needed, letter)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("target", ALL)
@by_name(SUBSETS[::2])
def test_no_gradient_wanted(target: Target, case: Case):
    made = make(case, target)
    inputs = (made.q, made.k, made.v)
    o, lse = made.attend(inputs, target.backend, return_lse=True)
    assert not o.requires_grad
    assert not lse.requires_grad
    with torch.no_grad():
        again = made.attend(leaves_of(made), target.backend)
    assert not again.requires_grad
    assert torch.equal(o, again)
    with torch.inference_mode():
        assert torch.equal(o, made.attend(inputs, target.backend))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("used", ["o", "lse"])
@by_name(NAMED)
def test_only_one_result_used(target: Target, used: str, case: Case):
    """A loss of o alone, or of lse alone, while both are returned."""
    made = make(case, target)
    leaves = leaves_of(made)
    o, lse = made.attend(leaves, target.backend, return_lse=True)
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
@by_name(NAMED)
def test_double_backward_raises(target: Target, case: Case):
    made = make(case, target)
    leaves = leaves_of(made)
    o = made.attend(leaves, target.backend)
    grads = torch.autograd.grad(o, leaves, made.dout, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves)


@pytest.mark.parametrize("target", ONE_EACH)
@by_name(NAMED_NO_LSE)
def test_backward_twice_over_a_retained_graph(target: Target, case: Case):
    made = make(case, target)
    leaves = leaves_of(made)
    o = made.attend(leaves, target.backend)
    first = torch.autograd.grad(o, leaves, made.dout, retain_graph=True)
    second = torch.autograd.grad(o, leaves, made.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("target", ONE_EACH)
@by_name(NAMED_NO_LSE)
def test_changing_an_input_before_backward_is_caught(target: Target, case: Case):
    """Saved tensors are autograd's: a change in place between forward and backward raises."""
    made = make(case, target)
    leaves = leaves_of(made)
    k = leaves[1] * 1
    o = made.attend((leaves[0], k, leaves[2]), target.backend)
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
