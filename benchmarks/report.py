"""Tables, JSON and the plot."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nsa_cuda
import torch

from .shapes import Shape
from .timing import Timing


@dataclass(frozen=True)
class Row:
    """One method on one shape (and selection; "-" for dense)."""

    shape: Shape
    method: str
    selection: str
    operation: str  # "forward" or "backward"
    timing: Timing | None  # None: this method doesn't have it, see note
    flops: int
    gather_bytes: int | None
    floor_ms: float | None
    note: str = ""

    @property
    def tflops(self) -> float | None:
        return self.flops / self.timing.milliseconds / 1e9 if self.timing else None

    @property
    def share_of_floor(self) -> float | None:
        return self.floor_ms / self.timing.milliseconds if self.timing and self.floor_ms else None


def environment(device: torch.device, module: str = "benchmarks.selected") -> dict[str, str]:
    """What a measurement depends on, printed above its tables and returned for its JSON."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        software = f"CUDA {torch.version.cuda}, driver {driver.splitlines()[0] if driver else 'unknown'}"
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
        software = platform.platform()
    about = {
        "device": name,
        "software": software,
        "torch": torch.__version__,
        "nsa_cuda": nsa_cuda.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }
    for key, value in about.items():
        print(f"{key}: {value}")
    return about


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def number(value: float | None, digits: int = 2) -> str:
    """Three significant digits below 100, none after the point above."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else digits}f}"


_COLUMNS = "TFLOP/s | GB/s | of floor | extra MB"
_HEADER = f"| method | selection | fwd ms | {_COLUMNS} | bwd ms | {_COLUMNS} |"


def _cells(row: Row | None) -> list[str]:
    if row is None or row.timing is None:
        return ["-"] * 5
    seconds = row.timing.milliseconds * 1e-3
    rate = row.gather_bytes / seconds / 1e9 if row.gather_bytes else None
    share = f"{row.share_of_floor:.0%}" if row.share_of_floor else "-"
    extra = row.timing.extra_bytes / 1e6 if row.timing.extra_bytes is not None else None
    return [number(row.timing.milliseconds), number(row.tflops), number(rate, 0), share, number(extra, 1)]


def table(rows: Sequence[Row]) -> str:
    """Markdown: the rows of one shape, forward and backward of a method side by side."""
    lines = [_HEADER, "|---|---|" + "---:|" * 10]
    names = list(dict.fromkeys((row.method, row.selection) for row in rows))
    for method, selection in names:
        of = {row.operation: row for row in rows if (row.method, row.selection) == (method, selection)}
        cells = [method, selection, *_cells(of.get("forward")), *_cells(of.get("backward"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speedups(rows: Sequence[Row]) -> str:
    """nsa_cuda against the fastest dense backend, per selection: above 1 sparse wins."""
    parts = []
    for selection in dict.fromkeys(row.selection for row in rows if row.method.startswith("nsa_cuda")):
        totals = []
        for operations in (("forward",), ("backward",), ("forward", "backward")):
            ours = _total(
                rows, operations, lambda row, s=selection: row.method.startswith("nsa_cuda") and row.selection == s
            )
            dense = _total(rows, operations, lambda row: row.method.startswith("dense"))
            totals.append(f"{dense / ours:.2f}x" if ours and dense else "-")
        parts.append(f"{selection}: forward {totals[0]}, backward {totals[1]}, both {totals[2]}")
    return "against the fastest dense: " + "; ".join(parts)


def _total(rows: Sequence[Row], operations: Sequence[str], chosen: Any) -> float | None:
    """Sum over the operations of the fastest chosen row's milliseconds."""
    total = 0.0
    for operation in operations:
        times = [r.timing.milliseconds for r in rows if r.operation == operation and chosen(r) and r.timing]
        if not times:
            return None
        total += min(times)
    return total


def goal_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown: a name, then numbers."""
    rule = ("---", *["---:"] * (len(columns) - 1))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(row), "tflops": row.tflops, "share_of_floor": row.share_of_floor} for row in rows]


def write_json(path: Path, about: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def plot(path: Path, about: dict[str, str], rows: Sequence[Row]) -> None:
    """Milliseconds over T, one line per method, for the heads and dims that were measured at the most lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths: dict[Shape, set[int]] = {}
    for row in rows:
        lengths.setdefault(dataclasses.replace(row.shape, seqlen=0), set()).add(row.shape.seqlen)
    family = max(lengths, key=lambda shape: len(lengths[shape]))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, operation in zip(panels, ("forward", "backward"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.operation == operation and row.timing and dataclasses.replace(row.shape, seqlen=0) == family:
                name = row.method if row.selection == "-" else f"{row.method}, {row.selection}"
                lines.setdefault(name, []).append((row.shape.seqlen, row.timing.milliseconds))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "s--" if name.startswith("dense") else "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel="ms", title=operation)
        ticks = sorted(lengths[family])
        axes.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{family.title.split(', ', 1)[1]}: {about['device']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
