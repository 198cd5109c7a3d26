"""Training two models side by side on the same batches, and what is asked of them afterwards."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Corpus, fixed_windows, random_batch
from .model import ByteModel

_LN2 = math.log(2.0)


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    minutes: float  # both models together; training ends early when they are spent
    batch: int
    context: int
    learning_rate: float
    seed: int
    device: torch.device


@dataclass
class Run:
    """One model, its optimizer and its record."""

    name: str
    model: ByteModel
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0  # of training, without evaluation
    losses: list[float] = field(default_factory=list)  # bits per byte, one per step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, bits per byte)


def make_run(name: str, model: ByteModel, learning_rate: float) -> Run:
    """AdamW; matrices decay, vectors don't. Compression reads l * D inputs at once, several times what the other
    matrices do, and its rate is smaller in proportion: at the full rate NSA trails by 0.4 bits more after 300 steps.
    """
    fan_in = model.config.kernel_size * model.config.head_dim
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.1, "scale": 1.0},
        {"params": [], "weight_decay": 0.0, "scale": 1.0},
        {"params": [], "weight_decay": 0.0, "scale": min(1.0, model.config.width / fan_in)},
    ]
    for path, parameter in model.named_parameters():
        kind = 1 if parameter.ndim < 2 else 2 if ".compress_" in path else 0
        groups[kind]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return Run(name, model, torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98)))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; the parameters stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def bits_per_byte(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean over all bytes of windows ``[B, T + 1]``: a scalar, differentiable."""
    with autocast(windows.device):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten()) / _LN2


def _step(run: Run, windows: Tensor, rate: float) -> None:
    start = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    loss = bits_per_byte(run.model, windows)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.losses.append(loss.item())  # waits for the device, so the time below is the whole step's
    run.seconds += time.perf_counter() - start


@torch.no_grad()
def evaluate(model: ByteModel, windows: Tensor, batch: int, device: torch.device) -> float:
    """Bits per byte over all ``windows`` ``[count, T + 1]``."""
    losses = [bits_per_byte(model, part.to(device)).item() * len(part) for part in windows.split(batch)]
    return sum(losses) / len(windows)


def _learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 15 %, times a cosine down to 2 %. ``progress`` in [0, 1].

    With a warm-up of 5 % NSA ends 0.2 bits per byte higher (400 steps on a CPU, mean of three seeds).
    """
    warm_up = min(1.0, progress / 0.15 + 0.02)
    return peak * warm_up * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress)))


class ProgressBar:
    """One line that is rewritten on a terminal; elsewhere a line per tenth."""

    def __init__(self) -> None:
        self._tenth = -1
        self._start = time.perf_counter()

    def show(self, progress: float, text: str) -> None:
        elapsed = time.perf_counter() - self._start
        filled = int(progress * 24)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {progress:4.0%} {elapsed:4.0f} s  {text}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if progress >= 1.0 else "", flush=True)
        elif int(progress * 10) > self._tenth:
            self._tenth = int(progress * 10)
            print(line, flush=True)


def train(runs: list[Run], corpus: Corpus, config: TrainConfig, held_out: Tensor) -> int:
    """Trains every run on the same batches with the same schedule; returns the steps done.

    The schedule follows whichever is nearer to its end, the steps or the minutes, so that a slow machine also finishes
    with a decayed learning rate. Along the way an eighth of ``held_out`` is evaluated four times, at the end all of it.
    """
    generator = torch.Generator().manual_seed(config.seed)
    bar, start, next_evaluation = ProgressBar(), time.perf_counter(), 0.2
    for step in range(config.steps):
        spent = (time.perf_counter() - start) / (60.0 * config.minutes)
        progress = max(step / config.steps, spent)
        if progress >= 1.0:
            break
        windows = random_batch(corpus.train, config.batch, config.context, generator, config.device)
        for run in runs:
            _step(run, windows, _learning_rate(config.learning_rate, progress))
        recent = "  ".join(f"{run.name} {sum(run.losses[-20:]) / len(run.losses[-20:]):.2f}" for run in runs)
        bar.show(progress, f"step {step + 1}/{config.steps}  bits per byte: {recent}")
        if progress >= next_evaluation:
            next_evaluation += 0.2
            _evaluate_all(runs, held_out[:: max(1, len(held_out) // 8)], config)
    _evaluate_all(runs, held_out, config)
    bar.show(1.0, f"{len(runs[0].losses)} steps")
    return len(runs[0].losses)


def _evaluate_all(runs: list[Run], windows: Tensor, config: TrainConfig) -> None:
    for run in runs:
        run.held_out.append((len(run.losses), evaluate(run.model, windows, config.batch, config.device)))


def held_out_windows(corpus: Corpus, config: TrainConfig, count: int) -> Tensor:
    return fixed_windows(corpus.held_out, count, config.context)


@torch.no_grad()
def blocks_selected(model: ByteModel, windows: Tensor) -> Tensor:
    """The last layer's block lists for windows ``[B, T + 1]``: int32 ``[B, T, Hkv, n]`` on the CPU."""
    with autocast(windows.device):
        return model.selected_blocks(windows[:, :-1]).cpu()


@torch.no_grad()
def generate(model: ByteModel, prompt: bytes, count: int, config: TrainConfig, temperature: float = 0.7) -> str:
    """Samples ``count`` bytes after ``prompt``, running the whole model over the last ``context`` bytes for each."""
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.tensor([list(prompt)], device=config.device)
    for _ in range(count):
        with autocast(config.device):
            logits = model(tokens[:, -config.context :])[0, -1]
        weights = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        drawn = torch.multinomial(weights, 1, generator=generator).to(config.device)
        tokens = torch.cat((tokens, drawn[None]), dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def tokens_per_second(run: Run, config: TrainConfig) -> float:
    return len(run.losses) * config.batch * config.context / max(run.seconds, 1e-9)


def smooth(values: list[float], decay: float = 0.97) -> list[float]:
    """Exponential mean without the bias towards its start."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(mean / weight)
    return found


def curves_apart(first: list[float], second: list[float]) -> tuple[float, float]:
    """Relative distance of two smoothed loss curves over the second half of training: its mean and the largest."""
    pairs = list(zip(smooth(first), smooth(second), strict=True))
    distances = [a / b - 1.0 for a, b in pairs[len(pairs) // 2 :]] or [0.0]
    return sum(distances) / len(distances), max(abs(x) for x in distances)
