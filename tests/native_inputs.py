"""Cases of the whole of NSA: their tensors, float64 oracle, baseline, and the accuracy rule applied to all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import nsa_cuda
import torch
from accuracy import Results, compare, row_norm
from inputs import cu_seqlens, generator
from nsa_cuda import reference
from nsa_cuda.reference import baseline as ideal
from nsa_cuda.reference.compression import num_compressed
from targets import Target
from torch import Tensor

LEAVES = ("q", "k", "v", "gates", "k_cmp", "v_cmp", "k_win", "v_win")


@dataclass(frozen=True)
class NativeCase:
    name: str
    B: int = 2
    Tq: int = 150
    Tk: int = 150
    Hq: int = 4
    Hkv: int = 2
    Dk: int = 64
    Dv: int = 64
    kernel_size: int = 8
    kernel_stride: int = 4
    block_size: int = 16
    topk: int = 4
    window_size: int = 20
    causal: bool = True
    q_offset: int | tuple[int, ...] | None = None
    shared: bool = False
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None
    pad: int = 0  # packed: rows past the last sequence, all NaN
    float_gates: bool = False
    signed_gates: bool = False  # of both signs, and 0 for a tenth of them
    gate_scale: float = 1.0

    @property
    def leaves(self) -> tuple[str, ...]:
        return LEAVES[:6] if self.shared else LEAVES

    @property
    def dense(self) -> bool:
        return self.seqlens_k is None and self.topk * self.block_size >= self.Tk


@dataclass
class NativeInputs:
    case: NativeCase
    tensors: dict[str, Tensor]  # by the names of LEAVES
    dout: Tensor
    options: dict[str, Any]

    def run(self, backend: str | None = None, **options: Any) -> Results:
        """o and the gradient of every leaf, as d + name."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.tensors.items()}
        o = call(nsa_cuda, leaves, **{**self.options, "backend": backend, **options})
        return results(o, leaves, self.dout)

    def lists(self, backend: str | None = None) -> Tensor:
        """The lists that the call chooses, which a dense one doesn't look for: there they hold every block."""
        case, x, options = self.case, self.tensors, dict(self.options)
        if case.dense:
            rows = (*x["q"].shape[:-2], case.Hkv, case.topk)
            return torch.arange(case.topk, dtype=torch.int32, device=x["q"].device).expand(rows)
        selection = {name: options.pop(name) for name in ("block_size", "topk")}
        del options["window_size"]
        if case.seqlens_k is None:
            options["seqlen_k"] = case.Tk
        _, lse = nsa_cuda.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], return_lse=True, **options)
        return nsa_cuda.select_blocks(x["q"], x["k_cmp"], lse, **selection, **options)


def call(module: Any, x: dict[str, Tensor], **options: Any) -> Tensor:
    keys = {name: x[name] for name in LEAVES[4:] if name in x}
    o: Tensor = module.native_sparse_attention(x["q"], x["k"], x["v"], x["gates"], **keys, **options)
    return o


