"""Selected attention on one GPU against its goals: one table.

    python -m benchmarks.selected_goals                          # an H100; about a minute
    python -m benchmarks.selected_goals --scale 0.03125          # smaller lengths, to try it out

Goals are for an H100 SXM, bfloat16, 16 blocks of 64, D 128, whole calls, index building included. "other" is the best
time of another NSA kernel known to us on an H100, measured before this library's first release; dense is the fastest of
torch's backends in the same run. With G = 1 the goal is twice the speed of the portable kernels (sm80), which are
measured in the same run, too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import report, selected
from .floors import warm
from .shapes import DTYPES, Shape


@dataclass(frozen=True)
class Goal:
    selection: str
    operation: str
    milliseconds: float
    other: float | None = None  # ms of the best other NSA kernel
    note: str = ""


_NO_GROUP = Shape(32768, heads_q=16, heads_k=16)
_GOALS = {
    Shape(65536): (
        Goal("clustered", "forward", 4.6, 15.3),
        Goal("uniform", "forward", 12.0, 16.3),
        Goal("clustered", "backward", 15.0, 32.6),
        Goal("uniform", "backward", 22.0, 34.3),
    ),
    Shape(8192): (Goal("uniform", "forward", 0.9, 1.69), Goal("uniform", "backward", 2.3, 5.1)),
    Shape(32768, heads_q=32, heads_k=8): (
        Goal("uniform", "forward", 10.0, 22.2),
        Goal("uniform", "backward", 11.0, 28.2),
        Goal("clustered", "forward", 5.0),
        Goal("clustered", "backward", 9.0),
    ),
}
Cells = tuple[str, str, str, str, str, str]


def times(rows: list[report.Row]) -> dict[tuple[str, str, str], float]:
    """(method, selection, operation) -> ms."""
    return {(r.method, r.selection, r.operation): r.timing.milliseconds for r in rows if r.timing}


def cells(shape: Shape, goal: Goal, found: dict[tuple[str, str, str], float]) -> Cells:
    measured = found.get(("nsa_cuda", goal.selection, goal.operation))
    dense = [ms for (method, _, operation), ms in found.items() if method != "nsa_cuda" and operation == goal.operation]
    name = f"T {shape.seqlen}, {shape.heads_q} q / {shape.heads_k} kv heads, {goal.selection}, {goal.operation}"
    return (
        name,
        f"{measured:.2f}" if measured else "refused",
        f"{goal.milliseconds}{goal.note}",
        f"{goal.other}" if goal.other else "",
        f"{min(dense):.2f}" if dense else "",
        f"{min(dense) / measured:.2f}x" if dense and measured else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    about = report.environment(device, "benchmarks.selected_goals")
    warm(device)

    def measure(shape: Shape, *options: str) -> tuple[Shape, dict[tuple[str, str, str], float]]:
        scaled = replace(shape, seqlen=int(arguments.scale * shape.seqlen), dtype=arguments.dtype)
        bench = selected.Bench(selected.make_parser().parse_args(["--device", arguments.device, *options]), device)
        bench.shape(scaled, None)
        return scaled, times(bench.rows)

    rows: list[Cells] = []
    for shape, goals in _GOALS.items():
        scaled, found = measure(shape)
        rows += [cells(scaled, goal, found) for goal in goals]
    if device.type == "cuda":
        _, portable = measure(_NO_GROUP, "--backend", "sm80", "--no-dense", "--selections", "clustered")
        scaled, found = measure(_NO_GROUP, "--selections", "clustered")
        for operation in ("forward", "backward"):
            limit = round(portable.get(("nsa_cuda", "clustered", operation), 0.0) / 2, 2)
            rows.append(cells(scaled, Goal("clustered", operation, limit, note=" (half of sm80)"), found))
    columns = ("ms", "measured", "goal", "other", "dense", "of dense")
    print(f"\n### Against the goals, {arguments.dtype}\n")
    print(report.goal_table(columns, rows))
    if arguments.json:
        report.write_json(arguments.json, about, [dict(zip(columns, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
