"""Trains a byte-level language model with Native Sparse Attention, and its dense twin, on real text.

The text is the source of Python's standard library on this machine (or --text). Both models have the same size, see
the same batches and take the same steps; only the attention differs. At the end: bits per byte on held-out files,
tokens per second, a sample, and in --out two pictures (losses.png, selection.png), the numbers (results.json) and the
block lists of the last layer (selection.pt, which `python -m benchmarks.selected --selection-file` can time).

    python examples/train_lm.py                     # at most 3 minutes; on a GPU with its kernels and a longer context
    python examples/train_lm.py --context 2048 --minutes 10
    python examples/train_lm.py --device cuda --context 16384 --steps 5000 --minutes 8
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Threads that wait for each other sleep instead of spinning: where other programs want the same cores, training is ten
# times as fast. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nsa_cuda
import torch
from lm.data import load_corpus
from lm.model import ByteModel, ModelConfig
from lm.train import (
    Run,
    TrainConfig,
    blocks_selected,
    curves_apart,
    generate,
    held_out_windows,
    make_run,
    tokens_per_second,
    train,
)

# What the options default to. GPU kernels have head dims 64, 128, 256 and blocks of 16, 32, 64, 128.
_CPU = {
    "context": 512, "batch": 1, "steps": 1200, "minutes": 2.25, "layers": 2, "width": 128, "heads": 4, "kv_heads": 1,
    "head_dim": 32, "block_size": 16, "window": 32, "kernel_size": 16, "kernel_stride": 8,
}  # fmt: skip
_GPU = {
    "context": 4096, "batch": 1, "steps": 1500, "minutes": 2.25, "layers": 4, "width": 512, "heads": 8, "kv_heads": 2,
    "head_dim": 64, "block_size": 64, "window": 512, "kernel_size": 32, "kernel_stride": 16,
}  # fmt: skip


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
    add("--learning-rate", type=float, help="peak rate of AdamW (default: 0.003 on CPU, 0.002 on GPU)")
    add("--seed", type=int, default=0)
    add("--sample", type=int, default=200, help="bytes of text to generate (default: %(default)s)")
    meanings = {
        "context": "bytes in a window, Tq = Tk", "batch": "windows per step", "steps": "training steps at most",
        "minutes": "training ends after this time, both models together", "layers": "transformer layers",
        "width": "width of the residual stream", "heads": "query heads Hq", "kv_heads": "key/value heads Hkv",
        "head_dim": "head dim D", "block_size": "selection block l'", "window": "sliding window w",
        "kernel_size": "compression kernel l", "kernel_stride": "compression stride d",
    }  # fmt: skip
    for name, meaning in meanings.items():
        kind: type = float if name == "minutes" else int
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{meaning} (default: CPU {_CPU[name]}, GPU {_GPU[name]})")
    add("--topk", type=int, help="blocks per query n (default: a quarter of the context's)")
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    on_gpu = arguments.device.type == "cuda"
    for name, value in (_GPU if on_gpu else _CPU).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    # A byte says as much as a quarter of a token; 1024 bytes of 16384 were too few (docs/performance.md).
    arguments.topk = arguments.topk or max(4, arguments.context // (4 * arguments.block_size))
    arguments.learning_rate = arguments.learning_rate or (2e-3 if on_gpu else 3e-3)
    return arguments


def make_models(arguments: argparse.Namespace) -> list[Run]:
    config = ModelConfig(
        layers=arguments.layers, width=arguments.width, heads=arguments.heads, kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim, kernel_size=arguments.kernel_size, kernel_stride=arguments.kernel_stride,
        block_size=arguments.block_size, topk=arguments.topk, window_size=arguments.window,
    )  # fmt: skip
    runs = []
    for name, sparse in (("NSA", True), ("dense", False)):
        torch.manual_seed(arguments.seed)
        model = ByteModel(config, sparse).to(arguments.device)
        runs.append(make_run(name, model, arguments.learning_rate))
    return runs


def report(runs: list[Run], config: TrainConfig, arguments: argparse.Namespace, steps: int) -> None:
    print(f"\n{'':8}{'parameters':>12}{'bits per byte, held out':>26}{'tokens/s in training':>23}")
    rows: dict[str, Any] = {}
    for run in runs:
        parameters = sum(p.numel() for p in run.model.parameters())
        rate, loss = tokens_per_second(run, config), run.held_out[-1][1]
        print(f"{run.name:8}{parameters:>12,}{loss:>26.3f}{rate:>23,.0f}")
        rows[run.name] = {
            "parameters": parameters,
            "bits_per_byte": loss,
            "tokens_per_second": rate,
            "losses": run.losses,
            "held_out": run.held_out,
        }
    sparse, dense = runs
    mean, largest = curves_apart(sparse.losses, dense.losses)
    end = sparse.held_out[-1][1] / dense.held_out[-1][1] - 1.0
    print(
        f"NSA against dense: {end:+.1%} on held-out files; training curves in the second half: {mean:+.1%} on average, "
        f"{largest:.1%} apart at most"
    )
    rows["curves_apart"] = {"mean": mean, "largest": largest}
    options = {name: str(value) for name, value in vars(arguments).items()}
    results = {"torch": torch.__version__, "nsa_cuda": nsa_cuda.__version__, "steps": steps, "options": options, **rows}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device: torch.device = arguments.device
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    corpus = load_corpus(arguments.text)
    size = corpus.train.numel() + corpus.held_out.numel()
    print(f"nsa_cuda {nsa_cuda.__version__}, torch {torch.__version__}, {name}")
    print(
        f"text: {size / 1e6:.1f} MB of {corpus.folder}, {corpus.train_files} files + {corpus.held_out_files} held out"
    )
    config = TrainConfig(
        steps=arguments.steps, minutes=arguments.minutes, batch=arguments.batch, context=arguments.context,
        learning_rate=arguments.learning_rate, seed=arguments.seed, device=device,
    )  # fmt: skip
    keys = arguments.topk * arguments.block_size
    print(
        f"context {config.context} bytes; a query of NSA sees {keys} selected, {arguments.window} nearest and "
        f"up to {max(0, config.context - arguments.kernel_size) // arguments.kernel_stride + 1} compressed keys"
    )
    runs = make_models(arguments)
    held_out = held_out_windows(corpus, config, count=max(32, 32768 // config.context))
    steps = train(runs, corpus, config, held_out)
    report(runs, config, arguments, steps)

    sparse = runs[0].model
    print("\nNSA writes (after the prompt 'def test_'):\n")
    print(generate(sparse, b"def test_", arguments.sample, config))
    blocks = blocks_selected(sparse, held_out[:1].to(device))
    torch.save({"block_indices": blocks, "block_size": arguments.block_size}, arguments.out / "selection.pt")
    names = "results.json, selection.pt"
    try:
        from lm.plots import plot_losses, plot_selection
    except ImportError as error:  # the numbers don't depend on it
        print(f"\nno pictures: {error}")
    else:
        plot_losses(runs, arguments.out / "losses.png")
        plot_selection(blocks[0], arguments.block_size, arguments.out / "selection.png")
        names = f"losses.png, selection.png, {names}"
    print(f"\n{names} are in {arguments.out}")


if __name__ == "__main__":
    main()
