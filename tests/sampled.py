"""The oracle for sequences too long for it: sampled query rows, or all the rows that read one key block, each with its
own selected keys gathered into a short sequence.

Row (t, kv head h) becomes batch entry of a problem with Tq = 1, Tk = S * l', one kv head: its valid blocks side by side
in ascending order, so that the block that holds p stands last and the causal mask is the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accuracy import Results, baseline, compare, failures, natural_norms, oracle
from cases import Case
from inputs import Inputs
from torch import Tensor


def compact(made: Inputs, rows: Tensor, heads: Tensor) -> tuple[Inputs, Tensor]:
    """made has B = 1, equal lengths and is causal. rows, heads: int64 [R]. Returns the problem of R rows, and the
    sorted block ids [R, S] (the number of blocks where an entry is void)."""
    case = made.case
    l, G = case.block_size, case.Hq // case.Hkv
    T, blocks = made.k.shape[1], -(-made.k.shape[1] // case.block_size)
    ids = made.block_indices[0, rows, heads].long()  # [R, S]
    own = (rows // l)[:, None]
    ids = ids.where((ids >= 0) & (ids <= own), blocks).sort(-1).values
    ids[:, 1:] = ids[:, 1:].where(ids[:, 1:] != ids[:, :-1], blocks)
    ids = ids.sort(-1).values
    valid = ids < blocks
    tokens = (
        (ids.clamp_max(blocks - 1)[..., None] * l + torch.arange(l, device=rows.device)).flatten(1).clamp_max(T - 1)
    )
    count = valid.sum(-1)
    has_own = (ids == own).any(-1)
    position = torch.where(has_own, (count - 1) * l + rows % l, ids.shape[1] * l)
    slots = torch.arange(ids.shape[1], device=rows.device)
    group = heads[:, None] * G + torch.arange(G, device=rows.device)  # [R, G]
    small = replace(case, name="compact", B=len(rows), Tq=1, Tk=tokens.shape[1], Hq=G, Hkv=1)
    options = dict(made.options) | {"q_offset": position.int()}
    return (
        Inputs(
            small,
            q=made.q[0, rows[:, None], group][:, None],
            k=made.k[0, tokens, heads[:, None]][:, :, None],
            v=made.v[0, tokens, heads[:, None]][:, :, None],
            block_indices=slots.where(valid, -1)[:, None, None].int(),
            dout=made.dout[0, rows[:, None], group][:, None],
            dlse=made.dlse[0, rows[:, None], group][:, None],
            options=options,
        ),
        ids,
    )


def check_rows(made: Inputs, found: Results, rows: Tensor, chunk: int = 256) -> list[str]:
    """Failures of o, lse and dq at these rows, every head."""
    Hkv, G = made.case.Hkv, made.case.Hq // made.case.Hkv
    lines = []
    for part in rows.split(max(1, chunk // Hkv)):
        all_rows, heads = (
            x.flatten() for x in torch.meshgrid(part, torch.arange(Hkv, device=rows.device), indexing="ij")
        )
        small, _ = compact(made, all_rows, heads)
        mine = {
            name: found[name][0, part].unflatten(1, (Hkv, G)).flatten(0, 1)[:, None]
            for name in ("o", "lse", "dq")
            if name in found
        }
        lines += failures(small, mine, oracle(small), baseline(small), made.q.dtype)
    return lines


def check_key_block(made: Inputs, found: Results, block: int, head: int, chunk: int = 512) -> list[str]:
    """Failures of dk and dv in one key block of one kv head, summed over every row whose list holds the block."""
    l = made.case.block_size
    rows = (made.block_indices[0, :, head] == block).any(-1).nonzero()[:, 0]
    rows = rows[rows // l >= block]
    sums: dict[tuple[str, str], Tensor] = {}
    for part in rows.split(chunk):
        small, ids = compact(made, part, torch.full_like(part, head))
        slot = (ids == block).int().argmax(-1)
        keys = slot[:, None] * l + torch.arange(l, device=rows.device)
        for kind, results in (("ref", oracle(small)), ("base", baseline(small))):
            for name in ("dk", "dv"):
                x = results[name][torch.arange(len(part), device=rows.device)[:, None], keys].double().sum(0)
                sums[kind, name] = sums.get((kind, name), 0) + x
    lines = []
    natural = natural_norms(made)
    for name in ("dk", "dv"):
        mine = found[name][0, block * l : (block + 1) * l, head : head + 1]
        ref, base = (sums[kind, name][: len(mine)] for kind in ("ref", "base"))  # the last block may end early
        groups = torch.zeros(len(mine), dtype=torch.int64, device=rows.device)
        lines += compare(name, mine, ref, base, made.q.dtype, natural[name], groups)
    return [f"key block {block}, head {head}, {len(rows)} rows: {line}" for line in lines]


def long_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """B = 1, Tq = Tk, drawn on the device. Lists: the first block, the last two, the rest uniform over the past."""
    gen = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, D: int) -> Tensor:
        return torch.empty(1, case.Tq, heads, D, device=device, dtype=dtype).normal_(generator=gen)

    own = (torch.arange(case.Tq, device=device) // case.block_size)[:, None, None]
    uniform = torch.rand(case.Tq, case.Hkv, case.S, generator=gen, device=device)
    lists = (uniform * (own + 1)).int()
    lists[..., 0], lists[..., 1], lists[..., 2] = 0, (own - 1)[..., 0], own[..., 0]
    dlse = torch.empty(1, case.Tq, case.Hq, device=device, dtype=torch.float32).normal_(generator=gen)
    return Inputs(
        case,
        draw(case.Hq, case.Dk),
        draw(case.Hkv, case.Dk),
        draw(case.Hkv, case.Dv),
        lists[None],
        draw(case.Hq, case.Dv),
        dlse,
        {"block_size": case.block_size, "causal": True},
    )
