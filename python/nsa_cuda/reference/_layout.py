"""Batched and packed layouts, query positions: what every operation of the reference does first and last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

QOffset = int | Tensor | None


def sanitised(cu_seqlens: Tensor, total: int | None = None) -> list[int]:
    """Sequence offsets as the kernels repair them: running maximum, clamped to [0, total]."""
    offsets: list[int] = []
    for value in cu_seqlens.tolist():
        value = max(value, offsets[-1] if offsets else 0)
        offsets.append(value if total is None else min(value, total))
    return offsets


@dataclass(frozen=True)
class Part:
    """Sequences treated together: the whole batch (N = B), or one sequence of a packed call (N = 1).

    Row t of the part stands at position t + q_offset; q_offset is an int, or int64 [N].
    """

    q_rows: slice | None
    k_rows: slice | None
    q_offset: int | Tensor
    seqlen_k: int  # Tk in tokens

    def q(self, x: Tensor) -> Tensor:
        """[B, Tq, ...] as it is, [total_q, ...] -> [1, Tq, ...]."""
        return x if self.q_rows is None else x[self.q_rows].unsqueeze(0)

    def k(self, x: Tensor) -> Tensor:
        """[B, Tk, ...] as it is, [total_k, ...] -> [1, Tk, ...]."""
        return x if self.k_rows is None else x[self.k_rows].unsqueeze(0)


def num_rows(part: Part, q: Tensor) -> int:
    """Tq of the part."""
    return q.shape[1] if part.q_rows is None else part.q_rows.stop - part.q_rows.start


def batched_part(seqlen_q: int, seqlen_k: int, q_offset: QOffset) -> Part:
    """The whole batch. Without an offset the last query stands on the last key."""
    if q_offset is None:
        q_offset = seqlen_k - seqlen_q
    elif isinstance(q_offset, Tensor):
        q_offset = q_offset.long()
    return Part(None, None, q_offset, seqlen_k)


def packed_parts(q_offsets: list[int], k_offsets: list[int], k_lengths: list[int], q_offset: QOffset) -> list[Part]:
    """One part per sequence; q_offsets, k_offsets [B + 1] delimit rows of q and k, k_lengths [B] count tokens."""
    batch = len(k_lengths)
    if isinstance(q_offset, Tensor):
        shifts: list[int | None] = list(q_offset.tolist())
    else:
        shifts = [q_offset] * batch
    parts = []
    for b in range(batch):
        rows = slice(q_offsets[b], q_offsets[b + 1])
        shift = shifts[b]
        if shift is None:
            shift = k_lengths[b] - (rows.stop - rows.start)
        parts.append(Part(rows, slice(k_offsets[b], k_offsets[b + 1]), shift, k_lengths[b]))
    # Without sequences an empty one keeps the results connected to the inputs' autograd graph.
    return parts or [Part(slice(0, 0), slice(0, 0), 0, 0)]


def token_parts(
    q: Tensor, k: Tensor, q_offset: QOffset, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[Part]:
    """Parts of an operation whose keys are tokens."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [batched_part(q.shape[1], k.shape[1], q_offset)]
    q_offsets = sanitised(cu_seqlens_q, q.shape[0])
    k_offsets = sanitised(cu_seqlens_k, k.shape[0])
    lengths = [stop - start for start, stop in pairwise(k_offsets)]
    return packed_parts(q_offsets, k_offsets, lengths, q_offset)


def join(parts: list[Part], outputs: Iterable[Tensor], total_q: int, dead: float) -> Tensor:
    """Results [N, Tq, ...] of all parts -> [B, Tq, ...] or [total_q, ...]; rows outside every sequence hold `dead`."""
    pieces = list(outputs)
    first, last = parts[0].q_rows, parts[-1].q_rows
    if first is None or last is None:
        return pieces[0]
    rows = [piece.squeeze(0) for piece in pieces]
    shape = rows[0].shape[1:]
    before = rows[0].new_full((first.start, *shape), dead)
    after = rows[0].new_full((total_q - last.stop, *shape), dead)
    return torch.cat([before, *rows, after])
