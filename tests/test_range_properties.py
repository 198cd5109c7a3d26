"""What must hold of the sliding window and of compressed attention whatever the kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accuracy import OUTPUTS, baseline, check, failures, run
from cases import on_every_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import INT32_MAX, INT32_MIN, Inputs
from poison import poisoned_memory
from range_cases import RangeCase, both
from range_inputs import make
from targets import ALL, CPU_TARGETS, CUDA_HEAD_DIMS, CUDA_TARGETS, Target, param
from test_selected_properties import assert_same_bits, dense
from torch import Tensor

DENSE = [
    RangeCase("gqa", B=2, Tq=130, Tk=130, Hq=8, Hkv=2),
    RangeCase("mqa_d128", Tq=130, Tk=130, Hq=16, Hkv=1, Dk=128, Dv=128),
    RangeCase("d192_128", Tq=130, Tk=130, Hq=4, Hkv=1, Dk=192, Dv=128),
    RangeCase("tail", Tq=50, Tk=200, Hq=4, Hkv=2),
]
DENSE = [replace(c, window_size=200) for c in DENSE] + [
    replace(c, name=f"compressed_{c.name}", mask="compressed", kernel_size=1, kernel_stride=1) for c in DENSE
]
DENSE += [replace(c, name=c.name + "_noncausal", causal=False) for c in DENSE]


@pytest.mark.parametrize(("target", "case"), on_every_target(DENSE))
def test_wide_enough_is_dense_attention(target: Target, case: RangeCase):
    """A window over everything, and windows of one token as compressed keys, are torch's dense attention."""
    made = make(case, target)
    lines = failures(made, run(made, target.backend), dense(made), baseline(made), target.dtype)
    assert not lines, "\n".join(lines)


def parametrise(cases: list[RangeCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases])


@pytest.mark.parametrize("target", ALL)
@parametrise(both("prefill", B=2, Tq=333, Tk=333, Hq=16, Hkv=2))
def test_last_token_alone(target: Target, case: RangeCase):
    """The last row of a prefill and a decoding step of that token obey the rule of the same oracle."""
    made = make(case, target)
    o, lse = made.attend((made.q, made.k, made.v), target.backend, return_lse=True)
    last = Inputs(**{**vars(made), "case": replace(case, Tq=1)})
    for name in ("q", "dout", "dlse"):
        setattr(last, name, getattr(made, name)[:, -1:])
    check(last, target, {"o": o[:, -1:], "lse": lse[:, -1:]})
    check(last, target)


@pytest.mark.parametrize("target", ALL)
@parametrise(both("packing", B=3, Tq=70, Tk=90, Hq=8, Hkv=2))
def test_packed_equals_batched(target: Target, case: RangeCase):
    made = make(case, target)
    batched = run(made, target.backend)
    for name in ("q", "k", "v", "dout", "dlse"):
        setattr(made, name, getattr(made, name).flatten(0, 1))
    bounds = torch.arange(4, dtype=torch.int32, device=made.q.device)
    made.options.pop("seqlen_k", None)
    made.options |= {"cu_seqlens_q": bounds * 70, "cu_seqlens_k": bounds * 90}
    packed = run(made, target.backend)
    check(made, target, packed)
    for name in OUTPUTS:
        torch.testing.assert_close(packed[name], batched[name].flatten(0, 1), rtol=0.02, atol=0.02, msg=name)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("value", [1e4, math.nan, math.inf], ids=["large", "nan", "inf"])
@parametrise(
    both("neighbours", seqlens_q=(37, 60), seqlens_k=(70, 60), Hq=8, Hkv=2)
    + both("neighbours_full", seqlens_q=(37, 60), seqlens_k=(70, 60), Hq=8, Hkv=2, causal=False)
)
def test_another_sequence_does_not_matter(target: Target, value: float, case: RangeCase):
    """Nothing crosses a sequence: what the second holds never shows in the first."""
    made = make(case, target)
    first = run(made, target.backend)
    keys = case.num_keys(70)
    for x, start in ((made.q, 37), (made.k, keys), (made.v, keys), (made.dout, 37)):
        x[start::7] = value
    second = run(made, target.backend)
    rows = {"o": 37, "lse": 37, "dq": 37, "dk": keys, "dv": keys}
    assert_same_bits({n: x[: rows[n]] for n, x in first.items()}, {n: x[: rows[n]] for n, x in second.items()})
    assert not torch.equal(first["o"][37:], second["o"][37:])


