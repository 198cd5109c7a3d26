"""nsa_cuda.nn's compressions, which sum over segments, against nsa_cuda.reference, which cuts out every window."""

from __future__ import annotations

import math

import pytest
import torch
from nsa_cuda import nn, reference
from torch import Tensor

HKV, DIM = 3, 8
SIZES = [(32, 16), (8, 8), (12, 4)]  # l, d
MODULES = [nn.MeanCompression, nn.WeightedCompression, nn.LinearCompression, nn.MLPCompression]

SIZE = pytest.mark.parametrize(("l", "d"), SIZES)
MODULE = pytest.mark.parametrize("module", MODULES)


def make(module: type[torch.nn.Module], l: int, d: int, position: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"kernel_size": l, "kernel_stride": d, "position_embedding": position, "dtype": torch.float64}
    made = module(HKV, DIM, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def by_windows(made: torch.nn.Module, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    options = {"kernel_stride": made.kernel_stride, "cu_seqlens": cu_seqlens, "position": made.position}
    if isinstance(made, nn.WeightedCompression):
        return reference.compress_weighted(x, made.weight, **options)
    options["kernel_size"] = made.kernel_size
    if isinstance(made, nn.MeanCompression):
        return reference.compress_mean(x, **options)
    if isinstance(made, nn.LinearCompression):
        return reference.compress_linear(x, made.linear.weight, made.linear.bias, **options)
    return reference.compress_mlp(x, made.linear.weight, made.linear.bias, made.weight2, made.bias2, **options)


def compare(made: torch.nn.Module, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
    """Values, and gradients of the input and of every parameter."""
    leaves = [x.requires_grad_(), *made.parameters()]
    found, expected = made(x, cu_seqlens), by_windows(made, x, cu_seqlens)
    torch.testing.assert_close(found, expected)
    if found.numel():
        weight = torch.randn_like(found)
        pairs = (torch.autograd.grad(y, leaves, weight, materialize_grads=True) for y in (found, expected))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@SIZE
@MODULE
@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("length", [0, 5, 31, 32, 47, 100])
def test_batched(module: type[torch.nn.Module], l: int, d: int, position: bool, length: int):
    made = make(module, l, d, position)
    compare(made, torch.randn(2, length, HKV, DIM, dtype=torch.float64))
    permuted = torch.randn(2, HKV, length, DIM, dtype=torch.float64).transpose(1, 2)
    compare(made, permuted)


@SIZE
@MODULE
@pytest.mark.parametrize("lengths", [(50, 0, 7, 40), (1, 100), (), (0, 0), (33,)])
@pytest.mark.parametrize("first", [0, 5])
def test_packed(module: type[torch.nn.Module], l: int, d: int, lengths: tuple[int, ...], first: int):
    """Rows outside the sequences hold NaN, which reaches no value and no gradient."""
    offsets = (torch.tensor([0, *lengths]).cumsum(0) + first).int()
    x = torch.randn(int(offsets[-1]) + 9, HKV, DIM, dtype=torch.float64)
    x[:first], x[int(offsets[-1]) :] = math.nan, math.nan
    made = make(module, l, d)
    compare(made, x, offsets)
    out = made(x, offsets)
    assert out.shape == (len(x) // d, HKV, DIM)
    assert (out[int(reference.compressed_cu_seqlens(offsets, l, d)[-1]) :] == 0).all()


@MODULE
def test_starting_values_and_shapes(module: type[torch.nn.Module]):
    made = module(HKV, DIM, position_embedding=True)
    out = made(torch.randn(2, 100, HKV, DIM))
    assert out.shape == (2, 5, HKV, DIM)
    assert (made.position == 0).all()
    if module in (nn.MeanCompression, nn.WeightedCompression):
        constant = made(torch.full((1, 64, HKV, DIM), 0.5))
        torch.testing.assert_close(constant, torch.full_like(constant, 0.5))


def test_other_sizes_of_the_output():
    x = torch.randn(2, 64, HKV, DIM)
    assert nn.LinearCompression(HKV, DIM, out_dim=5, bias=False)(x).shape == (2, 3, HKV, 5)
    assert nn.MLPCompression(HKV, DIM, hidden_dim=11, out_dim=5, bias=False)(x).shape == (2, 3, HKV, 5)


@MODULE
def test_half_types(module: type[torch.nn.Module]):
    made = make(module, 32, 16).float()
    for parameter in made.parameters():
        parameter.data.mul_(0.1)
    x = torch.randn(2, 100, HKV, DIM)
    expected = by_windows(made, x)
    found = made.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert error.item() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert made.float()(x).isfinite().all()


@MODULE
def test_compiles_without_graph_breaks(module: type[torch.nn.Module]):
    made = make(module, 8, 4)
    x = torch.randn(100, HKV, DIM, dtype=torch.float64)
    offsets = torch.tensor([0, 30, 70], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, offsets), made(x, offsets))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"kernel_stride": 5}, ValueError, "kernel_stride: must divide kernel_size = 32, was 5"),
        ({"kernel_stride": 0}, ValueError, "kernel_stride: must be at least 1, was 0"),
        ({"kernel_size": 8.0}, TypeError, "kernel_size: must be an int, was 8.0"),
    ],
)
def test_refused_sizes(change: dict, exception: type[Exception], message: str):
    with pytest.raises(exception, match=message):
        nn.MeanCompression(HKV, DIM, **change)


def test_refused_inputs():
    made = nn.MeanCompression(HKV, DIM)
    with pytest.raises(ValueError, match=r"x: must have 4 dims, \[B, T, Hkv, D\] without cu_seqlens; had 3"):
        made(torch.zeros(9, HKV, DIM))
    with pytest.raises(ValueError, match="x: Hkv and D must be 3 and 8, were 2 and 8"):
        made(torch.zeros(1, 9, 2, DIM))
    with pytest.raises(TypeError, match=r"cu_seqlens: dtype must be int32, was torch\.int64"):
        made(torch.zeros(9, HKV, DIM), torch.tensor([0, 9]))


@MODULE
@pytest.mark.parametrize("packed", [False, True])
def test_the_backward_keeps_each_token_once(module: type[torch.nn.Module], packed: bool):
    """A window shares all but d tokens with the next: keeping windows would keep l / d = 4 copies."""
    T, l, d = 4096, 32, 8
    made = module(HKV, DIM, kernel_size=l, kernel_stride=d, position_embedding=True)
    x = torch.randn(*(() if packed else (1,)), T, HKV, DIM, requires_grad=True)
    offsets = torch.tensor([0, 1000, 1010, T - 5], dtype=torch.int32) if packed else None
    sizes: dict[int, int] = {}

    def pack(y: Tensor) -> Tensor:
        # What has the size of a token's share of a tensor, not of a weight's.
        if y.numel() >= T // d and not isinstance(y, torch.nn.Parameter):
            sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        keep = made(x * 1.0, offsets)
    del keep
    tokens, row = 4 * x.numel(), 4 * HKV * DIM * (T // d)
    weights = 4 * sum(p.numel() for p in made.parameters())
    hidden = 2 * 4 * row if module is nn.MLPCompression else 0  # before and after GELU, 4 D units a row
    positions = 8 * T + 40 * (T // d) if packed else 0  # where a segment's tokens are
    assert sum(sizes.values()) <= tokens + hidden + positions + 2 * weights
