"""The attention operations in plain PyTorch: dense masks, softmax over the visible keys, gradients by autograd.

Any device, any floating dtype. float64 inputs make it the oracle that kernels are judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_cuda import _checks
from nsa_cuda.reference._attend import attend, compute_dtype
from nsa_cuda.reference._layout import Part, QOffset, join
from nsa_cuda.reference._parts import compressed_parts, selected_parts, window_parts
from nsa_cuda.reference._visibility import Visibility
from nsa_cuda.reference.selection import select_blocks

Output = Tensor | tuple[Tensor, Tensor]


def _attend_parts(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[tuple[Part, Visibility]], scale: float
) -> tuple[Tensor, Tensor]:
    outputs = [attend(part.q(q), part.k(k), part.k(v), keys, scale) for part, keys in parts]
    only_parts = [part for part, _ in parts]
    o = join(only_parts, [o for o, _ in outputs], q.shape[0], 0.0)
    lse = join(only_parts, [lse for _, lse in outputs], q.shape[0], float("-inf"))
    return o, lse


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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Output:
    """Attention to the selected blocks. Arguments as in `nsa_cuda.selected_attention`."""
    _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.block_lists(q, k, block_indices, block_counts)
    _checks.head_sizes(q, k, v=v)
    _checks.at_least(1, block_size=block_size)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    softmax_scale = _checks.softmax_scale(softmax_scale, scale, q.shape[-1])
    parts = selected_parts(q, k, block_indices, block_size, block_counts, causal, q_offset, cu_seqlens_q, cu_seqlens_k)
    o, lse = _attend_parts(q, k, v, parts, softmax_scale)
    return (o, lse) if return_lse else o


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
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Output:
    """Attention to the compressed keys. Arguments as in `nsa_cuda.compressed_attention`."""
    _checks.attention_tensors(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, "_cmp")
    softmax_scale = _checks.softmax_scale(softmax_scale, scale, q.shape[-1])
    parts = compressed_parts(
        q, k_cmp, kernel_size, kernel_stride, seqlen_k, q_offset, cu_seqlens_q, cu_seqlens_k, causal
    )
    o, lse = _attend_parts(q, k_cmp, v_cmp, parts, softmax_scale)
    return (o, lse) if return_lse else o


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int = 512,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Output:
    """Attention to the nearest tokens. Arguments as in `nsa_cuda.sliding_window_attention`."""
    _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.head_sizes(q, k, v=v)
    _checks.at_least(1, window_size=window_size)
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    softmax_scale = _checks.softmax_scale(softmax_scale, scale, q.shape[-1])
    parts = window_parts(q, k, window_size, causal, q_offset, cu_seqlens_q, cu_seqlens_k)
    o, lse = _attend_parts(q, k, v, parts, softmax_scale)
    return (o, lse) if return_lse else o


def _gated(gate: Tensor, o: Tensor, lse: Tensor) -> Tensor:
    """gate [.., Hq] times o [.., Hq, Dv] in the computing dtype; 0 on the branch's dead rows, whatever gates hold."""
    dtype = compute_dtype(o.dtype)
    dead = (lse.detach() == float("-inf")).unsqueeze(-1)
    return (gate.to(dtype).unsqueeze(-1) * o.to(dtype)).masked_fill(dead, 0.0)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: int | Tensor | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    causal: bool = True,
    softmax_scale: float | None = None,
    scale: float | None = None,
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    recompute: bool = False,
    selected: Callable[..., Any] = selected_attention,
) -> Tensor:
    """The three branches, gated and added. Arguments as in `nsa_cuda.native_sparse_attention`.

    `selected` computes the selected branch, with the signature of `selected_attention`.
    """
    packed = _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.gates(gates, q)
    if (k_win is None) != (v_win is None):
        raise ValueError(
            f"{'k_win' if k_win is None else 'v_win'}: k_win and v_win come together or not at all, was None"
        )
    shared: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": _checks.softmax_scale(softmax_scale, scale, q.shape[-1]),
        "q_offset": q_offset,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    tokens = None if packed else k.shape[1]
    compressed = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "seqlen_k": tokens, **shared}

    def branches(
        q: Tensor, k: Tensor, v: Tensor, gates: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor
    ) -> Tensor:
        o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, return_lse=True, **compressed)
        ids, counts = block_indices, block_counts
        if ids is None:
            counts = None
            ids = select_blocks(
                q.detach(),
                k_cmp.detach(),
                lse_cmp.detach(),
                block_size=block_size,
                topk=topk,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                **compressed,
            )
        o_slc, lse_slc = selected(q, k, v, ids, block_size=block_size, block_counts=counts, return_lse=True, **shared)
        o_win, lse_win = sliding_window_attention(q, k_win, v_win, window_size=window_size, return_lse=True, **shared)
        g_cmp, g_slc, g_win = gates.unbind(-1)
        o = _gated(g_cmp, o_cmp, lse_cmp) + _gated(g_slc, o_slc, lse_slc) + _gated(g_win, o_win, lse_win)
        return o.to(q.dtype)

    if k_win is None or v_win is None:
        k_win, v_win = k, v
    else:
        _checks.attention_tensors(q, k_win, v_win, cu_seqlens_q, cu_seqlens_k, "_win")
        _checks.same_tokens("k_win", k_win, k)
    arguments = (q, k, v, gates, k_cmp, v_cmp, k_win, v_win)
    if recompute and torch.is_grad_enabled():
        o: Tensor = checkpoint(branches, *arguments, use_reentrant=False, preserve_rng_state=False)
        return o
    return branches(*arguments)
