"""native_sparse_attention: o and every gradient by the accuracy rule, and the equalities between its ways."""

from __future__ import annotations

import math
from dataclasses import replace

import nsa_cuda
import pytest
import torch
from accuracy import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from native_inputs import LEAVES, NativeCase, baseline, check, make, oracle
from targets import ALL, CPU_TARGETS, CUDA_TARGETS, ONE_EACH, Target, param

PAPER = {"Hq": 16, "Hkv": 1, "Dk": 192, "Dv": 128, "kernel_size": 32, "kernel_stride": 16, "block_size": 64}
CASES = [
    NativeCase("plain"),
    NativeCase("shared", shared=True),
    NativeCase("float_gates", float_gates=True),
    NativeCase("signed_gates", signed_gates=True),
    NativeCase("signed_paper", B=1, Tq=400, Tk=400, topk=4, window_size=100, signed_gates=True, **PAPER),
    NativeCase("signed_wide", B=1, Tq=200, Tk=200, Dk=256, Dv=256, block_size=64, topk=3, signed_gates=True),
    NativeCase("signed_dead_rows", q_offset=-70, signed_gates=True, float_gates=True, shared=True),
    NativeCase("signed_packed", seqlens_q=(70, 0, 3, 120), seqlens_k=(70, 0, 3, 120), pad=9, signed_gates=True),
    NativeCase("signed_noncausal", causal=False, signed_gates=True),
    NativeCase("signed_g24", B=1, Tq=200, Hq=24, Hkv=1, Dk=128, Dv=128, block_size=64, topk=3, signed_gates=True),
    NativeCase("small_gates", Tk=400, gate_scale=1e-3, float_gates=True),
    NativeCase("noncausal", causal=False),
    NativeCase("tq_not_tk", Tq=33, Tk=170, shared=True),
    NativeCase("tq_longer", Tq=170, Tk=33, topk=3, block_size=16),
    NativeCase("decode", Tq=1, Tk=300, Hq=16, Hkv=1),
    NativeCase("paper", B=1, Tq=500, Tk=500, topk=4, window_size=100, **PAPER),
    NativeCase("offset_tensor", Tq=60, Tk=150, q_offset=(7, -20)),
    NativeCase("dead_rows", q_offset=-70),
    NativeCase("shorter_than_l", Tq=20, Tk=20, kernel_size=32, kernel_stride=16, topk=3),
    NativeCase("dense", topk=10),
    NativeCase("dense_shared_noncausal", topk=10, causal=False, shared=True),
    NativeCase("dense_tq_not_tk", Tq=33, Tk=160, topk=10),
    NativeCase("dense_dead_rows", topk=10, q_offset=-70),
    NativeCase("no_queries", Tq=0),
    NativeCase("no_keys", Tk=0),
    NativeCase("no_batch", B=0),
    NativeCase("packed", seqlens_q=(70, 0, 3, 120), seqlens_k=(70, 0, 3, 120)),
    NativeCase("packed_shared", seqlens_q=(70, 0, 3, 120), seqlens_k=(70, 0, 3, 120), shared=True),
    NativeCase("packed_padding", seqlens_q=(50, 77), seqlens_k=(50, 77), pad=20),
    NativeCase("packed_tq_not_tk", seqlens_q=(5, 30, 1), seqlens_k=(90, 30, 200), pad=11, shared=True),
    NativeCase("packed_noncausal", seqlens_q=(70, 3, 60), seqlens_k=(70, 3, 60), causal=False),
]  # fmt: skip
EACH = [param(t, c, name=c.name) for t in CPU_TARGETS + CUDA_TARGETS for c in CASES]
FEW = [pytest.param(c, id=c.name) for c in CASES if c.name in ("plain", "shared", "dense", "packed_padding")]


@pytest.mark.parametrize(("target", "case"), EACH)
def test_accuracy(target: Target, case: NativeCase):
    check(make(case, target), target)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("recompute", ["window", True])
def test_recomputing_changes_no_bit(target: Target, case: NativeCase, recompute):
    made = make(case, target)
    kept, again = made.run(target.backend), made.run(target.backend, recompute=recompute)
    for name, x in kept.items():
        # Rows past the sequences hold no result, and NaN came in there through dout.
        assert torch.equal(x.nan_to_num(), again[name].nan_to_num()), name


