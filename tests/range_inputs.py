"""Builds the tensors of a RangeCase, as inputs.py does those of a Case."""

from __future__ import annotations

from typing import Any

import torch
from bruteforce import visible_keys
from inputs import Inputs, cu_seqlens, generator, lay_out
from range_cases import RangeCase
from targets import Target
from torch import Tensor


def key_rows(case: RangeCase) -> tuple[int, int]:
    """(rows that are some sequence's key, all rows) of k: of one batch entry, or of a packed call."""
    if case.packed:
        inside = sum(case.num_keys(tokens) for tokens in case.seqlens_k or ())
        return inside, inside + case.pad_k
    inside = case.num_keys(case.Tk)
    return inside, inside + case.extra_rows


def options_of(case: RangeCase, device: str) -> dict[str, Any]:
    """The keyword arguments that the reference shares."""
    options: dict[str, Any] = {"causal": case.causal}
    if case.mask == "window":
        options["window_size"] = case.window_size
    else:
        options |= {"kernel_size": case.kernel_size, "kernel_stride": case.kernel_stride}
        if not case.packed:
            options["seqlen_k"] = case.Tk
    if case.softmax_scale is not None:
        options["softmax_scale"] = case.softmax_scale
    if case.q_offset is not None:
        is_tuple = isinstance(case.q_offset, tuple)
        options["q_offset"] = torch.tensor(case.q_offset, dtype=torch.int32) if is_tuple else case.q_offset
    if case.packed:
        options["cu_seqlens_q"] = cu_seqlens(case.seqlens_q or ())
        options["cu_seqlens_k"] = cu_seqlens(case.seqlens_k or ())
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}


def make(case: RangeCase, target: Target) -> Inputs:
    gen = generator(case.name)
    inside_k, rows_k = key_rows(case)
    inside_q = sum(case.seqlens_q or ()) if case.packed else case.Tq
    lead_q: tuple[int, ...] = (inside_q + case.pad_q,) if case.packed else (case.B, case.Tq)
    lead_k: tuple[int, ...] = (rows_k,) if case.packed else (case.B, rows_k)

    def draw(lead: tuple[int, ...], *rest: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*lead, *rest, generator=gen, dtype=torch.float64) * std).to(target.dtype)

    q = draw(lead_q, case.Hq, case.Dk, std=case.magnitude)
    k = draw(lead_k, case.Hkv, case.Dk, std=case.magnitude)
    v = draw(lead_k, case.Hkv, case.Dv)
    dout = draw(lead_q, case.Hq, case.Dv)
    dlse = torch.randn(*lead_q, case.Hq, generator=gen, dtype=torch.float64).to(target.lse_dtype)
    if case.nan_outside:
        for x, inside in ((q, inside_q), (k, inside_k), (v, inside_k)):
            x[..., inside:, :, :] = float("nan")
    options = options_of(case, target.device)
    hints = {} if case.max_seqlen is None else dict(zip(("max_seqlen_q", "max_seqlen_k"), case.max_seqlen, strict=True))
    q, k, v, dout = (lay_out(x.to(target.device), case.layout) for x in (q, k, v, dout))
    made = Inputs(case, q, k, v, None, dout, dlse.to(target.device), options, hints)
    if case.nan_outside:
        # Whatever do and dlse hold on rows that see no key is ignored.
        dead = ~visible_keys(made).any(-1).repeat_interleave(case.Hq // case.Hkv, -1).to(target.device)
        made.dlse[dead] = float("nan")
        made.dout[dead] = float("nan")
    return made