def results(o: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> Results:
    gradients = torch.autograd.grad(o, list(leaves.values()), dout.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def make(case: NativeCase, target: Target) -> NativeInputs:
    gen = generator(case.name)
    options: dict[str, Any] = {
        name: getattr(case, name)
        for name in ("kernel_size", "kernel_stride", "block_size", "topk", "window_size", "causal")
    }
    lead_q: tuple[int, ...] = (case.B, case.Tq)
    lead_k: tuple[int, ...] = (case.B, case.Tk)
    rows = num_compressed(case.Tk, case.kernel_size, case.kernel_stride)
    lead_cmp: tuple[int, ...] = (case.B, rows)
    if case.seqlens_q is not None and case.seqlens_k is not None:
        lead_q, lead_k = (sum(case.seqlens_q) + case.pad,), (sum(case.seqlens_k) + case.pad,)
        numbers = [num_compressed(t, case.kernel_size, case.kernel_stride) for t in case.seqlens_k]
        lead_cmp = (lead_k[0] // case.kernel_stride,)
        options |= {"cu_seqlens_q": cu_seqlens(case.seqlens_q), "cu_seqlens_k": cu_seqlens(case.seqlens_k)}
    if case.q_offset is not None:
        given = case.q_offset
        options["q_offset"] = torch.tensor(given, dtype=torch.int32) if isinstance(given, tuple) else given

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(target.dtype)

    x = {"q": draw(*lead_q, case.Hq, case.Dk)}
    for branch, lead in (("", lead_k), ("_cmp", lead_cmp), ("_win", lead_k)):
        x["k" + branch], x["v" + branch] = draw(*lead, case.Hkv, case.Dk), draw(*lead, case.Hkv, case.Dv)
    gates = torch.rand(*lead_q, case.Hq, 3, generator=gen, dtype=torch.float64)
    if case.signed_gates:
        zero = torch.rand(*gates.shape, generator=gen) < 0.1
        gates = (3 * gates - 1.5).masked_fill(zero, 0.0)
    x["gates"] = (case.gate_scale * gates).to(torch.float32 if case.float_gates else target.dtype)
    dout = draw(*lead_q, case.Hq, case.Dv)
    if case.pad:
        for name, tensor in x.items():
            end = sum(numbers) if name.endswith("_cmp") else len(tensor) - case.pad
            tensor[end:] = math.nan
        dout[len(dout) - case.pad :] = math.nan
    options = {name: y.to(target.device) if isinstance(y, Tensor) else y for name, y in options.items()}
    tensors = {name: x[name].to(target.device) for name in case.leaves}
    return NativeInputs(case, tensors, dout.to(target.device), options)


def oracle(made: NativeInputs, lists: Tensor) -> Results:
    leaves = {name: x.detach().double().requires_grad_() for name, x in made.tensors.items()}
    return results(call(reference, leaves, block_indices=lists, **made.options), leaves, made.dout)


def baseline(made: NativeInputs, lists: Tensor) -> Results:
    """Branch by branch what an ideal kernel returns; gated, ungated and added in float32 and rounded once."""
    x, case, dtype = made.tensors, made.case, made.tensors["q"].dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shared = {n: y for n, y in made.options.items() if n in ("causal", "q_offset", "cu_seqlens_q", "cu_seqlens_k")}
    windows = ("k", "v") if case.shared else ("k_win", "v_win")
    compression = {"kernel_size": case.kernel_size, "kernel_stride": case.kernel_stride}
    if case.seqlens_k is None:
        compression["seqlen_k"] = case.Tk
    branches: list[tuple[str, tuple[str, str], tuple[Tensor, ...], dict[str, int]]] = [
        ("compressed_attention", ("k_cmp", "v_cmp"), (), compression),
        ("selected_attention", ("k", "v"), (lists,), {"block_size": case.block_size}),
        ("sliding_window_attention", windows, (), {"window_size": case.window_size}),
    ]
    g, dout = x["gates"].to(exact), made.dout.to(exact)
    sums: dict[str, Tensor] = {"o": torch.zeros_like(dout)}
    dgates = []
    for c, (name, keys, arguments, options) in enumerate(branches):
        inputs = (x["q"].detach(), *(x[key].detach() for key in keys))
        o, lse = getattr(ideal, name)(*inputs, *arguments, **options, **shared)
        live = (lse != -math.inf).unsqueeze(-1)
        gate = g[..., c, None]
        sums["o"] += torch.where(live, gate * o.to(exact), 0.0)
        dgates.append(torch.where(live, dout * o.to(exact), 0.0).sum(-1))
        do = (gate * dout).to(dtype)
        gradients = getattr(ideal, name + "_backward")(*inputs, *arguments, o, lse, do, **options, **shared)
        for key, gradient in zip(("dq", *(f"d{key}" for key in keys)), gradients, strict=True):
            sums[key] = sums.get(key, 0.0) + gradient.to(exact)
    found = {name: total.to(dtype) for name, total in sums.items()}
    return {**found, "dgates": torch.stack(dgates, -1).to(x["gates"].dtype)}


def check(made: NativeInputs, target: Target, found: Results | None = None) -> None:
    """The accuracy rule for o and every gradient."""
    case, x = made.case, made.tensors
    found = made.run(target.backend) if found is None else found
    lists = made.lists()
    ref, base = oracle(made, lists), baseline(made, lists)
    q, k, v, dout = (row_norm(y) for y in (x["q"], x["k"], x["v"], made.dout))
    ds = dout * v / math.sqrt(case.Dk)
    natural = {"o": v, "q": ds * k, "k": ds * q, "v": dout, "gates": dout * v}
    lines = []
    for name, y in found.items():
        assert y.dtype == (x["gates"].dtype if name == "dgates" else target.dtype)
        kind = "o" if name == "o" else name.split("_")[0][1:]
        groups = None
        if kind in ("k", "v"):
            groups = torch.arange(y.shape[-3], device=y.device) // case.block_size
        rule = "o" if kind == "o" else "dq" if kind == "gates" else f"d{kind}"
        failed = compare(rule, y, ref[name], base[name], target.dtype, natural[kind], groups)
        lines += [f"{name}: {line}" for line in failed]
    assert not lines, f"{case}\n" + "\n".join(lines)
