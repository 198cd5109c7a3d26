"""The rule itself: what it must catch, what it must let pass."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import BASELINE_FACTOR, FLOORS, compare
from poison import poisoned_memory

DTYPE = torch.bfloat16


def noisy(ref: torch.Tensor, relative: float) -> torch.Tensor:
    gen = torch.Generator().manual_seed(7)
    return ref + relative * ref.abs().mean() * torch.randn(ref.shape, generator=gen, dtype=ref.dtype)


@pytest.fixture
def ref() -> torch.Tensor:
    return torch.randn(1, 65536, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rule(
    out: torch.Tensor, ref: torch.Tensor, base: torch.Tensor | None = None, name: str = "o", groups=None
) -> list[str]:
    return compare(name, out, ref, noisy(ref, 1e-3) if base is None else base, DTYPE, 1.0, groups)


def test_passes_the_oracle_and_the_baseline(ref):
    assert rule(ref, ref) == []
    assert rule(noisy(ref, 1e-3), ref) == []


def test_catches_one_wrong_row_in_65536(ref):
    out = noisy(ref, 1e-3)
    out[0, 4321] *= 1.2
    (line,) = rule(out, ref)
    assert "worst part (0, 4321, 0)" in line


def test_catches_a_small_error_everywhere(ref):
    assert any("error" in line for line in rule(noisy(ref, 1e-2), ref))


def test_nan_never_passes(ref):
    out = ref.clone()
    out[0, 5, 0, 3] = math.nan
    assert "NaN" in rule(out, ref)[0]
    zero = torch.zeros_like(ref)
    assert "NaN" in rule(torch.full_like(zero, math.nan), zero, zero)[0]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, -1e30])
def test_infinities_stand_in_the_same_places(value):
    ref = torch.randn(2, 10, 3, dtype=torch.float64)
    ref[1, 4] = -math.inf
    out = ref.clone()
    assert rule(out, ref, ref, "lse") == []
    out[1, 4, 2] = value
    assert rule(out, ref, ref, "lse")
    finite = ref.clone()
    finite[0, 0, 0] = -math.inf
    assert rule(finite, ref, ref, "lse")


def test_a_row_that_cancels_is_measured_against_the_typical_row(ref):
    ref[0, 10] *= 1e-9
    out = noisy(ref, 1e-3)
    assert rule(out, ref) == []
    out[0, 10] += 1.0
    assert rule(out, ref)


def test_a_large_block_does_not_hide_a_small_one():
    ref = torch.randn(1, 256, 1, 8, dtype=torch.float64)
    ref[0, :64] *= 1e4  # the sink block
    groups = torch.arange(256) // 64
    out, base = ref * (1 + 1e-3), ref * (1 - 1e-3)
    assert rule(out, ref, base, "dk", groups) == []
    out[0, 64:128] *= 1.1
    (line,) = rule(out, ref, base, "dk", groups)
    assert "worst part (0, 1, 0)" in line


def test_zero_references():
    zero = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    assert rule(zero, zero, zero) == []
    assert rule(zero + 1e-6, zero, zero) == []  # rounding noise of products of size 1
    assert rule(zero + 1e-2, zero, zero)
    assert compare("o", zero + 1e-12, zero, zero, DTYPE, 0.0)  # nothing of that size can come from zeros


def test_shapes_must_agree(ref):
    assert "shape" in rule(ref[:, :5], ref)[0]


def test_empty_tensors_pass():
    empty = torch.empty(0, 4, 2, 8, dtype=torch.float64)
    for name in ("o", "dk"):
        assert rule(empty, empty, empty, name, torch.arange(4) // 2) == []


def test_floors_are_below_what_rounding_an_operand_costs():
    """A kernel that loses one more bit than the baseline everywhere must fail: floors stay under the rounding error."""
    assert BASELINE_FACTOR == 2.0
    for dtype, floors in FLOORS.items():
        for whole, worst in floors.values():
            assert whole <= worst
            if dtype in (torch.bfloat16, torch.float16):
                assert whole <= torch.finfo(dtype).eps / 4


def test_poison_reaches_every_kind_of_allocation():
    with poisoned_memory():
        like = torch.zeros(3, dtype=torch.bfloat16)
        made = [torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (2,))]
        integers = torch.empty(3, dtype=torch.uint8)
    assert all(x.isnan().all() for x in made)
    assert (integers == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()
