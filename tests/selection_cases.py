"""Named cases of select_blocks, and the rule by which a result passes.

The rule: ids equal those of an exhaustive float64 selection unless the scores in question differ by less than rounding.
Everything else is exact: how many ids, their order, the padding, the forced blocks, who is a candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import nsa_cuda
import torch
from bruteforce import _rows, _spans, visible_keys
from inputs import Inputs
from nsa_cuda import reference
from range_cases import RangeCase
from range_inputs import make as make_range
from targets import CUDA_BLOCK_SIZES, Target
from torch import Tensor


@dataclass(frozen=True)
class SelectionCase(RangeCase):
    mask: str = "compressed"
    Tq: int = 150
    Tk: int = 150
    block_size: int = 16  # l'
    topk: int = 4  # n
    init_blocks: int = 1
    local_blocks: int = 2

    def runs_on(self, target: Target) -> bool:
        return super().runs_on(target) and (not target.is_cuda or self.block_size in CUDA_BLOCK_SIZES)


def case(name: str, **options: object) -> SelectionCase:
    return SelectionCase(name, **options)  # type: ignore[arg-type]


PAPER = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64}

SIZES = [
    case(f"l{l}_d{d}_block{block}_{'causal' if causal else 'full'}", Tq=90, Tk=397, kernel_size=l, kernel_stride=d,
         block_size=block, causal=causal)
    for l, d, block in (
        (32, 16, 64), (16, 16, 16), (16, 16, 64), (64, 16, 32), (32, 8, 16), (48, 16, 48), (128, 16, 64), (64, 32, 128),
        (8, 4, 16), (32, 16, 32), (8, 4, 8), (4, 1, 3), (6, 2, 10), (1, 1, 1), (7, 7, 14), (40, 8, 8), (150, 1, 64),
        (16, 1, 16), (8, 2, 200),
    )
    for causal in (True, False)
]  # fmt: skip
BUDGETS = [
    case(f"topk{topk}_init{init}_local{local}_{'causal' if causal else 'full'}", Tk=260, topk=topk, init_blocks=init,
         local_blocks=local, causal=causal)
    for topk, init, local in (
        (4, 1, 2), (3, 0, 0), (2, 2, 0), (2, 0, 2), (20, 1, 3), (1, 0, 1), (1, 0, 0), (64, 1, 2), (9, 4, 5), (12, 1, 1),
    )
    for causal in (True, False)
]  # fmt: skip
GROUPS = [
    case(f"g{G}", Tq=100, Tk=300, Hq=2 * G, Hkv=2, causal=G % 8 != 0)
    for G in (1, 2, 4, 6, 8, 12, 16, 20, 32, 48, 64, 80)
]
GROUPS += [
    case("paper", Tq=700, Tk=700, Hq=16, Hkv=1, Dk=192, Dv=128, topk=6, **PAPER),
    case("d128_g16", Tq=300, Tk=900, Hq=32, Hkv=2, Dk=128, Dv=128, topk=8, **PAPER),
    case("d256_g5", Tq=130, Tk=500, Hq=10, Hkv=2, Dk=256, Dv=256),
    case("d256_g1", Tq=130, Tk=1200, Hq=2, Hkv=2, Dk=256, Dv=256, topk=16),  # keys of one stage fit into shared memory
    case("d192_g1", Tq=130, Tk=1200, Hq=2, Hkv=2, Dk=192, Dv=128, topk=16),
    case("g16_topk70", Tq=70, Tk=2000, Hq=16, Hkv=1, topk=70),
    case("g32_topk300", Tq=40, Tk=8000, Hq=32, Hkv=1, topk=300),
    case("d33", Tq=70, Tk=200, Dk=33, Dv=1),
    case("sharp", Tk=400, magnitude=2.5),
    case("flat", Tk=400, magnitude=0.1),
    case("scale_given", Tk=400, softmax_scale=-0.4),
]
LENGTHS = [
    case("ragged", B=2, Tq=77, Tk=203),
    case("tq_longer", B=2, Tq=150, Tk=70),
    case("decode", B=4, Tq=1, Tk=1000, Hq=16, Hkv=2, topk=16, **PAPER),
    case("long", Tq=60, Tk=6000, topk=16, block_size=32),
    case("long_full", Tq=60, Tk=6000, topk=16, block_size=32, causal=False),
    case("tk_less_than_l", Tq=30, Tk=30, kernel_size=32, kernel_stride=16, topk=3),
    case("tk_less_than_l_many_blocks", Tq=120, Tk=120, kernel_size=128, kernel_stride=16, topk=3),
    case("tk_equals_l", Tq=32, Tk=32, kernel_size=32, kernel_stride=16, topk=3),
    case("batch_0", B=0),
    case("tq_0", Tq=0),
    case("tk_0", Tq=20, Tk=0),
    case("tk_0_full", Tq=20, Tk=0, causal=False),
    case("extra_rows", B=2, Tk=203, extra_rows=40, nan_outside=True),
    case("many_batches", B=21, Tq=5, Tk=100),
]
POSITIONS = [
    case("offset_0", Tk=260, q_offset=0),
    case("offset_negative", Tk=260, q_offset=-40),
    case("offset_negative_full", Tk=260, q_offset=-40, causal=False),
    case("offset_int32_min", Tk=260, q_offset=-(2**31)),
    case("offset_past_the_end", Tk=260, q_offset=200),
    case("offset_past_the_end_full", Tk=260, q_offset=200, causal=False),
    case("offset_int32_max", Tk=260, q_offset=2**31 - 1),
    case("offset_tensor", B=3, Tq=50, Tk=260, q_offset=(0, 177, -20)),
]
PACKED = [
    case("packed", seqlens_q=(64, 300, 64), seqlens_k=(64, 300, 64)),
    case("packed_ragged", seqlens_q=(1, 70, 33, 129, 0, 3), seqlens_k=(1, 170, 33, 129, 5, 2), pad_q=9, pad_k=20,
         nan_outside=True),
    case("packed_g16", seqlens_q=(1, 70, 33, 129, 0, 3), seqlens_k=(1, 1170, 33, 729, 5, 2), pad_q=9, pad_k=20, Hq=32,
         Hkv=2, nan_outside=True),
    case("packed_full", seqlens_q=(1, 70, 33, 129), seqlens_k=(1, 170, 33, 129), causal=False),
    case("packed_shorter_than_a_block", seqlens_q=(3, 9, 0, 200), seqlens_k=(3, 9, 12, 200), kernel_size=32,
         kernel_stride=16, block_size=64, topk=3),
    case("packed_offsets", seqlens_q=(30, 0, 55), seqlens_k=(64, 10, 300), q_offset=(10, 3, 200)),
    case("packed_only_padding", seqlens_q=(0,), seqlens_k=(0,), pad_q=20, pad_k=20, nan_outside=True),
    case("packed_no_sequences", seqlens_q=(), seqlens_k=()),
]  # fmt: skip
LAYOUTS = [
    case(f"{layout}_layout", B=2, Tk=203, layout=layout)
    for layout in ("heads_first", "sliced_heads", "inside_nan", "odd_strides", "expanded")
]
# The smallest shapes that reach every path, for compute-sanitizer.
SANITIZER = [case(f"small_g{G}", Tq=30, Tk=400, Hq=G, Hkv=1, topk=3) for G in (3, 16, 32, 80)]
SANITIZER += [
    case(f"small_d{D}", Tq=9, Tk=600, Hq=16, Hkv=1, Dk=D, Dv=128 if D == 192 else D) for D in (64, 128, 192, 256)
]
SANITIZER += [
    case("small_other_pooling", Tq=20, Tk=300, Hq=4, Hkv=1, kernel_size=16, block_size=32),
    case("small_workspace_lists", Tq=9, Tk=5000, Hq=16, Hkv=1, topk=280),
    case("small_packed", seqlens_q=(9, 0, 20), seqlens_k=(9, 4, 330), pad_q=5, pad_k=7, Hq=16, Hkv=1, nan_outside=True),
]
EVERYTHING = SIZES + BUDGETS + GROUPS + LENGTHS + POSITIONS + PACKED + LAYOUTS


def options_of(made: Inputs) -> dict[str, Any]:
    """The keyword arguments of select_blocks."""
    c = made.case
    names = ("block_size", "topk", "init_blocks", "local_blocks")
    return {**made.options, **{name: getattr(c, name) for name in names}}


def make(case: SelectionCase, target: Target) -> tuple[Inputs, Tensor]:
    """The tensors, and the oracle's lse."""
    made = make_range(replace(case, lse=True), target)
    inputs = [x.double() for x in (made.q, made.k, made.v)]
    _, lse = reference.compressed_attention(*inputs, return_lse=True, **made.options)
    return made, lse.to(target.lse_dtype)


