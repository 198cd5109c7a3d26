"""torch operators of the gated sum, o = sum over branches c of g_c o_c (the paper's eq. 5), over the C++ module.

No gradients of their own: whoever gates attention's branches has one autograd node for all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_cuda._checks import lse_dtype
from nsa_cuda._ops import (
    _DEVICES,
    _DTYPES,
    _gates,
    _loadable,
    _on_device,
    _stream,
    _tensor,
    define_operators,
    implement_operators,
    native,
)

define_operators(
    # o_* [B, Tq, Hq, Dv] or [total_q, Hq, Dv] of one dtype, gates [.., Hq, 3] of any floating dtype and strides -> o.
    # Added in float32 (float64 for float64) and rounded once. Where o_c is 0, as on dead rows, g_c may hold anything.
    "gated_sum_forward(Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor gates) -> Tensor",
    # dgates_c = sum over Dv of dout o_c, in float32 (float64 for float64). The column of an absent o_c isn't written.
    "gated_sum_backward(Tensor dout, Tensor? o_cmp, Tensor? o_slc, Tensor? o_win) -> Tensor",
)

gated_sum_forward = torch.ops.nsa_cuda.gated_sum_forward.default
gated_sum_backward = torch.ops.nsa_cuda.gated_sum_backward.default


def _sizes(x: Tensor) -> tuple[int, ...]:
    batch = x.shape[0] if x.dim() == 4 else 1
    return _DEVICES[x.device.type], _DTYPES[x.dtype], batch, *x.shape[-3:]


def _check(x: Tensor, gates: Tensor, *others: Tensor | None) -> None:
    """For callers inside the package: shapes that disagree would lead past a tensor's end."""
    given = [y for y in others if y is not None]
    if gates.shape != (*x.shape[:-1], 3) or any(y.shape != x.shape or y.dtype != x.dtype for y in given):
        shapes = [tuple(y.shape) for y in (x, *given)]
        raise ValueError(
            f"gates: must be [.., Hq, 3] for branches [.., Hq, Dv] of one dtype, was {tuple(gates.shape)} for {shapes}"
        )


def _forward(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    _check(o_cmp, gates, o_slc, o_win)
    o_cmp, o_slc, o_win = _loadable(o_cmp), _loadable(o_slc), _loadable(o_win)
    o = _fake_forward(o_cmp, o_slc, o_win, gates)
    with _on_device(o.device):
        native().gated_sum_forward(
            _sizes(o), _tensor(o_cmp), _tensor(o_slc), _tensor(o_win), _gates(gates, gates.shape[:-1]), _tensor(o),
            _stream(o.device), torch.get_num_threads(),
        )  # fmt: skip
    return o


def _backward(dout: Tensor, o_cmp: Tensor | None, o_slc: Tensor | None, o_win: Tensor | None) -> Tensor:
    dgates = _fake_backward(dout, o_cmp, o_slc, o_win)
    _check(dout, dgates, o_cmp, o_slc, o_win)
    dout = _loadable(dout)
    branches = [None if x is None else _loadable(x) for x in (o_cmp, o_slc, o_win)]
    with _on_device(dout.device):
        native().gated_sum_backward(
            _sizes(dout), _tensor(dout), *(_tensor(x) for x in branches), _gates(dgates, dgates.shape[:-1]),
            _stream(dout.device), torch.get_num_threads(),
        )  # fmt: skip
    return dgates


def _fake_forward(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    return o_cmp.new_empty(o_cmp.shape)


def _fake_backward(dout: Tensor, o_cmp: Tensor | None, o_slc: Tensor | None, o_win: Tensor | None) -> Tensor:
    return dout.new_empty((*dout.shape[:-1], 3), dtype=lse_dtype(dout.dtype))


implement_operators(
    ("gated_sum_forward", _forward, _fake_forward),
    ("gated_sum_backward", _backward, _fake_backward),
)
