"""The layer under DistributedDataParallel and fully sharded, two processes on the CPU: gradients of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nsa_cuda.nn import NativeSparseAttention
from torch import Tensor, nn

WORLD = 2
SIZES: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 9}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(NativeSparseAttention(32, 4, 2, **SIZES) for _ in range(2)))


def batch() -> Tensor:
    """[WORLD, T, dim]: an entry for each process."""
    return torch.randn(WORLD, 70, 32, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module(x).square().sum().backward()
    found = [p.grad for p in module.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def work(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD)
    try:
        module = model()
        if kind == "ddp":
            module = nn.parallel.DistributedDataParallel(module)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            for layer in module:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
        found = gradients(module, batch()[rank : rank + 1])
        if rank == 0:
            torch.save(found, Path(folder) / f"{kind}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Gloo's threads sometimes outlive the group and abort the process while the interpreter ends.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients(kind: str, tmp_path: Path):
    if kind == "fsdp":
        pytest.importorskip("torch.distributed.fsdp", reason="no FSDP in this torch")
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            pytest.skip("torch.distributed.fsdp.fully_shard came with torch 2.6")
    torch.multiprocessing.spawn(work, (str(tmp_path), kind), nprocs=WORLD)
    found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
    expected = [g / WORLD for g in gradients(model(), batch())]  # processes average
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
