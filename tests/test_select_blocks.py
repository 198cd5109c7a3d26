"""select_blocks on every target against an exhaustive float64 selection; ties, bits, and what it may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import nsa_cuda
import pytest
import torch
from cases import on_every_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import INT32_MAX, INT32_MIN
from nsa_cuda import _C
from poison import poisoned_memory
from range_inputs import make as make_range
from selection_cases import EVERYTHING, SANITIZER, SelectionCase, failures, make, options_of, select
from targets import ALL, CPU, CPU_TARGETS, CUDA_BLOCK_SIZES, CUDA_HEAD_DIMS, CUDA_TARGETS, ONE_EACH, Target, param
from torch import Tensor


@pytest.mark.parametrize(("target", "case"), on_every_target(EVERYTHING))
def test_case(target: Target, case: SelectionCase):
    made, lse = make(case, target)
    with poisoned_memory():
        ids = select(made, lse, target.backend)
    assert not failures(made, lse, ids)
    with poisoned_memory():
        assert torch.equal(ids, select(made, lse, target.backend))


@pytest.mark.sanitizer
@pytest.mark.parametrize(("target", "case"), [param(t, c, name=c.name) for t in CUDA_TARGETS for c in SANITIZER])
def test_small_launch(target: Target, case: SelectionCase):
    """For compute-sanitizer: on the GPU runs the library alone."""
    made, lse = make(case, Target("cpu", target.dtype, None))
    found = select(make_range(case, target), lse.to(target.device), target.backend).cpu()
    assert not failures(made, lse, found)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in EVERYTHING])
def test_reference_passes_the_same_rule(case: SelectionCase):
    """In float32 and in float64, where it has the compiled backend's ids."""
    for target in CPU_TARGETS[:2]:
        made, lse = make(case, target)
        ids = select(made, lse, "reference")
        assert not failures(made, lse, ids)
    made, lse = make(case, CPU_TARGETS[0])
    assert torch.equal(select(made, lse, "reference"), select(made, lse, None))


# The rule itself: every way of being wrong is seen.
RULE = SelectionCase("rule", topk=4, block_size=16)
SCORES = [0.1, 0.5, 0.2, 0.9, 0.3, 0.8, 0.0, 0.0]


@pytest.mark.parametrize(("ids", "wrong"), [
    ([0, 3, 6, 7], ""),
    ([0, 5, 6, 7], "took 5"),
    ([3, 0, 6, 7], "not ascending"),
    ([0, 3, 7, 7], "not ascending"),
    ([0, 3, 6, -1], "3 blocks"),
    ([0, -1, 6, 7], "not ascending"),
    ([1, 3, 6, 7], "forced"),
    ([0, 3, 6, 8], "candidates"),
])  # fmt: skip
def test_the_rule(ids: list[int], wrong: str):
    from selection_cases import row_failure

    found = row_failure(RULE, ids, SCORES, p=127, slack=1e-6)
    assert (wrong in found) if wrong else not found


# -------------------------------------------------------------------------------------------- ties


