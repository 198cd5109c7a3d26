"""What is measured: one Shape per table, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Shape:
    """Causal self-attention, Tq = Tk = T, B = batch. Letters as in the docs."""

    seqlen: int  # T
    heads_q: int = 64  # Hq
    heads_k: int = 4  # Hkv
    dim_qk: int = 128  # Dk
    dim_v: int = 128  # Dv
    block_size: int = 64  # l'
    topk: int = 16  # n
    dtype: str = "bfloat16"
    batch: int = 1

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_k

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def title(self) -> str:
        dims = f"D {self.dim_qk}" if self.dim_qk == self.dim_v else f"D {self.dim_qk}/{self.dim_v}"
        batch = f"batch {self.batch}, " if self.batch > 1 else ""
        return (
            f"T {self.seqlen}, {batch}{self.heads_q} q / {self.heads_k} kv heads, {dims}, "
            f"{self.topk} blocks of {self.block_size}, {self.dtype}"
        )


def _gpu_preset() -> list[Shape]:
    """The paper's heads from lengths where dense wins to 64K, then small groups, then the other head dims."""
    lengths = [Shape(seqlen) for seqlen in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
    groups = [Shape(32768, heads_q=32, heads_k=8), Shape(32768, heads_q=16, heads_k=16)]
    dims = [Shape(16384, dim_qk=dk, dim_v=dv) for dk, dv in ((64, 64), (192, 128), (256, 256))]
    return lengths + groups + dims


def _cpu_preset() -> list[Shape]:
    sizes = {"heads_q": 16, "heads_k": 1, "dim_qk": 64, "dim_v": 64}
    return [Shape(1024 * 2**i, dtype="float32", **sizes) for i in range(6)]


def _quick_preset(on_gpu: bool) -> list[Shape]:
    return [Shape(2048), Shape(8192)] if on_gpu else [s for s in _cpu_preset() if s.seqlen <= 4096]


def preset(name: str, on_gpu: bool) -> list[Shape]:
    """ "full" (a minute or two on an H100, a few on a CPU), "long" (T 65536 only) or "quick" (seconds)."""
    if name == "quick":
        return _quick_preset(on_gpu)
    if name == "long":
        return [Shape(65536)] if on_gpu else _cpu_preset()[-1:]
    return _gpu_preset() if on_gpu else _cpu_preset()


def custom(
    seqlens: Sequence[int],
    heads: Sequence[tuple[int, int]],
    dims: Sequence[tuple[int, int]],
    block_size: int,
    topk: int,
    dtype: str,
    batch: int,
) -> list[Shape]:
    """Every combination of lengths, (Hq, Hkv) and (Dk, Dv)."""
    return [
        Shape(seqlen, heads_q, heads_k, dim_qk, dim_v, block_size, topk, dtype, batch)
        for heads_q, heads_k in heads
        for dim_qk, dim_v in dims
        for seqlen in seqlens
    ]
