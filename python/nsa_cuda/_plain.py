"""interim: range attention, selection and gated sums in plain PyTorch, with the signatures of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_cuda import _checks, reference
from nsa_cuda.reference import baseline
from nsa_cuda.reference._attend import compute_dtype
from nsa_cuda.reference._parts import compressed_parts, window_parts

WINDOW, COMPRESSED = 0, 1


def _offset(q_offsets: Tensor | None, q_offset: int | None) -> Any:
    return q_offsets if q_offsets is not None else q_offset


@torch.no_grad()
def range_attention_forward(q, k, v, cu_q, cu_k, q_offsets, q_offset, mask, w, l, d, tokens, causal, scale, backend):
    options: dict[str, Any] = dict(
        causal=causal,
        softmax_scale=scale,
        q_offset=_offset(q_offsets, q_offset),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        return_lse=True,
    )
    if mask == WINDOW:
        return reference.sliding_window_attention(q, k, v, window_size=w, **options)
    return reference.compressed_attention(q, k, v, kernel_size=l, kernel_stride=d, seqlen_k=tokens, **options)


@torch.no_grad()
def range_attention_backward(
    q,
    k,
    v,
    o,
    lse,
    dout,
    dlse,
    cu_q,
    cu_k,
    q_offsets,
    q_offset,
    mask,
    w,
    l,
    d,
    tokens,
    causal,
    scale,
    backend,
    need_dq,
    need_dk,
    need_dv,
):
    offset = _offset(q_offsets, q_offset)
    if mask == WINDOW:
        parts = window_parts(q, k, w, causal, offset, cu_q, cu_k)
    else:
        parts = compressed_parts(q, k, l, d, tokens, offset, cu_q, cu_k, causal)
    dtype = compute_dtype(q.dtype)
    if dlse is None:
        dlse = torch.zeros_like(lse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for part, keys in parts:
        by_query = [part.q(x).to(dtype) for x in (q, o, lse, dout, dlse)]
        by_key = [part.k(x).to(dtype) for x in (k, v)]
        baseline._backward(
            by_query,
            by_key,
            (part.q(dq), part.k(dk), part.k(dv)),
            keys,
            _checks.softmax_scale(scale, None, q.shape[-1]),
            q.dtype,
        )
    return tuple(
        x.to(q.dtype) if n else x.new_empty(0, dtype=q.dtype) for x, n in zip((dq, dk, dv), (need_dq, need_dk, need_dv))
    )


@torch.no_grad()
def select_blocks(
    q, k_cmp, lse, cu_q, cu_k, q_offsets, q_offset, l, d, tokens, causal, scale, backend, block_size, topk, init, local
):
    return reference.select_blocks(
        q,
        k_cmp,
        lse,
        kernel_size=l,
        kernel_stride=d,
        block_size=block_size,
        topk=topk,
        init_blocks=init,
        local_blocks=local,
        seqlen_k=tokens,
        causal=causal,
        softmax_scale=scale,
        q_offset=_offset(q_offsets, q_offset),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
    )


