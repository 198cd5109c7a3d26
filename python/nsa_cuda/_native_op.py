"""The whole of NSA as one operator and one autograd node: nsa_cuda::native_sparse_attention_forward and _backward.

One node, because three with a sum behind them would keep each branch's gated output as well, and three dO at a time.
The branches run the library's other operators. What lies between forward and backward, in bytes per token with q's
element size e, Hq query heads and Hkv key/value heads of Dk and Dv (`kept_bytes` is the sum):

    q, k, v, k_win, v_win          e (Hq Dk + 2 Hkv (Dk + Dv)), the window's only where it has its own
    k_cmp, v_cmp                   e Hkv (Dk + Dv) / d
    o of the branches              3 e Hq Dv; 2 e Hq Dv with recompute="window"; nothing with recompute=True
    lse of the branches            12 Hq (24 Hq for float64)
    block lists, gates             4 Hkv n, 3 Hq (gates' element size)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_cuda._checks import lse_dtype
from nsa_cuda._gated_ops import gated_sum_backward, gated_sum_forward
from nsa_cuda._ops import (
    Gated,
    _library,
    _loadable,
    define_operators,
    implement_operators,
    scale_rows,
    selected_attention_forward,
    selected_backward,
)
from nsa_cuda._range_ops import COMPRESSED, WINDOW, range_attention_forward, range_backward, select_blocks

# Bits of `recompute`: the branches whose output backward computes again.
RECOMPUTE_NONE, RECOMPUTE_WINDOW, RECOMPUTE_ALL = 0, 4, 7
# More than any position: this window holds every key that causality leaves.
_EVERYTHING = 1 << 40

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor gates, Tensor k_cmp, Tensor v_cmp, Tensor? k_win, Tensor? v_win"
_LISTS = "Tensor? block_counts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_offsets"
_SETTINGS = (
    "SymInt? q_offset, SymInt? block_count, SymInt kernel_size, SymInt kernel_stride, SymInt block_size, SymInt topk, "
    "SymInt init_blocks, SymInt local_blocks, SymInt window_size, bool causal, float? softmax_scale, int recompute, "
    "int backend"
)
_KEPT = "Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor lse_cmp, Tensor lse_slc, Tensor lse_win"
_GRADIENTS = ("q", "k", "v", "gates", "k_cmp", "v_cmp", "k_win", "v_win")

define_operators(
    f"native_sparse_attention_forward({_INPUTS}, Tensor? block_indices, {_LISTS}, {_SETTINGS}) "
    f"-> (Tensor o, {_KEPT}, Tensor selected)",
    # given: the lists are the caller's, not select_blocks'.
    f"native_sparse_attention_backward(Tensor dout, {_INPUTS}, {_KEPT}, Tensor block_indices, bool given, {_LISTS}, "
    f"{_SETTINGS}, bool[8] needs) -> ({', '.join(f'Tensor d{name}' for name in _GRADIENTS)})",
)

native_sparse_attention_forward = torch.ops.nsa_cuda.native_sparse_attention_forward.default
native_sparse_attention_backward = torch.ops.nsa_cuda.native_sparse_attention_backward.default


_RANGE = range_attention_forward, range_backward
_SELECTED = selected_attention_forward, selected_backward


class _Lists(NamedTuple):
    block_counts: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    q_offsets: Tensor | None


class _Settings(NamedTuple):
    q_offset: int | None
    block_count: int | None
    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    window_size: int
    causal: bool
    softmax_scale: float | None
    recompute: int
    backend: int


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor | None
    v_win: Tensor | None


@dataclass(frozen=True)
class _Branch:
    """An attention over its own keys: the operator pair and its problem, the same arguments in both directions."""

    k: Tensor
    v: Tensor
    operators: tuple[Callable[..., Any], Callable[..., Any]]
    problem: tuple[Any, ...]

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = self.operators[0](q, self.k, self.v, *self.problem)
        return o, lse

    def backward(
        self, q: Tensor, o: Tensor | None, lse: Tensor, dout: Tensor, gated: Gated, needs: Sequence[bool]
    ) -> Any:
        return self.operators[1](q, self.k, self.v, o, lse, dout, None, *self.problem, *needs, gated=gated)


@dataclass(frozen=True)
class _Call:
    inputs: _Inputs
    lists: _Lists
    settings: _Settings

    def _range(self, mask: int, window_size: int) -> tuple[Any, ...]:
        s, x = self.settings, self.lists
        tokens = 0 if x.cu_seqlens_k is not None else self.inputs.k.shape[1]
        positions = (x.cu_seqlens_q, x.cu_seqlens_k, x.q_offsets, s.q_offset)
        sizes = (window_size, s.kernel_size, s.kernel_stride, tokens)
        return *positions, mask, *sizes, s.causal, s.softmax_scale, s.backend

    def every_block_is_selected(self) -> bool:
        """Known from sizes alone; the lists of a packed call are as long as its longest sequence, which is data."""
        x, s = self.inputs, self.settings
        return self.lists.cu_seqlens_k is None and s.topk * s.block_size >= x.k.shape[1]

    def compressed(self) -> _Branch:
        return _Branch(self.inputs.k_cmp, self.inputs.v_cmp, _RANGE, self._range(COMPRESSED, 0))

    def window(self) -> _Branch:
        x = self.inputs
        k, v = (x.k, x.v) if x.k_win is None or x.v_win is None else (x.k_win, x.v_win)
        return _Branch(k, v, _RANGE, self._range(WINDOW, self.settings.window_size))

    def selected(self, block_indices: Tensor, given: bool) -> _Branch:
        """Without lists of the caller's where every block would be chosen: all keys, which costs no lists."""
        x, s, lists = self.inputs, self.settings, self.lists
        if not given and self.every_block_is_selected():
            return _Branch(x.k, x.v, _RANGE, self._range(WINDOW, _EVERYTHING))
        counts, count = (lists.block_counts, s.block_count) if given else (None, None)
        positions = (lists.cu_seqlens_q, lists.cu_seqlens_k, lists.q_offsets, s.q_offset)
        problem = (block_indices, counts, *positions, count, s.block_size, s.causal, s.softmax_scale, s.backend)
        return _Branch(x.k, x.v, _SELECTED, problem)

    def select(self, lse: Tensor) -> Tensor:
        """int32 [.., Hkv, n]; empty lists where nobody reads them."""
        x, s, lists = self.inputs, self.settings, self.lists
        if self.every_block_is_selected():
            return x.q.new_full(_list_shape(x.q, x.k, s.topk), -1, dtype=torch.int32)
        tokens = 0 if lists.cu_seqlens_k is not None else x.k.shape[1]
        positions = (lists.cu_seqlens_q, lists.cu_seqlens_k, lists.q_offsets, s.q_offset)
        selection = (s.block_size, s.topk, s.init_blocks, s.local_blocks)
        backend = 0 if x.q.is_cuda else s.backend  # a family of attention kernels needn't have selected the blocks
        blocks: Tensor = select_blocks(
            x.q, x.k_cmp, lse, *positions, s.kernel_size, s.kernel_stride, tokens, s.causal, s.softmax_scale,
            backend, *selection,
        )  # fmt: skip
        return blocks

    def branches(self, block_indices: Tensor, given: bool) -> tuple[_Branch, _Branch, _Branch]:
        return self.compressed(), self.selected(block_indices, given), self.window()


