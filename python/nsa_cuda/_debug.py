"""Checks of values, which need them on the host: always for CPU tensors, on request for CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nsa_cuda import _checks

_enabled = False


def enabled() -> bool:
    return _enabled


@contextmanager
def debug_checks() -> Iterator[None]:
    """Turn on the checks that read values back from the GPU, in every thread, until the block ends.

    Inside, `cu_seqlens` must ascend within [0, rows] (ValueError), q, k and v must be finite inside the sequences
    (ValueError), and a CUDA error is raised by the call that caused it. Every call then synchronises: slow, and
    impossible while a CUDA graph is captured. Without it CUDA kernels repair offsets silently (running maximum,
    clamped). Values of `block_indices` and `block_counts` are data and never errors.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def check_offsets(
    cu_seqlens_q: Tensor | None, total_q: int | None, cu_seqlens_k: Tensor | None, total_k: int | None
) -> None:
    """Offsets of a packed call: ascending, within the rows (None: number of rows not known)."""
    for name, x, total in (("cu_seqlens_q", cu_seqlens_q, total_q), ("cu_seqlens_k", cu_seqlens_k, total_k)):
        if x is not None and (_enabled or x.device.type == "cpu"):
            _checks.cu_seqlens_values(name, x, total)


def check_finite(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Inside debug_checks(): q, k, v finite inside the sequences."""
    if not _enabled:
        return
    for name, x, cu_seqlens in (("q", q, cu_seqlens_q), ("k", k, cu_seqlens_k), ("v", v, cu_seqlens_k)):
        if cu_seqlens is not None:
            x = x[int(cu_seqlens[0]) : int(cu_seqlens[-1])]
        if not bool(torch.isfinite(x).all()):
            where = torch.isfinite(x).logical_not().nonzero()[0].tolist()
            raise ValueError(f"{name}: must be finite inside the sequences, was {float(x[tuple(where)])} at {where}")
