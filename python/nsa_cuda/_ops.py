"""torch operators over the C++ module: schemas, fake implementations, gradients. The only place that allocates.

`nsa_cuda::selected_attention_forward` and `_backward` are opaque to torch.compile. Library.define/impl costs 14 us a
call, custom_op 22; register_autograd costs 54 with gradients, a hand-made autograd.Function 80.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_cuda import _debug
from nsa_cuda._checks import default_scale, lse_dtype, not_one_of

BACKENDS = {None: 0, "cpu": 1, "sm80": 2, "sm90": 3}  # nsa::Backend
_DEVICES = {"cpu": 0, "cuda": 1}  # nsa::Device
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # nsa::Dtype
_ALIGNMENT = 16  # bytes: what the CUDA kernels load at once

_PROBLEM = (
    "Tensor block_indices, Tensor? block_counts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_offsets, "
    "SymInt? q_offset, SymInt? block_count, SymInt block_size, bool causal, float? softmax_scale, int backend"
)
_library: Any = torch.library.Library("nsa_cuda", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operators(*schemas: str) -> None:
    for schema in schemas:
        # Strides reach the kernels as they are: the compiler must not choose others.
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def implement_operators(*operators: tuple[str, Callable[..., Any], Callable[..., Any]]) -> None:
    """(name, implementation on CPU and CUDA, fake implementation) of each."""
    for name, function, fake in operators:
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        torch.library.register_fake(f"nsa_cuda::{name}", fake, lib=_library)


define_operators(
    f"selected_attention_forward(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor o, Tensor lse)",
    "selected_attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dout, Tensor? dlse, "
    f"{_PROBLEM}, bool need_dq, bool need_dk, bool need_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
)

selected_attention_forward = torch.ops.nsa_cuda.selected_attention_forward.default
selected_attention_backward = torch.ops.nsa_cuda.selected_attention_backward.default


@cache
def native() -> ModuleType:
    """The C++ module, imported at first use: nsa_cuda.reference works from a source tree without it."""
    try:
        from nsa_cuda import _C
    except ImportError as error:
        raise ImportError(
            f"nsa_cuda's compiled module can't be imported ({error}). Build it with `pip install .` (or "
            '`pip install -e .`) in the source tree; backend="reference" and nsa_cuda.reference work without it.'
        ) from error
    return _C


def _loadable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the kernels can't read it: last dim strided, or on CUDA not 16-byte aligned."""
    strides = x.stride()
    good = strides[-1] == 1 or x.shape[-1] == 1
    if good and x.is_cuda:
        size = x.element_size()
        good = x.data_ptr() % _ALIGNMENT == 0 and not any(s * size % _ALIGNMENT for s in strides[:-1])
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _tensor(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of [B, T, H, D] or [total, H, D]."""
    if x is None:
        return 0, 0, 0, 0
    s = x.stride()
    return (x.data_ptr(), s[0], s[1], s[2]) if len(s) == 4 else (x.data_ptr(), 0, s[0], s[1])


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of [B, T, H] or [total, H]."""
    if x is None:
        return 0, 0, 0, 0
    s = x.stride()
    return (x.data_ptr(), s[0], s[1], s[2]) if len(s) == 3 else (x.data_ptr(), 0, s[0], s[1])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _gates(x: Tensor, lead: tuple[int, ...]) -> tuple[int, ...]:
    """Address, dtype and strides of gates [*lead, 3], or [*lead] of one branch; lead is (B, T, H) or (total, H)."""
    strides = (*x.stride(), 0)[: len(lead) + 1]
    return _address(x), _DTYPES[x.dtype], *((0,) if len(lead) == 2 else ()), *strides


_NO_GATE = (0, _DTYPES[torch.float32], 0, 0, 0, 0)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offsets: Tensor | None,
    q_offset: int | None,
    block_count: int | None,
    block_size: int,
    causal: bool,
    softmax_scale: float | None,
    backend: int,
) -> Any:
    packed = cu_seqlens_q is not None
    index_strides = block_indices.stride()
    count_strides: tuple[int, ...] = (0, 0, 0) if block_counts is None else block_counts.stride()
    if packed:
        index_strides = (0, *index_strides)
        count_strides = (0, *count_strides)[-3:]
    return native().Problem(
        _DEVICES[q.device.type],
        backend,
        _DTYPES[q.dtype],
        len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0],
        q.shape[-3],
        k.shape[-3],
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        v.shape[-1],
        block_size,
        block_indices.shape[-1],
        causal,
        # The default is made here: in the graph, a symbol of a dynamic Dk, it makes torch 2.4 compile at every call.
        default_scale(q.shape[-1]) if softmax_scale is None else softmax_scale,
        _address(cu_seqlens_q),
        _address(cu_seqlens_k),
        _address(q_offsets),
        q_offset is not None,
        q_offset or 0,
        (block_indices.data_ptr(), block_indices.dtype == torch.int64, *index_strides),
        (_address(block_counts), block_counts is not None and block_counts.dtype == torch.int64, *count_strides),
        -1 if block_count is None else max(0, block_count),
    )


