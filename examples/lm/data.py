"""Bytes of real text: Python source files that are already on this machine, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}  # installed packages differ from machine to machine


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8 [bytes]
    held_out: Tensor  # uint8 [bytes]
    folder: Path
    train_files: int
    held_out_files: int


def load_corpus(folder: Path | None = None) -> Corpus:
    """All ``*.py`` files under ``folder`` (None: the standard library), about a tenth of the files held out.

    A file's side depends on its relative path alone, so the split is the same on every machine and in every run.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(path for path in folder.rglob("*.py") if not _FOREIGN & set(path.relative_to(folder).parts))
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in files:
        name = path.relative_to(folder).as_posix()
        is_held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # 26 / 256: one file in ten
        sides[is_held_out].append(path.read_bytes() + b"\n")
    train, held_out = (b"".join(side) for side in sides)
    if min(len(train), len(held_out)) < 100_000:
        raise SystemExit(f"{folder} holds too little Python source to train on ({len(train)} bytes); see --text")
    as_tensor = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)]
    return Corpus(as_tensor[0], as_tensor[1], folder, len(sides[0]), len(sides[1]))


def random_batch(text: Tensor, batch: int, context: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``batch`` random windows: int64 ``[batch, context + 1]`` (inputs and, one to the right, targets)."""
    starts = torch.randint(text.numel() - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].to(device, torch.int64)


def fixed_windows(text: Tensor, count: int, context: int) -> Tensor:
    """``count`` windows spread evenly over ``text``: int64 ``[count, context + 1]``, always the same ones."""
    last = text.numel() - context - 1
    starts = torch.tensor([i * last // max(count - 1, 1) for i in range(count)], dtype=torch.int64)[:, None]
    return text[starts + torch.arange(context + 1)].long()
