"""Small launches of every kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck pytest -m sanitizer`.

Only the library's own kernels run on the GPU here; the oracle stays on the CPU, and memory is left as it comes, because
a fill would hide from initcheck what was never written.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import baseline, failures, oracle, run
from cases import SANITIZER, Case
from inputs import make
from targets import CUDA_TARGETS, Target, param
from torch import Tensor

# Both dtypes where the kernel differs, by head dim; one for what is about addresses.
PAIRS = [
    param(t, c, name=c.name, marks=(pytest.mark.sanitizer,))
    for t in CUDA_TARGETS
    for c in SANITIZER
    if t.dtype == torch.bfloat16 or c.name.startswith("d")
]


@pytest.mark.parametrize(("target", "case"), PAIRS)
def test_small_launch(target: Target, case: Case):
    found: dict[str, Tensor] = {n: x.cpu() for n, x in run(make(case, target), target.backend).items()}
    made = make(case, Target("cpu", target.dtype, None))
    lines = failures(made, found, oracle(made), baseline(made), target.dtype)
    assert not lines, "\n".join(lines)
