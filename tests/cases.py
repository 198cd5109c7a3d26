"""Named cases of selected attention: the shapes, masks, lists and layouts that the suite goes through.

A Case describes; inputs.make builds the tensors. Every case runs on every target that supports its head dims and block
size. Dimension letters are those of the specification: B, Tq, Tk, Hq, Hkv, Dk, Dv, S, l' = block_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from targets import CPU_TARGETS, CUDA_TARGETS, Target, param


@dataclass(frozen=True)
class Case:
    name: str
    B: int = 1
    Tq: int = 128
    Tk: int = 128
    Hq: int = 4
    Hkv: int = 2
    Dk: int = 64
    Dv: int = 64
    block_size: int = 64
    S: int = 4
    causal: bool = True
    softmax_scale: float | None = None
    q_offset: int | tuple[int, ...] | None = None  # a tuple becomes the int32 [B] tensor
    block_counts: int | str | None = None  # int | "random" | "zero"; the strings become int32 [B, Tq, Hkv]
    indices: str = "random"  # a kind of inputs.INDEX_KINDS
    int64: bool = False
    seqlens_q: tuple[int, ...] | None = None  # packed: lengths of the sequences; B, Tq, Tk are then unused
    seqlens_k: tuple[int, ...] | None = None
    pad_q: int = 0  # packed: rows past the last sequence
    pad_k: int = 0
    nan_outside: bool = False  # fill memory outside every sequence, and do and dlse of dead rows, with NaN
    layout: str = "contiguous"  # a kind of inputs.LAYOUTS
    magnitude: float = 1.0  # standard deviation of q and k
    lse: bool = True  # return lse and give it a gradient
    max_seqlen: tuple[int, int] | None = None  # the hints, packed only

    @property
    def operation(self) -> str:
        return "selected_attention"

    @property
    def packed(self) -> bool:
        return self.seqlens_q is not None

    def runs_on(self, target: Target) -> bool:
        return target.supports(self.Dk, self.Dv, self.block_size)


def on_every_target(cases: list[Case]) -> list:
    """pytest parameters ("target", "case")."""
    pairs = [(t, c) for t in CPU_TARGETS + CUDA_TARGETS for c in cases if c.runs_on(t)]
    return [param(t, c, name=c.name) for t, c in pairs]


REGULAR = [
    Case("d64", B=2, Tq=256, Tk=256, Hq=4, Hkv=2, S=3),
    Case("d64_no_lse", B=2, Tq=256, Tk=256, Hq=4, Hkv=2, S=3, lse=False),
    Case("d64_noncausal", B=2, Tq=256, Tk=256, Hq=4, Hkv=2, S=3, causal=False),
    Case("d128_g16", Tq=256, Tk=256, Hq=32, Hkv=2, Dk=128, Dv=128, S=3),
    Case("d128_g16_noncausal", Tq=192, Tk=256, Hq=32, Hkv=2, Dk=128, Dv=128, S=3, causal=False),
    Case("d192_128_g16", Tq=256, Tk=256, Hq=16, Hkv=1, Dk=192, Dv=128, S=3),
    Case("d192_128_noncausal", B=2, Tq=128, Tk=192, Hq=8, Hkv=2, Dk=192, Dv=128, S=2, causal=False, lse=False),
    Case("d128_g24", Tq=130, Tk=130, Hq=24, Hkv=1, Dk=128, Dv=128, S=2),
    Case("d256_g8", Tq=256, Tk=256, Hq=16, Hkv=2, Dk=256, Dv=256, S=3),
    Case("d256_noncausal", Tq=128, Tk=256, Hq=8, Hkv=1, Dk=256, Dv=256, S=3, causal=False),
    Case("scale_given", Tq=128, Tk=128, softmax_scale=0.3, S=2),
    Case("scale_negative", Tq=128, Tk=128, softmax_scale=-0.125, S=2),
    Case("scale_zero", Tq=128, Tk=128, softmax_scale=0.0, S=2),
    Case("sharp_softmax", Tq=256, Tk=256, magnitude=3.0, S=4),
    Case("flat_softmax", Tq=256, Tk=256, magnitude=0.02, S=4),
    Case("int64_indices", Tq=256, Tk=256, S=3, int64=True),
]

GROUPS = [
    Case(f"g{G}", Tq=100, Tk=150, Hq=2 * G, Hkv=2, S=3, block_size=32, causal=G % 8 != 0)
    for G in (1, 2, 4, 6, 8, 12, 16, 20, 32, 64)
]
GROUPS += [
    Case(f"g{G}_d128", Tq=70, Tk=70, Hq=G * 3, Hkv=3, Dk=128, Dv=128, S=2, block_size=16) for G in (1, 3, 5, 7, 16, 17)
]
GROUPS += [  # blocks that the Hopper backward takes
    Case(f"g{G}_b64", Tq=100, Tk=150, Hq=2 * G, Hkv=2, Dk=D, Dv=D, S=3, causal=G % 2 != 0)
    for G, D in ((3, 128), (5, 64), (6, 128), (7, 64), (12, 128), (17, 128), (20, 64), (32, 128), (64, 64))
]
GROUPS += [Case("g6_d192_128", Tq=90, Tk=90, Hq=12, Hkv=2, Dk=192, Dv=128, S=3, block_size=32)]
GROUPS += [Case("g10_d256", Tq=90, Tk=90, Hq=10, Hkv=1, Dk=256, Dv=256, S=2, block_size=32)]

BLOCKS = [
    Case(f"block{l}_d{Dk}_{'causal' if causal else 'full'}", Tq=2 * l + 5, Tk=5 * l + 3, Hq=4, Hkv=1, Dk=Dk, Dv=Dv,
         block_size=l, S=4, causal=causal)
    for l in (16, 32, 64, 128)
    for Dk, Dv in ((64, 64), (192, 128))
    for causal in (True, False)
]  # fmt: skip
BLOCKS += [Case(f"block128_d{D}", Tq=140, Tk=300, Hq=4, Hkv=2, Dk=D, Dv=D, block_size=128, S=3) for D in (128, 256)]
BLOCKS += [Case(f"block16_d{D}", Tq=140, Tk=300, Hq=4, Hkv=2, Dk=D, Dv=D, block_size=16, S=9) for D in (128, 256)]

# CPU only: a CUDA kernel has neither these head dims nor these blocks.
ODD = [
    Case("block1", Tq=40, Tk=40, Dk=8, Dv=8, block_size=1, S=6),
    Case("block3_d5_7", Tq=33, Tk=47, Dk=5, Dv=7, block_size=3, S=5),
    Case("block24_d80", B=2, Tq=50, Tk=75, Dk=80, Dv=80, block_size=24, S=2),
    Case("block100_d1", Tq=230, Tk=230, Dk=1, Dv=1, block_size=100, S=2),
    Case("block48_dv_larger", Tq=100, Tk=100, Dk=24, Dv=96, block_size=48, S=2, causal=False),
    Case("block256_d33", Tq=300, Tk=600, Dk=33, Dv=17, block_size=256, S=2),
    Case("block_longer_than_keys", Tq=20, Tk=20, Dk=16, Dv=16, block_size=1 << 20, S=2),
]

RAGGED = [
    Case("tq_tk_odd", B=2, Tq=77, Tk=201, S=3),
    Case("tq_longer_than_tk", B=2, Tq=150, Tk=70, S=2),
    Case("tq_longer_noncausal", B=2, Tq=150, Tk=70, S=2, causal=False),
    Case("prime_lengths", B=3, Tq=131, Tk=257, Hq=6, Hkv=3, Dk=128, Dv=128, S=5, block_size=32),
    Case("prime_d192_128", B=2, Tq=67, Tk=131, Hq=12, Hkv=2, Dk=192, Dv=128, S=3, block_size=32),
    Case("prime_d256", B=2, Tq=67, Tk=131, Hq=4, Hkv=2, Dk=256, Dv=256, S=3, block_size=16),
    Case("one_past_a_block", Tq=65, Tk=65, S=2),
    Case("one_short_of_a_block", Tq=63, Tk=127, S=2),
    Case("decode_like", B=4, Tq=1, Tk=500, Hq=16, Hkv=1, Dk=128, Dv=128, S=5),
    Case("few_queries", B=3, Tq=3, Tk=333, Hq=16, Hkv=2, S=4),
    Case("many_batches", B=37, Tq=5, Tk=40, Hq=2, Hkv=1, S=2, block_size=16),
]

CORNER = [
    Case("batch_0", B=0, Tq=64, Tk=64),
    Case("tq_0", Tq=0, Tk=64),
    Case("tk_0", Tq=64, Tk=0),
    Case("tq_tk_0", B=2, Tq=0, Tk=0),
    Case("s_0", Tq=64, Tk=64, S=0),
    Case("tk_0_noncausal", B=2, Tq=5, Tk=0, causal=False),
    Case("one_query_one_key", Tq=1, Tk=1, Hq=1, Hkv=1, S=1),
    Case("tq_1", B=2, Tq=1, Tk=300, S=3),
    Case("tk_1", B=2, Tq=30, Tk=1, S=1, causal=False),
    Case("one_block", Tq=64, Tk=64, S=1, indices="all"),
    Case("tk_less_than_block", Tq=30, Tk=30, S=1, indices="all"),
    Case("tk_less_than_block_d128", Tq=9, Tk=9, Dk=128, Dv=128, block_size=128, S=3),
    Case("s_1", Tq=200, Tk=200, S=1),
    Case("packed_no_sequences", seqlens_q=(), seqlens_k=()),
    Case("packed_all_empty", seqlens_q=(0, 0), seqlens_k=(0, 0)),
    Case("packed_only_padding", seqlens_q=(0,), seqlens_k=(0,), pad_q=20, pad_k=20, nan_outside=True),
]

WILD = [
    Case("wild", B=2, Tq=150, Tk=250, S=12, indices="wild", block_size=32),
    Case("wild_noncausal", B=2, Tq=150, Tk=250, S=12, indices="wild", block_size=32, causal=False),
    Case("wild_d128_g16", Tq=150, Tk=250, Hq=16, Hkv=1, Dk=128, Dv=128, S=9, indices="wild"),
    Case("wild_d192_128", Tq=100, Tk=150, Hq=4, Hkv=1, Dk=192, Dv=128, S=9, indices="wild", block_size=16),
    Case("wild_d256", Tq=100, Tk=150, Hq=4, Hkv=1, Dk=256, Dv=256, S=9, indices="wild", block_size=16),
    Case("wild_int64", B=2, Tq=150, Tk=250, S=12, indices="wild", block_size=32, int64=True),
    Case("wild_int64_noncausal", Tq=150, Tk=250, S=12, indices="wild", block_size=32, int64=True, causal=False),
    Case("wild_counts", B=2, Tq=150, Tk=250, S=12, indices="wild", block_size=32, block_counts="random"),
    Case("duplicates", Tq=200, Tk=200, S=8, indices="duplicates", block_size=32),
    Case("unsorted", Tq=200, Tk=200, S=5, indices="unsorted", block_size=32),
    Case("future_blocks", Tq=200, Tk=300, S=8, indices="future", block_size=16, q_offset=0),
    Case("invalid_first", Tq=200, Tk=200, S=9, indices="invalid_first", block_size=32),
    Case("wild_packed", seqlens_q=(50, 0, 77, 1), seqlens_k=(90, 20, 77, 0), pad_q=9, pad_k=13, S=12, indices="wild",
         block_size=16, nan_outside=True),
    Case("wild_packed_int64", seqlens_q=(50, 0, 77, 1), seqlens_k=(90, 20, 77, 0), pad_q=9, pad_k=13, S=12,
         indices="wild", block_size=16, int64=True, causal=False),
]  # fmt: skip

DEAD = [
    Case("negative_offset", B=2, Tq=100, Tk=100, S=3, q_offset=-40, nan_outside=True),
    Case("offset_before_everything", Tq=50, Tk=100, S=3, q_offset=-1000, nan_outside=True),
    Case("offset_int32_min", Tq=50, Tk=100, S=3, q_offset=-(2**31), nan_outside=True),
    Case("empty_lists", Tq=100, Tk=100, S=3, indices="empty", nan_outside=True),
    Case("some_empty_lists", B=2, Tq=100, Tk=150, S=3, indices="some_empty", nan_outside=True),
    Case("some_empty_noncausal", Tq=100, Tk=150, S=3, indices="some_empty", causal=False, nan_outside=True),
    Case("some_empty_g16", Tq=100, Tk=150, Hq=16, Hkv=1, Dk=128, Dv=128, S=3, indices="some_empty", nan_outside=True),
    Case("some_empty_d192_128", Tq=50, Tk=70, Dk=192, Dv=128, S=3, indices="some_empty", nan_outside=True),
    Case("some_empty_d256", Tq=50, Tk=70, Dk=256, Dv=256, S=3, indices="some_empty", nan_outside=True),
    Case("counts_zero", Tq=100, Tk=100, S=3, block_counts="zero", nan_outside=True),
    Case("count_0", Tq=100, Tk=100, S=3, block_counts=0, nan_outside=True),
    Case("only_future", Tq=100, Tk=200, S=3, indices="only_future", q_offset=0, nan_outside=True),
    Case("tk_0_dead", B=2, Tq=20, Tk=0, S=3, nan_outside=True),
]

POSITIONS = [
    Case("offset_0", Tq=100, Tk=180, S=3, q_offset=0),
    Case("offset_int", Tq=100, Tk=180, S=3, q_offset=33),
    Case("offset_past_the_end", Tq=100, Tk=180, S=3, q_offset=5000),
    Case("offset_int32_max", Tq=20, Tk=180, S=3, q_offset=2**31 - 1),
    Case("offset_tensor", B=3, Tq=50, Tk=180, S=3, q_offset=(0, 77, -20)),
    Case("offset_tensor_packed", seqlens_q=(30, 0, 55), seqlens_k=(64, 10, 100), S=2, q_offset=(10, 3, -7)),
    Case("offset_int_packed", seqlens_q=(30, 5, 55), seqlens_k=(64, 10, 100), S=2, q_offset=4),
    Case("offset_ignored_noncausal", Tq=60, Tk=100, S=2, q_offset=-500, causal=False),
    Case("count_2", Tq=100, Tk=180, S=5, block_counts=2, block_size=16),
    Case("count_clamped", Tq=100, Tk=180, S=5, block_counts=99, block_size=16),
    Case("counts_tensor", B=2, Tq=100, Tk=180, S=5, block_counts="random", block_size=16),
    Case("counts_tensor_packed", seqlens_q=(30, 5, 55), seqlens_k=(64, 10, 100), S=5, block_counts="random",
         block_size=16),
]  # fmt: skip

PACKED = [
    Case("packed", seqlens_q=(64, 128, 64), seqlens_k=(64, 128, 64), S=2),
    Case("packed_ragged", seqlens_q=(1, 70, 33, 129), seqlens_k=(1, 70, 33, 129), S=3, block_size=32),
    Case("packed_no_lse", seqlens_q=(1, 70, 33, 129), seqlens_k=(1, 70, 33, 129), S=3, block_size=32, lse=False),
    Case("packed_empty", seqlens_q=(0, 40, 0, 0, 71, 0), seqlens_k=(0, 40, 0, 0, 71, 0), S=2, block_size=32),
    Case("packed_tq_not_tk", seqlens_q=(5, 0, 100, 1), seqlens_k=(50, 30, 30, 200), S=3, block_size=16),
    Case("packed_noncausal", seqlens_q=(5, 0, 100, 1), seqlens_k=(50, 30, 30, 200), S=3, block_size=16, causal=False),
    Case("packed_keys_empty", seqlens_q=(20, 30), seqlens_k=(0, 30), S=2, nan_outside=True),
    Case("packed_padding", seqlens_q=(40, 33), seqlens_k=(40, 33), pad_q=30, pad_k=50, S=2, nan_outside=True),
    Case("packed_padding_d128_g16", seqlens_q=(40, 33, 7), seqlens_k=(90, 33, 7), pad_q=30, pad_k=50, Hq=16, Hkv=1,
         Dk=128, Dv=128, S=2, nan_outside=True),
    Case("packed_padding_d192_128", seqlens_q=(40, 33, 7), seqlens_k=(90, 33, 7), pad_q=9, pad_k=100, Dk=192, Dv=128,
         S=2, nan_outside=True, causal=False),
    Case("packed_padding_d256", seqlens_q=(40, 33, 7), seqlens_k=(90, 33, 7), pad_q=9, pad_k=100, Dk=256, Dv=256,
         S=2, nan_outside=True, block_size=16),
    Case("packed_hints_small", seqlens_q=(70, 90), seqlens_k=(70, 90), S=2, max_seqlen=(1, 1)),
    Case("packed_hints_large", seqlens_q=(70, 90), seqlens_k=(70, 90), S=2, max_seqlen=(10**6, 10**6)),
    Case("packed_many_short", seqlens_q=tuple(i % 7 for i in range(30)), seqlens_k=tuple(i % 7 for i in range(30)),
         S=1, block_size=16),
]  # fmt: skip

LAYOUTS = [
    Case(f"{layout}_{'packed' if packed else 'batched'}", B=2, Tq=80, Tk=120, Hq=4, Hkv=2, S=3, block_size=32,
         layout=layout, seqlens_q=(30, 50) if packed else None, seqlens_k=(60, 60) if packed else None)
    for layout in ("heads_first", "sliced_heads", "inside_nan", "odd_strides", "expanded")
    for packed in (False, True)
]  # fmt: skip
LAYOUTS += [replace(c, name=c.name + "_d192_128", Dk=192, Dv=128) for c in LAYOUTS[::3]]
LAYOUTS += [replace(c, name=c.name + "_b64", block_size=64, Hq=16, Dk=128, Dv=128) for c in LAYOUTS[:10]]

LONG_LISTS = [
    Case("s_40", Tq=150, Tk=1000, Hq=2, Hkv=1, S=40, block_size=16, causal=False),
    Case("s_33_of_33", Tq=60, Tk=33 * 16, Hq=4, Hkv=1, S=33, block_size=16, indices="all"),
    Case("s_200", Tq=60, Tk=4000, Hq=2, Hkv=1, S=200, block_size=16, causal=False),
    Case("s_300_d128", Tq=40, Tk=300 * 16 + 7, Hq=4, Hkv=1, Dk=128, Dv=128, S=301, block_size=16, indices="all"),
    Case("s_300_wild", Tq=40, Tk=1500, Hq=2, Hkv=1, S=300, block_size=16, indices="wild"),
    # more entries a tile than are gathered in shared memory (common/tile_unions.cu)
    Case("s_90_g1", Tq=400, Tk=1600, Hq=2, Hkv=2, S=90, block_size=16, causal=False),
    Case("s_129_mostly_invalid", Tq=100, Tk=200, Hq=2, Hkv=1, S=129, block_size=32, indices="wild"),
    Case("sink_block", Tq=1500, Tk=1500, Hq=2, Hkv=1, S=2, indices="sink"),
    Case("sink_block_g16", Tq=700, Tk=700, Hq=16, Hkv=1, Dk=128, Dv=128, S=2, block_size=32, indices="sink"),
    Case("sink_packed", seqlens_q=(600, 3, 500), seqlens_k=(600, 3, 500), Hq=4, Hkv=1, S=2, block_size=16,
         indices="sink"),
    Case("all_blocks", Tq=200, Tk=200, S=7, block_size=32, indices="all"),
    Case("all_blocks_noncausal", B=2, Tq=130, Tk=200, S=7, block_size=32, indices="all", causal=False),
    Case("more_blocks_than_keys_need", Tq=100, Tk=100, S=50, block_size=16, indices="all"),
]  # fmt: skip

EVERYTHING = REGULAR + GROUPS + BLOCKS + ODD + RAGGED + CORNER + WILD + DEAD + POSITIONS + PACKED + LAYOUTS + LONG_LISTS

# compute-sanitizer slows kernels 10 to 100 times: the smallest shapes that reach every kernel and path.
SANITIZER = [
    Case(f"d{Dk}_{Dv}", B=2, Tq=17, Tk=35, Hq=4, Hkv=2, Dk=Dk, Dv=Dv, block_size=16, S=3, indices="wild")
    for Dk, Dv in ((64, 64), (128, 128), (192, 128), (256, 256))
]
SANITIZER += [
    Case("block32_g16", Tq=20, Tk=70, Hq=16, Hkv=1, Dk=128, Dv=128, block_size=32, S=3, causal=False),
    Case("block64_g3", Tq=20, Tk=130, Hq=3, Hkv=1, block_size=64, S=2, block_counts="random"),
    Case("block128_g1", Tq=20, Tk=200, Hq=1, Hkv=1, Dk=192, Dv=128, block_size=128, S=2),
    Case("sink", Tq=300, Tk=300, Hq=2, Hkv=1, block_size=16, S=2, indices="sink"),
    Case("packed", seqlens_q=(9, 0, 20), seqlens_k=(9, 4, 33), pad_q=5, pad_k=7, Hq=2, Hkv=1, S=3, block_size=16,
         indices="wild", nan_outside=True),
    Case("long_list", Tq=9, Tk=150, Hq=2, Hkv=1, S=140, block_size=16, indices="wild", int64=True),
    Case("dead", Tq=20, Tk=20, Hq=2, Hkv=1, S=2, indices="empty", nan_outside=True),
    Case("block64_g16", B=2, Tq=21, Tk=100, Hq=16, Hkv=1, Dk=128, Dv=128, S=2),
    Case("block128_g4", Tq=33, Tk=300, Hq=8, Hkv=2, Dk=128, Dv=128, block_size=128, S=3, indices="wild"),
    Case("block64_d256", Tq=20, Tk=100, Hq=8, Hkv=1, Dk=256, Dv=256, S=2),
    Case("windows", seqlens_q=(150, 130), seqlens_k=(150, 130), Hq=32, Hkv=2, S=1024, indices="wild",
         block_counts="random"),
]  # fmt: skip


def named(name: str) -> Case:
    return next(c for c in EVERYTHING if c.name == name)


assert len({c.name for c in EVERYTHING}) == len(EVERYTHING), "case names must be unique"
