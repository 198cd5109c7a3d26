"""The public functions with backend="reference": plain PyTorch, with autocast, refusals and a single derivative."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import nsa_cuda
import pytest
import torch
from nsa_cuda import _ops, reference
from torch import Tensor

HQ, HKV, D, T = 4, 2, 8, 70
SIZES = {"kernel_size": 8, "kernel_stride": 4}
SELECTION = {**SIZES, "block_size": 8, "topk": 4}


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, D, dtype=dtype) for heads in (HQ, HKV, HKV))
    k_cmp, v_cmp = (reference.compress_mean(x, **SIZES) for x in (k, v))
    return {"q": q, "k": k, "v": v, "k_cmp": k_cmp, "v_cmp": v_cmp, "gates": torch.rand(2, T, HQ, 3, dtype=dtype)}


def compressed(x: dict[str, Tensor], module: Any = nsa_cuda, **options: Any) -> Any:
    if module is nsa_cuda:
        options.setdefault("backend", "reference")
    return module.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **SIZES, **options)


def window(x: dict[str, Tensor], module: Any = nsa_cuda, **options: Any) -> Any:
    if module is nsa_cuda:
        options.setdefault("backend", "reference")
    return module.sliding_window_attention(x["q"], x["k"], x["v"], window_size=9, **options)


def native(x: dict[str, Tensor], module: Any = nsa_cuda, **options: Any) -> Any:
    if module is nsa_cuda:
        options.setdefault("backend", "reference")
    cmp = {"k_cmp": x["k_cmp"], "v_cmp": x["v_cmp"]}
    return module.native_sparse_attention(x["q"], x["k"], x["v"], x["gates"], **cmp, **SELECTION, **options)


def selected(x: dict[str, Tensor], module: Any = nsa_cuda, **options: Any) -> Any:
    if module is nsa_cuda:
        options.setdefault("backend", "reference")
    lists = torch.zeros(2, T, HKV, 1, dtype=torch.int32)
    return module.selected_attention(x["q"], x["k"], x["v"], lists, **options)


CALLS = [compressed, window, native, selected]
CALL = pytest.mark.parametrize("call", CALLS)


@CALL
def test_is_the_reference(call: Callable[..., Any]):
    x = inputs()
    assert torch.equal(call(x), call(x, reference))
    if call is not native:
        for a, b in zip(
            call(x, return_lse=True, scale=0.3), call(x, reference, return_lse=True, scale=0.3), strict=True
        ):
            assert torch.equal(a, b)


def test_select_blocks_is_the_reference():
    x = inputs()
    _, lse = compressed(x, return_lse=True)
    ids = nsa_cuda.select_blocks(x["q"], x["k_cmp"], lse, **SELECTION, backend="reference")
    assert torch.equal(ids, reference.select_blocks(x["q"], x["k_cmp"], lse, **SELECTION))
    x["q"].requires_grad_()
    for backend in (None, "reference"):
        assert not nsa_cuda.select_blocks(x["q"], x["k_cmp"], lse, **SELECTION, backend=backend).requires_grad


@CALL
def test_second_derivative_raises(call: Callable[..., Any]):
    x = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    o = call(x)
    (first,) = torch.autograd.grad(o.square().sum(), x["q"], create_graph=True)
    assert torch.equal(first, torch.autograd.grad(call(x).square().sum(), x["q"])[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@CALL
def test_autocast(call: Callable[..., Any]):
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x)
        assert call({name: tensor.double() for name, tensor in x.items()}).dtype == torch.float64
    low = {name: tensor if name == "gates" else tensor.bfloat16() for name, tensor in x.items()}
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, call(low))


@CALL
def test_mixed_types_meet_in_autocast(call: Callable[..., Any]):
    """What comes out of a layer is bfloat16, what comes out of a norm float32."""
    x = inputs() | {"q": inputs()["q"].bfloat16()}
    with pytest.raises(TypeError, match=r"must have q's dtype torch\.bfloat16, was torch\.float32"):
        call(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x).dtype == torch.bfloat16


@CALL
def test_inputs_that_need_no_gradient(call: Callable[..., Any]):
    x = inputs()
    assert not call(x).requires_grad
    x["v"].requires_grad_()
    o = call(x)
    assert o.requires_grad == (call is not compressed)


@pytest.mark.parametrize("packed", [False, True])
def test_native_takes_every_backend(packed: bool):
    x = inputs()
    options: dict[str, Any] = {}
    if packed:
        x = {name: tensor.flatten(0, 1) for name, tensor in x.items()}
        offsets = torch.tensor([0, T, 2 * T], dtype=torch.int32)
        options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    by_reference = native(x, backend="reference", **options)
    for backend in (None, "cpu"):
        torch.testing.assert_close(native(x, backend=backend, **options), by_reference)
    with pytest.raises(ValueError, match="backend is sm80, which runs on cuda"):
        native(x, backend="sm80", **options)


# -------------------------------------------------------------------------------------------- refusals


def refused(exception: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(exception, match=re.escape(message)):
        call()


def test_refusals():
    x = inputs()
    q, k, v, k_cmp, v_cmp = (x[n] for n in ("q", "k", "v", "k_cmp", "v_cmp"))
    lse = torch.zeros(2, T, HQ)

    def select(lse: Any = lse, **options: Any) -> Any:
        return nsa_cuda.select_blocks(q, k_cmp, lse, **{**SELECTION, "backend": "reference", **options})

    def compress(**options: Any) -> Any:
        return nsa_cuda.compressed_attention(q, k_cmp, v_cmp, **{**SIZES, "backend": "reference", **options})

    rules: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "backend: must be one of None, 'cpu', 'sm80', 'sm90', 'reference', was 'x'",
         lambda: window(x, backend="x")),
        (ValueError, "window_size: must be at least 1, was 0",
         lambda: nsa_cuda.sliding_window_attention(q, k, v, window_size=0, backend="reference")),
        (ValueError, "kernel_stride: must divide kernel_size = 8, was 3", lambda: compress(kernel_stride=3)),
        (ValueError, "kernel_stride: must divide block_size = 6, was 4", lambda: select(block_size=6)),
        (ValueError, "topk: must be at least init_blocks + local_blocks = 1 + 2, was 2", lambda: select(topk=2)),
        (ValueError, "init_blocks: must be at least 0, was -1", lambda: select(init_blocks=-1)),
        (ValueError, "seqlen_k: must be given where k_cmp doesn't come from Tq = 70 tokens (which give 16 rows), "
         "was None with 15 rows", lambda: nsa_cuda.compressed_attention(q, k_cmp[:, :15], v_cmp[:, :15], **SIZES)),
        (ValueError, "k_cmp: must have at least 17 rows for seqlen_k = 72 tokens, had 16",
         lambda: compress(seqlen_k=72)),
        (ValueError, "v_cmp: must be [B, Tk, Hkv, Dv] = [2, 16, 2, Dv] like k_cmp, was [2, 15, 2, 8]",
         lambda: nsa_cuda.compressed_attention(q, k_cmp, v_cmp[:, :15], **SIZES)),
        (ValueError, "k_cmp: Hkv must divide q's Hq = 4, both at least 1, was 3",
         lambda: nsa_cuda.compressed_attention(q, *(torch.zeros(2, 16, 3, D),) * 2, **SIZES, backend="reference")),
        (ValueError, "lse: must be [B, Tq, Hq] = [2, 70, 4], was [2, 70, 2]", lambda: select(lse[..., :2])),
        (TypeError, "lse: dtype must be torch.float32 for torch.float32 inputs, was torch.float64",
         lambda: select(lse.double())),
        (TypeError, "lse: must be a torch.Tensor, was NoneType", lambda: select(None)),
        (ValueError, "gates: must be [B, Tq, Hq, 3] = [2, 70, 4, 3], was [2, 70, 4, 2]",
         lambda: native({**x, "gates": x["gates"][..., :2]})),
        (ValueError, "v_win: k_win and v_win come together or not at all, was None", lambda: native(x, k_win=k)),
        (ValueError, "v_win: must be [B, Tk, Hkv, Dv] = [2, 70, 2, Dv] like k_win, was [2, 9, 2, 8]",
         lambda: native(x, k_win=k, v_win=v[:, :9])),
        (ValueError, "k_win: must have k's 70 rows, had 9", lambda: native(x, k_win=k[:, :9], v_win=v[:, :9])),
    ]  # fmt: skip
    for rule in rules:
        refused(*rule)


def test_offsets_on_the_cpu_are_checked():
    x = {name: tensor.flatten(0, 1) for name, tensor in inputs().items()}
    good = torch.tensor([0, T, 2 * T], dtype=torch.int32)
    bad = torch.tensor([0, 2 * T, T], dtype=torch.int32)
    for call in CALLS[:3]:
        refused(
            ValueError, "cu_seqlens_k: offsets must ascend; cu_seqlens_k[1] was 140, cu_seqlens_k[2] 70",
            lambda call=call: call(x, cu_seqlens_q=good, cu_seqlens_k=bad),
        )  # fmt: skip


def test_debug_checks_refuse_what_is_not_finite():
    """NaN outside the sequences stays allowed."""
    q = torch.zeros(9, HQ, D)
    q[7:] = math.nan
    offsets = torch.tensor([0, 7], dtype=torch.int32)
    with nsa_cuda.debug_checks():
        nsa_cuda._debug.check_finite(offsets, offsets, q, q, q)
        q[3, 1, 2] = math.inf
        refused(
            ValueError, "k: must be finite inside the sequences, was inf at [3, 1, 2]",
            lambda: nsa_cuda._debug.check_finite(offsets, offsets, q[:3].repeat(3, 1, 1), q, q),
        )  # fmt: skip
    nsa_cuda._debug.check_finite(offsets, offsets, q, q, q)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch):
    """The error says how to build it, and the reference goes on working."""
    monkeypatch.setitem(sys.modules, "nsa_cuda._C", None)
    monkeypatch.delattr(nsa_cuda, "_C", raising=False)
    _ops.native.cache_clear()
    x = inputs()
    refused(ImportError, "pip install .", lambda: selected(x, backend=None))
    assert selected(x).isfinite().all()
