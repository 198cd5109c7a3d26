"""The specification in Python loops over rows and keys, float64, small sizes: what tests of nsa_cuda.reference share.

Nothing here uses masks or positions of the reference: every operation states anew who sees whom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

HQ, HKV, DK, DV = 4, 2, 5, 3
G = HQ // HKV
L, D, BLOCK = 8, 4, 8  # l, d, l'

# (Tq, Tk, q_offset): equal, prefill of a tail, queries before and past the keys, one query, nothing at all.
SHAPES = [
    (29, 29, None),
    (9, 30, None),
    (11, 6, None),
    (10, 21, -4),
    (10, 21, 15),
    (1, 40, None),
    (0, 9, None),
    (7, 0, None),
]
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
SHAPE = pytest.mark.parametrize(("tq", "tk", "offset"), SHAPES)

Sees = Callable[[int, int, int, int], bool]  # (p, kv head, row t, key) -> visible


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(tq: int, tk: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, tq, HQ, DK), normal(batch, tk, HKV, DK, seed=1), normal(batch, tk, HKV, DV, seed=2)


def position(t: int, tq: int, tk: int, offset: int | None) -> int:
    return t + (tk - tq if offset is None else offset)


def loops(
    q: Tensor, k: Tensor, v: Tensor, sees: Sees, first_position: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence q [Tq,Hq,Dk], k [Tk,Hkv,Dk], v: softmax row by row over the keys that `sees` admits."""
    o, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -math.inf)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            keys = [i for i in range(k.shape[0]) if sees(t + first_position, kv, t, i)]
            if keys:
                scores = scale * (k[keys, kv] @ q[t, h])
                lse[t, h] = torch.logsumexp(scores, 0)
                o[t, h] = torch.softmax(scores, 0) @ v[keys, kv]
    return o, lse


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def random_lists(tq: int, tk: int, width: int = 4, seed: int = 3) -> Tensor:
    """[1,Tq,Hkv,S] with ids before, inside and past the sequence, duplicates included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, -(-tk // BLOCK) + 2, (1, tq, HKV, width), generator=generator, dtype=torch.int32)


def selected_sees(lists: Tensor, causal: bool, count: int | Tensor = 1 << 30) -> Sees:
    def sees(p: int, kv: int, t: int, key: int) -> bool:
        number = int(count[0, t, kv]) if isinstance(count, Tensor) else count
        entries = lists[0, t, kv].tolist()[: max(0, number)]
        return key // BLOCK in entries and (not causal or key <= p)

    return sees


def window_sees(w: int, causal: bool) -> Sees:
    return lambda p, kv, t, key: p - w < key <= p if causal else abs(key - p) < w


def compressed_sees(causal: bool) -> Sees:
    return lambda p, kv, t, i: not causal or i * D + L - 1 <= p


def exact_scores(p: Tensor, number: int) -> list[Fraction]:
    """The formula of section 5, in rationals."""
    scores = []
    for j in range(number):
        indices = [(BLOCK // D) * j + m - n for m in range(BLOCK // D) for n in range(L // D)]
        scores.append(sum((Fraction(float(p[i])) for i in indices if 0 <= i < len(p)), Fraction(0)))
    return scores


def brute_selection(
    q: Tensor, k_cmp: Tensor, tk: int, first_position: int, causal: bool, topk: int, init: int, local: int
) -> list[list[list[int]]]:
    """One sequence: ids [Tq][Hkv][topk]."""
    ids = []
    number = -(-tk // BLOCK)
    for t in range(len(q)):
        p, row = t + first_position, []
        for kv in range(HKV):
            mass = torch.zeros(len(k_cmp), dtype=torch.float64)
            seen = [i for i in range(len(k_cmp)) if compressed_sees(causal)(p, kv, t, i)]
            for h in range(kv * G, (kv + 1) * G):
                if seen:
                    mass[seen] += torch.softmax(k_cmp[seen, kv] @ q[t, h] / math.sqrt(DK), 0)
            scores = exact_scores(mass, number)
            candidates = [j for j in range(number) if not causal or j * BLOCK <= p]
            own = math.floor(p / BLOCK)
            forced = [j for j in candidates if j < init or own - local < j <= own]
            rest = sorted((j for j in candidates if j not in forced), key=lambda j: (-scores[j], j))
            chosen = sorted(forced + rest[: topk - len(forced)])
            row.append(chosen + [-1] * (topk - len(chosen)))
        ids.append(row)
    return ids


LENGTHS_Q, LENGTHS_K = (12, 0, 5, 1, 9), (12, 4, 17, 30, 0)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def packed_inputs(extra: int = 3) -> dict[str, Tensor]:
    """q, k, v with `extra` rows past the end, all NaN there."""
    total_q, total_k = sum(LENGTHS_Q) + extra, sum(LENGTHS_K) + extra
    q, k, v = (x[0] for x in qkv(total_q, total_k))
    for x, total in ((q, total_q), (k, total_k), (v, total_k)):
        x[total - extra :] = math.nan
    return {"q": q, "k": k, "v": v, "cu_q": cumulative(LENGTHS_Q), "cu_k": cumulative(LENGTHS_K)}


def gradients(o: Tensor, lse: Tensor, leaves: list[Tensor], do: Tensor, dlse: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad([o, lse], leaves, [do, dlse]))
