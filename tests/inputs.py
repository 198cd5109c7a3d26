"""Builds the tensors of a Case. Everything random is drawn on the CPU, so that a case is the same on every device."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import nsa_cuda
import torch
from cases import Case
from nsa_cuda import compressed_cu_seqlens
from targets import Target
from torch import Tensor

SEED = 0  # conftest sets it from --seed

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass
class Inputs:
    """Arguments of one attention operation and the gradients of its results."""

    case: Case
    q: Tensor  # [B,Tq,Hq,Dk] or [total_q,Hq,Dk]
    k: Tensor  # [B,Tk,Hkv,Dk]
    v: Tensor  # [B,Tk,Hkv,Dv]
    block_indices: Tensor | None  # [B,Tq,Hkv,S]; selected attention
    dout: Tensor  # [B,Tq,Hq,Dv]
    dlse: Tensor  # [B,Tq,Hq]
    options: dict[str, Any] = field(default_factory=dict)  # the keyword arguments that the reference shares
    hints: dict[str, Any] = field(default_factory=dict)  # max_seqlen_*: not the reference's

    @property
    def operation(self) -> str:
        """The function's name, the same in nsa_cuda, its reference and the baseline."""
        return self.case.operation

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """Positional arguments after q, k, v."""
        return () if self.block_indices is None else (self.block_indices,)

    def function(self, module: Any) -> Any:
        return getattr(module, self.operation)

    def attend(self, leaves: Sequence[Tensor], backend: str | None, **options: Any) -> Any:
        """The public function on other q, k, v."""
        return self.function(nsa_cuda)(*leaves, *self.lists, backend=backend, **{**self.options, **options})

    def key_offsets(self) -> Tensor | None:
        """Where the rows of k of each sequence begin, [B + 1]; None: batched."""
        offsets = self.options.get("cu_seqlens_k")
        if offsets is None or "kernel_size" not in self.options:
            return offsets
        return compressed_cu_seqlens(offsets, self.options["kernel_size"], self.options["kernel_stride"])


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1_000_003 * SEED)


