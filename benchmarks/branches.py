"""Times the steps of Native Sparse Attention, forward and backward, beside torch's dense attention in the same run.

    python -m benchmarks.branches                               # GPU if there is one, else CPU
    python -m benchmarks.branches --seqlens 8192 65536 --json branches.json
    python -m benchmarks.branches --steps compressed select --backend sm80

Compressed attention, select_blocks, the sliding window, selected attention with the blocks that select_blocks took,
and native_sparse_attention as a whole (k_cmp and v_cmp given). Queries drift along the sequence, so that the lists of
neighbours agree as those of large models do; with `--queries random` they agree on nothing. Times are medians; a
backward is the gradient of o alone. TFLOP/s count visible (query, key) pairs. "of dense" is dense time over the
step's time: for the whole, above 1 it wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nsa_cuda
import torch
from torch import Tensor

from . import methods, report, selections
from .floors import warm
from .methods import Call, Inputs
from .shapes import DTYPES, Shape
from .timing import Timing, input_sets, measure

STEPS = ("compressed", "select", "window", "selected", "whole", "dense")


@dataclass(frozen=True)
class Sizes:
    """What Shape doesn't say: l, d, w."""

    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 512

    @property
    def compression(self) -> dict[str, int]:
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}


@dataclass(frozen=True)
class Row:
    shape: Shape
    step: str
    operation: str  # "forward" or "backward"
    timing: Timing | None  # None: see note
    pairs: int  # visible (query, key) pairs times heads
    note: str = ""

    @property
    def tflops(self) -> float | None:
        """2 Dk a pair for scores, 2 Dv for values; 6 Dk + 4 Dv for the backward."""
        if self.timing is None or self.pairs == 0:
            return None
        dk, dv = self.shape.dim_qk, self.shape.dim_v
        per_pair = (
            2 * dk if self.step == "select" else 2 * (dk + dv) if self.operation == "forward" else 6 * dk + 4 * dv
        )
        return self.pairs * per_pair / self.timing.milliseconds / 1e9


@dataclass
class Branches:
    """Tensors of one input set: leaves q, k, v, k_cmp, v_cmp and gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    dout: Tensor

    @classmethod
    def make(cls, inputs: Inputs, sizes: Sizes, queries: Tensor | None = None) -> Branches:
        """``queries`` in the place of the inputs'."""
        q = inputs.q if queries is None else queries.to(inputs.q.dtype).requires_grad_()
        with torch.no_grad():
            k_cmp, v_cmp = (nsa_cuda.reference.compress_mean(x, **sizes.compression) for x in (inputs.k, inputs.v))
            gates = torch.rand((*inputs.q.shape[:-1], 3), device=inputs.q.device).to(inputs.q.dtype)
        leaves = (x.contiguous().requires_grad_() for x in (k_cmp, v_cmp, gates))
        return cls(q, inputs.k, inputs.v, *leaves, inputs.dout)


Forward = Callable[[Branches], Tensor]


