"""The layer on a GPU: CUDA graphs of a training step, long sequences, bitwise repeatability."""

from __future__ import annotations

import pytest
import torch
from nsa_cuda.nn import NativeSparseAttention
from targets import CUDA_BF16, Target
from torch import Tensor

pytestmark = pytest.mark.gpu


def make(target: Target) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(
        256, 16, 1, head_dim=64, window_size=128, backend=target.backend, device="cuda", dtype=target.dtype
    )


def step(layer: NativeSparseAttention, x: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    return y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("target", CUDA_BF16)
def test_graph_of_a_training_step(target: Target):
    """Captured once, replayed on other hidden states: the same bits as without a graph."""
    layer = make(target)
    x = torch.randn(1, 3000, 256, device="cuda", dtype=target.dtype).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", CUDA_BF16)
def test_same_bits_every_time(target: Target):
    layer = make(target)
    x = torch.randn(1, 8192, 256, device="cuda", dtype=target.dtype).requires_grad_()
    first = step(layer, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(layer, x), strict=True))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_long_sequence(target: Target):
    """At 128K tokens the first rows don't change when the rest follows, and nothing is not finite."""
    layer = make(target)
    x = torch.randn(1, 1 << 17, 256, device="cuda", dtype=target.dtype).requires_grad_()
    results = step(layer, x)
    assert all(torch.isfinite(y).all() for y in results)
    short = layer(x[:, :4096]).float()
    assert ((short - results[0][:, :4096].float()).norm() / short.norm()).item() < 1e-2