@pytest.mark.parametrize("target", ALL)
def test_keys_outside_every_range_are_not_read(target: Target):
    """A decoding step with a window reads w keys: the rest of the cache may hold anything."""
    case = RangeCase("cache", B=2, Tq=1, Tk=700, Hq=8, Hkv=2, window_size=64)
    made = make(case, target)
    first = run(made, target.backend)
    for x in (made.k, made.v):
        x[:, : 700 - 64 - 128] = math.nan  # a tile of keys and one more for the kernels that load whole tiles
    assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", ["heads_first", "sliced_heads", "inside_nan", "odd_strides"])
@parametrise(both("layout", B=2, Tq=80, Tk=120))
def test_layout_does_not_change_a_bit(target: Target, layout: str, case: RangeCase):
    plain = run(make(case, target), target.backend)
    assert_same_bits(plain, run(make(replace(case, layout=layout), target), target.backend))


def broken(offsets: Tensor, kind: str) -> Tensor:
    bad = offsets.clone()
    if kind == "descending":
        bad[1], bad[2] = int(offsets[2]), int(offsets[1])
    elif kind == "negative":
        bad[0] = -5
    else:
        bad[2:] += 10_000
    return bad


@pytest.mark.parametrize("target", [param(t) for t in CUDA_TARGETS])
@pytest.mark.parametrize("kind", ["descending", "negative", "past_the_end"])
@parametrise(both("offsets", seqlens_q=(30, 20, 50), seqlens_k=(60, 40, 50), Hq=8, Hkv=2))
def test_offsets_are_repaired(target: Target, kind: str, case: RangeCase):
    """On the GPU values of cu_seqlens are data: no crash, no stray write, what the reference's repair gives."""
    made = make(case, target)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        made.options[name] = broken(made.options[name], kind)
    check(made, target, run(made, target.backend))


@st.composite
def random_cases(draw: st.DrawFn, cuda: bool) -> RangeCase:
    Dk, Dv = draw(st.sampled_from(CUDA_HEAD_DIMS)) if cuda else (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    Hkv = draw(st.integers(1, 3))
    packed = draw(st.booleans())
    B = draw(st.integers(0, 3))
    d = draw(st.sampled_from([1, 2, 4, 7, 16]))
    lengths = st.lists(st.integers(0, 150), min_size=B, max_size=B).map(tuple)
    offsets = st.one_of(st.none(), st.integers(-100, 300), st.sampled_from([INT32_MIN, INT32_MAX]))
    return RangeCase(
        name=f"random_{draw(st.integers(0, 10**6))}",
        B=B,
        Tq=draw(st.integers(0, 150)),
        Tk=draw(st.integers(0, 400)),
        Hq=Hkv * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17])),
        Hkv=Hkv,
        Dk=Dk,
        Dv=Dv,
        mask=draw(st.sampled_from(["window", "compressed"])),
        window_size=draw(st.one_of(st.integers(1, 200), st.sampled_from([1 << 33, (1 << 63) - 1]))),
        kernel_size=d * draw(st.integers(1, 5)),
        kernel_stride=d,
        extra_rows=0,
        causal=draw(st.booleans()),
        q_offset=draw(st.one_of(offsets, st.lists(st.integers(-50, 250), min_size=B, max_size=B).map(tuple))),
        seqlens_q=draw(lengths) if packed else None,
        seqlens_k=draw(lengths) if packed else None,
        pad_q=draw(st.integers(0, 20)) if packed else 0,
        pad_k=draw(st.integers(0, 20)) if packed else 0,
        nan_outside=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "heads_first", "sliced_heads", "inside_nan", "odd_strides"])),
        lse=draw(st.booleans()),
    )


@pytest.mark.parametrize("target", [param(t) for t in [*CPU_TARGETS[:3], *CUDA_TARGETS]])
def test_random_cases(target: Target):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=random_cases(target.is_cuda))
    def holds(case: RangeCase) -> None:
        made = make(case, target)
        with poisoned_memory():
            found = run(made, target.backend)
        check(made, target, found)

    holds()
