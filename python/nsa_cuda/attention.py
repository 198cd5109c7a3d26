"""The operations of Native Sparse Attention (NSA, arXiv 2502.11089): what users call.

Layouts, the same in every function: batched q [B, Tq, Hq, Dk], k [B, Tk, Hkv, Dk], v [B, Tk, Hkv, Dv]; packed (with
`cu_seqlens_q` and `cu_seqlens_k`, int32 [B + 1]) the same without B, Tq and Tk being totals. The last dim is
contiguous, every other stride is free. Query head h reads kv head h // G, G = Hq / Hkv. Query row t of a sequence
stands at position p = t + q_offset.

Arguments that are the same everywhere:
    causal: keys after p are invisible.
    softmax_scale: factor of q . k before the softmax; None means 1 / sqrt(Dk). `scale` is another name for it.
    q_offset: int, or int32 [B] on q's device; None means Tk - Tq of the sequence (the last query stands on the last
        key).
    cu_seqlens_q, cu_seqlens_k: offsets of packed sequences in tokens, both or neither, on q's device. They ascend
        within [0, rows]; rows outside every sequence are dead. On the GPU their values are not read by the host:
        see `debug_checks`.
    max_seqlen_q, max_seqlen_k: hints that never change a result.
    return_lse: also return the log-sum-exp (natural logarithm, scale included) [B, Tq, Hq] in float32 (float64 for
        float64 inputs). It is differentiable, so results over disjoint keys can be merged.
    backend: None picks by device: the C++ backend on the CPU, the fastest kernel that there is on a GPU. "reference" is
        plain PyTorch (`nsa_cuda.reference`): any device, any floating dtype. Except for `selected_attention`, None
        runs it on CUDA tensors too, where this build has no kernel for them.

A row that sees no key is dead: o = 0, lse = -inf, gradients 0, whatever do and dlse hold there. Inputs are finite
inside the sequences; memory outside them may hold anything. A second derivative raises. Under torch.autocast q, k
and v are cast to the autocast dtype (float64 stays).

Errors name the argument, what it was and what is allowed: TypeError for something that is not a tensor or number,
or has a wrong dtype; ValueError for shapes, devices, strides and sizes; NotImplementedError where no kernel exists;
ImportError where the compiled module is missing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from nsa_cuda import _checks, _debug, _ops, _range_ops, reference
from nsa_cuda._debug import debug_checks
from nsa_cuda._native import native_sparse_attention
from nsa_cuda._tensors import autocast, differentiable_once
from nsa_cuda.reference import compressed_cu_seqlens

__all__ = [
    "compressed_attention",
    "compressed_cu_seqlens",
    "debug_checks",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

Backend = Literal["reference", "cpu", "sm80", "sm90"]


def _offsets(q_offset: int | Tensor | None) -> tuple[Tensor | None, int | None]:
    """(per sequence, for all of them): what the operators take."""
    return (q_offset, None) if isinstance(q_offset, Tensor) else (None, q_offset)


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
    q_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Any:
    """Attention to the key blocks that each query and kv head lists (the paper's section 3.3.2, eqs. 5 and 12).

    Row t of a kv head's group sees the keys of [j l', min((j + 1) l', Tk)) for the valid entries j of its list,
    causal: those <= p. An entry is ignored, wherever it stands, if it is negative, names no block of the sequence,
    stands at or past `block_counts`, or (causal) starts after p. The list is a set: order is free, a duplicate
    counts once. No value is an error.

    Args:
        q: [B, Tq, Hq, Dk] or [total_q, Hq, Dk]. CPU: float64, float32, bfloat16, float16, any head dims; CUDA:
            bfloat16, float16, (Dk, Dv) of (64, 64), (128, 128), (192, 128) or (256, 256).
        k: [B, Tk, Hkv, Dk] or [total_k, Hkv, Dk], q's dtype.
        v: [B, Tk, Hkv, Dv] or [total_k, Hkv, Dv], q's dtype.
        block_indices: int32 or int64 [B, Tq, Hkv, S] or [total_q, Hkv, S], any strides; ids are local to their
            sequence.
        block_size: l', tokens per block. CUDA: 16, 32, 64 or 128.
        block_counts: entries that count, an int or int32/int64 [B, Tq, Hkv]; clamped to [0, S]. None: all S.
        backend: None, "cpu", "sm80", "sm90" or "reference".
        The rest: see the module.

    Returns:
        o [B, Tq, Hq, Dv] or [total_q, Hq, Dv] in q's dtype; with return_lse (o, lse).

    CUDA tensors whose address or strides are not multiples of 16 bytes are copied first. The backward is
    bitwise deterministic. Accumulation is in float32 (float64 for float64).
    """
    q, k, v = autocast(q, k, v)
    _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.last_dim_contiguous(q=q, k=k, v=v)
    _checks.block_lists(q, k, block_indices, block_counts)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    _checks.integer(block_size=block_size)
    softmax_scale = _checks.given_scale(softmax_scale, scale)
    _checks.backend(backend, _ops.BACKENDS, q)
    if backend == "reference":
        _check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0])
        q, k, v = differentiable_once(q, k, v)
        return reference.selected_attention(
            q, k, v, block_indices, block_size=block_size, block_counts=block_counts, causal=causal,
            softmax_scale=softmax_scale, q_offset=q_offset, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse,
        )  # fmt: skip
    counts, count = (block_counts, None) if isinstance(block_counts, Tensor) else (None, block_counts)
    o, lse = _ops.selected_attention_forward(
        q, k, v, block_indices, counts, cu_seqlens_q, cu_seqlens_k, *_offsets(q_offset), count, block_size, causal,
        softmax_scale, _ops.BACKENDS[backend],
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _check_offsets(cu_seqlens_q: Tensor | None, total_q: int, cu_seqlens_k: Tensor | None, total_k: int | None) -> None:
    """For the operations in plain PyTorch; a compiled operator looks at values itself, when it has them."""
    if cu_seqlens_q is not None and not torch.compiler.is_compiling():
        _debug.check_offsets(cu_seqlens_q, total_q, cu_seqlens_k, total_k)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Any:
    """Attention to the compressed keys (the paper's section 3.3.1, eqs. 5 and 7).

    Compressed key i covers the tokens [i d, i d + l); causal: visible if i d + l - 1 <= p.

    Args:
        q: [B, Tq, Hq, Dk] or [total_q, Hq, Dk]. CPU: float64, float32, bfloat16, float16, any head dims.
        k_cmp: [B, Nc, Hkv, Dk], Nc = (Tk - l) // d + 1 (0 if Tk < l), or [rows, Hkv, Dk], packed per sequence at
            `compressed_cu_seqlens(cu_seqlens_k, l, d)`. More rows are accepted and never read.
        v_cmp: like k_cmp with Dv.
        kernel_size: l, tokens behind a compressed key.
        kernel_stride: d, tokens from one compressed key to the next; divides l.
        seqlen_k: Tk, the tokens behind k_cmp (batched calls); None means Tq where that agrees with Nc, else ValueError.
        cu_seqlens_k: offsets of the *tokens*.
        backend: None, "cpu", "sm80", "sm90" or "reference".
        The rest: see the module.

    Returns:
        o [B, Tq, Hq, Dv] or [total_q, Hq, Dv] in q's dtype; with return_lse (o, lse).
    """
    q, k_cmp, v_cmp = autocast(q, k_cmp, v_cmp)
    packed = _checks.attention_tensors(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, "_cmp")
    _checks.last_dim_contiguous(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    _checks.compression(kernel_size, kernel_stride)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    softmax_scale = _checks.given_scale(softmax_scale, scale)
    _checks.backend(backend, _ops.BACKENDS, q)
    if backend == "reference":
        _check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, None)
        return reference.compressed_attention(
            *differentiable_once(q, k_cmp, v_cmp), kernel_size=kernel_size, kernel_stride=kernel_stride,
            seqlen_k=seqlen_k, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, return_lse=return_lse,
        )  # fmt: skip
    tokens = (
        0 if packed else _checks.compressed_length(seqlen_k, q.shape[1], k_cmp.shape[1], kernel_size, kernel_stride)
    )
    o, lse = _range_ops.range_attention_forward(
        q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, *_offsets(q_offset), _range_ops.COMPRESSED, 1, kernel_size,
        kernel_stride, tokens, causal, softmax_scale, _ops.BACKENDS[backend],
    )  # fmt: skip
    return (o, lse) if return_lse else o


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The blocks that each query and kv head attends to (the paper's eqs. 8-12).

    A block's score is the attention mass of the compressed keys, each giving to a block in proportion to the tokens
    they share, summed over the G heads of the group (the paper's eq. 9 in 0-based indices):
    p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[(l'/d) j + m - n].

    Candidates are the blocks that start at or before p (causal), or all. Within the budget `topk`, the first
    `init_blocks` and the `local_blocks` that end with the query's own, floor(p / l'), are always taken; the rest by
    score, ties to the smaller id. Deterministic; not differentiable. Scores are recomputed from q, k_cmp and lse a tile
    at a time: no memory grows with the number of keys or blocks.

    Args:
        q: [B, Tq, Hq, Dk] or [total_q, Hq, Dk].
        k_cmp: as in `compressed_attention`.
        lse: float32 (float64 for float64) [B, Tq, Hq] or [total_q, Hq] that `compressed_attention` returned.
        kernel_size, kernel_stride: l and d; d divides l and l'.
        block_size: l', tokens per block.
        topk: n, blocks per query and kv head, forced ones included; at least init_blocks + local_blocks.
        seqlen_k, cu_seqlens_k: the tokens behind k_cmp, as in `compressed_attention`.
        backend: None, "cpu", "sm80", "sm90" or "reference".
        The rest: see the module.

    Returns:
        block_indices int32 [B, Tq, Hkv, topk] or [total_q, Hkv, topk]: ascending ids, local to the sequence, then -1.
    """
    q, k_cmp = autocast(q, k_cmp)
    _checks.tensors(q=q, k_cmp=k_cmp, lse=lse)
    packed = _checks.packing(q, cu_seqlens_q, cu_seqlens_k)
    _checks.query_and_key(q, k_cmp, "k_cmp", packed)
    _checks.last_dim_contiguous(q=q, k_cmp=k_cmp)
    _checks.query_lse(lse, q)
    _checks.compression(kernel_size, kernel_stride)
    _checks.integer(block_size=block_size, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    softmax_scale = _checks.given_scale(softmax_scale, scale)
    _checks.backend(backend, _ops.BACKENDS, q)
    if backend == "reference":
        _check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, None)
        return reference.select_blocks(
            q, k_cmp, lse, kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, topk=topk,
            init_blocks=init_blocks, local_blocks=local_blocks, seqlen_k=seqlen_k, causal=causal,
            softmax_scale=softmax_scale, q_offset=q_offset, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
    tokens = (
        0 if packed else _checks.compressed_length(seqlen_k, q.shape[1], k_cmp.shape[1], kernel_size, kernel_stride)
    )
    block_indices: Tensor = _range_ops.select_blocks(
        q.detach(), k_cmp.detach(), lse.detach(), cu_seqlens_q, cu_seqlens_k, *_offsets(q_offset), kernel_size,
        kernel_stride, tokens, causal, softmax_scale, _ops.BACKENDS[backend], block_size, topk, init_blocks,
        local_blocks,
    )  # fmt: skip
    return block_indices


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int = 512,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Any:
    """Attention to the nearest tokens (the paper's section 3.3.3).

    Causal: exactly the w tokens (p - w, p]. Otherwise the tokens with |key - p| < w.

    Args:
        q: [B, Tq, Hq, Dk] or [total_q, Hq, Dk].
        k: [B, Tk, Hkv, Dk] or [total_k, Hkv, Dk], q's dtype.
        v: [B, Tk, Hkv, Dv] or [total_k, Hkv, Dv], q's dtype.
        window_size: w, tokens; may be larger than Tk.
        backend: None, "cpu", "sm80", "sm90" or "reference".
        The rest: see the module.

    Returns:
        o [B, Tq, Hq, Dv] or [total_q, Hq, Dv] in q's dtype; with return_lse (o, lse).
    """
    q, k, v = autocast(q, k, v)
    _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.last_dim_contiguous(q=q, k=k, v=v)
    _checks.integer(window_size=window_size)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    softmax_scale = _checks.given_scale(softmax_scale, scale)
    _checks.backend(backend, _ops.BACKENDS, q)
    if backend == "reference":
        _check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0])
        return reference.sliding_window_attention(
            *differentiable_once(q, k, v), window_size=window_size, causal=causal, softmax_scale=softmax_scale,
            q_offset=q_offset, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=return_lse,
        )  # fmt: skip
    o, lse = _range_ops.range_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *_offsets(q_offset), _range_ops.WINDOW, window_size, 1, 1, 0, causal,
        softmax_scale, _ops.BACKENDS[backend],
    )  # fmt: skip
    return (o, lse) if return_lse else o