def problem_of_sizes(
    dtype: torch.dtype,
    backend: str | None,
    batch: int,
    seqlen: int,
    heads_q: int,
    heads_k: int,
    dim_qk: int,
    dim_v: int,
    block_size: int,
    topk: int,
    causal: bool,
) -> Any:
    """A problem on CUDA without its tensors: for questions about sizes."""
    if backend not in BACKENDS:
        raise not_one_of("backend", backend, BACKENDS)
    if dtype not in _DTYPES:
        raise not_one_of("dtype", dtype, _DTYPES)
    no_indices = (0, False, 0, 0, 0, 0)
    no_counts = (0, False, 0, 0, 0)
    sizes = (batch, seqlen, seqlen, heads_q, heads_k, dim_qk, dim_v, block_size, topk)
    return native().Problem(
        _DEVICES["cuda"],
        BACKENDS[backend],
        _DTYPES[dtype],
        *sizes,
        causal,
        1.0,
        0,
        0,
        0,
        False,
        0,
        no_indices,
        no_counts,
        -1,
    )


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _workspace(size: int, device: torch.device) -> Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    indices, counts, cu_seqlens_q, cu_seqlens_k, q_offsets, *settings = problem
    _debug.check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0])
    _debug.check_finite(cu_seqlens_q, cu_seqlens_k, q, k, v)
    device = q.device
    # The vectors of offsets are strided where a caller expanded or sliced them; they are short.
    cu_seqlens_q, cu_seqlens_k, q_offsets = (_contiguous(x) for x in (cu_seqlens_q, cu_seqlens_k, q_offsets))
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    with _on_device(device):
        c = native()
        p = _problem(q, k, v, indices, counts, cu_seqlens_q, cu_seqlens_k, q_offsets, *settings)
        o, lse = _fake_forward(q, k, v)
        size = c.forward_workspace(p, True, torch.get_num_threads())
        workspace = _workspace(size, device)
        c.forward(
            p, _tensor(q), _tensor(k), _tensor(v), _tensor(o), _rows(lse), _address(workspace), size, _stream(device),
            torch.get_num_threads(),
        )  # fmt: skip
        if device.type == "cuda" and _debug.enabled():
            torch.cuda.synchronize(device)
    return o, lse


class Gated(NamedTuple):
    """What the backward of one branch of a gated sum takes."""

    gate: Tensor | None  # [.., Hq], and dout is that of the sum; None: dout is the branch's own
    delta: Tensor | None  # [.., Hq] sum(dout o), of lse's dtype, and o isn't read; None: found from o
    dq: Tensor | None  # what dq is added to, contiguous; None: nothing


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """x [.., D] times factors [..], multiplied in float32 (float64 for float64) and rounded once."""
    return torch.mul(x, factors.unsqueeze(-1).to(lse_dtype(x.dtype)), out=torch.empty_like(x))


def backward_arguments(
    inputs: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    o: Tensor | None,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    gated: Gated | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The gradients to be filled, the tensors as the C++ module takes them, and copies that must outlive the call."""
    q, k, v = inputs
    if dout is None:
        dout = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    gate, delta, dq = (None, None, None) if gated is None else gated
    adds = dq is not None
    fresh, dk, dv = _fake_backward(q, k, v, needs[0] and not adds, *needs[1:])
    gradients = (fresh if dq is None else dq, dk, dv)
    held = tuple(None if x is None else _loadable(x) for x in (q, k, v, o, dout))
    read = [_tensor(x) for x in held]
    written = [_tensor(x if need else None) for x, need in zip(gradients, needs, strict=True)]
    gates = _NO_GATE if gate is None else _gates(gate, lse.shape)
    rows = (_rows(dlse), _rows(delta), gates)
    return gradients, (*read[:4], _rows(lse), read[4], *rows, *written, adds), held


def selected_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    *arguments: Any,
    gated: Gated | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    *problem, need_dq, need_dk, need_dv = arguments
    needs = (need_dq, need_dk, need_dv)
    indices, counts, cu_seqlens_q, cu_seqlens_k, q_offsets, *settings = problem
    device, threads = q.device, torch.get_num_threads()
    cu_seqlens_q, cu_seqlens_k, q_offsets = (_contiguous(x) for x in (cu_seqlens_q, cu_seqlens_k, q_offsets))
    with _on_device(device):
        c = native()
        p = _problem(q, k, v, indices, counts, cu_seqlens_q, cu_seqlens_k, q_offsets, *settings)
        gradients, tensors, _held = backward_arguments((q, k, v), needs, o, lse, dout, dlse, gated)
        size = c.backward_workspace(p, *needs, dlse is not None, threads)
        workspace = _workspace(size, device)
        c.backward(p, *tensors, _address(workspace), size, _stream(device), threads)
        if device.type == "cuda" and _debug.enabled():
            torch.cuda.synchronize(device)
    return gradients


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return o, q.new_empty(q.shape[:-1], dtype=lse_dtype(q.dtype))


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that nobody needs are empty: an operator returns tensors, not None."""
    dq, dk, dv = (x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), arguments[-3:], strict=True))
    return dq, dk, dv


def register_gradients(forward: str, backward: str, num_tensors: int) -> None:
    """Makes `forward`(q, k, v, tensors.., settings..) -> (o, lse) differentiable by `backward`, once."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *problem = inputs
        tensors, ctx.settings = problem[:num_tensors], problem[num_tensors:]
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        no_gradients = [None] * (len(tensors) + len(ctx.settings))
        if dout is None and dlse is None:
            return None, None, None, *no_gradients
        gradients = operator(q, k, v, o, lse, dout, dlse, *tensors, *ctx.settings, *needs)
        return *(x if need else None for x, need in zip(gradients, needs, strict=True)), *no_gradients

    def refuse(ctx: Any, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(f"nsa_cuda::{forward} has no second derivative: its backward can't be differentiated")

    operator = getattr(torch.ops.nsa_cuda, backward).default
    torch.library.register_autograd(f"nsa_cuda::{forward}", differentiate, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"nsa_cuda::{backward}", refuse, lib=_library)


implement_operators(
    ("selected_attention_forward", _forward, _fake_forward),
    ("selected_attention_backward", selected_backward, _fake_backward),
)
register_gradients("selected_attention_forward", "selected_attention_backward", num_tensors=5)
