"""Random shapes, masks, lists and layouts, by the accuracy rule."""

from __future__ import annotations

import pytest
from accuracy import check, run
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import INT32_MAX, INT32_MIN, make
from poison import poisoned_memory
from targets import CPU_TARGETS, CUDA_BLOCK_SIZES, CUDA_HEAD_DIMS, CUDA_TARGETS, Target, param

INDEX_KINDS = ["random", "wild", "all", "some_empty", "duplicates", "unsorted", "future", "invalid_first", "sink"]
LAYOUT_KINDS = ["contiguous", "contiguous", "heads_first", "sliced_heads", "inside_nan", "odd_strides"]

settings.register_profile("suite", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("suite")


@st.composite
def cases(draw: st.DrawFn, cuda: bool) -> Case:
    if cuda:
        Dk, Dv = draw(st.sampled_from(CUDA_HEAD_DIMS))
        block_size = draw(st.sampled_from(CUDA_BLOCK_SIZES))
    else:
        Dk, Dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        block_size = draw(st.sampled_from([*CUDA_BLOCK_SIZES, 1, 7, 24, 100]))
    Hkv = draw(st.integers(1, 3))
    packed = draw(st.booleans())
    B = draw(st.integers(0, 3))
    lengths = st.lists(st.integers(0, 90), min_size=B, max_size=B).map(tuple)
    offsets = st.one_of(st.none(), st.integers(-100, 200), st.sampled_from([INT32_MIN, INT32_MAX]))
    return Case(
        name=f"random_{draw(st.integers(0, 10**6))}",
        B=B,
        Tq=draw(st.integers(0, 150)),
        Tk=draw(st.integers(0, 250)),
        Hq=Hkv * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17])),
        Hkv=Hkv,
        Dk=Dk,
        Dv=Dv,
        block_size=block_size,
        S=draw(st.one_of(st.integers(0, 8), st.integers(30, 40))),
        causal=draw(st.booleans()),
        q_offset=draw(st.one_of(offsets, st.lists(st.integers(-50, 150), min_size=B, max_size=B).map(tuple))),
        block_counts=draw(st.one_of(st.none(), st.just("random"), st.integers(-2, 12))),
        indices=draw(st.sampled_from(INDEX_KINDS)),
        int64=draw(st.booleans()),
        seqlens_q=draw(lengths) if packed else None,
        seqlens_k=draw(lengths) if packed else None,
        pad_q=draw(st.integers(0, 20)) if packed else 0,
        pad_k=draw(st.integers(0, 20)) if packed else 0,
        nan_outside=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUT_KINDS)),
        lse=draw(st.booleans()),
    )


TARGETS = [param(t) for t in [*CPU_TARGETS[:3], *CUDA_TARGETS]]


@pytest.mark.parametrize("target", TARGETS)
def test_random_cases(target: Target):
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(case=cases(target.is_cuda))
    def holds(case: Case) -> None:
        made = make(case, target)
        with poisoned_memory():
            found = run(made, target.backend)
        check(made, target, found)

    holds()
