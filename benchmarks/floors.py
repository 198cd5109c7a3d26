"""The least time that a shape could take on a device, from what the device gives and what has to be moved.

The largest of three times, each an amount over a rate:

                          arithmetic             through L2                  through memory
    forward               2 (Dk + Dv) pairs      K, V of unions              q, k, v, o, lse, lists once
    backward, dS kept     2 (3 Dk + 2 Dv) pairs  K of unions + rows + 2 dS   q, k, v, o, dO, gradients once, dS twice
    ... computed again    2 (4 Dk + 3 Dv) pairs  K, V of unions + rows       q, k, v, o, dO, gradients once

pairs: visible (query head, key) pairs. dQ goes over the queries' lists, dK and dV over the blocks' lists. So either dS,
two bytes a pair, is written and read, or both compute it; the backward's floor is the smaller of the two. The CPU's one
pass over tiles of queries needs neither. 2 (3 Dk + 2 Dv) is the useful work that TFLOP/s are quoted in.

unions: what a tile of max(16, 192 / G) consecutive queries loads when it loads once every block that any of them chose.
rows: for every entry of every list the pass over blocks gathers the Q and dO of G heads.

Rates of an H100 and H200 were measured with micro-benchmarks (docs/performance.md); on other devices the tensor and
memory rates are measured here in a second, by a matrix product and a copy, and the L2 term is left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .selections import mean_union, visible_pairs
from .shapes import DTYPES, Shape
from .timing import measure


@dataclass(frozen=True)
class Limits:
    """Rates per second."""

    flops: float
    l2_bytes: float | None
    memory_bytes: float
    source: str


_HOPPER_FLOPS = 972e12  # wgmma m64n64..128k16, bf16
_HOPPER_L2 = 7.8e12  # gather of 16 KiB tiles out of L2 into shared memory


def limits_of(device: torch.device, dtype: str) -> Limits:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if "H100" in name:
            return Limits(_HOPPER_FLOPS, _HOPPER_L2, 3.25e12, "measured on an H100 SXM")
        if "H200" in name:
            return Limits(_HOPPER_FLOPS, _HOPPER_L2, 4.3e12, "as an H100 SXM, memory measured on an H200")
    return _measured_limits(device, dtype)


def _measured_limits(device: torch.device, dtype: str) -> Limits:
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn((size, size), device=device).to(DTYPES[dtype])
    flops = 2 * size**3 / (measure([lambda: a @ a], device).milliseconds * 1e-3)
    source = torch.empty(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / (measure([lambda: target.copy_(source)], device).milliseconds * 1e-3)
    return Limits(flops, None, copy, "a matrix product and a copy in this run")


@dataclass(frozen=True)
class Work:
    """What one selection of one shape costs."""

    pairs: int  # visible (query head, key) pairs
    union_4: float
    union_16: float
    forward_flops: int  # useful
    backward_flops: int
    forward_gather_bytes: int  # K/V of every entry, one query at a time
    backward_gather_bytes: int  # ... and Q/dO of every entry
    forward_floor_ms: float
    backward_floor_ms: float


def work_of(block_indices: Tensor, shape: Shape, limits: Limits) -> Work:
    pairs = visible_pairs(block_indices, shape)
    blocks = -(-shape.seqlen // shape.block_size)
    tile = max(16, 192 // shape.group)
    dims = shape.dim_qk + shape.dim_v
    on_gpu = block_indices.device.type == "cuda"

    block_bytes = shape.block_size * dims * shape.element_bytes
    entries = int((block_indices >= 0).sum())
    kv_gather = entries * block_bytes
    q_gather = entries * shape.group * dims * shape.element_bytes
    tiles = shape.batch * shape.heads_k * -(-shape.seqlen // tile)
    union_bytes = tiles * mean_union(block_indices, tile, blocks) * block_bytes

    rows_q = shape.batch * shape.seqlen * shape.heads_q
    rows_k = shape.batch * shape.seqlen * shape.heads_k
    once = (rows_q + rows_k) * dims * shape.element_bytes + rows_q * 4 + block_indices.numel() * 4
    twice = 2 * (rows_q + rows_k) * dims * shape.element_bytes + rows_q * 4 + block_indices.numel() * 4

    forward_flops = 2 * dims * pairs
    backward_flops = 2 * (3 * shape.dim_qk + 2 * shape.dim_v) * pairs
    again_flops = 2 * (4 * shape.dim_qk + 3 * shape.dim_v) * pairs
    ds_bytes = 2 * pairs * shape.element_bytes if on_gpu else 0
    forward = [forward_flops / limits.flops, once / limits.memory_bytes]
    kept = [backward_flops / limits.flops, (twice + ds_bytes) / limits.memory_bytes]
    again = [again_flops / limits.flops, twice / limits.memory_bytes]
    if limits.l2_bytes:
        forward.append(union_bytes / limits.l2_bytes)
        kept.append((union_bytes * shape.dim_qk / dims + q_gather + ds_bytes) / limits.l2_bytes)
        again.append((union_bytes + q_gather) / limits.l2_bytes)
    return Work(
        pairs=pairs,
        union_4=mean_union(block_indices, 4, blocks),
        union_16=mean_union(block_indices, 16, blocks),
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        forward_gather_bytes=kv_gather,
        backward_gather_bytes=kv_gather + q_gather,
        forward_floor_ms=1e3 * max(forward),
        backward_floor_ms=1e3 * min(max(kept), max(again)),
    )


def dense_flops(shape: Shape) -> tuple[int, int]:
    """Useful FLOP of dense causal attention: (forward, backward)."""
    pairs = shape.batch * shape.heads_q * shape.seqlen * (shape.seqlen + 1) // 2
    return 2 * (shape.dim_qk + shape.dim_v) * pairs, 2 * (3 * shape.dim_qk + 2 * shape.dim_v) * pairs


def warm(device: torch.device, seconds: float = 0.5) -> None:
    """Brings the clocks up before anything is measured."""
    a = torch.randn((2048, 2048), device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        (a @ a)[0, 0].item()
