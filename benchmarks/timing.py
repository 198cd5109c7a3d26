"""Median time and peak memory of a call, on CPU and GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UP = 2
_MAX_RUNS = 100


@dataclass(frozen=True)
class Timing:
    milliseconds: float  # median
    runs: int
    extra_bytes: int | None  # peak above what was allocated before the call, results included; None on CPU


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets to rotate so that a call doesn't find the one before it in the L2 cache: 1 to 16."""
    return max(1, min(16, -(-2 * l2_bytes(device) // max(1, bytes_per_set))))


def _run_cpu(calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
    times = []
    for run in range(runs):
        start = time.perf_counter()
        calls[run % len(calls)]()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _run_cuda(calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """CUDA events around each call; the host runs ahead, so launch cost counts only where the GPU waits for it."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    torch.cuda.synchronize()
    for run, (start, end) in enumerate(events):
        start.record()
        calls[run % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.3, repeat: int | None = None
) -> Timing:
    """Median over about ``seconds`` of runs (or exactly ``repeat``), at least 3; calls rotate over the input sets.

    A call slower than a third of ``seconds`` is measured three times after one warm-up; one slower than ten times
    ``seconds`` once, on the CPU without warm-up.
    """
    run = _run_cuda if device.type == "cuda" else _run_cpu
    extra = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        calls[0]()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated(device) - before
    first = run(calls, 1)[0]
    share = first / (1e3 * seconds)
    if repeat is None and share > 1 / 3:
        times = [first] if share > 10 else [first, *run(calls, 2)] if extra is not None else run(calls, 3)
        return Timing(statistics.median(times), len(times), extra)
    run(calls, _WARM_UP)
    runs = repeat or max(3, min(_MAX_RUNS, int(1 / max(share, 1e-6))))
    return Timing(statistics.median(run(calls, runs)), runs, extra)
