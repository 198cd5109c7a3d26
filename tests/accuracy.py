"""The accuracy rule of specification section 9, the only one in the suite.

A result passes when its error against the float64 oracle is at most twice the error of the baseline (the same
computation in plain PyTorch, rounded where an ideal kernel rounds) plus a floor; for the whole tensor and for its worst
part: the worst query row of o, lse and dq, the worst key block of dk and dv. Infinities stand in the same places; NaN
never passes.

A part's error is taken relative to the part's own norm, or to the median norm of all parts where that is larger: a row
that cancels to nearly nothing has no digits to lose. A tensor whose reference is all rounding noise (softmax over one
key: dq = 0) is measured against the size that its products have, `natural_norm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from inputs import Inputs
from nsa_cuda import reference
from targets import Target
from torch import Tensor

OUTPUTS = ("o", "lse", "dq", "dk", "dv")
INPUTS = ("q", "k", "v")

# Floors (whole tensor, worst part), relative. For bf16 and fp16 in units of the dtype's rounding error u = eps / 2:
# what the last rounding alone may cost where the baseline happens to be exact. lse is float32 whatever the dtype of q,
# whose products are exact there. For float64 the baseline is the oracle itself and the floor is all there is.
_U_BF16, _U_FP16 = 2.0**-8, 2.0**-11
FLOORS: dict[torch.dtype, dict[str, tuple[float, float]]] = {
    torch.bfloat16: {
        "o": (0.25 * _U_BF16, 1.0 * _U_BF16),
        "lse": (1e-6, 4e-6),
        "dq": (0.5 * _U_BF16, 2.0 * _U_BF16),
        "dk": (0.5 * _U_BF16, 2.0 * _U_BF16),
        "dv": (0.5 * _U_BF16, 2.0 * _U_BF16),
    },
    torch.float16: {
        "o": (0.25 * _U_FP16, 1.0 * _U_FP16),
        "lse": (1e-6, 4e-6),
        "dq": (0.5 * _U_FP16, 2.0 * _U_FP16),
        "dk": (0.5 * _U_FP16, 2.0 * _U_FP16),
        "dv": (0.5 * _U_FP16, 2.0 * _U_FP16),
    },
    torch.float32: {
        "o": (5e-7, 2e-6),
        "lse": (5e-7, 2e-6),
        "dq": (1e-6, 5e-6),
        "dk": (1e-6, 5e-6),
        "dv": (1e-6, 5e-6),
    },
    torch.float64: {
        "o": (1e-14, 1e-13),
        "lse": (1e-14, 1e-13),
        "dq": (1e-13, 1e-12),
        "dk": (1e-13, 1e-12),
        "dv": (1e-13, 1e-12),
    },
}
BASELINE_FACTOR = 2.0
# Share of natural_norm below which a reference counts as noise. A gradient of 1000 keys is about 0.5 % of it.
NATURAL_SHARE = 1e-2

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Error:
    whole: float
    worst: float
    worst_part: tuple[int, ...] = ()


def part_norms(x: Tensor, name: str, groups: Tensor | None) -> Tensor:
    """Norms of the parts of x: rows [.., T, H]; for dk, dv key blocks [.., blocks, H]; groups [T]: a row's block."""
    x = x.double()
    if name == "lse":
        return x.abs()
    squares = (x * x).sum(-1)  # [.., T, H]
    if name in ("dk", "dv") and groups is not None:
        t_dim = squares.dim() - 2
        shape = list(squares.shape)
        shape[t_dim] = int(groups.max()) + 1 if groups.numel() else 0
        squares = squares.new_zeros(shape).index_add(t_dim, groups, squares)
    return squares.sqrt()


def error(out: Tensor, ref: Tensor, name: str, natural_norm: float, groups: Tensor | None = None) -> Error:
    """Relative errors of out; both finite. natural_norm is that of one part."""
    norms = part_norms(ref, name, groups)
    if norms.numel() == 0:
        return Error(0.0, 0.0)
    wrong = part_norms(out.double() - ref.double(), name, groups)
    nonzero = norms[norms > 0]
    typical = float(nonzero.median()) if nonzero.numel() else 0.0
    least = max(NATURAL_SHARE * natural_norm, torch.finfo(torch.float64).tiny)
    relative = wrong / norms.clamp_min(max(typical, least))
    whole = float(wrong.norm()) / max(float(norms.norm()), least * math.sqrt(max(1, nonzero.numel())))
    index = int(relative.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), relative.shape))
    return Error(whole, float(relative.flatten()[index]), where)