def tie_case(**options: object) -> SelectionCase:
    sizes = {"init_blocks": 0, "local_blocks": 0, "causal": False, "Hq": 12, "Hkv": 2}
    return SelectionCase("ties", **{**sizes, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("length", [96, 203, 1031])
def test_equal_masses_go_to_the_smaller_id(target: Target, length: int):
    """q = 0 makes every compressed key equal. Block 0 lacks the window that would start before the sequence."""
    made = make_range(tie_case(Tq=length, Tk=length, topk=3), target)
    made.q.zero_()
    _, lse = nsa_cuda.compressed_attention(
        made.q, made.k, made.v, return_lse=True, backend=target.backend, **made.options
    )
    ids = select(made, lse, target.backend)
    assert (ids == torch.tensor([1, 2, 3], device=ids.device)).all()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("G", [1, 3, 6, 16])
@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), [(32, 16, 64), (8, 4, 16), (64, 16, 32)])
def test_repeated_keys_tie_exactly(target: Target, G: int, kernel_size: int, kernel_stride: int, block_size: int):
    """Keys that repeat block by block give equal masses, wherever a block stands in tiles and chunks of keys."""
    step, before = block_size // kernel_stride, kernel_size // kernel_stride - 1
    case = tie_case(
        Tq=40, Tk=60 * block_size, kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size,
        Hq=2 * G, topk=6,
    )  # fmt: skip
    made, _ = make(case, target)
    made.k.copy_(made.k[:, :step].repeat(1, 61, 1, 1)[:, : made.k.shape[1]])
    _, lse = nsa_cuda.compressed_attention(
        made.q, made.k, made.v, return_lse=True, backend=target.backend, **made.options
    )
    ids = select(made, lse, target.backend)
    first = -(-before // step)  # the first block that has all its keys
    assert (ids == torch.arange(first, first + 6, device=ids.device)).all()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("G", [3, 16, 32])
@pytest.mark.parametrize("topk", [1, 16, 32, 33, 70])
@pytest.mark.parametrize("order", ["rising", "falling", "runs"])
def test_order_of_scores(target: Target, G: int, topk: int, order: str):
    """Every block enters the list; none once it is full; all of a run tie. Lists of one entry to three warps'."""
    case = tie_case(Tq=20, Tk=2400, kernel_size=8, kernel_stride=4, block_size=16, Hq=2 * G, topk=topk)
    made, _ = make(case, target)
    block = torch.arange(made.k.shape[1], device=made.k.device) // 4
    level = {"rising": block, "falling": 150 - block, "runs": block // 40 * 40}[order] / 150
    made.q.abs_()
    made.k.copy_(level[None, :, None, None].expand(made.k.shape))
    _, lse = nsa_cuda.compressed_attention(
        made.q, made.k, made.v, return_lse=True, backend=target.backend, **made.options
    )
    ids = select(made, lse, target.backend)
    assert not failures(made, lse, ids)
    if order == "runs" and topk < 29:  # of the last run's blocks, 120 shares a key with the run before
        assert (ids == torch.arange(121, 121 + topk, device=ids.device)).all()
    assert torch.equal(ids, select(made, lse, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_scores_of_zero_are_candidates(target: Target):
    """lse = -inf, a dead row of the compressed branch, scores 0 everywhere and fills its budget in order of id."""
    made, lse = make(SelectionCase("dead", Tq=5, Tk=300, topk=5, causal=False, q_offset=250), target)
    ids = select(made, torch.full_like(lse, -math.inf), target.backend)
    assert (ids == torch.tensor([0, 1, 2, 14, 15], device=ids.device)).all()


# -------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("target", CPU)
@pytest.mark.parametrize("name", ["paper", "packed_ragged", "long_full"])
def test_threads_do_not_matter(target: Target, name: str, one_thread):
    made, lse = make(next(c for c in EVERYTHING if c.name == name), target)
    torch.set_num_threads(1)
    first = select(made, lse, target.backend)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(first, select(made, lse, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_last_token_alone(target: Target):
    """A decoding step takes the blocks that the same token takes in a prefill, ids within rounding."""
    case = SelectionCase("prefill", B=2, Tq=333, Tk=333, Hq=16, Hkv=2, topk=6)
    made, lse = make(case, target)
    prefill = select(made, lse, target.backend)[:, -1:]
    made.q, lse = made.q[:, -1:], lse[:, -1:]
    made.case = replace(case, Tq=1)
    assert not failures(made, lse, prefill)
    assert not failures(made, lse, select(made, lse, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_packed_equals_batched(target: Target):
    made, lse = make(SelectionCase("packing", B=3, Tq=70, Tk=200, Hq=8, Hkv=2), target)
    batched = select(made, lse, target.backend)
    made.q, made.k = made.q.flatten(0, 1), made.k.flatten(0, 1)
    bounds = torch.arange(4, dtype=torch.int32, device=made.q.device)
    del made.options["seqlen_k"]
    made.options |= {"cu_seqlens_q": bounds * 70, "cu_seqlens_k": bounds * 200}
    packed = select(made, lse.flatten(0, 1), target.backend)
    # Rows may stand elsewhere in their tiles, so a score may round differently where a kernel's sums depend on that.
    assert not failures(made, lse.flatten(0, 1), packed)
    assert (packed == batched.flatten(0, 1)).double().mean() > 0.999


@pytest.mark.parametrize("target", ALL)
def test_a_longer_tail_of_keys_is_not_read(target: Target):
    """Rows of k_cmp past the sequence's own may hold anything."""
    made, lse = make(SelectionCase("tail", B=2, Tk=203), target)
    first = select(made, lse, target.backend)
    for value in (math.nan, math.inf, 1e4):
        made.k = torch.nn.functional.pad(made.k, (0, 0, 0, 0, 0, 37), value=value)
        assert torch.equal(first, select(made, lse, target.backend))


@pytest.mark.parametrize("target", ONE_EACH)
def test_no_gradient_and_no_graph(target: Target):
    made, lse = make(SelectionCase("leaf", Tk=203), target)
    made.q.requires_grad_()
    made.k.requires_grad_()
    assert not select(made, lse.requires_grad_(), target.backend).requires_grad


@pytest.mark.parametrize("target", ONE_EACH)
def test_autocast(target: Target):
    made, lse = make(SelectionCase("autocast", Tk=203), target)
    with torch.autocast(target.device, torch.bfloat16):
        found = nsa_cuda.select_blocks(
            made.q.float(), made.k.float(), lse.float(), backend=target.backend, **options_of(made)
        )
    made.q, made.k = made.q.bfloat16(), made.k.bfloat16()
    assert torch.equal(found, select(made, lse.float(), target.backend))


def test_memory_does_not_grow_with_queries_or_with_keys_times_queries():
    """The CPU's scratch holds the keys once and each thread's tile: nothing of size Tq."""

    def workspace(tq: int, tk: int) -> int:
        rows = (tk - 32) // 16 + 1
        problem = _C.RangeProblem(
            0, 0, 1, 1, tq, rows, 64, 4, 128, 1, 1, 0, 32, 16, tk, True, 0.1, 0, 0, 0, False, 0
        )  # fmt: skip
        return _C.selection_workspace(problem, 64, 16, 1, 2, 2)

    assert workspace(1 << 10, 1 << 16) == workspace(1 << 20, 1 << 16)
    assert workspace(1 << 20, 1 << 20) < 1.1 * (1 << 16) * 4 * 128 * 4 + (4 << 20)


# -------------------------------------------------------------------------------------------- random configurations


@st.composite
def random_cases(draw: st.DrawFn, cuda: bool) -> SelectionCase:
    d = draw(st.sampled_from([16, 8, 32] if cuda else [1, 2, 4, 16, 5]))
    block = draw(st.sampled_from([b for b in CUDA_BLOCK_SIZES if b % d == 0])) if cuda else d * draw(st.integers(1, 9))
    Dk, Dv = draw(st.sampled_from(CUDA_HEAD_DIMS)) if cuda else (draw(st.integers(1, 40)), 3)
    init, local = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    packed = draw(st.booleans())
    B = draw(st.integers(0, 3))
    Hkv = draw(st.integers(1, 2))
    lengths = st.lists(st.integers(0, 200), min_size=B, max_size=B).map(tuple)
    offsets = st.one_of(st.none(), st.integers(-100, 400), st.sampled_from([INT32_MIN, INT32_MAX]))
    return SelectionCase(
        name=f"random_{draw(st.integers(0, 10**6))}",
        B=B,
        Tq=draw(st.integers(0, 90)),
        Tk=draw(st.integers(0, 700)),
        Hq=Hkv * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17])),
        Hkv=Hkv,
        Dk=Dk,
        Dv=Dv,
        kernel_size=d * draw(st.integers(1, 6)),
        kernel_stride=d,
        block_size=block,
        topk=max(1, init + local + draw(st.integers(0, 12))),
        init_blocks=init,
        local_blocks=local,
        causal=draw(st.booleans()),
        q_offset=draw(st.one_of(offsets, st.lists(st.integers(-50, 300), min_size=B, max_size=B).map(tuple))),
        seqlens_q=draw(lengths) if packed else None,
        seqlens_k=draw(lengths) if packed else None,
        pad_q=draw(st.integers(0, 20)) if packed else 0,
        pad_k=draw(st.integers(0, 20)) if packed else 0,
        extra_rows=draw(st.integers(0, 9)),
        nan_outside=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "heads_first", "sliced_heads", "inside_nan", "odd_strides"])),
        magnitude=draw(st.sampled_from([1.0, 0.3, 2.0])),
    )


@pytest.mark.parametrize("target", [param(t) for t in [*CPU_TARGETS[:3], *CUDA_TARGETS]])
def test_random_cases(target: Target):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=random_cases(target.is_cuda))
    def holds(case: SelectionCase) -> None:
        made, lse = make(case, target)
        with poisoned_memory():
            ids: Tensor = select(made, lse, target.backend)
        assert not failures(made, lse, ids)

    holds()
