"""What an ideal kernel in a low-precision dtype computes: the yardstick of the accuracy rule (spec section 9).

Scores, sums and accumulators in float32; p and ds rounded to the kernel's dtype before the products that consume them;
o rounded before delta reads it; results rounded once. In float32 and float64 nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_cuda import _checks
from nsa_cuda.reference import attention as reference
from nsa_cuda.reference._attend import compute_dtype, grouped, masked_scores, row_chunks, ungrouped
from nsa_cuda.reference._layout import Part, QOffset
from nsa_cuda.reference._parts import compressed_parts, selected_parts, window_parts
from nsa_cuda.reference._visibility import Visibility


@torch.no_grad()
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    block_counts: int | Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse; arguments as in `nsa_cuda.selected_attention`. The reference's forward rounds as a kernel does."""
    output = reference.selected_attention(
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        block_counts=block_counts,
        causal=causal,
        softmax_scale=softmax_scale,
        scale=scale,
        q_offset=q_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        return_lse=True,
    )
    assert isinstance(output, tuple)
    return output


@torch.no_grad()
def selected_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    block_size: int = 64,
    block_counts: int | Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype, from o, lse of `selected_attention`, do [.., Hq, Dv] and dlse [.., Hq] (None: zero)."""
    softmax_scale = _checks.softmax_scale(softmax_scale, scale, q.shape[-1])
    parts = selected_parts(q, k, block_indices, block_size, block_counts, causal, q_offset, cu_seqlens_q, cu_seqlens_k)
    return _backward_of_parts(q, k, v, o, lse, do, dlse, parts, softmax_scale)


@torch.no_grad()
def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """o and lse; options as in `nsa_cuda.sliding_window_attention`."""
    output = reference.sliding_window_attention(q, k, v, return_lse=True, **options)
    assert isinstance(output, tuple)
    return output


@torch.no_grad()
def sliding_window_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    window_size: int = 512,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; as `selected_attention_backward`."""
    parts = window_parts(q, k, window_size, causal, q_offset, cu_seqlens_q, cu_seqlens_k)
    scale = _checks.softmax_scale(softmax_scale, None, q.shape[-1])
    return _backward_of_parts(q, k, v, o, lse, do, dlse, parts, scale)


@torch.no_grad()
def compressed_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """o and lse; options as in `nsa_cuda.compressed_attention`."""
    output = reference.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **options)
    assert isinstance(output, tuple)
    return output


@torch.no_grad()
def compressed_attention_backward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk_cmp, dv_cmp; as `selected_attention_backward`."""
    parts = compressed_parts(
        q, k_cmp, kernel_size, kernel_stride, seqlen_k, q_offset, cu_seqlens_q, cu_seqlens_k, causal
    )
    scale = _checks.softmax_scale(softmax_scale, None, q.shape[-1])
    return _backward_of_parts(q, k_cmp, v_cmp, o, lse, do, dlse, parts, scale)


def _backward_of_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    parts: Sequence[tuple[Part, Visibility]],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if dlse is None:
        dlse = torch.zeros_like(lse)
    dtype = compute_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for part, keys in parts:
        by_query = [part.q(x).to(dtype) for x in (q, o, lse, do, dlse)]
        by_key = [part.k(x).to(dtype) for x in (k, v)]
        _backward(by_query, by_key, (part.q(dq), part.k(dk), part.k(dv)), keys, scale, q.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _backward(
    by_query: Sequence[Tensor],
    by_key: Sequence[Tensor],
    gradients: Sequence[Tensor],
    keys: Visibility,
    scale: float,
    rounding: torch.dtype,
) -> None:
    """Adds to the gradients of one part, everything in the computing dtype.

    by_query: q [N, Tq, Hq, Dk], o [N, Tq, Hq, Dv], lse [N, Tq, Hq], do, dlse; by_key: k [N, Tk, Hkv, Dk] and
    v [N, Tk, Hkv, Dv]; gradients: dq, dk, dv; rounding: the kernel's dtype.
    """
    q, o, lse, do, dlse = by_query
    k, v = by_key
    dq, dk, dv = gradients

    def rounded(x: Tensor) -> Tensor:
        return x.to(rounding).to(x.dtype)

    n, seqlen_q, num_heads_q, _ = q.shape
    num_heads_k = k.shape[2]
    group = num_heads_q // num_heads_k
    for rows, (lo, hi) in row_chunks(keys, seqlen_q, n * num_heads_q):
        r = slice(*rows)
        visible = keys.mask(rows, (lo, hi))
        scores = masked_scores(q[:, r], k[:, lo:hi], visible, scale).flatten(2, 3)  # [N, Hkv, G * R, K]
        row_lse = grouped(lse[:, r].unsqueeze(-1), num_heads_k)  # [N, Hkv, G * R, 1]
        dead = row_lse == float("-inf")
        p = (scores - row_lse).exp().masked_fill(dead, 0.0)
        row_do = grouped(do[:, r], num_heads_k).masked_fill(dead, 0.0)
        row_dlse = grouped(dlse[:, r].unsqueeze(-1), num_heads_k).masked_fill(dead, 0.0)
        delta = (row_do * grouped(o[:, r], num_heads_k)).sum(-1, keepdim=True)
        dp = row_do @ v[:, lo:hi].permute(0, 2, 3, 1)
        ds = rounded(p * (dp - delta + row_dlse))
        dv[:, lo:hi] += (rounded(p).transpose(-1, -2) @ row_do).transpose(1, 2)
        dk[:, lo:hi] += (ds.transpose(-1, -2) @ grouped(q[:, r], num_heads_k)).transpose(1, 2) * scale
        dq[:, r] += ungrouped(ds @ k[:, lo:hi].transpose(1, 2), group) * scale