def compare(
    name: str,
    out: Tensor,
    ref: Tensor,
    base: Tensor,
    dtype: torch.dtype,
    natural_norm: float,
    groups: Tensor | None = None,
) -> list[str]:
    """What is wrong with out, one line each; empty when it passes. dtype is that of q: it names the floor."""
    if out.shape != ref.shape:
        return [f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"]
    if out.isnan().any():
        rows = out.isnan().nonzero()
        return [f"{name}: {len(rows)} NaN, first at {rows[0].tolist()}"]
    assert not ref.isnan().any(), f"{name}: the oracle holds NaN: a broken test"
    assert not base.isnan().any(), f"{name}: the baseline holds NaN: a broken test"
    infinite = ref.isinf()
    if not torch.equal(torch.where(infinite, ref, 0.0), torch.where(out.isinf(), out.double(), 0.0)):
        return [f"{name}: infinities stand elsewhere: {int(out.isinf().sum())} found, {int(infinite.sum())} expected"]
    finite = [x.double().masked_fill(infinite, 0.0) for x in (out, ref, base)]
    mine = error(finite[0], finite[1], name, natural_norm, groups)
    theirs = error(finite[2], finite[1], name, natural_norm, groups)
    floor_whole, floor_worst = FLOORS[dtype][name]
    failures = []
    if not mine.whole <= (limit := BASELINE_FACTOR * theirs.whole + floor_whole):
        failures.append(f"{name}: error {mine.whole:.3g} > {limit:.3g} (baseline {theirs.whole:.3g})")
    if not mine.worst <= (limit := BASELINE_FACTOR * theirs.worst + floor_worst):
        failures.append(
            f"{name}: worst part {mine.worst_part}: error {mine.worst:.3g} > {limit:.3g} (baseline {theirs.worst:.3g})"
        )
    return failures


def row_norm(x: Tensor) -> float:
    """Root mean square norm of the finite rows of x [.., T, H, D], of some thousands of them where there are more."""
    step = 1 + x.shape[-3] // 4096
    norms = x[..., ::step, :, :].double().norm(dim=-1).flatten()
    norms = norms[norms.isfinite()]
    return float(norms.square().mean().sqrt()) if norms.numel() else 0.0


def natural_norms(made: Inputs) -> dict[str, float]:
    """The norm that one row of each output has when a single key takes all the weight."""
    q, k, v, dout = (row_norm(x) for x in (made.q, made.k, made.v, made.dout))
    scale = abs(made.options.get("softmax_scale", 1.0 / math.sqrt(made.q.shape[-1])))
    ds = scale * (dout * v + (1.0 if made.case.lse else 0.0))
    # lse: 1 / NATURAL_SHARE makes its error absolute below |lse| = 1: it is the relative error of a sum.
    return {"o": v, "lse": 1.0 / NATURAL_SHARE, "dq": ds * k, "dk": ds * q, "dv": dout}


def key_blocks(made: Inputs) -> Tensor:
    """int64 [Tk] or [total_k]: the block of every key row, numbered through the sequences."""
    block_size, total = made.case.block_size, made.k.shape[made.k.dim() - 3]
    rows = torch.arange(total)
    offsets = made.key_offsets()
    if offsets is not None:
        bounds = offsets.cpu().long()
        sequence = torch.searchsorted(bounds, rows, right=True) - 1
        start = bounds[sequence.clamp_min(0)]
        ids = sequence * (total // block_size + 1) + (rows - start) // block_size
        rows = torch.unique(ids, return_inverse=True)[1] if total else ids
    else:
        rows = rows // block_size
    return rows.to(made.k.device)


def _differentiate(made: Inputs, leaves: list[Tensor], o: Tensor, lse: Tensor | None) -> Results:
    outputs, gradients = [o], [made.dout.to(o.dtype)]
    if lse is not None:
        outputs.append(lse)
        gradients.append(made.dlse.to(lse.dtype))
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(outputs, leaves, gradients), strict=True))


def run(made: Inputs, backend: str | None) -> Results:
    """The operation and its gradients through the public function. lse is missing unless the case wants it."""
    leaves = [x.detach().requires_grad_() for x in (made.q, made.k, made.v)]
    out = made.attend(leaves, backend, return_lse=made.case.lse, **made.hints)
    o, lse = out if made.case.lse else (out, None)
    found = {"o": o.detach(), **_differentiate(made, leaves, o, lse)}
    if lse is not None:
        found["lse"] = lse.detach()
    return found


def oracle(made: Inputs) -> Results:
    """nsa_cuda.reference in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (made.q, made.k, made.v)]
    o, lse = made.function(reference)(*leaves, *made.lists, return_lse=True, **made.options)
    return {"o": o.detach(), "lse": lse.detach(), **_differentiate(made, leaves, o, lse if made.case.lse else None)}


def baseline(made: Inputs) -> Results:
    """What an ideal kernel of this dtype returns."""
    q, k, v = made.q.detach(), made.k.detach(), made.v.detach()
    o, lse = made.function(reference.baseline)(q, k, v, *made.lists, **made.options)
    dlse = made.dlse if made.case.lse else None
    differentiate = getattr(reference.baseline, f"{made.operation}_backward")
    dq, dk, dv = differentiate(q, k, v, *made.lists, o, lse, made.dout, dlse, **made.options)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def failures(made: Inputs, found: Results, ref: Results, base: Results, dtype: torch.dtype) -> list[str]:
    """All outputs of found against the oracle's, and the zeros that are exact."""
    natural, blocks = natural_norms(made), key_blocks(made)
    lines = []
    for name in OUTPUTS:
        if name in found:
            lines += compare(name, found[name], ref[name], base[name], dtype, natural[name], blocks)
    dead = ref["lse"] == -math.inf  # [.., Tq, Hq]
    for name in ("o", "dq"):
        if name in found and not (found[name][dead] == 0).all():
            lines.append(f"{name}: not zero on a dead row")
    unseen = (ref["dv"] == 0).all(-1)  # [.., Tk, Hkv]: no query gave the key any weight
    for name in ("dk", "dv"):
        if name in found and not (found[name][unseen] == 0).all():
            lines.append(f"{name}: not zero for a key that no query sees")
    return lines


def check(made: Inputs, target: Target, found: Results | None = None) -> None:
    """Runs the operation (unless its results are given) and applies the rule to everything it returns."""
    found = run(made, target.backend) if found is None else found
    for name, x in found.items():
        expected = target.lse_dtype if name == "lse" else target.dtype
        assert x.dtype == expected, f"{name}: dtype {x.dtype}, expected {expected}"
        assert x.device == made.q.device, f"{name}: on {x.device}"
    lines = failures(made, found, oracle(made), baseline(made), target.dtype)
    assert not lines, f"{made.case}\n" + "\n".join(lines)
