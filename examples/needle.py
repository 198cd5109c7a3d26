"""Trains a small model with Native Sparse Attention, and its dense twin, to find a needle in a long text.

A needle is a key and a value, said four times, somewhere in the source text of Python's standard library (or --text),
among other needles; the end of the text asks for one key. Both models have the same size, see the same texts and take
the same steps. The lengths grow during training: recall is learned in short texts, where every block is selected, and
has to survive in long ones, where NSA must select the right few. At the end: the share of needles found, by depth and
length, as a table and in --out as a heat map (needle.png) and as numbers (needle.json).

    python examples/needle.py                                  # on a CPU: about 5 minutes, 1024 bytes
    python examples/needle.py --device cuda                    # at most 8 minutes, 16384 bytes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

# As in train_lm.py: threads that wait sleep instead of spinning. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nsa_cuda
import torch
from lm.data import load_corpus
from lm.model import ByteModel, ModelConfig
from lm.recall import Learner, Texts, learn, make_learner, recall
from lm.train import ProgressBar

# What the options default to. `warm_up` steps at the first length, `steps` at each longer one.
_CPU = {
    "first": 64, "context": 1024, "tokens": 2048, "warm_up": 350, "steps": 250, "minutes": 6.0, "layers": 2,
    "width": 128, "heads": 4, "kv_heads": 1, "head_dim": 32, "block_size": 16, "topk": 6, "window": 32,
    "kernel_size": 16, "kernel_stride": 8, "trials": 20,
}  # fmt: skip
_GPU = {
    "first": 64, "context": 16384, "tokens": 32768, "warm_up": 500, "steps": 200, "minutes": 6.0, "layers": 2,
    "width": 256, "heads": 8, "kv_heads": 1, "head_dim": 64, "block_size": 64, "topk": 16, "window": 128,
    "kernel_size": 16, "kernel_stride": 8, "trials": 40,
}  # fmt: skip
_DEPTHS = 11  # 0 %, 10 %, ... 100 %
_OTHERS = 5  # needles beside the one that is asked for


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 (default: %(default)s)",
    )
    add("--text", type=Path, help="folder whose *.py files are the text (default: Python's standard library)")
    add(
        "--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results (default: examples/out)"
    )
    add("--learning-rate", type=float, default=3e-3, help="peak rate of AdamW (default: %(default)s)")
    add(
        "--compression",
        default="mean",
        help="mean, weighted, linear or mlp; a mean has nothing to learn: mlp found 82 %% where it found 98 %% (1024 "
        "bytes on a CPU) (default: %(default)s)",
    )
    add("--seed", type=int, default=0)
    meanings = {
        "first": "bytes of the shortest texts, where training starts", "context": "bytes of the longest texts",
        "tokens": "bytes per step, which set the batch of each length", "warm_up": "steps at the first length",
        "steps": "steps at each longer length, twice as many at the last",
        "minutes": "training ends after this time, both models together", "layers": "transformer layers",
        "width": "width of the residual stream", "heads": "query heads Hq", "kv_heads": "key/value heads Hkv",
        "head_dim": "head dim D", "block_size": "selection block l'", "topk": "blocks per query n",
        "window": "sliding window w", "kernel_size": "compression kernel l", "kernel_stride": "compression stride d",
        "trials": "texts per depth and length",
    }  # fmt: skip
    for name, meaning in meanings.items():
        kind: type = float if name == "minutes" else int
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{meaning} (default: CPU {_CPU[name]}, GPU {_GPU[name]})")
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    for name, value in (_GPU if arguments.device.type == "cuda" else _CPU).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def lengths(arguments: argparse.Namespace) -> list[int]:
    """Doubling from the first to the context."""
    found = [arguments.first]
    while found[-1] < arguments.context:
        found.append(min(2 * found[-1], arguments.context))
    return found


def schedule(arguments: argparse.Namespace) -> list[int]:
    """The length of every step."""
    short, *longer = lengths(arguments)
    plan = [short] * arguments.warm_up
    for length in longer:
        plan += [length] * arguments.steps * (2 if length == arguments.context else 1)
    return plan


def make_learners(arguments: argparse.Namespace) -> list[Learner]:
    # Half of a head's dims don't turn: keys must agree at any distance.
    config = ModelConfig(
        layers=arguments.layers, width=arguments.width, heads=arguments.heads, kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim, kernel_size=arguments.kernel_size, kernel_stride=arguments.kernel_stride,
        block_size=arguments.block_size, topk=arguments.topk, window_size=arguments.window,
        rotary_dim=arguments.head_dim // 2, start=0.05, compression=arguments.compression,
    )  # fmt: skip
    learners = []
    for name, sparse in (("NSA", True), ("dense", False)):
        torch.manual_seed(arguments.seed)
        learners.append(make_learner(name, ByteModel(config, sparse).to(arguments.device), arguments.learning_rate))
    return learners


def train(learners: list[Learner], texts: Texts, arguments: argparse.Namespace) -> int:
    """All learners on the same texts; the rate warms up over 50 steps and falls to a tenth. Returns the steps done."""
    plan, bar, start = schedule(arguments), ProgressBar(), time.perf_counter()
    right = {learner.name: 0.0 for learner in learners}
    for step, length in enumerate(plan):
        spent = (time.perf_counter() - start) / (60.0 * arguments.minutes)
        if spent >= 1.0:
            print(f"\nout of time at length {length}: see --minutes")
            return step
        decay = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * max(step / len(plan), spent)))
        rate = arguments.learning_rate * min(1.0, (step + 1) / 50) * decay
        text, answers = texts.training(max(1, arguments.tokens // length), length)
        for learner in learners:
            right[learner.name] += 0.05 * (learn(learner, text, answers, rate) - right[learner.name])
        found = "  ".join(f"{name} {share:4.0%}" for name, share in right.items())
        bar.show((step + 1) / len(plan), f"length {length:>5}  found: {found}")
    return len(plan)


def test(learners: list[Learner], texts: Texts, arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Share of needles found: {name: [length][depth]} over the four longest lengths."""
    shares: dict[str, list[list[float]]] = {learner.name: [] for learner in learners}
    for learner in learners:
        for length in lengths(arguments)[-4:]:
            batch = max(1, arguments.tokens // length)
            depths = (d / (_DEPTHS - 1) for d in range(_DEPTHS))
            shares[learner.name].append(
                [recall(learner.model, texts, length, depth, arguments.trials, batch, _OTHERS) for depth in depths]
            )
    return shares


def report(learners: list[Learner], shares: dict[str, list[list[float]]], arguments: argparse.Namespace) -> None:
    columns = lengths(arguments)[-4:]
    for learner in learners:
        print(f"\n{learner.name}: needles found, {arguments.trials} texts each")
        print(f"{'depth':>8}" + "".join(f"{length:>9}" for length in columns))
        for d in range(_DEPTHS):
            row = "".join(f"{shares[learner.name][c][d]:>9.0%}" for c in range(len(columns)))
            print(f"{d / (_DEPTHS - 1):>8.0%}{row}")
    rows: dict[str, Any] = {}
    print()
    for learner in learners:
        rate = learner.tokens / max(learner.seconds, 1e-9)
        at_end = sum(shares[learner.name][-1]) / _DEPTHS
        print(f"{learner.name}: {at_end:.1%} of the needles at length {columns[-1]}, {rate:,.0f} tokens/s in training")
        rows[learner.name] = {"found": shares[learner.name], "tokens_per_second": rate, "losses": learner.losses}
    options = {name: str(value) for name, value in vars(arguments).items()}
    results = {"torch": torch.__version__, "nsa_cuda": nsa_cuda.__version__, "lengths": columns, "options": options}
    (arguments.out / "needle.json").write_text(json.dumps({**results, **rows}, indent=1))


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device: torch.device = arguments.device
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"nsa_cuda {nsa_cuda.__version__}, torch {torch.__version__}, {name}")
    print(
        f"texts of {', '.join(map(str, lengths(arguments)))} bytes; a query of NSA sees "
        f"{arguments.topk * arguments.block_size} selected and {arguments.window} nearest keys"
    )
    corpus = load_corpus(arguments.text)
    learners = make_learners(arguments)
    start = time.perf_counter()
    train(learners, Texts(corpus.train, torch.Generator().manual_seed(arguments.seed), device), arguments)
    held_out = Texts(corpus.held_out, torch.Generator().manual_seed(arguments.seed + 1), device)
    shares = test(learners, held_out, arguments)
    report(learners, shares, arguments)
    try:
        from lm.plots import plot_recall
    except ImportError as error:  # the numbers don't depend on it
        print(f"no picture: {error}")
    else:
        plot_recall(shares, lengths(arguments)[-4:], arguments.out / "needle.png")
    print(f"{time.perf_counter() - start:.0f} s; needle.png and needle.json are in {arguments.out}")


if __name__ == "__main__":
    main()