@pytest.mark.parametrize("target", ALL)
def test_own_lists_are_those_of_select_blocks(target: Target):
    made = make(CASES[0], target)
    found, expected = made.run(target.backend), made.run(target.backend, block_indices=made.lists())
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("causal", [True, False])
def test_dense_is_every_block_listed(target: Target, causal: bool):
    """The path without lists agrees with lists that hold every block, both within the rule."""
    case = NativeCase("dense_listed", topk=10, causal=causal)
    made = make(case, target)
    check(made, target, made.run(target.backend, block_indices=made.lists()))
    check(made, target, made.run(target.backend))


@pytest.mark.parametrize("target", ONE_EACH)
def test_counts_apply_to_given_lists(target: Target):
    made = make(CASES[0], target)
    lists = made.lists()
    short = made.run(target.backend, block_indices=lists, block_counts=2)
    cut = lists.where(torch.arange(4, device=lists.device) < 2, -1)
    expected = made.run(target.backend, block_indices=cut)
    assert all(torch.equal(x, expected[name]) for name, x in short.items())


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("wanted", LEAVES)
@pytest.mark.parametrize("recompute", [False, "window", True])
def test_a_gradient_alone(target: Target, wanted: str, recompute):
    """Only what is asked for is computed, and it is the same."""
    made = make(CASES[0], target)
    full = made.run(target.backend)[f"d{wanted}"]
    leaf = made.tensors[wanted].detach().requires_grad_()
    x = {**made.tensors, wanted: leaf}
    keys = {name: x[name] for name in LEAVES[4:]}
    o = nsa_cuda.native_sparse_attention(
        *(x[name] for name in LEAVES[:4]), **keys, recompute=recompute, backend=target.backend, **made.options
    )
    (alone,) = torch.autograd.grad(o, leaf, made.dout)
    assert torch.equal(alone, full)


@pytest.mark.parametrize("target", ONE_EACH)
def test_gates_of_dead_rows_hold_anything(target: Target):
    """Before position l - 1 no compressed key is visible, before 0 no key at all."""
    made = make(NativeCase("dead_gates", q_offset=-70), target)
    gates = made.tensors["gates"]
    clean = made.run(target.backend)
    gates[:, : 70 + made.case.kernel_size - 1, :, 0] = math.nan
    gates[:, :70] = math.inf
    found = made.run(target.backend)
    assert torch.equal(found["o"], clean["o"])
    for name in ("dq", "dk", "dv_win", "dk_cmp", "dgates"):
        assert torch.equal(found[name], clean[name]), name


@pytest.mark.parametrize("target", ALL)
def test_the_last_row_of_many_is_a_call_of_its_own(target: Target):
    """Token by token: row t of a causal call agrees with the call that has this query alone and the keys up to it."""
    case = NativeCase("tokens", B=1, Tq=200, Tk=200, shared=True)
    made = make(case, target)
    lists = made.lists()
    ref, base = oracle(made, lists)["o"], baseline(made, lists)["o"]
    x = made.tensors
    for T in (1, 7, 8, 64, 65, 131, 199, 200):
        rows = max(0, (T - case.kernel_size) // case.kernel_stride + 1)
        options = {"backend": target.backend, **made.options}
        row = nsa_cuda.native_sparse_attention(
            x["q"][:, T - 1 : T], x["k"][:, :T], x["v"][:, :T], x["gates"][:, T - 1 : T],
            k_cmp=x["k_cmp"][:, :rows], v_cmp=x["v_cmp"][:, :rows], **options,
        )  # fmt: skip
        t = slice(T - 1, T)
        failed = compare("o", row, ref[:, t], base[:, t], target.dtype, 8.0)
        assert not failed, (T, failed)


sizes = st.sampled_from([(8, 4, 16), (4, 4, 8), (12, 4, 12), (16, 2, 32)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    size=sizes,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    dims=st.sampled_from([(8, 8), (5, 7), (16, 24)]),
    window=st.integers(1, 80),
    causal=st.booleans(),
    shared=st.booleans(),
    packed=st.booleans(),
)
def test_random_configurations(data, size, heads, dims, window, causal, shared, packed):
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    case = NativeCase(
        f"random_{lengths}_{size}", B=1, Tq=lengths[0], Tk=lengths[-1], Hq=heads[0], Hkv=heads[1], Dk=dims[0],
        Dv=dims[1], kernel_size=size[0], kernel_stride=size[1], block_size=size[2], topk=data.draw(st.integers(3, 6)),
        window_size=window, causal=causal, shared=shared,
    )  # fmt: skip
    if packed:
        case = replace(case, seqlens_q=tuple(lengths), seqlens_k=tuple(reversed(lengths)))
    target = CPU_TARGETS[0]
    check(make(case, target), target)
