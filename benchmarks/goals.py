"""The whole of Native Sparse Attention on one GPU against its goals: one table.

    python -m benchmarks.goals                       # an H100; about half a minute
    python -m benchmarks.goals --seqlen 2048 --short 1024 --device cpu --heads 16/1 --head-dims 64 --dtype float32

Goals are for an H100 SXM, 64 query and 4 kv heads of 128, bfloat16, l 32, d 16, 16 blocks of 64, window 512, and
queries whose lists agree as those of large models do. Times are `benchmarks.branches`', "dense" is cuDNN's causal
attention in the same run. Memory is what autograd holds between forward and backward: of the layer, hidden states
included and parameters not, beside the layer's dense twin; and of the attention alone, beside q, k, v, o and lse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import nsa_cuda
import torch
from nsa_cuda.nn import NativeSparseAttention
from torch import Tensor

from . import branches, report
from .floors import warm
from .layer import DenseTwin, kept_bytes
from .methods import make_inputs
from .shapes import DTYPES, Shape

# (step, operation) -> ms at T 65536.
_GOALS = {
    ("compressed", "forward"): 7.2,
    ("select", "forward"): 5.0,
    ("compressed", "backward"): 25.0,
    ("window", "forward"): 2.2,
    ("window", "backward"): 6.0,
    ("selected", "forward"): None,
    ("selected", "backward"): None,
    ("whole", "forward"): 22.0,
    ("whole", "backward"): 50.0,
}
_KEPT_GOALS: dict[bool | Literal["window"], float] = {False: 2.2, "window": 2.2, True: 1.3}


def times(bench: branches.Bench, shape: Shape) -> dict[tuple[str, str], float]:
    """(step, operation) -> ms of one shape; what a step refused is left out."""
    return {(r.step, r.operation): r.timing.milliseconds for r in bench.rows if r.shape == shape and r.timing}


def kept(shape: Shape, device: torch.device) -> dict[str, int]:
    """Bytes that a layer of this shape holds for its backward: the dense twin's, and NSA's per `recompute`."""
    dtype = DTYPES[shape.dtype]
    dim = shape.heads_q * shape.dim_qk
    x = torch.randn(1, shape.seqlen, dim, device=device, dtype=dtype).requires_grad_()
    heads = shape.heads_q, shape.heads_k
    twin = DenseTwin(dim, *heads, shape.dim_qk).to(device, dtype)
    found = {"dense": kept_bytes(twin, x, twin.parameters())}
    for recompute in _KEPT_GOALS:
        layer = NativeSparseAttention(
            dim, *heads, head_dim=shape.dim_qk, topk=shape.topk, block_size=shape.block_size, recompute=recompute,
            device=device, dtype=dtype,
        )  # fmt: skip
        found[str(recompute)] = kept_bytes(layer, x, layer.parameters())
    return found


def flash_bytes(shape: Shape) -> int:
    """q, k, v, o and lse: what dense flash attention keeps by itself."""
    rows = shape.heads_q * (shape.dim_qk + shape.dim_v) + shape.heads_k * (shape.dim_qk + shape.dim_v)
    return shape.batch * shape.seqlen * (rows * shape.element_bytes + 4 * shape.heads_q)


def kept_by_attention(shape: Shape, device: torch.device) -> dict[str, int]:
    """Bytes of `native_sparse_attention` alone, its result o included, per `recompute`."""
    b = branches.Branches.make(make_inputs(shape, device, seed=1), branches.Sizes())
    found = {}
    for recompute in _KEPT_GOALS:

        def call(x: Tensor, recompute: bool | Literal["window"] = recompute) -> Tensor:
            return nsa_cuda.native_sparse_attention(
                x, b.k, b.v, b.gates, k_cmp=b.k_cmp, v_cmp=b.v_cmp, block_size=shape.block_size, topk=shape.topk,
                recompute=recompute,
            )  # fmt: skip

        found[str(recompute)] = kept_bytes(call, b.q) + b.dout.nbytes
    return found


Cells = tuple[str, str, str, str, str]


def time_rows(bench: branches.Bench, long: Shape, short: Shape) -> list[Cells]:
    rows: list[Cells] = []
    found = times(bench, long)
    for key, goal in _GOALS.items():
        measured, dense = found.get(key), found.get(("dense", key[1])) if key[0] == "whole" else None
        text = "refused" if measured is None else f"{measured:.2f} ms"
        ratio = f"{dense / measured:.2f}x" if dense and measured else ""
        rows.append((" ".join(key), text, f"{goal} ms" if goal else "", f"{dense:.1f} ms" if dense else "", ratio))
    found = times(bench, short)
    whole, dense = (found.get((s, "forward"), 0.0) + found.get((s, "backward"), 0.0) for s in ("whole", "dense"))
    if whole and dense:
        name = f"whole forward + backward, T {short.seqlen}"
        rows.append((name, f"{whole:.2f} ms", "dense", f"{dense:.2f} ms", f"{dense / whole:.2f}x"))
    return rows


def memory_rows(shape: Shape, device: torch.device) -> list[Cells]:
    """The layer's and, without a goal, the attention's alone."""
    layer, alone = kept(shape, device), kept_by_attention(shape, device)
    rows: list[Cells] = []
    for recompute, goal in _KEPT_GOALS.items():
        for name, held, dense in (
            ("layer", layer[str(recompute)], layer["dense"]),
            ("attention alone", alone[str(recompute)], flash_bytes(shape)),
        ):
            wanted = f"{goal}x of dense" if name == "layer" else ""
            ratio = f"{held / dense:.2f}x of dense"
            rows.append(
                (f"{name} keeps, recompute={recompute}", f"{held / 1e9:.2f} GB", wanted, f"{dense / 1e9:.2f} GB", ratio)
            )
    return rows


def main() -> None:
    parser = branches.make_parser()
    parser.description = __doc__
    parser.add_argument("--seqlen", type=int, default=65536, help="T of the table (default: %(default)s)")
    parser.add_argument("--short", type=int, default=8192, help="T of the break-even row (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    about = report.environment(device, "benchmarks.goals")
    warm(device)
    bench = branches.Bench(arguments, device)
    arguments.seqlens = [arguments.seqlen]
    (long,) = branches.shapes_of(arguments, device.type == "cuda")
    short = replace(long, seqlen=arguments.short)
    for shape in (short, long):
        bench.shape(shape)
    print(f"\n### T {long.seqlen}\n")
    columns = ("", "measured", "goal", "dense", "ratio")
    rows = [*time_rows(bench, long, short), *memory_rows(long, device)]
    print(report.goal_table(columns, rows))
    if arguments.json:
        report.write_json(arguments.json, about, [dict(zip(columns, cells, strict=True)) for cells in rows])


if __name__ == "__main__":
    main()
