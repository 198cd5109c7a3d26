"""Every named case of the sliding window and of compressed attention on every target, by the accuracy rule."""

from __future__ import annotations

import bruteforce
import pytest
import torch
from accuracy import baseline, check, failures, oracle, run
from cases import on_every_target
from poison import poisoned_memory
from range_cases import EVERYTHING, SANITIZER, RangeCase
from range_inputs import make
from targets import CPU_TARGETS, CUDA_TARGETS, Target, param

FLOAT64 = CPU_TARGETS[0]


@pytest.mark.parametrize(("target", "case"), on_every_target(EVERYTHING))
def test_case(target: Target, case: RangeCase):
    made = make(case, target)
    with poisoned_memory():
        found = run(made, target.backend)
    check(made, target, found)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("target", "case"), [param(t, c, name=c.name) for t in CUDA_TARGETS for c in SANITIZER])
def test_small_launch(target: Target, case: RangeCase):
    """For compute-sanitizer: on the GPU runs the library alone."""
    found = {n: x.cpu() for n, x in run(make(case, target), target.backend).items()}
    made = make(case, Target("cpu", target.dtype, None))
    lines = failures(made, found, oracle(made), baseline(made), target.dtype)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in EVERYTHING if c.Tq * c.Tk < 100_000])
def test_oracle_agrees_with_the_text(case: RangeCase):
    """The oracle that everything is measured by, against loops written from the specification."""
    made = make(case, FLOAT64)
    ref = bruteforce.results(made)
    lines = failures(made, oracle(made), ref, ref, torch.float64)
    assert not lines, "\n".join(lines)
