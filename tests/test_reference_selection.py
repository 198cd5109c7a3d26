"""select_blocks of nsa_cuda.reference: weights, scores, ranks, ties."""

from __future__ import annotations

import math

import pytest
import torch
from nsa_cuda import reference
from nsa_cuda.reference.selection import block_scores, selection_weights
from plain_loops import (
    BLOCK,
    CAUSAL,
    DK,
    HKV,
    HQ,
    D,
    L,
    brute_selection,
    exact_scores,
    position,
    qkv,
)


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"), [(32, 16, 64), (8, 4, 8), (16, 16, 64), (48, 16, 32)]
)
def test_weights_are_shared_tokens(kernel_size: int, kernel_stride: int, block_size: int):
    """A compressed key weighs in a block's score as many times d tokens as the two share."""
    weights = selection_weights(kernel_size, kernel_stride, block_size)
    block = 5
    for i in range(40 * block_size // kernel_stride):
        u = i - block * block_size // kernel_stride
        window = range(i * kernel_stride, i * kernel_stride + kernel_size)
        shared = len([x for x in window if block * block_size <= x < (block + 1) * block_size])
        assert weights.get(u, 0) * kernel_stride == shared


def test_weights_of_the_paper():
    assert list(selection_weights(32, 16, 64).items()) == [(-1, 1), (0, 2), (1, 2), (2, 2), (3, 1)]


@pytest.mark.parametrize(("compressed", "number"), [(0, 0), (0, 1), (1, 1), (6, 4), (7, 4), (15, 8), (3, 8)])
def test_block_scores(compressed: int, number: int):
    p = torch.rand(compressed, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = block_scores(p[None], number, L, D, BLOCK)[0]
    expected = torch.tensor([float(x) for x in exact_scores(p, number)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


SELECT_SHAPES = [(70, 70, None), (9, 90, None), (11, 6, None), (30, 61, -12), (30, 61, 50), (0, 9, None), (7, 0, None)]


@CAUSAL
@pytest.mark.parametrize(("tq", "tk", "offset"), SELECT_SHAPES)
@pytest.mark.parametrize(("topk", "init", "local"), [(4, 1, 2), (3, 0, 0), (2, 2, 0), (20, 1, 3)])
def test_select_blocks(tq: int, tk: int, offset: int | None, causal: bool, topk: int, init: int, local: int):
    number = (tk - L) // D + 1 if tk >= L else 0
    q, k_cmp, v_cmp = qkv(tq, number)
    cmp = {"kernel_size": L, "kernel_stride": D, "seqlen_k": tk, "causal": causal, "q_offset": offset}
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **cmp)
    found = reference.select_blocks(
        q, k_cmp, lse, block_size=BLOCK, topk=topk, init_blocks=init, local_blocks=local, **cmp
    )
    assert found.dtype == torch.int32
    assert found.shape == (1, tq, HKV, topk)
    expected = brute_selection(q[0], k_cmp[0], tk, position(0, tq, tk, offset), causal, topk, init, local)
    assert found[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 200, 331])
def test_equal_masses_are_ties_and_go_to_the_smaller_id(dtype: torch.dtype, length: int):
    """Scores of zero make every compressed key equal, so that inner blocks tie exactly: the first of them win."""
    q = torch.zeros(1, length, 3 * HKV, DK, dtype=dtype)  # G = 3: sums that do round
    number = (length - L) // D + 1
    k_cmp, v_cmp = torch.zeros(2, 1, number, HKV, DK, dtype=dtype)
    cmp = {"kernel_size": L, "kernel_stride": D, "causal": False}
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **cmp)
    ids = reference.select_blocks(q, k_cmp, lse, block_size=BLOCK, topk=5, init_blocks=0, local_blocks=0, **cmp)
    # Block 0 lacks the window that would start before the sequence, so its score is smaller than the others'.
    assert (ids == torch.arange(1, 6)).all()


def test_scores_of_zero_are_candidates():
    """A dead row of the compressed branch still fills its budget, in order of id."""
    q, k_cmp, _v_cmp = qkv(1, 24)
    cmp = {"kernel_size": L, "kernel_stride": D, "seqlen_k": 100, "causal": False}
    ids = reference.select_blocks(
        q, k_cmp, torch.full((1, 1, HQ), -math.inf, dtype=torch.float64), block_size=BLOCK, topk=4, init_blocks=1,
        local_blocks=1, q_offset=75, **cmp,
    )  # fmt: skip
    assert (ids[0, 0] == torch.tensor([0, 1, 2, 9])).all()
