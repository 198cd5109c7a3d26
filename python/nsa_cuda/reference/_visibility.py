"""Who sees whom: one class per operation, each a dense mask [N, Hkv, rows, keys] when asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsa_cuda.reference._layout import Part


class Visibility(Protocol):
    """The keys that each query row sees."""

    def preferred_rows(self) -> int:
        """Rows to treat at once where memory allows."""

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        """Keys [lo, hi) outside which rows [first, last) see nothing."""

    def mask(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """bool [N | 1, Hkv | 1, rows, keys]."""


def positions(part: Part, rows: tuple[int, int], device: torch.device) -> Tensor:
    """Positions p = t + q_offset, int64 [N | 1, rows]."""
    p = torch.arange(rows[0], rows[1], device=device).unsqueeze(0)
    return p + (part.q_offset.unsqueeze(1) if isinstance(part.q_offset, Tensor) else part.q_offset)


@dataclass(frozen=True)
class SelectedKeys:
    """Keys of the listed blocks (spec section 3.1)."""

    part: Part
    blocks: Tensor  # bool [N, Tq, Hkv, number of blocks]: the list as a set
    block_size: int
    causal: bool

    @staticmethod
    def from_lists(
        part: Part, block_indices: Tensor, block_counts: int | Tensor | None, block_size: int, causal: bool
    ) -> SelectedKeys:
        """block_indices [N, Tq, Hkv, S] of any integer type, block_counts an int or [N, Tq, Hkv]."""
        _, seqlen_q, _, width = block_indices.shape
        device = block_indices.device
        number = -(-part.seqlen_k // block_size)
        ids = block_indices.long()
        valid = (ids >= 0) & (ids < number)
        if causal:
            p = positions(part, (0, seqlen_q), device)
            valid &= ids.clamp(0, number) * block_size <= p[:, :, None, None]
        if block_counts is not None:
            counts = block_counts.unsqueeze(-1) if isinstance(block_counts, Tensor) else block_counts
            valid &= torch.arange(width, device=device) < counts
        # Ignored entries mark one block too many, which is cut off.
        marks = torch.zeros((*ids.shape[:3], number + 1), dtype=torch.bool, device=device)
        marks = marks.scatter(-1, torch.where(valid, ids, number), True)
        return SelectedKeys(part, marks[..., :number], block_size, causal)

    def preferred_rows(self) -> int:
        return self.blocks.shape[1]

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        return _causal_range(self.part, last, self.causal)

    def mask(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        key = torch.arange(keys[0], keys[1], device=self.blocks.device)
        seen = self.blocks[:, rows[0] : rows[1]].transpose(1, 2)[..., key // self.block_size]
        if self.causal:
            seen = seen & (key <= positions(self.part, rows, key.device)[:, None, :, None])
        return seen


@dataclass(frozen=True)
class CompressedKeys:
    """Compressed keys whose last token is not after the query (spec section 3.2)."""

    part: Part
    seqlen_q: int
    number: int  # Nc
    kernel_size: int
    kernel_stride: int
    causal: bool
    device: torch.device

    def preferred_rows(self) -> int:
        return self.seqlen_q

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        if not self.causal or isinstance(self.part.q_offset, Tensor):
            return 0, self.number
        seen = (last + self.part.q_offset - self.kernel_size) // self.kernel_stride + 1
        return 0, max(0, min(self.number, seen))

    def mask(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        last_token = torch.arange(*keys, device=self.device) * self.kernel_stride + (self.kernel_size - 1)
        if not self.causal:
            return torch.ones((1, 1, rows[1] - rows[0], len(last_token)), dtype=torch.bool, device=self.device)
        return last_token <= positions(self.part, rows, self.device)[:, None, :, None]


@dataclass(frozen=True)
class WindowKeys:
    """Causal: the w tokens (p - w, p]; else |key - p| < w (spec section 3.3)."""

    part: Part
    seqlen_q: int
    window_size: int
    causal: bool
    device: torch.device

    def preferred_rows(self) -> int:
        # A band of r rows reads r + w keys: more rows waste work on the triangles, fewer make more calls.
        return self.seqlen_q if isinstance(self.part.q_offset, Tensor) else max(128, self.window_size // 2)

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        if isinstance(self.part.q_offset, Tensor):
            return 0, self.part.seqlen_k
        lo = first + self.part.q_offset - self.window_size + 1
        hi = last + self.part.q_offset + (0 if self.causal else self.window_size - 1)
        lo = max(0, lo)
        return lo, max(lo, min(self.part.seqlen_k, hi))

    def mask(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        p = positions(self.part, rows, self.device)[:, None, :, None]
        key = torch.arange(*keys, device=self.device)
        seen = (key > p - self.window_size) & (key < p + (1 if self.causal else self.window_size))
        return seen


def _causal_range(part: Part, last: int, causal: bool) -> tuple[int, int]:
    """Keys [0, hi) that rows before `last` can see; all of them where positions are data."""
    if not causal or isinstance(part.q_offset, Tensor):
        return 0, part.seqlen_k
    return 0, max(0, min(part.seqlen_k, last + part.q_offset))
