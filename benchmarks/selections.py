"""Block lists to measure with: uniform, clustered, or from a model.

All hold the forced blocks {0, own - 1, own} (own: the query's block) and, causally, nothing later; ascending,
-1-padded, as `select_blocks` returns them. Made on the device, in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .shapes import Shape

_CHUNK_SCORES = 1 << 25  # scores held at once: 128 MB
_ANCHOR_EVERY = 64  # tokens between two anchors of the clustered selection
# Standard deviation of its white noise. With 1024 blocks and 16 chosen, the lists of 4 neighbours then hold 22.7
# different blocks, of 16 neighbours 32, like lists captured from large models. The unions are printed with every table.
_NOISE = 0.17


def _lists_from_scores(
    shape: Shape, scores: Callable[[int, int], Tensor], rows_per_chunk: int, device: torch.device
) -> Tensor:
    """int32 [T, Hkv, n]; ``scores(first, last)`` gives [rows, Hkv, blocks]."""
    blocks = -(-shape.seqlen // shape.block_size)
    block = torch.arange(blocks, device=device)
    chunks = []
    for first in range(0, shape.seqlen, rows_per_chunk):
        last = min(first + rows_per_chunk, shape.seqlen)
        own = (torch.arange(first, last, device=device) // shape.block_size)[:, None, None]
        forced = (block == 0) | (block == own) | (block == own - 1)
        ranked = scores(first, last).masked_fill_(forced, float("inf")).masked_fill_(block > own, float("-inf"))
        value, ids = ranked.topk(min(shape.topk, blocks), dim=-1)
        ids = ids.masked_fill(value == float("-inf"), blocks).sort(-1).values
        ids = torch.nn.functional.pad(ids, (0, shape.topk - ids.shape[-1]), value=blocks)
        chunks.append(ids.masked_fill(ids == blocks, -1).to(torch.int32))
    return torch.cat(chunks)


def _rows_per_chunk(shape: Shape) -> int:
    blocks = -(-shape.seqlen // shape.block_size)
    return max(1, _CHUNK_SCORES // (blocks * shape.heads_k))


def uniform(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Forced blocks plus uniformly random others, drawn anew for every query: int32 [B, T, Hkv, n]."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-shape.seqlen // shape.block_size)

    def scores(first: int, last: int) -> Tensor:
        return torch.rand((last - first, shape.heads_k, blocks), generator=generator, device=device)

    return torch.stack([_lists_from_scores(shape, scores, _rows_per_chunk(shape), device) for _ in range(shape.batch)])


def clustered(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Top-n of scores that drift slowly, so that neighbouring queries mostly agree: int32 [B, T, Hkv, n].

    Scores are linearly interpolated between normal random anchors every 64 tokens, plus white noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-shape.seqlen // shape.block_size)
    anchors = -(-shape.seqlen // _ANCHOR_EVERY) + 1

    def one_sequence() -> Tensor:
        anchor = torch.randn((anchors, shape.heads_k, blocks), generator=generator, device=device)

        def scores(first: int, last: int) -> Tensor:
            t = torch.arange(first, last, device=device)
            left = t // _ANCHOR_EVERY
            fraction = ((t % _ANCHOR_EVERY).float() / _ANCHOR_EVERY)[:, None, None]
            drift = torch.lerp(anchor[left], anchor[left + 1], fraction)
            return drift.add_(torch.randn(drift.shape, generator=generator, device=device), alpha=_NOISE)

        return _lists_from_scores(shape, scores, _rows_per_chunk(shape) // 4 or 1, device)

    return torch.stack([one_sequence() for _ in range(shape.batch)])


def drifting_queries(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Queries that make `select_blocks` choose as `clustered` does: float32 [B, T, Hq, Dk].

    Every head's query drifts between normal anchors every 64 tokens, plus the same white noise, so that its products
    with random keys drift as the scores of `clustered` do.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, -(-shape.seqlen // _ANCHOR_EVERY) + 1, shape.heads_q, shape.dim_qk)
    anchor = torch.randn(size, generator=generator, device=device)
    t = torch.arange(shape.seqlen, device=device)
    left = t // _ANCHOR_EVERY
    drift = torch.lerp(
        anchor[:, left], anchor[:, left + 1], ((t % _ANCHOR_EVERY).float() / _ANCHOR_EVERY)[:, None, None]
    )
    return drift.add_(torch.randn(drift.shape, generator=generator, device=device), alpha=_NOISE)


def from_file(path: Path, device: torch.device) -> tuple[Tensor, int]:
    """(block_indices int32 [B, T, Hkv, n], block_size) as examples/train_lm.py saves them (selection.pt)."""
    saved = torch.load(path, map_location=device, weights_only=True)
    return saved["block_indices"].to(torch.int32), int(saved["block_size"])


MAKERS: dict[str, Callable[[Shape, torch.device], Tensor]] = {"uniform": uniform, "clustered": clustered}


def mean_union(block_indices: Tensor, tokens: int, blocks: int) -> float:
    """Mean number of different blocks in the lists of ``tokens`` consecutive queries: [B, T, Hkv, n] -> a count."""
    batch, seqlen, heads, width = block_indices.shape
    tiles = -(-seqlen // tokens)
    padded = torch.nn.functional.pad(block_indices, (0, 0, 0, 0, 0, tiles * tokens - seqlen), value=-1)
    ids = padded.view(batch, tiles, tokens, heads, width).transpose(2, 3).flatten(3).long()
    total = 0
    for part in ids.flatten(0, 1).split(max(1, _CHUNK_SCORES // (blocks * heads))):  # [tiles, Hkv, tokens * n]
        seen = torch.zeros((*part.shape[:2], blocks + 1), dtype=torch.bool, device=ids.device)
        seen.scatter_(-1, torch.where(part < 0, blocks, part), True)
        total += int(seen[..., :blocks].sum())
    return total / (batch * tiles * heads)


def visible_pairs(block_indices: Tensor, shape: Shape) -> int:
    """(query head, key) pairs that the attention covers, summed over the batch: what the FLOP are counted from."""
    total = 0
    for first in range(0, shape.seqlen, 1 << 16):
        part = block_indices[:, first : first + (1 << 16)].long()
        position = torch.arange(first, first + part.shape[1], device=part.device)[:, None, None]
        start = part * shape.block_size
        end = torch.minimum(start + shape.block_size, (position + 1).clamp_max(shape.seqlen))
        total += int(((end - start).clamp_min(0) * (part >= 0)).sum())
    return total * shape.group
