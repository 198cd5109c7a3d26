"""The attention operations as citizens of torch: opcheck, torch.compile, autocast, checkpointing, a training step."""

from __future__ import annotations

from typing import Any

import nsa_cuda
import pytest
import torch
from accuracy import run
from cases import Case, named
from inputs import Inputs, make
from nsa_cuda import selected_attention
from range_cases import RangeCase, both
from range_cases import named as range_named
from selection_cases import SelectionCase, select
from selection_cases import make as make_selection
from targets import ONE_EACH, Target
from test_gradients import leaves_of
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
    *both("plain", B=2, Tq=60, Tk=60),
    *both("tensors", B=2, Tq=50, Tk=60, q_offset=(3, -4)),
    *both("strided", B=2, Tq=50, Tk=60, Dk=192, Dv=128, layout="sliced_heads"),
    *[range_named(f"{mask}_packed_padding") for mask in ("window", "compressed")],
]
ONE_CASE_EACH = [c for c in CALLS if c.name.endswith("plain")]
BY_NAME = [pytest.param(c, id=c.name) for c in CALLS]
each_operation = pytest.mark.parametrize("case", [pytest.param(c, id=c.operation) for c in ONE_CASE_EACH])


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

    function = made.function(nsa_cuda)

    def loss(q: Tensor, k: Tensor, v: Tensor, *lists: Tensor) -> Tensor:
        out = function(q * 2.0, k, v + 1.0, *lists, return_lse=True, backend=target.backend, **made.options)
        return (out[0].float() * made.dout.float()).nan_to_num().sum() + out[1].clamp(-10, 10).float().sum()

    return loss


def value_and_grads(function, made: Inputs) -> list[Tensor]:
    leaves = leaves_of(made)
    value = function(*leaves, *made.lists)
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


def branches(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> Tensor:
    """All operations, one after another, as in a layer."""
    sizes = {"kernel_size": 8, "kernel_stride": 4, "seqlen_k": k.shape[1], "backend": backend}
    k_cmp, v_cmp = (x.unfold(1, 8, 4).mean(-1) for x in (k, v))
    o_cmp, lse = nsa_cuda.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **sizes)
    lists = nsa_cuda.select_blocks(q, k_cmp, lse, block_size=16, topk=3, **sizes)
    o_slc = selected_attention(q, k, v, lists, block_size=16, backend=backend)
    o_win = nsa_cuda.sliding_window_attention(q, k, v, window_size=20, backend=backend)
    return (o_cmp + o_slc + o_win).float().square().sum()


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_all_branches(target: Target, dynamic: bool):
    torch._dynamo.reset()
    graphs = 0

    def count(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    compiled = torch.compile(branches, fullgraph=True, dynamic=dynamic, backend=count)
    for T in (60, 75, 130) if dynamic else (60,):
        made = make(RangeCase(f"branches_{T}", B=2, Tq=T, Tk=T), target)
        eager, found = leaves_of(made), leaves_of(made)
        value, compiled_value = branches(*eager, target.backend), compiled(*found, target.backend)
        torch.testing.assert_close(value, compiled_value, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(value, eager), torch.autograd.grad(compiled_value, found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert graphs == 1


@pytest.mark.parametrize("target", ONE_EACH)
def test_opcheck_select_blocks(target: Target):
    for case in (SelectionCase("opcheck", B=2, Tk=203), SelectionCase("opcheck_offsets", B=2, Tk=203, q_offset=(3, -4)),
                 SelectionCase("opcheck_packed", seqlens_q=(30, 40), seqlens_k=(30, 90))):  # fmt: skip
        made, lse = make_selection(case, target)
        with RecordOps() as record:
            select(made, lse, target.backend)
        ((func, args, kwargs),) = [call for call in record.calls if call[0].name() == "nsa_cuda::select_blocks"]
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("target", ONE_EACH)
@each_operation
def test_inductor(target: Target, case: Case):
    """The default compiler, forward and backward."""
    made = make(case, target)
    torch._dynamo.reset()
    compiled = torch.compile(step(target, made), fullgraph=True)
    for a, b in zip(value_and_grads(step(target, made), made), value_and_grads(compiled, made), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("target", ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_operation
def test_autocast(target: Target, case: Case, dtype: torch.dtype):
    """float32 inputs are cast to the autocast dtype; their gradients come back in float32."""
    made = make(case, target)
    made.q, made.k, made.v = (x.float() for x in (made.q, made.k, made.v))
    leaves = leaves_of(made)
    with torch.autocast(target.device, dtype):
        o, lse = made.attend(leaves, target.backend, return_lse=True)
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
@each_operation
def test_activation_checkpointing(target: Target, case: Case, reentrant: bool):
    made = make(case, target)
    function = step(target, made)

    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=reentrant)

    def backward(f) -> list[Tensor]:
        leaves = leaves_of(made)
        value = f(*leaves, *made.lists)
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
@each_operation
def test_saved_tensor_hooks_are_obeyed(target: Target, case: Case):
    """What backward needs goes through autograd's saved tensors, so that offloading works."""
    made = make(case, target)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    plain = run(made, target.backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hooked = run(made, target.backend)
    assert {x.shape for x in packed} >= {made.q.shape, made.k.shape, made.v.shape}
    assert all(torch.equal(plain[n], hooked[n]) for n in plain)