def _list_shape(q: Tensor, k: Tensor, entries: int) -> tuple[int, ...]:
    return (*q.shape[:-2], k.shape[-2], entries)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, block_indices = _Inputs(*arguments[:8]), arguments[8]
    call = _Call(inputs, _Lists(*arguments[9:13]), _Settings(*arguments[13:]))
    given = block_indices is not None
    o_cmp, lse_cmp = call.compressed().forward(inputs.q)
    selected = inputs.q.new_empty(0, dtype=torch.int32) if given else call.select(lse_cmp)
    o_slc, lse_slc = call.selected(block_indices if given else selected, given).forward(inputs.q)
    o_win, lse_win = call.window().forward(inputs.q)
    lse = (lse_cmp, lse_slc, lse_win)
    o = gated_sum_forward(o_cmp, o_slc, o_win, inputs.gates)
    kept = (x.new_empty(0) if call.settings.recompute & 1 << c else x for c, x in enumerate((o_cmp, o_slc, o_win)))
    return o, *kept, *lse, selected


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, block_indices, settings = _Inputs(*arguments[:8]), arguments[8], _Settings(*arguments[13:])
    q, v = inputs.q, inputs.v
    shape = (*q.shape[:-1], v.shape[-1])
    kept = (q.new_empty((0,) if settings.recompute & 1 << c else shape) for c in range(3))
    lse = (q.new_empty(q.shape[:-1], dtype=lse_dtype(q.dtype)) for _ in range(3))
    lists = (0,) if block_indices is not None else _list_shape(q, inputs.k, settings.topk)
    return q.new_empty(shape), *kept, *lse, q.new_empty(lists, dtype=torch.int32)


