"""Every named case on every target: forward and gradients by the accuracy rule, on poisoned memory."""

from __future__ import annotations

import bruteforce
import pytest
import torch
from accuracy import OUTPUTS, check, failures, oracle, run
from cases import EVERYTHING, Case, on_every_target
from inputs import make
from nsa_cuda import reference
from poison import poisoned_memory
from targets import CPU_TARGETS, Target

FLOAT64 = CPU_TARGETS[0]


@pytest.mark.parametrize(("target", "case"), on_every_target(EVERYTHING))
def test_case(target: Target, case: Case):
    made = make(case, target)
    with poisoned_memory():
        found = run(made, target.backend)
    check(made, target, found)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in EVERYTHING if "huge" not in c.name])
def test_oracle_agrees_with_the_text(case: Case):
    """The oracle that everything is measured by, against loops written from the specification."""
    made = make(case, FLOAT64)
    ref = bruteforce.results(made)
    lines = failures(made, oracle(made), ref, ref, torch.float64)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in EVERYTHING[::7]])
def test_reference_backend_is_the_reference(case: Case):
    """backend="reference" runs nsa_cuda.reference in the inputs' own dtype."""
    made = make(case, CPU_TARGETS[1])
    found = run(made, "reference")
    o, lse = reference.selected_attention(made.q, made.k, made.v, made.block_indices, return_lse=True, **made.options)
    assert torch.equal(found["o"], o)
    if case.lse:
        assert torch.equal(found["lse"], lse)
    assert set(found) - {"lse"} == set(OUTPUTS) - {"lse"}
