"""A quick look at whether what is about to be timed is right. The tests are where that is really asked."""

from __future__ import annotations

import nsa_cuda
import torch
from nsa_cuda.attention import Backend
from torch import Tensor

from .methods import Inputs, ours_forward
from .shapes import Shape

_LIMITS = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def _relative(error: Tensor, reference: Tensor) -> float:
    return float(error.norm() / reference.norm().clamp_min(1e-30))


def _oracle_row(inputs: Inputs, block_indices: Tensor, shape: Shape, row: int) -> tuple[Tensor, Tensor]:
    """float64 (o, dq) of one query of the first sequence: [Hq, Dv], [Hq, Dk]."""
    q = inputs.q[:1, row : row + 1].detach().double().requires_grad_()
    k, v = (x[:1, : row + 1].detach().double() for x in (inputs.k, inputs.v))
    lists = block_indices[:1, row : row + 1]
    o = nsa_cuda.selected_attention(q, k, v, lists, block_size=shape.block_size, q_offset=row, backend="reference")
    (dq,) = torch.autograd.grad(o, q, inputs.dout[:1, row : row + 1].double())
    return o[0, 0].detach(), dq[0, 0]


def check(inputs: Inputs, block_indices: Tensor, shape: Shape, backend: Backend | None, backward: bool = True) -> float:
    """Compares a few rows of o and dq with the float64 oracle, and dk, dv through two sums; returns the largest error.

    Sums that hold for any softmax attention: over the keys, dv adds up to dout over the queries (of the rows that see a
    key: all, here); and sum(q dq) = sum(k dk). Errors are relative; one above the dtype's limit raises.
    """
    limit = _LIMITS[shape.dtype]
    rows = sorted(
        {0, min(shape.block_size, shape.seqlen - 1), shape.seqlen // 2 + 1, shape.seqlen - 1} - {shape.seqlen}
    )
    o = ours_forward(inputs, block_indices, shape.block_size, backend)
    errors: dict[str, float] = {}
    gradients = torch.autograd.grad(o, (inputs.q, inputs.k, inputs.v), inputs.dout) if backward else None
    for row in rows:
        o_row, dq_row = _oracle_row(inputs, block_indices, shape, row)
        errors[f"o[{row}]"] = _relative(o[0, row].detach().double() - o_row, o_row)
        if gradients and row >= 1:  # row 0 sees one key: its dq is zero
            errors[f"dq[{row}]"] = _relative(gradients[0][0, row].double() - dq_row, dq_row)
    if gradients:
        dq, dk, dv = gradients
        grouped = inputs.dout.unflatten(2, (shape.heads_k, shape.group)).sum(dim=(1, 3), dtype=torch.float64)
        errors["sum of dv"] = _relative(dv.sum(1, dtype=torch.float64) - grouped, grouped)
        # The two sums nearly cancel, so the error is measured against their terms.
        q_terms, k_terms = inputs.q.detach() * dq, inputs.k.detach() * dk
        difference = (q_terms.sum(dtype=torch.float64) - k_terms.sum(dtype=torch.float64)).abs()
        errors["sum of q dq - k dk"] = float(difference / q_terms.double().norm().clamp_min(1e-30)) / shape.seqlen**0.5
    name, worst = max(errors.items(), key=lambda item: item[1])
    if not worst <= limit:
        raise AssertionError(f"{shape.title}: {name} is off by {worst:.2g} (relative), allowed {limit:.2g}")
    return worst
