"""Selected attention straight from the text of the specification: Python loops for who sees whom, explicit formulas in
float64 for the rest. Slow, and it shares nothing with nsa_cuda.reference, which it checks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from inputs import Inputs


def _rows(made: Inputs) -> list[tuple[int, int, int, int]]:
    """(flat query row, position p, first key row, Tk) for every row inside a sequence; flat rows count b * Tq + t."""
    q, k, options = made.q, made.k, made.options
    if "cu_seqlens_q" in options:
        bounds_q, bounds_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
        spans = [
            (bounds_q[b], bounds_q[b + 1] - bounds_q[b], bounds_k[b], bounds_k[b + 1] - bounds_k[b])
            for b in range(len(bounds_q) - 1)
        ]
    else:
        spans = [(b * q.shape[1], q.shape[1], b * k.shape[1], k.shape[1]) for b in range(q.shape[0])]
    offsets = options.get("q_offset")
    rows = []
    for b, (first_q, tq, first_k, tk) in enumerate(spans):
        offset = tk - tq if offsets is None else int(offsets[b]) if isinstance(offsets, Tensor) else offsets
        rows += [(first_q + t, t + offset, first_k, tk) for t in range(tq)]
    return rows


def visible_keys(made: Inputs) -> Tensor:
    """bool [B,Tq,Hkv,B*Tk] (packed: [total_q,Hkv,total_k]), on the CPU; keys counted over the whole k tensor."""
    Hkv = made.k.shape[-2]
    total_k = math.prod(made.k.shape[:-2])
    block_size, causal = made.options["block_size"], made.options["causal"]
    rows_q = math.prod(made.q.shape[:-2])
    lists = made.block_indices.reshape(rows_q, Hkv, made.block_indices.shape[-1]).tolist()
    counts = made.options.get("block_counts")
    count_lists = counts.reshape(-1, Hkv).tolist() if isinstance(counts, Tensor) else None
    seen = torch.zeros(len(lists), Hkv, total_k, dtype=torch.bool)
    for row, p, first_k, tk in _rows(made):
        for h in range(Hkv):
            entries = lists[row][h]
            count = len(entries) if counts is None else count_lists[row][h] if count_lists else counts
            for j in set(entries[: max(0, count)]):
                last = min((j + 1) * block_size, tk, p + 1 if causal else tk)
                if j >= 0 and j * block_size < last:
                    seen[row, h, first_k + j * block_size : first_k + last] = True
    return seen.view(*made.q.shape[:-2], Hkv, total_k)


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
