"""The pictures: loss curves, the blocks that queries of a held-out window selected, and recall by depth and length."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from .train import Run, smooth

matplotlib.use("Agg")
from matplotlib import pyplot

_COLOURS = ("#1f77b4", "#d95f02")


def plot_losses(runs: list[Run], path: Path) -> None:
    """Training loss (line, smoothed) and held-out loss (dots), bits per byte over steps."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run, colour in zip(runs, _COLOURS, strict=False):
        axes.plot(range(1, len(run.losses) + 1), smooth(run.losses), color=colour, label=f"{run.name}, training")
        steps, losses = zip(*run.held_out, strict=True)
        axes.plot(steps, losses, "o", color=colour, markersize=5, label=f"{run.name}, held-out files")
    lowest = min(loss for run in runs for _, loss in run.held_out)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(lowest - 0.3, 5.0), title="NSA and its dense twin")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_selection(blocks: Tensor, block_size: int, path: Path) -> None:
    """Which blocks each query selected: ``blocks`` int ``[T, Hkv, n]``, negative entries empty; a panel per kv head.

    The diagonal is the query's own block and the one before, the column on the left the forced first block.
    """
    rows, heads, _ = blocks.shape
    columns = -(-rows // block_size)
    figure, panels = pyplot.subplots(1, heads, figsize=(1.0 + 5.5 * heads, 5.5), layout="constrained", squeeze=False)
    for head, axes in enumerate(panels[0]):
        chosen = torch.zeros(rows, columns + 1)
        entries = blocks[:, head].long().cpu()
        chosen.scatter_(1, torch.where(entries < 0, columns, entries), 1.0)  # the last column takes the empty entries
        axes.imshow(chosen[:, :columns], aspect="auto", cmap="Blues", interpolation="nearest", vmin=0, vmax=1.2)
        axes.set(xlabel=f"key block ({block_size} bytes each)", ylabel="query position", title=f"kv head {head}")
    figure.suptitle("Blocks selected in the last layer, one held-out window")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_recall(shares: dict[str, list[list[float]]], lengths: list[int], path: Path) -> None:
    """Heat maps of the share of needles found, {name: [length][depth]}: a panel per model, depth downwards."""
    figure, panels = pyplot.subplots(1, len(shares), figsize=(4.2 * len(shares) + 1, 4.8), layout="constrained")
    image = None
    for (name, found), axes in zip(shares.items(), panels, strict=True):
        depths = len(found[0])
        image = axes.imshow(torch.tensor(found).T, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        axes.set(xlabel="length, bytes", ylabel="depth of the needle", title=name)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(depths), [f"{d / (depths - 1):.0%}" for d in range(depths)])
        for x, column in enumerate(found):
            for y, share in enumerate(column):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=list(panels), label="needles found")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
