"""Same inputs, same bits: run after run, for any number of threads, whatever the memory held before."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import run
from cases import Case, named
from inputs import make
from poison import poisoned_memory
from range_cases import both
from range_cases import named as range_named
from targets import ALL, CPU, CUDA, ONE_EACH, Target
from test_selected_properties import assert_same_bits

CASES = [
    Case("repeat", B=2, Tq=300, Tk=300, Hq=16, Hkv=2, S=5, block_size=32),
    Case("repeat_noncausal", B=2, Tq=200, Tk=300, Hq=6, Hkv=2, S=5, block_size=16, causal=False, indices="wild"),
    named("sink_block"),
    named("packed_padding"),
    named("wild_packed"),
    *both("repeat", B=2, Tq=300, Tk=500, Hq=16, Hkv=2),
    *both("repeat_noncausal", B=2, Tq=200, Tk=300, Hq=6, Hkv=2, causal=False),
    *[range_named(f"{mask}_{name}") for mask in ("window", "compressed")
      for name in ("packed_padding", "packed_long_and_short")],
]  # fmt: skip
BY_NAME = [pytest.param(c, id=c.name) for c in CASES]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("case", BY_NAME)
def test_runs_repeat(target: Target, case: Case):
    made = make(case, target)
    first = run(made, target.backend)
    with poisoned_memory():
        assert_same_bits(first, run(made, target.backend))
    assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", CPU)
@pytest.mark.parametrize("case", BY_NAME)
def test_threads_do_not_matter(target: Target, case: Case, one_thread):
    made = make(case, target)
    torch.set_num_threads(1)
    first = run(made, target.backend)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(first, run(made, target.backend))


LARGE = {"Tq": 6000, "Tk": 6000, "Hq": 16, "Hkv": 1, "Dk": 128, "Dv": 128}
RACES = [
    Case("race", S=8, indices="sink", **LARGE),
    Case("race_short_lists", S=2, **LARGE),
    *both("race", window_size=512, kernel_size=32, kernel_stride=16, **LARGE),
]


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in RACES])
def test_large_runs_repeat(target: Target, case: Case):
    """Enough blocks in flight for their order to vary between runs; partial sums must not care."""
    made = make(case, target)
    first = run(made, target.backend)
    for _ in range(100):
        assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ONE_EACH)
def test_concurrent_calls(target: Target):
    """The interpreter lock is released around the work: calls from several Python threads don't touch each other."""
    made = [make(case, target) for case in CASES]
    expected = [run(m, target.backend) for m in made]
    with ThreadPoolExecutor(len(made)) as pool:
        for _ in range(3):
            found = list(pool.map(lambda m: run(m, target.backend), made))
            for a, b in zip(expected, found, strict=True):
                assert_same_bits(a, b)


COUNT_THREADS = """
import os, torch
import nsa_cuda
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 512, 4, 64, requires_grad=True) for _ in range(3))
lists = torch.zeros(1, 512, 4, 2, dtype=torch.int32)
(q @ k.mT).sum().backward()
before = len(os.listdir("/proc/self/task"))
nsa_cuda.selected_attention(q, k, v, lists).sum().backward()
nsa_cuda.sliding_window_attention(q, k, v, window_size=100).sum().backward()
o, lse = nsa_cuda.compressed_attention(q, k[:, :31], v[:, :31], return_lse=True)
o.sum().backward()
nsa_cuda.select_blocks(q, k[:, :31], lse)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_set_num_threads_is_obeyed():
    """With torch.set_num_threads(1) a forward and a backward on the CPU start no thread."""
    command = [sys.executable, "-c", COUNT_THREADS]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "0"
