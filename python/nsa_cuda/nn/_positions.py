"""Positions of rows within their sequences, and rotary embedding (RoPE, arXiv 2104.09864) at them."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_cuda.nn._segments import Rows
from nsa_cuda.reference import compressed_cu_seqlens


def token_positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [T] for x [B, T, ..], or [total] for x [total, ..], where positions restart with each sequence."""
    if cu_seqlens is None:
        return torch.arange(x.shape[1], device=x.device)
    return _restarting(cu_seqlens.long().cummax(0).values.clamp(0, len(x)), len(x))


def compressed_positions(
    rows: Tensor, cu_seqlens: Tensor | None, total: int, kernel_size: int, kernel_stride: int
) -> Tensor:
    """Where compressed rows [B, Nc, ..] or packed [rows, ..] stand: row i of its sequence at i * kernel_stride."""
    if cu_seqlens is None:
        return torch.arange(rows.shape[1], device=rows.device) * kernel_stride
    offsets = cu_seqlens.long().cummax(0).values.clamp(0, total).to(torch.int32)
    return _restarting(compressed_cu_seqlens(offsets, kernel_size, kernel_stride).long(), len(rows)) * kernel_stride


def _restarting(offsets: Tensor, number: int) -> Tensor:
    if len(offsets) < 2:
        return torch.arange(number, device=offsets.device)
    return Rows.of(offsets, number).index


def rotation(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, dim / 2] in float32 of position times base^(-2i / dim)."""
    # The angle in float64: in float32 a position of one million is off by 0.06 radians.
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / -dim
    angles = positions.to(torch.float64).view(-1, 1, 1) * torch.pow(base, exponent)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., T, H, D] with element i < r / 2 of its first r dims turned together with element i + r / 2.

    cos and sin are `rotation`'s [T, 1, r / 2]; r <= D. Computed in float32 (float64 for float64), rounded once.
    """
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    turned = ((a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype))
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, -1)
