"""Block selection (spec section 5; the paper's eqs. 8-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_cuda import _checks
from nsa_cuda.reference._attend import compute_dtype, masked_scores, row_chunks
from nsa_cuda.reference._layout import Part, QOffset, join
from nsa_cuda.reference._parts import compressed_parts
from nsa_cuda.reference._visibility import CompressedKeys, positions


def selection_weights(kernel_size: int, kernel_stride: int, block_size: int) -> dict[int, int]:
    """Weight of p_cmp[(l'/d) j + u] in p_slc[j] by u: how often m - n = u. For l, d, l' = 32, 16, 64: 1, 2, 2, 2, 1."""
    weights: dict[int, int] = {}
    for m in range(block_size // kernel_stride):
        for n in range(kernel_size // kernel_stride):
            weights[m - n] = weights.get(m - n, 0) + 1
    return dict(sorted(weights.items()))


def block_scores(p: Tensor, number: int, kernel_size: int, kernel_stride: int, block_size: int) -> Tensor:
    """p_slc [..., blocks] of p_cmp [..., Nc]: each compressed key gives its mass to the blocks it shares tokens with.

    Terms are added in the same order for every block, product and sum rounded apart, so that equal masses tie exactly.
    """
    weights = selection_weights(kernel_size, kernel_stride, block_size)
    per_block = block_size // kernel_stride
    left = -min(weights)
    right = max(0, (number - 1) * per_block + max(weights) + 1 - p.shape[-1])
    padded = torch.nn.functional.pad(p, (left, right))
    scores = p.new_zeros((*p.shape[:-1], number))
    for u, weight in weights.items():
        first = left + u
        scores += weight * padded[..., first : first + (number - 1) * per_block + 1 : per_block]
    return scores


def ranked_ids(scores: Tensor, candidate: Tensor, forced: Tensor, topk: int) -> Tensor:
    """int32 [.., topk], ascending, -1-padded: forced candidates, then the largest scores, ties to the smaller id."""
    number = scores.shape[-1]
    rank = scores.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    ids = rank.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    ids = torch.where(candidate.expand_as(scores).gather(-1, ids), ids, number).sort(-1).values
    ids = torch.nn.functional.pad(ids, (0, topk - ids.shape[-1]), value=number)
    return ids.masked_fill(ids == number, -1).to(torch.int32)


def _select(
    part: Part,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    keys: CompressedKeys,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    """q [N, Tq, Hq, Dk], k_cmp [N, Nc, Hkv, Dk], lse [N, Tq, Hq] -> int32 [N, Tq, Hkv, topk]."""
    n, seqlen_q, num_heads_q, _ = q.shape
    num_heads_k = k_cmp.shape[2]
    group = num_heads_q // num_heads_k
    number = -(-part.seqlen_k // block_size)
    block = torch.arange(number, device=q.device)
    chosen = []
    for rows, (lo, hi) in row_chunks(keys, seqlen_q, n * num_heads_q):
        first, last = rows
        scores = masked_scores(q[:, first:last], k_cmp[:, lo:hi], keys.mask(rows, (lo, hi)), scale)
        row_lse = lse[:, first:last].transpose(1, 2).view(n, num_heads_k, group, last - first, 1)
        # Dead rows, lse = -inf, score 0 everywhere.
        unseen = (scores == float("-inf")) | (row_lse == float("-inf"))
        p = (scores - row_lse).exp().masked_fill(unseen, 0.0)
        mass = p[:, :, 0].clone()
        for g in range(1, group):
            mass += p[:, :, g]
        p_slc = block_scores(mass, number, keys.kernel_size, keys.kernel_stride, block_size)  # [N, Hkv, R, blocks]

        p_query = positions(part, rows, q.device)[:, None, :, None]
        own = p_query.div(block_size, rounding_mode="floor")
        candidate = block * block_size <= p_query if keys.causal else torch.ones_like(own + block, dtype=torch.bool)
        forced = candidate & ((block < init_blocks) | ((block > own - local_blocks) & (block <= own)))
        chosen.append(ranked_ids(p_slc, candidate, forced, topk).transpose(1, 2))
    return torch.cat(chosen, dim=1)


@torch.no_grad()
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
    q_offset: QOffset = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Blocks to select, from the compressed branch's attention. Arguments as in `nsa_cuda.select_blocks`."""
    parts = compressed_parts(
        q, k_cmp, kernel_size, kernel_stride, seqlen_k, q_offset, cu_seqlens_q, cu_seqlens_k, causal
    )
    _checks.selection(block_size, kernel_stride, topk, init_blocks, local_blocks)
    _checks.query_lse(lse, q)
    softmax_scale = _checks.softmax_scale(softmax_scale, scale, q.shape[-1])
    dtype = compute_dtype(q.dtype)
    outputs = []
    for part, keys in parts:
        arguments = (part.q(q).to(dtype), part.k(k_cmp)[:, : keys.number].to(dtype), part.q(lse), keys)
        with torch.autocast(q.device.type, enabled=False):
            outputs.append(_select(part, *arguments, block_size, topk, init_blocks, local_blocks, softmax_scale))
    return join([part for part, _ in parts], outputs, q.shape[0], -1)
