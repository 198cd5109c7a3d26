"""native_sparse_attention: checks, defaults, and the choice between the operator and the reference."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from nsa_cuda import _checks, _debug, _native_op, _ops, reference
from nsa_cuda._native_op import RECOMPUTE_ALL, RECOMPUTE_NONE, RECOMPUTE_WINDOW
from nsa_cuda._tensors import autocast, differentiable_once

_RECOMPUTE: dict[bool | str, int] = {False: RECOMPUTE_NONE, "window": RECOMPUTE_WINDOW, True: RECOMPUTE_ALL}


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
    q_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    recompute: bool | Literal["window"] = False,
    backend: Literal["reference", "cpu", "sm80", "sm90"] | None = None,
) -> Tensor:
    """The whole of NSA: o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win (the paper's eq. 5).

    The branches are compressed attention, selected attention and the sliding window, in the library's kernels, and one
    node of the autograd graph. A branch's dead rows add nothing, whatever their gates. Where topk * block_size >= Tk
    (batched calls without `block_indices`) every block is selected: the selected branch attends to all keys and no
    block is scored.

    Args:
        q: [B, Tq, Hq, Dk] or [total_q, Hq, Dk].
        k, v: keys and values of the selected branch, as in `selected_attention`.
        gates: [B, Tq, Hq, 3] or [total_q, Hq, 3], any floating dtype, in the order (compressed, selected, window),
            applied as given: the caller passes them through its sigmoid.
        k_cmp, v_cmp: the compressed branch's, as in `compressed_attention`; they come from Tk tokens.
        k_win, v_win: the window branch's, shaped like k and v; None shares k and v, whose gradients are then the sum.
        block_indices, block_counts: the lists to attend to, as in `selected_attention`; None selects them by
            `select_blocks` with `topk`, `init_blocks` and `local_blocks`.
        kernel_size, kernel_stride, block_size, window_size: l, d, l', w in tokens.
        recompute: outputs that the backward computes again instead of keeping them: none (False), the window branch's
            ("window"), or all (True). Gradients are the same, bit for bit.
        backend: as in `selected_attention`, for every branch.
        The rest: see the module `nsa_cuda.attention`.

    Returns:
        o [B, Tq, Hq, Dv] or [total_q, Hq, Dv] in q's dtype.

    Kept for the backward, in bytes per token, with e bytes an element of q: its inputs, e (Hq Dk + 2 Hkv (Dk + Dv))
    (half of the second term where the window shares k and v), e Hkv (Dk + Dv) / d for the compressed keys, the gates;
    12 Hq for the three lse; 4 Hkv n for the lists; and 3 e Hq Dv for the branches' outputs (2 e Hq Dv with
    "window", nothing with True). With 64 query and 4 kv heads of 128 in bfloat16 that is 2.03 times what dense flash
    attention keeps (q, k, v, o, lse), 1.56 times with "window" and 0.63 times with True; beside the result o, which
    dense attention keeps anyway and here only the layer behind it may keep, 2.50, 2.03 and 1.09 times.
    """
    if recompute not in _RECOMPUTE:
        raise ValueError(f'recompute: must be False, "window" or True, was {recompute!r}')
    q, k, v, k_cmp, v_cmp, k_win, v_win = autocast(q, k, v, k_cmp, v_cmp, k_win, v_win)
    packed = _checks.attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.backend(backend, _ops.BACKENDS, q)
    sizes: dict[str, Any] = {
        "kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size, "topk": topk,
        "init_blocks": init_blocks, "local_blocks": local_blocks, "window_size": window_size,
    }  # fmt: skip
    softmax_scale = _checks.given_scale(softmax_scale, scale)
    positions: dict[str, Any] = {
        "q_offset": q_offset, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k
    }  # fmt: skip
    if backend == "reference":
        if packed and not torch.compiler.is_compiling():
            _debug.check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0])
        q, k, v, gates, k_cmp, v_cmp, k_win, v_win = differentiable_once(q, k, v, gates, k_cmp, v_cmp, k_win, v_win)
        return reference.native_sparse_attention(
            q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win, block_indices=block_indices,
            block_counts=block_counts, causal=causal, softmax_scale=softmax_scale, recompute=recompute is True,
            **sizes, **positions,
        )  # fmt: skip
    _check(q, k, v, gates, k_cmp, v_cmp, k_win, v_win, block_indices, block_counts, sizes, positions)
    counts, count = (block_counts, None) if isinstance(block_counts, Tensor) else (None, block_counts)
    offsets, offset = (q_offset, None) if isinstance(q_offset, Tensor) else (None, q_offset)
    # Without a backward to come the branches' outputs are dropped as soon as they are added up.
    again = _RECOMPUTE[recompute] if torch.is_grad_enabled() else RECOMPUTE_ALL
    o: Tensor = _native_op.native_sparse_attention_forward(
        q, k, v, gates, k_cmp, v_cmp, k_win, v_win, block_indices, counts, cu_seqlens_q, cu_seqlens_k, offsets, offset,
        count, kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size, causal,
        softmax_scale, again, _ops.BACKENDS[backend],
    )[0]  # fmt: skip
    return o


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_win: Tensor | None,
    v_win: Tensor | None,
    block_indices: Tensor | None,
    block_counts: int | Tensor | None,
    sizes: dict[str, Any],
    positions: dict[str, Any],
) -> None:
    """What the operators of the branches don't see, or see too late: q, k and v are checked already."""
    offsets = positions["cu_seqlens_q"], positions["cu_seqlens_k"]
    _checks.gates(gates, q)
    _checks.attention_tensors(q, k_cmp, v_cmp, *offsets, "_cmp")
    _checks.last_dim_contiguous(q=q, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp)
    _checks.head_sizes(q, k, v=v)
    _checks.same_heads("_cmp", k_cmp, v_cmp, k, v)
    if (k_win is None) != (v_win is None):
        missing = "k_win" if k_win is None else "v_win"
        raise ValueError(f"{missing}: k_win and v_win come together or not at all, was None")
    if k_win is not None and v_win is not None:
        _checks.attention_tensors(q, k_win, v_win, *offsets, "_win")
        _checks.last_dim_contiguous(k_win=k_win, v_win=v_win)
        _checks.same_tokens("k_win", k_win, k)
        _checks.same_heads("_win", k_win, v_win, k, v)
    l, d = sizes["kernel_size"], sizes["kernel_stride"]
    _checks.compression(l, d)
    _checks.at_least(1, window_size=sizes["window_size"])
    if block_indices is not None:
        _checks.block_lists(q, k, block_indices, block_counts)
        _checks.at_least(1, block_size=sizes["block_size"])
    else:
        _checks.selection(sizes["block_size"], d, sizes["topk"], sizes["init_blocks"], sizes["local_blocks"])
    _checks.q_offset(positions["q_offset"], q, _checks.batch_size(q, offsets[0]))
    if offsets[0] is None:
        _checks.compressed_length(k.shape[1], q.shape[1], k_cmp.shape[1], l, d)
