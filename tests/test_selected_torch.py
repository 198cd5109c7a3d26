"""selected_attention as a citizen of torch: opcheck, torch.compile, autocast, checkpointing, a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import run
from cases import Case, named
from inputs import Inputs, make
from nsa_cuda import selected_attention
from targets import ONE_EACH, Target
from test_selected_gradients import leaves_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

CALLS = [
    Case("plain", B=2, Tq=60, Tk=60, Hq=4, Hkv=2, S=3, block_size=16),
    Case("plain_no_lse", B=2, Tq=60, Tk=60, Hq=4, Hkv=2, S=3, block_size=16, lse=False),
    Case("tensors", B=2, Tq=50, Tk=60, Hq=4, Hkv=2, S=3, block_size=16, block_counts="random", q_offset=(3, -4)),
    Case(
        "strided", B=2, Tq=50, Tk=60, Hq=4, Hkv=2, Dk=192, Dv=128, S=3, block_size=16, layout="sliced_heads", int64=True
    ),
    named("packed_padding"),
]
BY_NAME = [pytest.param(c, id=c.name) for c in CALLS]


class RecordOps(TorchDispatchMode):
    """Keeps the calls of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa_cuda":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("case", BY_NAME)
def test_opcheck(target: Target, case: Case):
    """The schemas, fake implementations and aliasing of the operators that a forward and a backward go through."""
    made = make(case, target)
    with RecordOps() as record:
        run(made, target.backend)
    assert len(record.calls) >= 2, "forward and backward are operators of namespace nsa_cuda"
    for func, args, kwargs in record.calls:
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def step(target: Target, made: Inputs):
    """A function with work before and after the operation, returning the loss."""

    def loss(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
        out = selected_attention(
            q * 2.0, k, v + 1.0, block_indices, return_lse=True, backend=target.backend, **made.options
        )
        return (out[0].float() * made.dout.float()).nan_to_num().sum() + out[1].clamp(-10, 10).float().sum()

    return loss


def value_and_grads(function, made: Inputs) -> list[Tensor]:
    leaves = leaves_of(made)
    value = function(*leaves, made.block_indices)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("case", BY_NAME)
def test_compile_without_graph_breaks(target: Target, case: Case):
    made = make(case, target)
    torch._dynamo.reset()
    compiled = torch.compile(step(target, made), fullgraph=True, backend="aot_eager")
    eager = value_and_grads(step(target, made), made)
    for a, b in zip(eager, value_and_grads(compiled, made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ONE_EACH)
def test_compile_with_dynamic_shapes(target: Target):
    """One compiled graph serves several lengths."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    def loss(q, k, v, block_indices):
        return selected_attention(q, k, v, block_indices, block_size=16, backend=target.backend).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for T in (60, 75, 130):
        made = make(Case(f"dynamic_{T}", B=2, Tq=T, Tk=T, Hq=4, Hkv=2, S=3, block_size=16), target)
        for a, b in zip(value_and_grads(loss, made), value_and_grads(compiled, made), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert graphs == 1


@pytest.mark.parametrize("target", ONE_EACH)
def test_inductor(target: Target):
    """The default compiler, forward and backward."""
    made = make(CALLS[0], target)
    torch._dynamo.reset()
    compiled = torch.compile(step(target, made), fullgraph=True)
    for a, b in zip(value_and_grads(step(target, made), made), value_and_grads(compiled, made), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(target: Target, dtype: torch.dtype):
    """float32 inputs are cast to the autocast dtype; their gradients come back in float32."""
    made = make(CALLS[0], target)
    made.q, made.k, made.v = (x.float() for x in (made.q, made.k, made.v))
    leaves = leaves_of(made)
    with torch.autocast(target.device, dtype):
        o, lse = selected_attention(
            *leaves, made.block_indices, return_lse=True, backend=target.backend, **made.options
        )
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    grads = torch.autograd.grad([o, lse], leaves, [made.dout.to(dtype), made.dlse.float()])
    assert all(g.dtype == torch.float32 for g in grads)
    cast = Inputs(**{**vars(made), "q": made.q.to(dtype), "k": made.k.to(dtype), "v": made.v.to(dtype),
                     "dout": made.dout.to(dtype), "dlse": made.dlse.float()})  # fmt: skip
    by_hand = run(cast, target.backend)
    assert torch.equal(o, by_hand["o"])
    assert torch.equal(lse, by_hand["lse"])
    for g, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(g, by_hand[name].float())


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_activation_checkpointing(target: Target, reentrant: bool):
    made = make(CALLS[0], target)
    function = step(target, made)

    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=reentrant)

    def backward(f) -> list[Tensor]:
        leaves = leaves_of(made)
        value = f(*leaves, made.block_indices)
        value.backward()
        return [value.detach(), *[x.grad for x in leaves]]

    assert all(torch.equal(a, b) for a, b in zip(backward(function), backward(checkpointed), strict=True))


class Recall(nn.Module):
    """One attention layer that must copy values from the block that the list names."""

    def __init__(self, dim: int, heads: int, kv_heads: int, backend: str | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.backend = heads, kv_heads, 64, backend
        self.q = nn.Linear(dim, heads * 64)
        self.kv = nn.Linear(dim, 2 * kv_heads * 64)
        self.out = nn.Linear(heads * 64, dim)

    def forward(self, x: Tensor, block_indices: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, 64)
        k, v = self.kv(x).view(B, T, 2, self.kv_heads, 64).unbind(2)
        o = selected_attention(q, k, v, block_indices, block_size=16, backend=self.backend)
        return self.out(o.flatten(2))


@pytest.mark.parametrize("target", ONE_EACH)
def test_training_decreases_the_loss(target: Target):
    torch.manual_seed(0)
    layer = Recall(32, heads=4, kv_heads=2, backend=target.backend).to(target.device, target.dtype)
    x = torch.randn(2, 64, 32).to(target.device, target.dtype)
    goal = x.roll(1, 1)
    lists = torch.arange(4, dtype=torch.int32, device=target.device).expand(2, 64, 2, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x, lists) - goal).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("target", ONE_EACH)
def test_saved_tensor_hooks_are_obeyed(target: Target):
    """What backward needs goes through autograd's saved tensors, so that offloading works."""
    made = make(CALLS[0], target)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    plain = run(made, target.backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hooked = run(made, target.backend)
    assert {x.shape for x in packed} >= {made.q.shape, made.k.shape, made.v.shape}
    assert all(torch.equal(plain[n], hooked[n]) for n in plain)
