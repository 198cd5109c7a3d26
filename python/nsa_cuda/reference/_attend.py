"""Softmax attention over the visible keys, written out with dense masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_cuda.reference._visibility import Visibility

# Scores held at once: 2**24 are 128 MiB in float64.
MAX_SCORES = 1 << 24
# Above this many scores per call, autograd recomputes them in the backward instead of keeping them.
MAX_KEPT_SCORES = 1 << 26


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 and float32 compute in themselves, half types in float32."""
    return dtype if dtype in (torch.float64, torch.float32) else torch.float32


def row_chunks(
    keys: Visibility, seqlen_q: int, scores_per_key: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, keys) ranges that cover all queries, each of at most MAX_SCORES scores where a single row allows."""
    rows = rows_per_chunk(keys, seqlen_q, scores_per_key)
    for first in range(0, max(seqlen_q, 1), rows):
        last = min(first + rows, seqlen_q)
        yield (first, last), keys.key_range(first, last)


def rows_per_chunk(keys: Visibility, seqlen_q: int, scores_per_key: int) -> int:
    rows = max(1, min(keys.preferred_rows(), seqlen_q))
    while rows > 1:
        # The last rows of a causal mask see the most keys.
        lo, hi = keys.key_range(seqlen_q - rows, seqlen_q)
        if rows * (hi - lo) * scores_per_key <= MAX_SCORES:
            break
        rows = (rows + 1) // 2
    return rows


def grouped(x: Tensor, num_heads_k: int) -> Tensor:
    """[N, rows, Hq, D] -> [N, Hkv, G * rows, D]: one matrix per kv head."""
    n, rows, num_heads_q, dim = x.shape
    group = num_heads_q // num_heads_k
    return x.reshape(n, rows, num_heads_k, group, dim).permute(0, 2, 3, 1, 4).reshape(n, num_heads_k, group * rows, dim)


def ungrouped(x: Tensor, group: int) -> Tensor:
    """[N, Hkv, G * rows, D] -> [N, rows, Hq, D]."""
    n, num_heads_k, grouped_rows, dim = x.shape
    rows = grouped_rows // group
    return x.reshape(n, num_heads_k, group, rows, dim).permute(0, 3, 1, 2, 4).reshape(n, rows, num_heads_k * group, dim)


def masked_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """scale * q . k, -inf where invisible: q [N, R, Hq, Dk], k [N, K, Hkv, Dk] -> [N, Hkv, G, R, K]."""
    n, rows, num_heads_q, _ = q.shape
    num_heads_k = k.shape[2]
    scores = (grouped(q, num_heads_k) * scale) @ k.permute(0, 2, 3, 1)
    scores = scores.view(n, num_heads_k, num_heads_q // num_heads_k, rows, k.shape[1])
    return scores.masked_fill(~visible.unsqueeze(2), float("-inf"))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to the values of `dtype`, as a tensor core's operand is; its gradient passes unrounded."""
    if x.dtype == dtype:
        return x
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q [N, R, Hq, Dk], k and v [N, K, Hkv, D], visible [N | 1, Hkv | 1, R, K] -> o [N, R, Hq, Dv], lse [N, R, Hq]."""
    n, rows, num_heads_q, _ = q.shape
    num_keys, num_heads_k, head_dim_v = v.shape[1:]
    group = num_heads_q // num_heads_k
    scores = masked_scores(q, k, visible, scale)
    dead = ~visible.any(-1).unsqueeze(2)  # [N | 1, Hkv | 1, 1, R]
    top = scores.detach().amax(-1) if num_keys else scores.new_zeros(scores.shape[:-1])
    top = top.masked_fill(dead, 0.0)
    p = (scores - top.unsqueeze(-1)).exp()
    total = p.sum(-1).masked_fill(dead, 1.0)  # [N, Hkv, G, R]
    p = rounded(p, dtype).view(n, num_heads_k, group * rows, num_keys)
    o = (p @ v.transpose(1, 2)).view(n, num_heads_k, group, rows, head_dim_v) / total.unsqueeze(-1)
    # The fills also cut dead rows off in the backward: whatever do and dlse hold there, nothing passes.
    o = o.masked_fill(dead.unsqueeze(-1), 0.0).permute(0, 3, 1, 2, 4).reshape(n, rows, num_heads_q, head_dim_v)
    lse = (top + total.log()).masked_fill(dead, float("-inf")).permute(0, 3, 1, 2).reshape(n, rows, num_heads_q)
    return o, lse


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [N, Tq, Hq, Dk] to the visible ones of k [N, Tk, Hkv, Dk], v [N, Tk, Hkv, Dv].

    Returns o [N, Tq, Hq, Dv] in q's dtype and lse [N, Tq, Hq] in float32 (float64 for float64). Half types: scores
    and sums in float32, exp(score - row maximum) rounded to q's dtype before it meets v, o rounded once at the end.
    """
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(compute_dtype(dtype)) for x in (q, k, v))
        seqlen_q, per_key = q.shape[1], q.shape[0] * q.shape[2]
        chunks = list(row_chunks(keys, seqlen_q, per_key))
        number = sum((rows[1] - rows[0]) * (span[1] - span[0]) for rows, span in chunks) * per_key
        recompute = number > MAX_KEPT_SCORES and torch.is_grad_enabled()

        outputs = []
        # split, not slices: the gradient of split is one concatenation instead of one full-sized sum per chunk.
        for part, (rows, span) in zip(torch.split(q, chunks[0][0][1] or 1, dim=1), chunks, strict=True):
            lo, hi = span
            arguments = (part, k[:, lo:hi], v[:, lo:hi], keys.mask(rows, span), scale, dtype)
            if recompute:
                outputs.append(checkpoint(_attend_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(_attend_rows(*arguments))
        o, lse = (torch.cat(pieces, dim=1) for pieces in zip(*outputs, strict=True))
        return o.to(dtype), lse