def pairs_of(step: str, shape: Shape, sizes: Sizes) -> int:
    """Visible (query, key) pairs of one call, all heads."""
    T, w, l, d = shape.seqlen, sizes.window_size, sizes.kernel_size, sizes.kernel_stride
    rows = shape.batch * shape.heads_q
    if step in ("compressed", "select"):
        return rows * sum((p - l + 1) // d + 1 for p in range(l - 1, T))
    if step == "window":
        return rows * sum(min(p + 1, w) for p in range(T))
    return rows * T * (T + 1) // 2 if step == "dense" else 0


class Bench:
    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.sizes = Sizes(arguments.kernel_size, arguments.kernel_stride, arguments.window_size)
        self.rows: list[Row] = []

    def _functions(self, shape: Shape, lists: Tensor) -> dict[str, tuple[Forward, tuple[str, ...]]]:
        """step -> (forward, names of what it is differentiated by)."""
        backend, compression = self.arguments.backend, self.sizes.compression

        def compressed(b: Branches) -> Any:
            return nsa_cuda.compressed_attention(b.q, b.k_cmp, b.v_cmp, backend=backend, **compression)

        def window(b: Branches) -> Any:
            return nsa_cuda.sliding_window_attention(b.q, b.k, b.v, window_size=self.sizes.window_size, backend=backend)

        def selected(b: Branches) -> Any:
            return nsa_cuda.selected_attention(b.q, b.k, b.v, lists, block_size=shape.block_size, backend=backend)

        def whole(b: Branches) -> Tensor:
            return nsa_cuda.native_sparse_attention(
                b.q, b.k, b.v, b.gates, k_cmp=b.k_cmp, v_cmp=b.v_cmp, block_size=shape.block_size, topk=shape.topk,
                window_size=self.sizes.window_size, backend=backend, **compression,
            )  # fmt: skip

        return {
            "compressed": (compressed, ("q", "k_cmp", "v_cmp")),
            "window": (window, ("q", "k", "v")),
            "selected": (selected, ("q", "k", "v")),
            "whole": (whole, ("q", "k", "v", "gates", "k_cmp", "v_cmp")),
        }

    def _add(self, shape: Shape, step: str, operation: str, make: Callable[[], Sequence[Call]]) -> None:
        """Times calls; what a step refuses becomes a row without a time and with the reason."""
        timing, note = None, ""
        try:
            timing = measure(make(), self.device, repeat=self.arguments.repeat)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            note = str(error).splitlines()[0][:120]
        self.rows.append(Row(shape, step, operation, timing, pairs_of(step, shape, self.sizes), note))

    def _attention(
        self, shape: Shape, step: str, forward: Forward, names: tuple[str, ...], sets: list[Branches]
    ) -> None:
        def forward_of(b: Branches) -> Call:
            def call() -> Tensor:
                with torch.no_grad():
                    return forward(b)

            return call

        def backward_of(b: Branches) -> Call:
            o, leaves = forward(b), [getattr(b, name) for name in names]
            return lambda: torch.autograd.grad(o, leaves, b.dout, retain_graph=True)

        self._add(shape, step, "forward", lambda: [forward_of(b) for b in sets])
        if not self.arguments.forward_only:
            self._add(shape, step, "backward", lambda: [backward_of(b) for b in sets])

    def _selector(self, shape: Shape, b: Branches) -> Callable[[], Tensor]:
        with torch.no_grad():
            _, lse = nsa_cuda.compressed_attention(
                b.q, b.k_cmp, b.v_cmp, return_lse=True, backend=self.arguments.backend, **self.sizes.compression
            )
        return lambda: nsa_cuda.select_blocks(
            b.q, b.k_cmp, lse, block_size=shape.block_size, topk=shape.topk, backend=self.arguments.backend,
            **self.sizes.compression,
        )  # fmt: skip

    def shape(self, shape: Shape) -> None:
        print(f"\n### {shape.title}, l {self.sizes.kernel_size}, d {self.sizes.kernel_stride}, "
              f"w {self.sizes.window_size}\n", flush=True)  # fmt: skip
        first_row = len(self.rows)
        first = methods.make_inputs(shape, self.device, seed=1)
        count = input_sets(first.nbytes, self.device)
        inputs = [first, *(methods.make_inputs(shape, self.device, seed=2 + i) for i in range(count - 1))]
        drift = self.arguments.queries == "drifting"
        sets = [
            Branches.make(x, self.sizes, selections.drifting_queries(shape, self.device, i) if drift else None)
            for i, x in enumerate(inputs)
        ]
        if "select" in self.arguments.steps:
            self._add(shape, "select", "forward", lambda: [self._selector(shape, b) for b in sets])
        lists = torch.empty(0)
        if "selected" in self.arguments.steps:
            lists = self._selector(shape, sets[0])()
            blocks = -(-shape.seqlen // shape.block_size)
            unions = (f"{selections.mean_union(lists, tokens, blocks):.1f} of {tokens}" for tokens in (4, 16))
            print(f"different blocks in the lists of neighbouring queries: {', '.join(unions)}\n")
        for step, (forward, names) in self._functions(shape, lists).items():
            if step in self.arguments.steps:
                self._attention(shape, step, forward, names, sets)
        if "dense" in self.arguments.steps:
            self._dense(shape, inputs)
        self._print(self.rows[first_row:])

    def _dense(self, shape: Shape, inputs: list[Inputs]) -> None:
        """cuDNN's on a GPU, the fastest of torch's there; torch's own choice on a CPU."""
        backend = methods.DENSE_GPU["dense, cuDNN"] if self.device.type == "cuda" else None
        self._add(shape, "dense", "forward", lambda: methods.dense(inputs, shape, backend)[0])
        if not self.arguments.forward_only:
            self._add(shape, "dense", "backward", lambda: methods.dense(inputs, shape, backend)[1])

    def _print(self, rows: Sequence[Row]) -> None:
        dense = {row.operation: row.timing for row in rows if row.step == "dense"}
        print("| step | fwd ms | TFLOP/s | of dense | extra MB | bwd ms | TFLOP/s | of dense | extra MB |")
        print("|---|" + "---:|" * 8)
        for step in dict.fromkeys(row.step for row in rows):
            cells = [step]
            for operation in ("forward", "backward"):
                found = [row for row in rows if (row.step, row.operation) == (step, operation) and row.timing]
                timing = found[0].timing if found else None
                if timing is None:
                    cells += ["-"] * 4
                    continue
                other = dense.get(operation)
                ratio = f"{other.milliseconds / timing.milliseconds:.2f}x" if other else "-"
                extra = timing.extra_bytes / 1e6 if timing.extra_bytes is not None else None
                cells += [
                    report.number(timing.milliseconds), report.number(found[0].tflops), ratio, report.number(extra, 1)
                ]  # fmt: skip
            print("| " + " | ".join(cells) + " |")
        for row in rows:
            if row.note:
                print(f"{row.step}, {row.operation}: {row.note}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="kernels of nsa_cuda: sm80, sm90, cpu, reference (default: the fastest that the device has)")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    add("--seqlens", type=int, nargs="+", help="T (default: 8192 to 65536 on a GPU, 2048 to 16384 on a CPU)")
    add("--heads", metavar="HQ/HKV", help="default: 64/4 on a GPU, 16/1 on a CPU")
    add("--head-dims", metavar="DK/DV", help="default: 128/128 on a GPU, 64/64 on a CPU")
    add("--kernel-size", type=int, default=32)
    add("--kernel-stride", type=int, default=16)
    add("--window-size", type=int, default=512)
    add("--block-size", type=int, default=64)
    add("--topk", type=int, default=16)
    add("--queries", choices=("drifting", "random"), default="drifting", help="default: %(default)s")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--repeat", type=int, help="runs per measurement (default: about 0.3 s of them, at least 3)")
    add("--threads", type=int, help="CPU threads")
    add("--forward-only", action="store_true")
    add("--json", type=Path, help="write every number to this file")
    return parser


def shapes_of(arguments: argparse.Namespace, on_gpu: bool) -> list[Shape]:
    def pair(text: str) -> tuple[int, int]:
        first, _, second = text.partition("/")
        return int(first), int(second or first)

    heads = pair(arguments.heads or ("64/4" if on_gpu else "16/1"))
    dims = pair(arguments.head_dims or ("128" if on_gpu else "64"))
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    lengths = arguments.seqlens or ((8192, 16384, 32768, 65536) if on_gpu else (2048, 4096, 8192, 16384))
    return [Shape(T, *heads, *dims, arguments.block_size, arguments.topk, dtype) for T in lengths]


def main() -> None:
    arguments = make_parser().parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = report.environment(device, "benchmarks.branches")
    warm(device)
    bench = Bench(arguments, device)
    for shape in shapes_of(arguments, device.type == "cuda"):
        bench.shape(shape)
    if arguments.json:
        records = [{**asdict(row), "tflops": row.tflops} for row in bench.rows]
        report.write_json(arguments.json, about, records)


if __name__ == "__main__":
    main()
