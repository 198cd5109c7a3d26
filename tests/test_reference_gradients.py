"""Gradients of nsa_cuda.reference, its half types, and the baseline of the accuracy rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nsa_cuda import reference
from nsa_cuda.reference import _attend
from plain_loops import (
    BLOCK,
    CAUSAL,
    HKV,
    gradients,
    normal,
    packed_inputs,
    qkv,
    random_lists,
)
from torch import Tensor


@CAUSAL
@pytest.mark.parametrize("operation", ["selected", "window", "compressed"])
def test_gradcheck(operation: str, causal: bool):
    q, k, v = (x.requires_grad_() for x in qkv(9, 12))
    lists = torch.cat([random_lists(9, 12, 2), torch.zeros(1, 9, HKV, 1, dtype=torch.int32)], -1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if operation == "selected":
            return reference.selected_attention(q, k, v, lists, block_size=BLOCK, causal=causal, return_lse=True)
        if operation == "window":
            return reference.sliding_window_attention(q, k, v, window_size=4, causal=causal, return_lse=True)
        return reference.compressed_attention(
            q, k, v, kernel_size=2, kernel_stride=1, seqlen_k=13, causal=causal, q_offset=3, return_lse=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_dead_rows_are_exact_whatever_their_gradients_hold():
    q, k, v = (x.requires_grad_() for x in qkv(12, 12, batch=2))
    lists = random_lists(12, 12, 1).expand(2, -1, -1, -1)
    o, lse = reference.selected_attention(q, k, v, lists, block_size=BLOCK, q_offset=-3, return_lse=True)
    dead = lse == -math.inf
    assert dead.any()
    assert not dead.all()
    do, dlse = normal(*o.shape, seed=8), normal(*lse.shape, seed=9)
    clean = gradients(o, lse, [q, k, v], do.masked_fill(dead[..., None], 0.0), dlse.masked_fill(dead, 0.0))
    o, lse = reference.selected_attention(q, k, v, lists, block_size=BLOCK, q_offset=-3, return_lse=True)
    dirty = gradients(o, lse, [q, k, v], do.masked_fill(dead[..., None], math.nan), dlse.masked_fill(dead, math.nan))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (o[dead] == 0).all()
    assert (dirty[0][dead] == 0).all()


def test_memory_outside_packed_sequences_never_matters():
    x = packed_inputs()
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v")]
    options = {"cu_seqlens_q": x["cu_q"], "cu_seqlens_k": x["cu_k"], "return_lse": True}
    lists = random_lists(len(x["q"]), 30)[0]
    o, lse = reference.selected_attention(*leaves, lists, block_size=BLOCK, **options)
    do, dlse = normal(*o.shape), normal(*lse.shape)
    do[-3:], dlse[-3:] = math.nan, math.nan
    for gradient, last in zip(gradients(o, lse, leaves, do, dlse), (-3, -3, -3), strict=True):
        assert gradient.isfinite().all()
        assert (gradient[last:] == 0).all()


@pytest.mark.parametrize("operation", ["selected", "window", "compressed"])
def test_chunks_and_recomputation_change_nothing(operation: str, monkeypatch: pytest.MonkeyPatch):
    """Large calls are cut into rows and keep no scores: the same numbers."""

    def run() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in qkv(300, 300, batch=2)]
        if operation == "selected":
            lists = random_lists(300, 300, 6).expand(2, -1, -1, -1)
            o, lse = reference.selected_attention(*leaves, lists, block_size=BLOCK, return_lse=True)
        elif operation == "window":
            o, lse = reference.sliding_window_attention(*leaves, window_size=20, return_lse=True)
        else:
            o, lse = reference.compressed_attention(
                *leaves, kernel_size=1, kernel_stride=1, seqlen_k=300, return_lse=True
            )
        dead = lse == -math.inf
        found = gradients(o, lse, leaves, normal(*o.shape, seed=3), normal(*lse.shape, seed=4).masked_fill(dead, 0.0))
        return [o.detach(), lse.detach(), *found]

    whole = run()
    monkeypatch.setattr(_attend, "MAX_SCORES", 20_000)
    monkeypatch.setattr(_attend, "MAX_KEPT_SCORES", 1)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@CAUSAL
def test_baseline_backward_is_autograd_in_float64(causal: bool):
    """The explicit formulas of the baseline against autograd through the reference."""
    x = packed_inputs(0)
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v")]
    lists = random_lists(len(x["q"]), 30)[0]
    options = {
        "block_size": BLOCK,
        "causal": causal,
        "cu_seqlens_q": x["cu_q"],
        "cu_seqlens_k": x["cu_k"],
        "scale": 0.7,
    }
    o, lse = reference.selected_attention(*leaves, lists, return_lse=True, **options)
    do, dlse = normal(*o.shape, seed=4), normal(*lse.shape, seed=5)
    expected = gradients(o, lse, leaves, do, dlse)
    inputs = [leaf.detach() for leaf in leaves]
    o, lse = reference.baseline.selected_attention(*inputs, lists, **options)
    found = reference.baseline.selected_attention_backward(*inputs, lists, o, lse, do, dlse, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_types_are_as_good_as_one_rounding_of_each_operand(dtype: torch.dtype, unit: float):
    """Relative errors of the baseline and of the reference itself stay near the dtype's rounding."""
    q, k, v = (x.to(dtype) for x in qkv(200, 200))
    lists = random_lists(200, 200, 8)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = reference.selected_attention(*exact, lists, block_size=BLOCK, return_lse=True)
    do, dlse = normal(*o.shape, seed=4).to(dtype), normal(*lse.shape, seed=5).float().masked_fill(lse == -math.inf, 0.0)
    expected = [o, lse, *gradients(o, lse, exact, do.double(), dlse.double())]

    low_o, low_lse = reference.baseline.selected_attention(q, k, v, lists, block_size=BLOCK)
    low = reference.baseline.selected_attention_backward(q, k, v, lists, low_o, low_lse, do, dlse, block_size=BLOCK)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plain_o, plain_lse = reference.selected_attention(*leaves, lists, block_size=BLOCK, return_lse=True)
    plain = gradients(plain_o, plain_lse, leaves, do, dlse)
    assert low_lse.dtype == plain_lse.dtype == torch.float32
    assert torch.equal(plain_o, low_o)
    for found in ([low_o, low_lse, *low], [plain_o, plain_lse, *plain]):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            finite = b.isfinite()
            error = float(((a.double() - b)[finite].norm() / b[finite].norm()).detach())
            assert error < (1e-6 if i == 1 else unit)
            assert i == 1 or (a.dtype == dtype and error > unit / 50)


@pytest.mark.parametrize("operation", ["selected", "window", "compressed"])
def test_autocast_leaves_the_reference_alone(operation: str):
    """Called directly it computes in the dtype it is given."""
    q, k, v = (x.float() for x in qkv(20, 20))
    lists = random_lists(20, 20)

    def run() -> Tensor:
        if operation == "selected":
            return reference.selected_attention(q, k, v, lists, block_size=BLOCK)
        if operation == "window":
            return reference.sliding_window_attention(q, k, v, window_size=5)
        return reference.compressed_attention(q, k, v, kernel_size=1, kernel_stride=1)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), plain)
        assert plain.dtype == torch.float32
