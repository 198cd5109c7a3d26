"""The attention operations straight from the text of the specification: Python loops for who sees whom, explicit
formulas in float64 for the rest. Slow, and it shares nothing with nsa_cuda.reference, which it checks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from inputs import Inputs


Span = tuple[int, int, int, int, int]  # first row of q, Tq, first row of k, rows of k, Tk in tokens


def _spans(made: Inputs) -> list[Span]:
    """The sequences of a call; rows are counted over the whole tensors, flat ones b * T + t."""
    q, k, options = made.q, made.k, made.options

    def keys(tokens: int) -> int:
        if "kernel_size" not in options:
            return tokens
        l, d = options["kernel_size"], options["kernel_stride"]
        return len([i for i in range(tokens) if i % d == 0 and i + l <= tokens])

    if "cu_seqlens_q" not in options:
        tokens = options.get("seqlen_k", k.shape[1])
        return [(b * q.shape[1], q.shape[1], b * k.shape[1], keys(tokens), tokens) for b in range(q.shape[0])]
    bounds_q, bounds_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    spans: list[Span] = []
    first_k = 0
    for b in range(len(bounds_q) - 1):
        tokens = bounds_k[b + 1] - bounds_k[b]
        spans.append((bounds_q[b], bounds_q[b + 1] - bounds_q[b], first_k, keys(tokens), tokens))
        first_k += keys(tokens)
    return spans


def _rows(made: Inputs) -> list[tuple[int, int, int, int]]:
    """(flat query row, position p, first key row, rows of k) for every row inside a sequence."""
    offsets = made.options.get("q_offset")
    rows = []
    for b, (first_q, tq, first_k, keys, tk) in enumerate(_spans(made)):
        offset = tk - tq if offsets is None else int(offsets[b]) if isinstance(offsets, Tensor) else offsets
        rows += [(first_q + t, t + offset, first_k, keys) for t in range(tq)]
    return rows


def visible_keys(made: Inputs) -> Tensor:
    """bool [B,Tq,Hkv,B*Tk] (packed: [total_q,Hkv,total_k]), on the CPU; keys counted over the whole k tensor."""
    Hkv = made.k.shape[-2]
    seen = torch.zeros(math.prod(made.q.shape[:-2]), Hkv, math.prod(made.k.shape[:-2]), dtype=torch.bool)
    if made.block_indices is not None:
        _see_blocks(made, made.block_indices, seen)
    else:
        for row, p, first_k, keys in _rows(made):
            for i in _range_of(made, p, keys):
                seen[row, :, first_k + i] = True
    return seen.view(*made.q.shape[:-2], Hkv, -1) if seen.numel() else seen.view(*made.q.shape[:-2], *seen.shape[1:])


def _range_of(made: Inputs, p: int, keys: int) -> list[int]:
    """Keys of its sequence that the query at position p sees in the window, or compressed."""
    options, causal = made.options, made.options["causal"]
    if "window_size" in options:
        w = options["window_size"]
        return [i for i in range(keys) if (p - w < i <= p if causal else abs(i - p) < w)]
    l, d = options["kernel_size"], options["kernel_stride"]
    return [i for i in range(keys) if not causal or i * d + l - 1 <= p]


def _see_blocks(made: Inputs, block_indices: Tensor, seen: Tensor) -> None:
    Hkv, block_size, causal = made.k.shape[-2], made.options["block_size"], made.options["causal"]
    lists = block_indices.reshape(seen.shape[0], Hkv, block_indices.shape[-1]).tolist()
    counts = made.options.get("block_counts")
    count_lists = counts.reshape(-1, Hkv).tolist() if isinstance(counts, Tensor) else None
    for row, p, first_k, tk in _rows(made):
        for h in range(Hkv):
            entries = lists[row][h]
            count = len(entries) if counts is None else count_lists[row][h] if count_lists else counts
            for j in set(entries[: max(0, count)]):
                last = min((j + 1) * block_size, tk, p + 1 if causal else tk)
                if j >= 0 and j * block_size < last:
                    seen[row, h, first_k + j * block_size : first_k + last] = True


def results(made: Inputs) -> dict[str, Tensor]:
    """o, lse and dq, dk, dv for dout and (case.lse) dlse, in float64."""
    Hq, Dk, Hkv, Dv = *made.q.shape[-2:], made.k.shape[-2], made.v.shape[-1]
    G = Hq // Hkv
    q, dout = (x.double().reshape(-1, Hkv, G, x.shape[-1]) for x in (made.q, made.dout))
    k, v = (x.double().reshape(-1, Hkv, x.shape[-1]) for x in (made.k, made.v))
    dlse = made.dlse.double().reshape(-1, Hkv, G) if made.case.lse else q.new_zeros(q.shape[:3])
    seen = visible_keys(made).to(q.device).reshape(q.shape[0], Hkv, 1, k.shape[0])
    live = seen.any(-1)  # [rows, Hkv, 1]
    unseen_keys = (
        ~seen.any(0).any(-2).mT if seen.numel() else torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    )
    q, dout = q.masked_fill(~live[..., None], 0.0), dout.masked_fill(~live[..., None], 0.0)
    dlse = dlse.masked_fill(~live, 0.0)
    k, v = k.masked_fill(unseen_keys[..., None], 0.0), v.masked_fill(unseen_keys[..., None], 0.0)
    scale = made.options.get("softmax_scale", 1.0 / math.sqrt(Dk))
    s = (scale * torch.einsum("rhgd,khd->rhgk", q, k)).masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1) if k.shape[0] else torch.full(q.shape[:3], -math.inf, dtype=q.dtype, device=q.device)
    p = torch.where(seen, torch.exp(s - torch.where(live, lse, 0.0)[..., None]), 0.0)
    o = torch.einsum("rhgk,khd->rhgd", p, v)
    dp = torch.einsum("rhgd,khd->rhgk", dout, v)
    ds = scale * p * (dp - (dout * o).sum(-1, keepdim=True) + dlse[..., None])
    return {
        "o": o.reshape(*made.q.shape[:-1], Dv),
        "lse": lse.reshape(made.q.shape[:-1]),
        "dq": torch.einsum("rhgk,khd->rhgd", ds, k).reshape(made.q.shape),
        "dk": torch.einsum("rhgk,rhgd->khd", ds, q).reshape(made.k.shape),
        "dv": torch.einsum("rhgk,rhgd->khd", p, dout).reshape(made.v.shape),
    }
