"""Named cases of the sliding window and of compressed attention, for every target; see cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cases import Case
from targets import Target


@dataclass(frozen=True)
class RangeCase(Case):
    mask: str = "window"  # or "compressed"
    window_size: int = 40  # w
    kernel_size: int = 8  # l
    kernel_stride: int = 4  # d
    extra_rows: int = 0  # batched, compressed: rows of k past Nc

    @property
    def operation(self) -> str:
        return "sliding_window_attention" if self.mask == "window" else "compressed_attention"

    def num_keys(self, tokens: int) -> int:
        """Rows of k that a sequence of so many tokens has."""
        if self.mask == "window":
            return tokens
        return (tokens - self.kernel_size) // self.kernel_stride + 1 if tokens >= self.kernel_size else 0

    def runs_on(self, target: Target) -> bool:
        return target.supports(self.Dk, self.Dv, 64)


def both(name: str, **options: object) -> list[RangeCase]:
    """One case for each mask."""
    return [RangeCase(f"{mask}_{name}", mask=mask, **options) for mask in ("window", "compressed")]  # type: ignore[arg-type]


def window(name: str, **options: object) -> list[RangeCase]:
    return [RangeCase(f"window_{name}", **options)]  # type: ignore[arg-type]


def compressed(name: str, **options: object) -> list[RangeCase]:
    return [RangeCase(f"compressed_{name}", mask="compressed", **options)]  # type: ignore[arg-type]


PAPER = {"Hq": 16, "Hkv": 1, "Dk": 192, "Dv": 128, "window_size": 64, "kernel_size": 32, "kernel_stride": 16}

REGULAR = [
    *both("d64", B=2, Tq=256, Tk=256),
    *both("no_lse", B=2, Tq=256, Tk=256, lse=False),
    *both("noncausal", B=2, Tq=256, Tk=256, causal=False),
    *both("d128_g16", Tq=300, Tk=300, Hq=32, Hkv=2, Dk=128, Dv=128, window_size=128),
    *both("paper", Tq=400, Tk=400, **PAPER),
    *both("paper_noncausal", Tq=200, Tk=400, causal=False, **PAPER),
    *both("d256", Tq=200, Tk=200, Hq=8, Hkv=2, Dk=256, Dv=256, kernel_size=16, kernel_stride=8),
    *both("scale_given", softmax_scale=0.3),
    *both("scale_negative", softmax_scale=-0.125),
    *both("scale_zero", softmax_scale=0.0),
    *both("sharp", Tq=300, Tk=300, magnitude=3.0),
    *both("flat", Tq=300, Tk=300, magnitude=0.02),
]

GROUPS = [
    case
    for G in (1, 2, 4, 6, 8, 12, 16, 20, 32, 64)
    for case in both(f"g{G}", Tq=100, Tk=150, Hq=2 * G, Hkv=2, causal=G % 8 != 0)
]
GROUPS += [
    case for G in (1, 3, 5, 16, 17) for case in both(f"g{G}_d128", Tq=70, Tk=70, Hq=3 * G, Hkv=3, Dk=128, Dv=128)
]
GROUPS += both("g6_d192_128", Tq=90, Tk=90, Hq=12, Hkv=2, Dk=192, Dv=128)

# Hopper's dK and dV begin with any row of those that see a tile's 128 keys; here also with one that only the second 64
# are seen by.
TURNS = [
    case
    for Dk, Dv in ((64, 64), (128, 128), (192, 128), (256, 256))
    for case in window(f"turns_d{Dk}", Tq=900, Tk=900, Hq=16, Hkv=1, Dk=Dk, Dv=Dv, window_size=16)
]

WIDTHS = [
    case
    for causal in (True, False)
    for w in (1, 2, 63, 64, 65, 127, 500, 1 << 40, (1 << 63) - 1)
    for case in window(f"w{w}_{'causal' if causal else 'full'}", Tq=130, Tk=200, window_size=w, causal=causal)
]
STRIDES = [
    case
    for causal in (True, False)
    for l, d in ((32, 16), (1, 1), (16, 1), (16, 16), (48, 16), (64, 8), (7, 7), (6, 2), (128, 32))
    for case in compressed(
        f"l{l}_d{d}_{'causal' if causal else 'full'}", Tq=130, Tk=333, kernel_size=l, kernel_stride=d, causal=causal
    )
]

# CPU only.
ODD = [
    *both("d5_7", Tq=33, Tk=47, Dk=5, Dv=7),
    *both("d80", B=2, Tq=50, Tk=75, Dk=80, Dv=80),
    *both("d1", Tq=230, Tk=230, Dk=1, Dv=1),
    *both("dv_larger", Tq=100, Tk=100, Dk=24, Dv=96, causal=False),
    *both("d33_17", Tq=300, Tk=600, Dk=33, Dv=17),
]

RAGGED = [
    *both("tq_tk_odd", B=2, Tq=77, Tk=201),
    *both("tq_longer", B=2, Tq=150, Tk=70),
    *both("tq_longer_noncausal", B=2, Tq=150, Tk=70, causal=False),
    *both("primes", B=3, Tq=131, Tk=257, Hq=6, Hkv=3, Dk=128, Dv=128),
    *both("one_past_a_tile", Tq=65, Tk=65),
    *both("decode", B=4, Tq=1, Tk=500, Hq=16, Hkv=1, Dk=128, Dv=128, window_size=100),
    *both("few_queries", B=3, Tq=3, Tk=333, Hq=16, Hkv=2),
    *both("many_batches", B=37, Tq=5, Tk=40, Hq=2, Hkv=1),
    *both("long_keys", Tq=40, Tk=3000, Hq=4, Hkv=1),
    *both("long", Tq=1500, Tk=1500, Hq=2, Hkv=1),
    *compressed("extra_rows", B=2, Tq=60, Tk=90, extra_rows=9, nan_outside=True),
    *compressed("extra_rows_d128", B=2, Tq=60, Tk=90, Hq=16, Hkv=1, Dk=128, Dv=128, extra_rows=70, nan_outside=True),
    *compressed("extra_rows_noncausal", B=2, Tq=60, Tk=90, extra_rows=9, nan_outside=True, causal=False),
    *compressed("partial_last_window", Tq=60, Tk=91),
]

CORNER = [
    *both("batch_0", B=0, Tq=64, Tk=64),
    *both("tq_0", Tq=0, Tk=64),
    *both("tk_0", Tq=64, Tk=0),
    *both("tq_tk_0", B=2, Tq=0, Tk=0),
    *both("tk_0_noncausal", B=2, Tq=5, Tk=0, causal=False),
    *both("one_query_one_key", Tq=1, Tk=1, Hq=1, Hkv=1, kernel_size=1, kernel_stride=1),
    *both("tq_1", B=2, Tq=1, Tk=300),
    *both("tk_1", B=2, Tq=30, Tk=1, causal=False),
    *compressed("tk_less_than_l", B=2, Tq=30, Tk=30, kernel_size=32, kernel_stride=16, nan_outside=True),
    *compressed("tk_equals_l", B=2, Tq=32, Tk=32, kernel_size=32, kernel_stride=16, nan_outside=True),
    *compressed("rows_but_no_keys", Tq=30, Tk=30, kernel_size=32, kernel_stride=16, extra_rows=5, nan_outside=True),
    *both("packed_no_sequences", seqlens_q=(), seqlens_k=()),
    *both("packed_all_empty", seqlens_q=(0, 0), seqlens_k=(0, 0)),
    *both("packed_only_padding", seqlens_q=(0,), seqlens_k=(0,), pad_q=20, pad_k=20, nan_outside=True),
]

POSITIONS = [
    *both("offset_0", Tq=100, Tk=180, q_offset=0),
    *both("offset_33", Tq=100, Tk=180, q_offset=33, nan_outside=True),
    *both("offset_negative", B=2, Tq=100, Tk=100, q_offset=-40, nan_outside=True),
    *both("offset_before_everything", Tq=50, Tk=100, q_offset=-1000, nan_outside=True),
    *both("offset_int32_min", Tq=50, Tk=100, q_offset=-(2**31), nan_outside=True),
    *both("offset_past_the_end", Tq=100, Tk=180, q_offset=150, nan_outside=True),
    *both("offset_far_past_the_end", Tq=100, Tk=180, q_offset=5000, nan_outside=True),
    *both("offset_int32_max", Tq=20, Tk=180, q_offset=2**31 - 1, nan_outside=True),
    *both("offset_tensor", B=3, Tq=50, Tk=180, q_offset=(0, 77, -20), nan_outside=True),
    *both("offset_noncausal", B=2, Tq=60, Tk=100, q_offset=(-30, 70), causal=False, nan_outside=True),
    *both("offset_tensor_packed", seqlens_q=(30, 0, 55), seqlens_k=(64, 10, 100), q_offset=(10, 3, -7),
          nan_outside=True),
    *both("offset_int_packed", seqlens_q=(30, 5, 55), seqlens_k=(64, 10, 100), q_offset=4),
]  # fmt: skip

PACKED = [
    *both("packed", seqlens_q=(64, 128, 64), seqlens_k=(64, 128, 64)),
    *both("packed_ragged", seqlens_q=(1, 70, 33, 129), seqlens_k=(1, 70, 33, 129)),
    *both("packed_no_lse", seqlens_q=(1, 70, 33, 129), seqlens_k=(1, 70, 33, 129), lse=False),
    *both("packed_empty", seqlens_q=(0, 40, 0, 0, 71, 0), seqlens_k=(0, 40, 0, 0, 71, 0)),
    *both("packed_tq_not_tk", seqlens_q=(5, 0, 100, 1), seqlens_k=(50, 30, 30, 200)),
    *both("packed_noncausal", seqlens_q=(5, 0, 100, 1), seqlens_k=(50, 30, 30, 200), causal=False),
    *both("packed_keys_empty", seqlens_q=(20, 30), seqlens_k=(0, 30), nan_outside=True),
    *both("packed_padding", seqlens_q=(40, 33), seqlens_k=(40, 33), pad_q=30, pad_k=50, nan_outside=True),
    *both("packed_padding_d128_g16", seqlens_q=(40, 33, 7), seqlens_k=(90, 33, 7), pad_q=30, pad_k=50, Hq=16, Hkv=1,
          Dk=128, Dv=128, nan_outside=True),
    *both("packed_padding_d192_128", seqlens_q=(40, 33, 7), seqlens_k=(90, 33, 7), pad_q=9, pad_k=100, Dk=192, Dv=128,
          nan_outside=True, causal=False),
    *both("packed_shorter_than_l", seqlens_q=(3, 40, 5, 7, 9), seqlens_k=(3, 40, 5, 7, 9), kernel_size=8,
          kernel_stride=2, nan_outside=True),
    *both("packed_hints_small", seqlens_q=(70, 90), seqlens_k=(70, 90), max_seqlen=(1, 1)),
    *both("packed_hints_large", seqlens_q=(70, 90), seqlens_k=(70, 90), max_seqlen=(10**6, 10**6)),
    *both("packed_many_short", seqlens_q=tuple(i % 7 for i in range(30)), seqlens_k=tuple(i % 7 for i in range(30)),
          window_size=3, kernel_size=2, kernel_stride=1),
    *both("packed_long_and_short", seqlens_q=(700, 3, 300), seqlens_k=(700, 3, 500), Hq=2, Hkv=1, kernel_size=4,
          kernel_stride=2),
]  # fmt: skip

LAYOUTS = [
    case
    for layout in ("heads_first", "sliced_heads", "inside_nan", "odd_strides", "expanded")
    for packed in (False, True)
    for case in both(
        f"{layout}_{'packed' if packed else 'batched'}",
        B=2,
        Tq=80,
        Tk=120,
        layout=layout,
        seqlens_q=(30, 50) if packed else None,
        seqlens_k=(60, 60) if packed else None,
    )
]
LAYOUTS += [replace(c, name=c.name + "_d192_128", Dk=192, Dv=128) for c in LAYOUTS[::5]]

EVERYTHING = REGULAR + GROUPS + TURNS + WIDTHS + STRIDES + ODD + RAGGED + CORNER + POSITIONS + PACKED + LAYOUTS

# The smallest shapes that reach every path, for compute-sanitizer.
SANITIZER = [
    *[case for Dk, Dv in ((64, 64), (128, 128), (192, 128), (256, 256))
      for case in both(f"d{Dk}_{Dv}", B=2, Tq=17, Tk=75, Hq=4, Hkv=2, Dk=Dk, Dv=Dv, window_size=20)],
    *both("g16_noncausal", Tq=20, Tk=70, Hq=16, Hkv=1, Dk=128, Dv=128, causal=False),
    *both("g3", Tq=20, Tk=330, Hq=3, Hkv=1),
    *both("packed_small", seqlens_q=(9, 0, 20), seqlens_k=(9, 4, 33), pad_q=5, pad_k=7, Hq=2, Hkv=1, nan_outside=True),
    *both("dead", Tq=20, Tk=20, Hq=2, Hkv=1, q_offset=-100, nan_outside=True),
]  # fmt: skip


def named(name: str) -> RangeCase:
    return next(c for c in EVERYTHING if c.name == name)


assert len({c.name for c in EVERYTHING}) == len(EVERYTHING), "case names must be unique"
