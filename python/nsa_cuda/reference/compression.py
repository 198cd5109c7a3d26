"""Compression (spec section 4; the paper's eq. 7): windows of l tokens, one every d tokens, each mapped to one row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nsa_cuda import _checks
from nsa_cuda.reference._attend import compute_dtype
from nsa_cuda.reference._layout import sanitised


def num_compressed(seqlen_k: int, kernel_size: int, kernel_stride: int) -> int:
    """Nc = (Tk - l) // d + 1, 0 for sequences shorter than l."""
    return (seqlen_k - kernel_size) // kernel_stride + 1 if seqlen_k >= kernel_size else 0


def compressed_cu_seqlens(cu_seqlens_k: Tensor, kernel_size: int = 32, kernel_stride: int = 16) -> Tensor:
    """Offsets of the compressed rows of packed sequences.

    Args:
        cu_seqlens_k: int32 [B + 1], offsets of the tokens.
        kernel_size: l, tokens per compressed row.
        kernel_stride: d, tokens from one compressed row to the next; divides l.

    Returns:
        int32 [B + 1] on the same device, without a synchronisation. A sequence shorter than l has no row.
    """
    _checks.compression(kernel_size, kernel_stride)
    _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k)
    lengths = cu_seqlens_k.long().cummax(0).values.clamp_min(0).diff()
    numbers = torch.where(lengths >= kernel_size, (lengths - kernel_size) // kernel_stride + 1, 0)
    return torch.nn.functional.pad(numbers.cumsum(0), (1, 0)).to(torch.int32)


def compress(
    x: Tensor,
    phi: Callable[[Tensor], Tensor],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Apply `phi` to every window of x.

    Args:
        x: [B, Tk, Hkv, D], or packed [total_k, Hkv, D] with `cu_seqlens`.
        phi: maps windows [rows, l, Hkv, D] to [rows, Hkv, Do].
        kernel_size, kernel_stride: l and d; d divides l.
        cu_seqlens: int32 [B + 1], offsets of the tokens.
        position: [l, Hkv, D], added to every window.

    Returns:
        [B, Nc, Hkv, Do], or [total_k // d, Hkv, Do] whose rows past compressed_cu_seqlens[-1] are zero.
    """
    _checks.compression(kernel_size, kernel_stride)

    def rows_of(tokens: Tensor) -> Tensor:
        """[T, Hkv, D] -> [Nc, Hkv, Do]."""
        number = num_compressed(len(tokens), kernel_size, kernel_stride)
        start = torch.arange(number, device=x.device) * kernel_stride
        windows = tokens[start[:, None] + torch.arange(kernel_size, device=x.device)]
        return phi(windows if position is None else windows + position)

    if cu_seqlens is None:
        if len(x) == 0:
            number = num_compressed(x.shape[1], kernel_size, kernel_stride)
            return rows_of(x.flatten(0, 1)).unsqueeze(0).expand(-1, number, -1, -1)[:0]
        return torch.stack([rows_of(sequence) for sequence in x])
    offsets = sanitised(cu_seqlens, len(x))
    rows = [rows_of(x[start:stop]) for start, stop in pairwise(offsets)] or [rows_of(x[:0])]
    compressed = torch.cat(rows)
    padding = compressed.new_zeros((len(x) // kernel_stride - len(compressed), *compressed.shape[1:]))
    return torch.cat([compressed, padding])


def compress_mean(
    x: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Mean of each window. Shapes as in `compress`, Do = D."""
    return compress(
        x,
        lambda windows: windows.to(compute_dtype(x.dtype)).mean(1).to(x.dtype),
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
        position=position,
    )


def compress_weighted(
    x: Tensor,
    weight: Tensor,
    *,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each window with weight [l, Hkv]. Shapes as in `compress`, Do = D."""
    return compress(
        x,
        lambda windows: (windows * weight.unsqueeze(-1)).sum(1),
        kernel_size=len(weight),
        kernel_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
        position=position,
    )


def _flat_linear(windows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """windows [rows, l, Hkv, D], weight [Hkv, l * D, Do], bias [Hkv, Do] -> [rows, Hkv, Do]."""
    flat = windows.transpose(1, 2).flatten(2)
    out = torch.einsum("rhi,hio->rho", flat, weight)
    return out if bias is None else out + bias


def compress_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Linear map of each flattened window: weight [Hkv, l * D, Do] (by token), bias [Hkv, Do]; else as `compress`."""
    return compress(
        x,
        lambda windows: _flat_linear(windows, weight, bias),
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
        position=position,
    )


def compress_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The paper's phi: two-layer MLP with GELU on each flattened window.

    weight1 [Hkv, l * D, hidden], bias1 [Hkv, hidden], weight2 [Hkv, hidden, Do], bias2 [Hkv, Do]. Shapes as in
    `compress`.
    """

    def phi(windows: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(_flat_linear(windows, weight1, bias1))
        out = torch.einsum("rhi,hio->rho", hidden, weight2)
        return out if bias2 is None else out + bias2

    return compress(
        x,
        phi,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
        position=position,
    )
