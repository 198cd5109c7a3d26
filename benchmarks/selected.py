"""Times selected-block attention, forward and backward, beside torch's dense attention and flash-linear-attention.

    python -m benchmarks.selected                              # GPU if there is one, else CPU
    python -m benchmarks.selected --preset quick
    python -m benchmarks.selected --seqlens 65536 --heads 64/4 --head-dims 128 --json out.json --plot out.png
    python -m benchmarks.selected --selection-file examples/out/selection.pt

Times are medians; backward is the gradient of o alone. TFLOP/s count visible (query, key) pairs only, so causal dense
attention and selected attention are quoted alike. GB/s is what a kernel that loads every query's blocks for itself
would move, over the time: more than the L2 cache delivers means that queries shared loads. "of floor": the least time
for that shape and selection (formula: benchmarks/floors.py) over the measured time. "extra MB": peak memory above the
inputs', results included. A few rows are compared with the float64 oracle before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import methods, report
from .checks import check
from .floors import Limits, Work, dense_flops, limits_of, warm, work_of
from .methods import Call, Inputs
from .report import Row
from .selections import MAKERS, from_file
from .shapes import DTYPES, Shape, custom, preset
from .timing import Timing, input_sets, measure


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    return int(first), int(second or first)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=("full", "long", "quick"), default="full", help="which shapes (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="kernels of nsa_cuda: sm80, sm90, cpu, reference (default: the fastest that the device has)")
    add("--selections", nargs="+", choices=tuple(MAKERS), default=list(MAKERS))
    add(
        "--selection-file",
        type=Path,
        help="time this model's block lists (selection.pt of examples/train_lm.py) instead",
    )
    add("--seqlens", type=int, nargs="+", help="own shapes instead of a preset: lengths T")
    add("--heads", type=_pair, nargs="+", default=[(64, 4)], metavar="HQ/HKV")
    add("--head-dims", type=_pair, nargs="+", default=[(128, 128)], metavar="D or DK/DV")
    add("--block-size", type=int, default=64)
    add("--topk", type=int, default=16)
    add("--batch", type=int, default=1)
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU; overrides a preset's")
    add("--repeat", type=int, help="runs per measurement (default: about 0.3 s of them, at least 3)")
    add("--threads", type=int, help="CPU threads")
    add("--forward-only", action="store_true")
    add("--no-dense", action="store_true", help="leave torch's dense attention out")
    add(
        "--dense-limit",
        type=float,
        default=60.0,
        help="skip dense calls expected to take longer, in seconds (default: 60)",
    )
    add("--json", type=Path, help="write every number to this file")
    add("--plot", type=Path, help="write milliseconds over T to this PNG")
    return parser


def shapes_of(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Shape], Tensor | None]:
    """The shapes to measure and, with --selection-file, the one list of blocks to use."""
    on_gpu = device.type == "cuda"
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    if arguments.selection_file is not None:
        blocks, block_size = from_file(arguments.selection_file, device)
        batch, seqlen, heads_k, topk = blocks.shape
        groups = {hq // hk for hq, hk in arguments.heads}
        heads = [(group * heads_k, heads_k) for group in sorted(groups)]
        return custom([seqlen], heads, arguments.head_dims, block_size, topk, dtype, batch), blocks
    if arguments.seqlens:
        sizes = (arguments.heads, arguments.head_dims, arguments.block_size, arguments.topk)
        return custom(arguments.seqlens, *sizes, dtype, arguments.batch), None
    shapes = preset(arguments.preset, on_gpu)
    return [dataclasses.replace(shape, dtype=dtype) for shape in shapes] if arguments.dtype else shapes, None


class Bench:
    """Measures one shape after another and remembers the rows."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.rows: list[Row] = []
        self.limits: dict[str, Limits] = {}
        self._dense_ms: dict[tuple[str, str, int, int, int], tuple[int, float]] = {}

    def _time(self, calls: Sequence[Call]) -> Timing:
        return measure(calls, self.device, repeat=self.arguments.repeat)

    def _both(
        self,
        make: Callable[[], tuple[list[Call], list[Call]]],
        add: Callable[[str, Timing | None, str], None],
        skip: Callable[[str], str] = lambda operation: "",
    ) -> None:
        """Times forward and backward; what a method refuses becomes a row without a time and with the reason."""
        operations = ["forward"] if self.arguments.forward_only else ["forward", "backward"]
        try:
            reasons = {operation: skip(operation) for operation in operations}
            calls = make() if not all(reasons.values()) else ([], [])
            for operation, group in zip(operations, calls, strict=False):
                add(operation, None if reasons[operation] else self._time(group), reasons[operation])
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            for operation in operations:
                add(operation, None, str(error).splitlines()[0][:120])

    def _sparse(self, shape: Shape, name: str, blocks: Tensor, sets: list[Inputs], method: str) -> None:
        work = self._work(shape, blocks)

        def add(operation: str, timing: Timing | None, note: str) -> None:
            is_forward = operation == "forward"
            flops = work.forward_flops if is_forward else work.backward_flops
            moved = work.forward_gather_bytes if is_forward else work.backward_gather_bytes
            floor = work.forward_floor_ms if is_forward else work.backward_floor_ms
            self.rows.append(Row(shape, method, name, operation, timing, flops, moved, floor, note))

        def checked() -> tuple[list[Call], list[Call]]:
            check(sets[0], blocks, shape, self.arguments.backend, not self.arguments.forward_only)
            return methods.ours(sets, blocks, shape, self.arguments.backend)

        if method == "nsa_cuda":
            print(
                f"{name}: lists of 4 neighbours hold {work.union_4:.1f} different blocks, of 16 {work.union_16:.1f}; "
                f"floor {work.forward_floor_ms:.2f} + {work.backward_floor_ms:.2f} ms"
            )
            self._both(checked, add)
        else:
            self._both(lambda: methods.fla(sets, blocks, shape), add)

    def _work(self, shape: Shape, blocks: Tensor) -> Work:
        if shape.dtype not in self.limits:
            self.limits[shape.dtype] = limits_of(self.device, shape.dtype)
            rates = self.limits[shape.dtype]
            l2 = f", L2 {rates.l2_bytes / 1e12:.1f} TB/s" if rates.l2_bytes else ""
            print(
                f"{shape.dtype} rates for the floor ({rates.source}): {rates.flops / 1e12:.3g} TFLOP/s{l2}, "
                f"memory {rates.memory_bytes / 1e12:.3g} TB/s"
            )
        return work_of(blocks, shape, self.limits[shape.dtype])

    def _dense(self, shape: Shape, sets: list[Inputs]) -> None:
        flops = dict(zip(("forward", "backward"), dense_flops(shape), strict=True))
        for method, backend in (methods.DENSE_GPU if self.device.type == "cuda" else methods.DENSE_CPU).items():

            def skip(operation: str, method: str = method) -> str:
                last = self._dense_ms.get((method, operation, shape.heads_q, shape.dim_qk, shape.dim_v))
                if last is None:
                    return ""
                expected = last[1] * (shape.seqlen / last[0]) ** 2 * 1e-3
                return f"expected {expected:.0f} s" if expected > self.arguments.dense_limit else ""

            def add(operation: str, timing: Timing | None, note: str, method: str = method) -> None:
                self.rows.append(Row(shape, method, "-", operation, timing, flops[operation], None, None, note))
                if timing:
                    key = (method, operation, shape.heads_q, shape.dim_qk, shape.dim_v)
                    self._dense_ms[key] = (shape.seqlen, timing.milliseconds)

            self._both(partial(methods.dense, sets, shape, backend), add, skip)

    def shape(self, shape: Shape, given: Tensor | None) -> None:
        print(f"\n### {shape.title}\n", flush=True)
        first_row = len(self.rows)
        first = methods.make_inputs(shape, self.device, seed=1)
        count = input_sets(first.nbytes, self.device)
        sets = [first, *(methods.make_inputs(shape, self.device, seed=2 + i) for i in range(count - 1))]
        lists = {"model": given} if given is not None else {}
        if given is None:
            lists = {name: MAKERS[name](shape, self.device) for name in self.arguments.selections}
        for name, blocks in lists.items():
            self._sparse(shape, name, blocks, sets, "nsa_cuda")
        # Its kernels take about a minute to compile for each pair of head dims: presets compare the paper's alone.
        wanted = bool(self.arguments.seqlens) or (shape.dim_qk, shape.dim_v) == (128, 128)
        if self.device.type == "cuda" and methods.fla_module() is not None and wanted:
            print("flash-linear-attention (the first call compiles its kernels)", flush=True)
            for name, blocks in lists.items():
                self._sparse(shape, name, blocks, sets, "flash-linear-attention")
        if not self.arguments.no_dense:
            self._dense(shape, sets)
        rows = self.rows[first_row:]
        print(f"\n{report.table(rows)}\n")
        if not self.arguments.no_dense:
            print(report.speedups(rows))
        for row in rows:
            if row.note:
                print(f"{row.method}, {row.selection}, {row.operation}: {row.note}")


def main() -> None:
    arguments = make_parser().parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = report.environment(device)
    if device.type == "cuda" and methods.fla_module() is None:
        print("flash-linear-attention is not installed: not compared")
    warm(device)
    bench = Bench(arguments, device)
    shapes, given = shapes_of(arguments, device)
    for shape in shapes:
        bench.shape(shape, given)
    if arguments.json:
        report.write_json(arguments.json, about, report.records(bench.rows))
    if arguments.plot:
        report.plot(arguments.plot, about, bench.rows)


if __name__ == "__main__":
    main()
