"""The operations of nsa_cuda.reference against loops over rows and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_cuda import reference
from plain_loops import (
    BLOCK,
    CAUSAL,
    DK,
    DV,
    HKV,
    HQ,
    LENGTHS_Q,
    SHAPE,
    D,
    L,
    brute_selection,
    compressed_sees,
    cumulative,
    loops,
    normal,
    packed_inputs,
    position,
    qkv,
    random_lists,
    same,
    selected_sees,
    window_sees,
)
from torch import Tensor


@CAUSAL
@SHAPE
@pytest.mark.parametrize("counts", [None, 2, "tensor"])
def test_selected(tq: int, tk: int, offset: int | None, causal: bool, counts: Any):
    q, k, v = qkv(tq, tk)
    lists = random_lists(tq, tk)
    if counts == "tensor":
        counts = (torch.arange(tq * HKV).view(1, tq, HKV) % 7 - 1).int()
    found = reference.selected_attention(
        q, k, v, lists, block_size=BLOCK, block_counts=counts, causal=causal, q_offset=offset, return_lse=True
    )
    sees = selected_sees(lists, causal, 1 << 30 if counts is None else counts)
    expected = loops(q[0], k[0], v[0], sees, position(0, tq, tk, offset))
    same((found[0][0], found[1][0]), expected)


@CAUSAL
@SHAPE
@pytest.mark.parametrize("w", [1, 5, 100])
def test_window(tq: int, tk: int, offset: int | None, causal: bool, w: int):
    q, k, v = qkv(tq, tk)
    o, lse = reference.sliding_window_attention(q, k, v, window_size=w, causal=causal, q_offset=offset, return_lse=True)
    same((o[0], lse[0]), loops(q[0], k[0], v[0], window_sees(w, causal), position(0, tq, tk, offset)))


def test_window_is_exactly_w_tokens():
    """lse of zero scores is the logarithm of the number of visible keys."""
    q, k, v = (x * 0 for x in qkv(20, 20))
    for causal, number in ((True, 5), (False, 9)):
        _, lse = reference.sliding_window_attention(q, k, v, window_size=5, causal=causal, return_lse=True)
        torch.testing.assert_close(lse[0, 10], torch.full_like(lse[0, 10], math.log(number)))


@CAUSAL
@SHAPE
def test_compressed(tq: int, tk: int, offset: int | None, causal: bool):
    q = normal(1, tq, HQ, DK)
    number = (tk - L) // D + 1 if tk >= L else 0
    _, k_cmp, v_cmp = qkv(tq, number + 2)
    k_cmp[:, number:], v_cmp[:, number:] = math.nan, math.nan  # a longer k_cmp: the rest is never read
    o, lse = reference.compressed_attention(
        q, k_cmp, v_cmp, kernel_size=L, kernel_stride=D, seqlen_k=tk, causal=causal, q_offset=offset, return_lse=True
    )
    expected = loops(q[0], k_cmp[0, :number], v_cmp[0, :number], compressed_sees(causal), position(0, tq, tk, offset))
    same((o[0], lse[0]), expected)


def test_offsets_of_a_batch_are_those_of_its_sequences():
    q, k, v = qkv(9, 22, batch=3)
    lists = random_lists(9, 22).expand(3, -1, -1, -1)
    offsets = torch.tensor([13, -5, 2], dtype=torch.int32)
    k_cmp, v_cmp = (reference.compress_mean(x, kernel_size=L, kernel_stride=D) for x in (k, v))
    cmp = {"kernel_size": L, "kernel_stride": D, "seqlen_k": 22}
    calls: list[Callable[..., Any]] = [
        lambda s, o: reference.selected_attention(q[s], k[s], v[s], lists[s], block_size=BLOCK, q_offset=o),
        lambda s, o: reference.sliding_window_attention(q[s], k[s], v[s], window_size=6, q_offset=o),
        lambda s, o: reference.compressed_attention(q[s], k_cmp[s], v_cmp[s], q_offset=o, **cmp),
    ]
    for call in calls:
        together = call(slice(0, 3), offsets)
        alone = torch.cat([call(slice(b, b + 1), int(offsets[b])) for b in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-14)


@CAUSAL
@pytest.mark.parametrize("offset", [None, 2, "tensor"])
@pytest.mark.parametrize("operation", ["selected", "window", "compressed", "select"])
def test_packed_is_each_sequence_alone(operation: str, causal: bool, offset: Any):
    x = packed_inputs()
    q, k, v, cu_q, cu_k = x["q"], x["k"], x["v"], x["cu_q"], x["cu_k"]
    lists = random_lists(len(q), 30)[0]
    offsets = torch.tensor([0, 3, -4, 29, 5], dtype=torch.int32) if offset == "tensor" else offset
    cu_cmp = reference.compressed_cu_seqlens(cu_k, L, D)
    k_cmp, v_cmp = (reference.compress_mean(y, kernel_size=L, kernel_stride=D, cu_seqlens=cu_k) for y in (k, v))
    assert len(k_cmp) == len(k) // D
    assert (k_cmp[int(cu_cmp[-1]) :] == 0).all()
    k_cmp[int(cu_cmp[-1]) :] = math.nan
    cmp = {"kernel_size": L, "kernel_stride": D, "causal": causal}

    def run(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, lists: Tensor, **options: Any) -> Tensor:
        tokens = {} if "cu_seqlens_q" in options else {"seqlen_k": k.shape[1]}
        if operation == "selected":
            return reference.selected_attention(q, k, v, lists, block_size=BLOCK, causal=causal, **options)
        if operation == "window":
            return reference.sliding_window_attention(q, k, v, window_size=5, causal=causal, **options)
        o, lse = reference.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **cmp, **tokens, **options)
        if operation == "compressed":
            return o
        return reference.select_blocks(q, k_cmp, lse, block_size=BLOCK, topk=3, **cmp, **tokens, **options)

    found = run(q, k, v, k_cmp, v_cmp, lists, q_offset=offsets, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in range(len(LENGTHS_Q)):
        rows, tokens, compressed = (slice(int(c[b]), int(c[b + 1])) for c in (cu_q, cu_k, cu_cmp))
        alone = run(
            q[None, rows], k[None, tokens], v[None, tokens], k_cmp[None, compressed], v_cmp[None, compressed],
            lists[None, rows], q_offset=int(offsets[b]) if isinstance(offsets, Tensor) else offsets,
        )  # fmt: skip
        torch.testing.assert_close(found[rows], alone[0], rtol=1e-13, atol=1e-14)
    assert (found[int(cu_q[-1]) :] == (-1 if operation == "select" else 0)).all()


def test_compressed_cu_seqlens():
    cu = cumulative((0, 7, 8, 11, 12, 40))
    assert reference.compressed_cu_seqlens(cu, 8, 4).tolist() == [0, 0, 0, 1, 2, 4, 13]
    assert reference.compressed_cu_seqlens(torch.zeros(1, dtype=torch.int32), 8, 4).tolist() == [0]


def test_packed_without_sequences():
    empty = torch.zeros(1, dtype=torch.int32)
    q, k, v = (x[0].requires_grad_() for x in qkv(4, 6))
    o, lse = reference.sliding_window_attention(q, k, v, cu_seqlens_q=empty, cu_seqlens_k=empty, return_lse=True)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    o.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize("length", [0, 3, 8, 11, 12, 30])
def test_compressions(length: int):
    x, position = normal(2, length, HKV, DK), normal(L, HKV, DK, seed=1)
    number = (length - L) // D + 1 if length >= L else 0
    windows = [x[:, i * D : i * D + L] + position for i in range(number)]  # [B,l,Hkv,D]
    options = {"kernel_stride": D, "position": position}
    weight, w1, b1 = normal(L, HKV, seed=2), normal(HKV, L * DK, 7, seed=3), normal(HKV, 7, seed=4)
    w2, b2 = normal(HKV, 7, 6, seed=5), normal(HKV, 6, seed=6)

    def by_head(f: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """f maps the window [l,D] of one head to a row."""
        return [torch.stack([torch.stack([f(w[b, :, h], h) for h in range(HKV)]) for b in range(2)]) for w in windows]

    def hidden(w: Tensor, h: int) -> Tensor:
        return w.reshape(-1) @ w1[h] + b1[h]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    found_and_expected = [
        (reference.compress_mean(x, kernel_size=L, **options), by_head(lambda w, h: w.sum(0) / L)),
        (reference.compress_weighted(x, weight, **options), by_head(lambda w, h: weight[:, h] @ w)),
        (reference.compress_linear(x, w1, b1, kernel_size=L, **options), by_head(hidden)),
        (
            reference.compress_mlp(x, w1, b1, w2, b2, kernel_size=L, **options),
            by_head(lambda w, h: gelu(hidden(w, h)) @ w2[h] + b2[h]),
        ),
    ]
    for found, expected in found_and_expected:
        assert found.shape[:3] == (2, number, HKV)
        if number:
            torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-12, atol=1e-13)


def nsa_inputs(length: int = 40) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q, k, v = qkv(length, length)
    k_cmp, v_cmp = (reference.compress_mean(x, kernel_size=L, kernel_stride=D) for x in (k, v))
    gates = torch.sigmoid(normal(1, length, HQ, 3, seed=5))
    k_win, v_win = normal(1, length, HKV, DK, seed=6), normal(1, length, HKV, DV, seed=7)
    sizes = {"kernel_size": L, "kernel_stride": D, "block_size": BLOCK, "topk": 4, "window_size": 6}
    return (q, k, v, gates, k_cmp, v_cmp, k_win, v_win), sizes


def test_native_sparse_attention_is_the_gated_sum():
    (q, k, v, gates, k_cmp, v_cmp, k_win, v_win), sizes = nsa_inputs()
    found = reference.native_sparse_attention(
        q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win, **sizes
    )
    expected_ids = brute_selection(q[0], k_cmp[0], 40, 0, True, 4, 1, 2)
    lists = torch.tensor(expected_ids)[None]
    branches = [
        loops(q[0], k_cmp[0], v_cmp[0], compressed_sees(True), 0)[0],
        loops(q[0], k[0], v[0], selected_sees(lists, True), 0)[0],
        loops(q[0], k_win[0], v_win[0], window_sees(6, True), 0)[0],
    ]
    expected = sum(gates[0, :, :, c, None] * o for c, o in enumerate(branches))
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-13)
    given = reference.native_sparse_attention(
        q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win, block_indices=lists, **sizes
    )
    assert torch.equal(found, given)
    shared = reference.native_sparse_attention(q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, **sizes)
    window = loops(q[0], k[0], v[0], window_sees(6, True), 0)[0]
    expected = expected + gates[0, :, :, 2, None] * (window - branches[2])
    torch.testing.assert_close(shared[0], expected, rtol=1e-12, atol=1e-13)


def test_recompute_changes_nothing():
    tensors, sizes = nsa_inputs()
    names = ("k_cmp", "v_cmp", "k_win", "v_win")
    results = []
    for recompute in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        keywords = dict(zip(names, leaves[4:], strict=True))
        o = reference.native_sparse_attention(*leaves[:4], **keywords, recompute=recompute, **sizes)
        results.append([o, *torch.autograd.grad(o, leaves, normal(*o.shape, seed=9))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dead_branches_ignore_their_gates():
    """A row before the keys is dead in all branches; the first rows of a sequence see no compressed key yet."""
    (q, k, v, gates, k_cmp, v_cmp, _, _), sizes = nsa_inputs()
    gates[:, : L - 1, :, 0] = math.nan
    leaf = gates.requires_grad_()
    o = reference.native_sparse_attention(q, k, v, leaf, k_cmp=k_cmp, v_cmp=v_cmp, **sizes)
    (gradient,) = torch.autograd.grad(o.sum(), leaf)
    assert o.isfinite().all()
    assert (gradient[:, : L - 1, :, 0] == 0).all()
    assert gradient.isfinite().all()
    all_nan = torch.full_like(gates, math.nan).requires_grad_()
    o = reference.native_sparse_attention(q, k, v, all_nan, k_cmp=k_cmp, v_cmp=v_cmp, q_offset=-40, **sizes)
    (gradient,) = torch.autograd.grad(o, all_nan, torch.full_like(o, math.nan))
    assert (o == 0).all()
    assert (gradient == 0).all()
