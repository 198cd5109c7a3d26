"""torch operators of range attention (sliding window, compressed) and of block selection, over the C++ module.

On CUDA with the automatic backend an operator that has no kernel for its arguments runs `nsa_cuda.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_cuda import _debug, reference
from nsa_cuda._checks import default_scale
from nsa_cuda._ops import (
    _DEVICES,
    _DTYPES,
    BACKENDS,
    Gated,
    _address,
    _contiguous,
    _fake_backward,
    _fake_forward,
    _loadable,
    _on_device,
    _rows,
    _stream,
    _tensor,
    _workspace,
    backward_arguments,
    define_operators,
    implement_operators,
    native,
    register_gradients,
    scale_rows,
)
from nsa_cuda.reference.compression import compressed_cu_seqlens, num_compressed

WINDOW, COMPRESSED = 0, 1  # nsa::RangeMask

_SEQUENCES = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_offsets, SymInt? q_offset"
_COMPRESSION = "SymInt kernel_size, SymInt kernel_stride, SymInt num_tokens, bool causal, float? softmax_scale"
_PROBLEM = f"{_SEQUENCES}, int mask, SymInt window_size, {_COMPRESSION}, int backend"
define_operators(
    f"range_attention_forward(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor o, Tensor lse)",
    "range_attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dout, Tensor? dlse, "
    f"{_PROBLEM}, bool need_dq, bool need_dk, bool need_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
    f"select_blocks(Tensor q, Tensor k_cmp, Tensor lse, {_SEQUENCES}, {_COMPRESSION}, int backend, "
    "SymInt block_size, SymInt topk, SymInt init_blocks, SymInt local_blocks) -> Tensor",
)

range_attention_forward = torch.ops.nsa_cuda.range_attention_forward.default
range_attention_backward = torch.ops.nsa_cuda.range_attention_backward.default
select_blocks = torch.ops.nsa_cuda.select_blocks.default


def _problem(
    q: Tensor,
    k: Tensor,
    head_dim_v: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offsets: Tensor | None,
    q_offset: int | None,
    mask: int,
    window_size: int,
    kernel_size: int,
    kernel_stride: int,
    num_tokens: int,
    causal: bool,
    softmax_scale: float | None,
    backend: int,
) -> Any:
    return native().RangeProblem(
        _DEVICES[q.device.type],
        backend,
        _DTYPES[q.dtype],
        len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0],
        q.shape[-3],
        k.shape[-3],
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        head_dim_v,
        mask,
        window_size,
        kernel_size,
        kernel_stride,
        num_tokens,
        causal,
        default_scale(q.shape[-1]) if softmax_scale is None else softmax_scale,
        _address(cu_seqlens_q),
        _address(cu_seqlens_k),
        _address(q_offsets),
        q_offset is not None,
        q_offset or 0,
    )


def _check_values(q: Tensor, keys: tuple[Tensor, ...], problem: tuple[Any, ...]) -> None:
    """The offsets of a packed call on the CPU; inside debug_checks() those on a GPU and that numbers are finite."""
    cu_seqlens_q, cu_seqlens_k, _, _, mask, _, kernel_size, kernel_stride, num_tokens, *_ = problem
    rows = None if mask == COMPRESSED else keys[0].shape[0]
    _debug.check_offsets(cu_seqlens_q, q.shape[0], cu_seqlens_k, rows)
    if not _debug.enabled():
        return
    offsets = cu_seqlens_k
    if mask == COMPRESSED and cu_seqlens_k is not None:
        offsets = compressed_cu_seqlens(cu_seqlens_k, kernel_size, kernel_stride)
    elif mask == COMPRESSED:
        keys = tuple(x[:, : num_compressed(num_tokens, kernel_size, kernel_stride)] for x in keys)
    _debug.check_finite(cu_seqlens_q, offsets, q, keys[0], keys[-1])


def _prepared(problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """The vectors of offsets are strided where a caller expanded or sliced them; they are short."""
    return *(_contiguous(x) for x in problem[:3]), *problem[3:]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda" and _debug.enabled():
        torch.cuda.synchronize(device)


def _falls_back(q: Tensor, backend: int) -> bool:
    return q.is_cuda and backend == BACKENDS[None]


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> Any:
    cu_seqlens_q, cu_seqlens_k, q_offsets, q_offset, mask, window_size, *rest = problem
    kernel_size, kernel_stride, num_tokens, causal, softmax_scale, _ = rest
    options: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "q_offset": q_offset if q_offsets is None else q_offsets,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "return_lse": True,
    }
    if mask == WINDOW:
        return reference.sliding_window_attention(q, k, v, window_size=window_size, **options)
    return reference.compressed_attention(
        q, k, v, kernel_size=kernel_size, kernel_stride=kernel_stride, seqlen_k=num_tokens, **options
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    _check_values(q, (k, v), problem)
    device, threads = q.device, torch.get_num_threads()
    problem = _prepared(problem)
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    with _on_device(device):
        c = native()
        p = _problem(q, k, v.shape[-1], *problem)
        try:
            size = c.range_forward_workspace(p, True, threads)
            workspace = _workspace(size, device)
            o, lse = _fake_forward(q, k, v)
            c.range_forward(
                p, _tensor(q), _tensor(k), _tensor(v), _tensor(o), _rows(lse), _address(workspace), size,
                _stream(device), threads,
            )  # fmt: skip
        except NotImplementedError:
            if not _falls_back(q, problem[-1]):
                raise
            o, lse = _reference_attention(q, k, v, *problem)
            return o.contiguous(), lse.contiguous()
        _synchronise(device)
    return o, lse


def range_backward(
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
    *settings, need_dq, need_dk, need_dv = arguments
    needs = (need_dq, need_dk, need_dv)
    device, threads = q.device, torch.get_num_threads()
    problem = _prepared(tuple(settings))
    with _on_device(device):
        c = native()
        p = _problem(q, k, v.shape[-1], *problem)
        try:
            size = c.range_backward_workspace(p, *needs, dlse is not None, threads)
            workspace = _workspace(size, device)
            gradients, tensors, _held = backward_arguments((q, k, v), needs, o, lse, dout, dlse, gated)
            c.range_backward(p, *tensors, _address(workspace), size, _stream(device), threads)
        except NotImplementedError:
            if not _falls_back(q, problem[-1]):
                raise
            return _reference_backward((q, k, v), needs, dout, dlse, problem, gated)
        _synchronise(device)
    return gradients


def _reference_backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    dout: Tensor | None,
    dlse: Tensor | None,
    problem: tuple[Any, ...],
    gated: Gated | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if dout is not None and gated is not None and gated.gate is not None:
        dout = scale_rows(dout, gated.gate)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        o, lse = _reference_attention(*leaves, *problem)
        wanted = [x for x in leaves if x.requires_grad]
        pairs = [(x, dx) for x, dx in ((o, dout), (lse, dlse)) if dx is not None]
        outputs, given = zip(*pairs, strict=True)
        # dv doesn't depend on lse alone, nor does an output without rows depend on anything.
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True, materialize_grads=True))
    dq, dk, dv = (next(found).contiguous() if x.requires_grad else x.new_empty(0) for x in leaves)
    if gated is not None and gated.dq is not None:
        dq = gated.dq.add_(dq)
    return dq, dk, dv


def _select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
    *sequences, kernel_size, kernel_stride, num_tokens, causal, softmax_scale, backend = arguments[:-4]
    block_size, topk, init_blocks, local_blocks = arguments[-4:]
    problem = (*sequences, COMPRESSED, 0, kernel_size, kernel_stride, num_tokens, causal, softmax_scale, backend)
    _check_values(q, (k_cmp,), problem)
    device, threads = q.device, torch.get_num_threads()
    problem = _prepared(problem)
    selection = (block_size, topk, init_blocks, local_blocks)
    q, k_cmp = _loadable(q), _loadable(k_cmp)
    with _on_device(device):
        c = native()
        p = _problem(q, k_cmp, 1, *problem)
        try:
            size = c.selection_workspace(p, *selection, threads)
            workspace = _workspace(size, device)
            block_indices = _fake_select_blocks(q, k_cmp, lse, *arguments)
            c.select_blocks(
                p, *selection, _tensor(q), _tensor(k_cmp), _rows(lse), _address(block_indices), _address(workspace),
                size, _stream(device), threads,
            )  # fmt: skip
        except NotImplementedError:
            if not _falls_back(q, backend):
                raise
            return _reference_selection(q, k_cmp, lse, problem, selection)
        _synchronise(device)
    return block_indices


def _reference_selection(
    q: Tensor, k_cmp: Tensor, lse: Tensor, problem: tuple[Any, ...], selection: tuple[int, int, int, int]
) -> Tensor:
    cu_seqlens_q, cu_seqlens_k, q_offsets, q_offset, _, _, kernel_size, kernel_stride, num_tokens, *rest = problem
    causal, softmax_scale, _ = rest
    block_size, topk, init_blocks, local_blocks = selection
    return reference.select_blocks(
        q, k_cmp, lse, kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, topk=topk,
        init_blocks=init_blocks, local_blocks=local_blocks, seqlen_k=num_tokens, causal=causal,
        softmax_scale=softmax_scale, q_offset=q_offset if q_offsets is None else q_offsets,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    ).contiguous()  # fmt: skip


def _fake_select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
    topk = arguments[-3]
    return q.new_empty((*q.shape[:-2], k_cmp.shape[-2], max(topk, 0)), dtype=torch.int32)


implement_operators(
    ("range_attention_forward", _forward, _fake_forward),
    ("range_attention_backward", range_backward, _fake_backward),
    ("select_blocks", _select_blocks, _fake_select_blocks),
)
register_gradients("range_attention_forward", "range_attention_backward", num_tensors=3)
