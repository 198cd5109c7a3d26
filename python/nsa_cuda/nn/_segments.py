"""Overlapping windows without l / d copies of the tokens.

A window of l tokens is l / d segments of d tokens; neighbours share all but one of them. What is linear in the
tokens is done once per segment and summed over the segments of each window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_cuda.reference import compressed_cu_seqlens
from nsa_cuda.reference.compression import num_compressed


@dataclass(frozen=True)
class Rows:
    """Rows packed per sequence: row r belongs to sequence[r]; rows past the last sequence are not valid."""

    sequence: Tensor  # int64 [rows]
    index: Tensor  # int64 [rows], within its sequence
    valid: Tensor  # bool [rows]

    @staticmethod
    def of(cu_rows: Tensor, number: int) -> Rows:
        row = torch.arange(number, device=cu_rows.device)
        sequence = (torch.searchsorted(cu_rows, row, right=True) - 1).clamp(0, max(0, len(cu_rows) - 2))
        return Rows(sequence, row - cu_rows[sequence], row < cu_rows[-1])


@dataclass(frozen=True)
class Windows:
    """The windows of x [B, T, Hkv, D] or, with offsets, x [total, Hkv, D]; host code reads no value of the offsets."""

    kernel_size: int  # l
    kernel_stride: int  # d
    cu_seqlens: Tensor | None

    def _offsets(self, total: int) -> Tensor:
        """Token offsets, int64, ascending within [0, total] as the kernels repair them."""
        assert self.cu_seqlens is not None
        return self.cu_seqlens.long().cummax(0).values.clamp(0, total)

    def _segment_offsets(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.pad((tokens.diff() // self.kernel_stride).cumsum(0), (1, 0))

    def segments(self, x: Tensor) -> Tensor:
        """The whole segments of every sequence: [B, T // d, d, Hkv, D], a view, or [total // d, d, Hkv, D]."""
        d = self.kernel_stride
        if self.cu_seqlens is None:
            number = x.shape[1] // d
            return x[:, : number * d].view(len(x), number, d, *x.shape[2:])
        number = len(x) // d
        if number == 0 or len(self.cu_seqlens) < 2:
            return x.new_zeros((number, d, *x.shape[1:]))
        offsets = self._offsets(len(x))
        rows = Rows.of(self._segment_offsets(offsets), number)
        token = (offsets[rows.sequence] + rows.index * d)[:, None] + torch.arange(d, device=x.device)
        # Past the end of the last sequence tokens may hold anything: nothing of it may reach a product.
        return x[token.clamp(0, len(x) - 1)].masked_fill(~rows.valid[:, None, None, None], 0.0)

    def sum(self, parts: Tensor, total: int) -> Tensor:
        """Sum over the segments of each window: parts [.., segments, l / d, Hkv, D], part c of a segment being what it
        contributes as segment c of a window -> [B, Nc, Hkv, D] or [total // d, Hkv, D], arbitrary past the last one."""
        per_window = self.kernel_size // self.kernel_stride
        if self.cu_seqlens is None:
            number = num_compressed(total, self.kernel_size, self.kernel_stride)
            out = parts[:, :number, 0]
            for c in range(1, per_window):
                out = out + parts[:, c : c + number, c]
            return out
        number = len(parts)
        if number == 0 or len(self.cu_seqlens) < 2:
            return parts[:, 0]
        rows = self._windows(total, number)
        first = self._segment_offsets(self._offsets(total))[rows.sequence] + rows.index
        out = parts[first.clamp(0, number - 1), 0]
        for c in range(1, per_window):
            out = out + parts[(first + c).clamp(0, number - 1), c]
        return out

    def _windows(self, total: int, number: int) -> Rows:
        offsets = self._offsets(total).to(torch.int32)
        return Rows.of(compressed_cu_seqlens(offsets, self.kernel_size, self.kernel_stride).long(), number)

    def zero_past_end(self, rows: Tensor, total: int) -> Tensor:
        """Packed: zeroes the rows [total // d, Hkv, D] from the last window on."""
        if self.cu_seqlens is None:
            return rows
        if len(self.cu_seqlens) < 2:
            return rows.masked_fill(torch.ones_like(rows, dtype=torch.bool), 0.0)
        return rows.masked_fill(~self._windows(total, len(rows)).valid[:, None, None], 0.0)