def _sequences(case: Case) -> list[tuple[int, int, int]]:
    """(rows, first position, blocks) of each run of query rows that share a sequence."""
    n_seq = len(case.seqlens_q) if case.packed else case.B
    lengths_q = list(case.seqlens_q) if case.packed else [case.Tq] * n_seq
    lengths_k = list(case.seqlens_k or ()) if case.packed else [case.Tk] * n_seq
    runs = []
    for b, (tq, tk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        offset = case.q_offset[b] if isinstance(case.q_offset, tuple) else case.q_offset
        runs.append((tq, tk - tq if offset is None else offset, -(-tk // case.block_size)))
    if case.pad_q:
        runs.append((case.pad_q, 0, 8))
    return runs


def _subset(case: Case, rows: int, first: int, blocks: int, gen: torch.Generator) -> Tensor:
    """Random distinct blocks for each row, ascending, -1 after them; under causal those that start at or before p."""
    S, Hkv = case.S, case.Hkv
    scores = torch.rand(rows, Hkv, blocks, generator=gen, dtype=torch.float64)
    own = (torch.arange(rows, dtype=torch.int64) + first) // case.block_size
    ids = torch.arange(blocks)
    if case.causal:
        scores = scores + 10.0 * (ids > own[:, None])[:, None, :]
    chosen = scores.argsort(-1)[..., :S]
    if case.causal:
        chosen = torch.where(chosen > own[:, None, None], blocks, chosen)
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen >= blocks, -1, chosen)
    return torch.nn.functional.pad(chosen, (0, S - chosen.shape[-1]), value=-1)


def _wild(case: Case, rows: int, first: int, blocks: int, gen: torch.Generator) -> Tensor:
    """Half the entries valid, in any order and with duplicates; the rest everything that an integer can be."""
    shape = (rows, case.Hkv, case.S)
    good = torch.randint(0, max(blocks, 1), shape, generator=gen)
    pool = [-1, -2, INT32_MIN, INT32_MAX, INT32_MAX - 1, blocks, blocks + 1, 1 << 20, -(1 << 20)]
    # Times the block size these reach, or wrap around in 32 bits to, the start of the sequence.
    pool += [INT32_MAX // case.block_size, (1 << 32) // case.block_size, (1 << 31) // case.block_size]
    if case.int64:
        # The low 32 bits of most of these are a valid block: truncation would show.
        pool += [1 << 32, (1 << 32) + 1, -(1 << 32), -(1 << 32) + 1, 1 << 40, (1 << 62) + 1, -(1 << 63), (1 << 63) - 1]
        # These wrap around to a valid position when multiplied by a power-of-two block size in 64 bits.
        pool += [(1 << 63) // case.block_size * 2 % (1 << 63), (1 << 60), (1 << 59) + 1]
    bad = torch.tensor(pool)[torch.randint(0, len(pool), shape, generator=gen)]
    return torch.where(torch.rand(shape, generator=gen) < 0.5, good, bad)


def _entries(case: Case, rows: int, first: int, blocks: int, gen: torch.Generator) -> Tensor:
    """[rows, Hkv, S] int64."""
    shape = (rows, case.Hkv, case.S)
    if case.indices == "all":
        ids = torch.arange(case.S).where(torch.arange(case.S) < blocks, -1)
        return ids.expand(shape).clone()
    if case.indices == "empty":
        return torch.full(shape, -1)
    if case.indices == "wild":
        return _wild(case, rows, first, blocks, gen)
    if case.indices == "only_future":
        own = (torch.arange(rows) + first) // case.block_size
        return (own[:, None, None] + 1 + torch.arange(case.S)).expand(shape).clone()
    chosen = _subset(case, rows, first, blocks, gen)
    if case.indices == "random":
        return chosen
    if case.indices == "sink":  # every query reads block 0: one key block with a list as long as the sequence
        if case.S:
            chosen[..., -1] = 0
        return chosen
    if case.indices == "unsorted":
        return chosen.gather(-1, torch.rand(shape, generator=gen).argsort(-1))
    if case.indices == "duplicates":
        return chosen.gather(-1, torch.randint(0, max(1, case.S // 2), shape, generator=gen))
    if case.indices == "some_empty":
        return torch.where(torch.rand(rows, case.Hkv, 1, generator=gen) < 0.5, -1, chosen)
    if case.indices == "future":
        extra = torch.randint(0, max(blocks, 1), shape, generator=gen)
        return torch.where(torch.rand(shape, generator=gen) < 0.5, extra, chosen)
    if case.indices == "invalid_first":
        return chosen.flip(-1).where(torch.arange(case.S) % 2 == 1, -7)
    raise AssertionError(case.indices)


def block_indices(case: Case, gen: torch.Generator) -> Tensor:
    parts = [_entries(case, rows, first, blocks, gen) for rows, first, blocks in _sequences(case)]
    flat = torch.cat(parts) if parts else torch.zeros(0, case.Hkv, case.S, dtype=torch.int64)
    if not case.packed:
        flat = flat.view(case.B, case.Tq, case.Hkv, case.S)
    return flat if case.int64 else flat.to(torch.int32)


def _outside(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x [.., T, H, D] (packed: [T, H, D]) behind other strides. The last dim stays contiguous."""
    if layout == "contiguous" or x.numel() == 0:
        return x
    t_dim = x.dim() - 3
    if layout == "heads_first":
        return x.transpose(t_dim, t_dim + 1).contiguous().transpose(t_dim, t_dim + 1)
    shape = list(x.shape)
    if layout == "sliced_heads":  # as a slice of a fused qkv projection
        shape[-2] += 3
        buffer = _outside(tuple(shape), x)
        buffer[..., 2:-1, :] = x
        return buffer[..., 2:-1, :]
    if layout == "inside_nan":  # NaN before and after the rows, and beyond the head dim
        shape[t_dim] += 70
        shape[-1] += 16
        buffer = _outside(tuple(shape), x)
        view = buffer.narrow(t_dim, 3, x.shape[t_dim])[..., 8 : 8 + x.shape[-1]]
        return view.copy_(x)
    if layout == "odd_strides":  # no stride and no pointer a multiple of 16 bytes
        shape[-1] += 1
        buffer = _outside(tuple(shape), x)
        return buffer[..., 1:].copy_(x)
    if layout == "expanded":  # one batch entry, or one head, for all
        if x.dim() == 4:
            return x[:1].contiguous().expand(x.shape)
        return x[:, :1].contiguous().expand(x.shape)
    raise AssertionError(layout)


def _lay_out_indices(x: Tensor, layout: str) -> Tensor:
    if layout == "heads_first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced_heads":
        return torch.stack([x, torch.full_like(x, 1 << 30)], -1)[..., 0]
    if layout == "inside_nan":
        return torch.nn.functional.pad(x, (3, 5), value=0)[..., 3 : 3 + x.shape[-1]]
    if layout == "expanded" and x.numel():
        return x[:1].expand(x.shape)
    return x


def _counts(case: Case, shape: tuple[int, ...], gen: torch.Generator) -> Any:
    if case.block_counts == "zero":
        return torch.zeros(shape, dtype=torch.int32)
    if case.block_counts == "random":  # clamped to [0, S] by the operation
        counts = torch.randint(-3, case.S + 4, shape, generator=gen, dtype=torch.int32)
        extremes = torch.tensor([INT32_MIN, INT32_MAX], dtype=torch.int32)[torch.randint(0, 2, shape, generator=gen)]
        return torch.where(torch.rand(shape, generator=gen) < 0.1, extremes, counts)
    return case.block_counts


def make(case: Case, target: Target) -> Inputs:
    if case.operation != "selected_attention":
        from range_inputs import make as make_range

        return make_range(case, target)
    gen = generator(case.name)
    lead_q: tuple[int, ...] = (case.B, case.Tq)
    lead_k: tuple[int, ...] = (case.B, case.Tk)
    if case.packed:
        lead_q, lead_k = (sum(case.seqlens_q or ()) + case.pad_q,), (sum(case.seqlens_k or ()) + case.pad_k,)

    def draw(lead: tuple[int, ...], *rest: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*lead, *rest, generator=gen, dtype=torch.float64) * std).to(target.dtype)

    q = draw(lead_q, case.Hq, case.Dk, std=case.magnitude)
    k = draw(lead_k, case.Hkv, case.Dk, std=case.magnitude)
    v = draw(lead_k, case.Hkv, case.Dv)
    dout = draw(lead_q, case.Hq, case.Dv)
    dlse = torch.randn(*lead_q, case.Hq, generator=gen, dtype=torch.float64).to(target.lse_dtype)
    if case.nan_outside and case.packed:
        inside_q, inside_k = sum(case.seqlens_q or ()), sum(case.seqlens_k or ())
        for x, inside in ((q, inside_q), (k, inside_k), (v, inside_k)):
            x[inside:] = float("nan")
    indices = block_indices(case, gen)

    options: dict[str, Any] = {"block_size": case.block_size, "causal": case.causal}
    if case.softmax_scale is not None:
        options["softmax_scale"] = case.softmax_scale
    if case.block_counts is not None:
        options["block_counts"] = _counts(case, (*lead_q, case.Hkv), gen)
    if case.q_offset is not None:
        is_tuple = isinstance(case.q_offset, tuple)
        options["q_offset"] = torch.tensor(case.q_offset, dtype=torch.int32) if is_tuple else case.q_offset
    if case.packed:
        options["cu_seqlens_q"] = cu_seqlens(case.seqlens_q or ())
        options["cu_seqlens_k"] = cu_seqlens(case.seqlens_k or ())
    options = {n: x.to(target.device) if isinstance(x, Tensor) else x for n, x in options.items()}
    hints = {} if case.max_seqlen is None else dict(zip(("max_seqlen_q", "max_seqlen_k"), case.max_seqlen, strict=True))

    q, k, v, dout = (lay_out(x.to(target.device), case.layout) for x in (q, k, v, dout))
    indices = _lay_out_indices(indices.to(target.device), case.layout)
    made = Inputs(case, q, k, v, indices, dout, dlse.to(target.device), options, hints)
    if case.nan_outside:
        _spoil_dead_gradients(made)
    return made


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _spoil_dead_gradients(made: Inputs) -> None:
    """NaN in do and dlse of rows that see no key: whatever they hold is ignored (spec section 3)."""
    from bruteforce import visible_keys

    dead = ~visible_keys(made).any(-1)  # [.., Tq, Hkv]
    dead = dead.repeat_interleave(made.q.shape[-2] // made.k.shape[-2], -1).to(made.q.device)
    made.dlse[dead] = float("nan")
    made.dout[dead] = float("nan")