def _backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """One branch after the other, on dout itself: a branch takes its gate, and the gate's gradient as its delta, so no
    gated dout is ever in memory; dQ is added up in place: with dO and dQ of N bytes, 6 N are moved beside the branches,
    where gated copies, delta of each and sums of dQ take 21 N. With `recompute` one branch output is alive.

    Kernels in float16 get a gated dout each after all, and o: they would round gate P, and where many keys share a row
    (4096: P about 2e-4) a gate of 0.03 takes it below the least normal number, 6e-5, and dV a tenth of its digits.
    """
    dout = _loadable(dout)  # once, and not for every branch
    inputs, outputs, lse = _Inputs(*arguments[:8]), arguments[8:11], arguments[11:14]
    call = _Call(inputs, _Lists(*arguments[16:20]), _Settings(*arguments[20:33]))
    branches = call.branches(*arguments[14:16])
    need = dict(zip(_GRADIENTS, arguments[33], strict=True))
    keys = (("k_cmp", "v_cmp"), ("k", "v"), ("k", "v") if inputs.k_win is None else ("k_win", "v_win"))
    one_by_one = call.settings.recompute == RECOMPUTE_ALL
    gates_dout = dout.dtype == torch.float16 and dout.is_cuda
    if one_by_one:
        dgates = dout.new_empty((*dout.shape[:-1], 3), dtype=lse_dtype(dout.dtype))
    else:
        if call.settings.recompute == RECOMPUTE_WINDOW:
            outputs = (*outputs[:2], branches[2].forward(inputs.q)[0])
        dgates = gated_sum_backward(dout, *outputs)
    if not gates_dout:  # nobody reads them any more
        outputs = (None, None, None)
    found: dict[str, Tensor] = {}
    for c, branch in enumerate(branches):
        names = ("q", *keys[c])
        needs = [need[name] for name in names]
        if not any(needs) and not need["gates"]:
            continue
        o = branch.forward(inputs.q)[0] if one_by_one else outputs[c]
        if one_by_one:
            dgates[..., c] = gated_sum_backward(dout, *(o if c == i else None for i in range(3)))[..., c]
        if any(needs):
            gate, dq = inputs.gates[..., c], found.get("q")
            if gates_dout:
                own, gated = scale_rows(dout, gate), Gated(None, None, dq)
            else:
                o, own, gated = None, dout, Gated(gate, dgates[..., c], dq)
            gradients = branch.backward(inputs.q, o, lse[c], own, gated, needs)
            del own  # not beside the next branch's
            for name, needed, gradient in zip(names, needs, gradients, strict=True):
                if needed:
                    found[name] = gradient if name == "q" or name not in found else found[name].add_(gradient)
        del o
    if need["gates"]:
        found["gates"] = dgates.to(inputs.gates.dtype)
    return tuple(found[name] if name in found else inputs.q.new_empty(0) for name in _GRADIENTS)


def _fake_backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients that nobody needs are empty: an operator returns tensors, not None."""
    q = arguments[0]
    pairs = zip(arguments[:8], arguments[33], strict=True)
    return tuple(x.new_empty(x.shape) if need and x is not None else q.new_empty(0) for x, need in pairs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *kept, selected = output
    block_indices = inputs[8]
    ctx.given = block_indices is not None
    ctx.save_for_backward(*inputs[:8], *kept, block_indices if ctx.given else selected, *inputs[9:13])
    ctx.settings = inputs[13:]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:8])
    no_gradients = [None] * (5 + len(ctx.settings))
    if dout is None or not any(needs):
        return *([None] * 8), *no_gradients
    saved = ctx.saved_tensors
    gradients = native_sparse_attention_backward(dout, *saved[:15], ctx.given, *saved[15:], *ctx.settings, needs)
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), *no_gradients


def _no_double_backward(ctx: Any, *gradients: Tensor | None) -> Any:
    raise NotImplementedError(
        "nsa_cuda.native_sparse_attention has no second derivative: its backward can't be differentiated"
    )


implement_operators(
    ("native_sparse_attention_forward", _forward, _fake_forward),
    ("native_sparse_attention_backward", _backward, _fake_backward),
)
torch.library.register_autograd(
    "nsa_cuda::native_sparse_attention_forward", _autograd_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("nsa_cuda::native_sparse_attention_backward", _no_double_backward, lib=_library)