def select(made: Inputs, lse: Tensor, backend: str | None) -> Tensor:
    return nsa_cuda.select_blocks(made.q, made.k, lse, backend=backend, **options_of(made))


def exhaustive_scores(made: Inputs, lse: Tensor, span: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor]:
    """One sequence, float64 on the CPU: scores [Tq, Hkv, blocks] and the largest |score| before the softmax [Tq, Hkv].

    From the words of the specification: a key gives its mass to a block in proportion to the tokens they share.
    """
    first_q, tq, first_k, keys, tokens = span
    c = made.case
    Hkv, G = made.k.shape[-2], made.q.shape[-2] // made.k.shape[-2]
    q = made.q.detach().double().cpu().flatten(0, -3).unflatten(1, (Hkv, G))[first_q : first_q + tq]
    k = made.k.detach().double().cpu().flatten(0, -3)[first_k : first_k + keys]
    row_lse = lse.double().cpu().flatten(0, -2).unflatten(1, (Hkv, G))[first_q : first_q + tq]
    seen = visible_keys(made).flatten(0, -3)
    seen = seen[first_q : first_q + tq, :, first_k : first_k + keys]
    s = made.options.get("softmax_scale", 1.0 / math.sqrt(q.shape[-1])) * torch.einsum("thgd,khd->thgk", q, k)
    p = torch.where(seen[:, :, None], (s - row_lse[..., None]).exp(), 0.0)
    p = p.masked_fill(row_lse[..., None] == -math.inf, 0.0)
    start = torch.arange(keys) * c.kernel_stride
    block = torch.arange(-(-tokens // c.block_size)) * c.block_size
    shared = torch.minimum(start[:, None] + c.kernel_size, block + c.block_size) - torch.maximum(start[:, None], block)
    scores = p.sum(2) @ (shared.clamp_min(0) / c.kernel_stride).double()
    largest = s.abs().masked_fill(~seen[:, :, None], 0.0).flatten(2)
    return scores, largest.amax(-1) if largest.shape[-1] else largest.sum(-1)


def failures(made: Inputs, lse: Tensor, ids: Tensor) -> list[str]:
    """What is wrong with the ids, one line each."""
    c = made.case
    Hkv = made.k.shape[-2]
    if ids.dtype != torch.int32 or ids.shape != (*made.q.shape[:-2], Hkv, c.topk):
        return [f"{ids.dtype} {tuple(ids.shape)}"]
    flat = ids.cpu().flatten(0, -3)
    eps = torch.finfo(lse.dtype).eps
    lines, inside = [], torch.zeros(len(flat), dtype=torch.bool)
    position = {row: p for row, p, _, _ in _rows(made)}
    for span in _spans(made):
        if span[1] == 0:
            continue
        scores, largest = exhaustive_scores(made, lse, span)
        slack = eps * (64 + 16 * largest)
        for t in range(span[1]):
            row = span[0] + t
            inside[row] = True
            for h in range(Hkv):
                wrong = row_failure(c, flat[row, h].tolist(), scores[t, h].tolist(), position[row], float(slack[t, h]))
                if wrong:
                    lines.append(f"row {row}, kv head {h}: {wrong}")
    if not (flat[~inside] == -1).all():
        lines.append("a row outside every sequence has blocks")
    return lines


def row_failure(c: SelectionCase, ids: list[int], scores: list[float], p: int, slack: float) -> str:
    """Empty when the ids of one row pass."""
    own = math.floor(p / c.block_size)
    candidates = [j for j in range(len(scores)) if not c.causal or j * c.block_size <= p]
    forced = {j for j in candidates if j < c.init_blocks or own - c.local_blocks < j <= own}
    found = [j for j in ids if j != -1]
    if ids != found + [-1] * (c.topk - len(found)) or found != sorted(set(found)):
        return f"not ascending and padded: {ids}"
    if len(found) != min(c.topk, len(candidates)):
        return f"{len(found)} blocks of {len(candidates)} candidates"
    if not set(found) <= set(candidates) or not forced <= set(found):
        return f"{ids}: candidates {candidates[:3]}..{candidates[-3:]}, forced {sorted(forced)}"
    free = [j for j in found if j not in forced]
    rest = [j for j in candidates if j not in found]
    if free and rest:
        worst, best = min(free, key=lambda j: (scores[j], -j)), max(rest, key=lambda j: (scores[j], -j))
        if scores[best] > scores[worst] + slack * scores[best]:
            return f"took {worst} ({scores[worst]:.9g}), left {best} ({scores[best]:.9g})"
    return ""
