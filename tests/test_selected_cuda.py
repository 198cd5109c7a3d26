"""What only a GPU has: graphs, streams, devices, offsets that the host never reads, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from accuracy import OUTPUTS, check, run
from cases import Case, named
from inputs import Inputs, make
from nsa_cuda import selected_attention
from sampled import long_inputs
from targets import CUDA, CUDA_BF16, Target
from test_selected_properties import assert_same_bits
from torch import Tensor

pytestmark = pytest.mark.gpu
TENSORS = ("q", "k", "v", "block_indices", "dout", "dlse")


def overwrite(made: Inputs, other: Inputs) -> None:
    """other's values into made's memory."""
    for name in TENSORS:
        getattr(made, name).copy_(getattr(other, name))
    for name, x in made.options.items():
        if isinstance(x, Tensor):
            x.copy_(other.options[name])


GRAPHS = {
    "batched": [Case(f"graph_{i}", B=2, Tq=200, Tk=260, Hq=16, Hkv=2, Dk=128, Dv=128, S=4, block_size=32,
                     indices=indices) for i, indices in enumerate(("random", "wild", "sink", "some_empty"))],
    "packed": [Case(f"graph_packed_{i}", seqlens_q=lengths, seqlens_k=lengths, pad_q=300 - sum(lengths),
                    pad_k=300 - sum(lengths), S=4, block_size=16, indices="wild", block_counts="random")
               for i, lengths in enumerate(((100, 150, 50), (1, 0, 299), (0, 0, 0), (20, 30, 40)))],
}  # fmt: skip


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_replays_with_changed_inputs(target: Target, kind: str):
    """Forward and backward captured once; lists, lengths and values may all change between replays."""
    made = [make(case, target) for case in GRAPHS[kind]]
    static = make(GRAPHS[kind][0], target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, target.backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, target.backend)
    for other in made[1:] + made[:1]:
        overwrite(static, other)
        for x in captured.values():
            x.fill_(float("nan"))
        graph.replay()
        assert_same_bits(captured, run(other, target.backend))


@pytest.mark.parametrize("target", CUDA_BF16)
@pytest.mark.parametrize("name", ["d64", "packed_padding", "offset_tensor", "counts_tensor_packed"])
def test_no_host_synchronisation(target: Target, name: str):
    made = make(named(name), target)
    run(made, target.backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(made, target.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("target", CUDA_BF16)
def test_runs_on_the_current_stream(target: Target):
    """Inputs that a slow stream has yet to write are waited for, forward and backward."""
    made = make(named("d128_g16"), target)
    expected = run(made, target.backend)
    late = make(named("d128_g16"), target)
    values = {name: getattr(late, name).clone() for name in TENSORS}
    for name in TENSORS:
        getattr(late, name).zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for name, x in values.items():
            getattr(late, name).copy_(x)
        found = run(late, target.backend)
    side.synchronize()
    assert_same_bits(expected, found)


@pytest.mark.parametrize("target", CUDA_BF16)
def test_second_device(target: Target):
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = make(named("packed_padding"), target)
    expected = run(made, target.backend)
    for name in TENSORS:
        setattr(made, name, getattr(made, name).to("cuda:1"))
    made.options = {n: x.to("cuda:1") if isinstance(x, Tensor) else x for n, x in made.options.items()}
    found = run(made, target.backend)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in found.values())
    assert_same_bits(expected, {n: x.to("cuda:0") for n, x in found.items()})


def repaired(bounds: list[int], total: int) -> list[int]:
    """Running maximum, clamped to [0, total]."""
    out: list[int] = []
    for x in bounds:
        out.append(min(max(x, 0, *out), total))
    return out


BROKEN_OFFSETS = {
    "descending": ([0, 40, 20, 100, 60], [0, 60, 30, 120, 50]),
    "past_the_end": ([0, 40, 500, 501, 502], [0, 60, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
    "negative": ([-7, -3, 30, -50, 100], [-(2**31), 60, 70, 80, 120]),
    "late_start": ([9, 40, 50, 60, 80], [11, 60, 70, 80, 90]),
    "garbage": ([55, -1, 2**31 - 1, 3, -(2**31)], [90, 7, 100, -5, 2**31 - 1]),
}


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", BROKEN_OFFSETS)
def test_offsets_are_repaired(target: Target, name: str, causal: bool):
    case = Case("broken", seqlens_q=(25, 25, 25, 25), seqlens_k=(30, 30, 30, 30), S=6, block_size=16, indices="wild",
                causal=causal)  # fmt: skip
    made = make(case, target)
    bounds_q, bounds_k = BROKEN_OFFSETS[name]
    made.options |= {"cu_seqlens_q": torch.tensor(bounds_q, dtype=torch.int32, device="cuda"),
                     "cu_seqlens_k": torch.tensor(bounds_k, dtype=torch.int32, device="cuda")}  # fmt: skip
    found = run(made, target.backend)
    made.options |= {
        "cu_seqlens_q": torch.tensor(repaired(bounds_q, 100), dtype=torch.int32, device="cuda"),
        "cu_seqlens_k": torch.tensor(repaired(bounds_k, 120), dtype=torch.int32, device="cuda"),
    }
    check(made, target, found)


@pytest.mark.parametrize("target", CUDA_BF16)
def test_debug_checks_read_the_offsets(target: Target):
    import nsa_cuda

    made = make(named("packed"), target)
    made.options["cu_seqlens_q"] = torch.tensor([0, 200, 100, 256], dtype=torch.int32, device="cuda")
    run(made, target.backend)
    with nsa_cuda.debug_checks(), pytest.raises(ValueError, match="cu_seqlens_q"):
        run(made, target.backend)
    run(made, target.backend)


def extra_memory(made: Inputs, target: Target) -> dict[str, int]:
    """Bytes that forward and backward hold at their peaks beyond their inputs and results."""
    leaves = [x.detach().requires_grad_() for x in (made.q, made.k, made.v)]
    gc.collect()  # or what an earlier test left may go in between and be counted
    torch.cuda.synchronize()
    peaks, kept = {}, []
    for phase in ("forward", "backward"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if phase == "forward":
            results = selected_attention(
                *leaves, made.block_indices, return_lse=True, backend=target.backend, **made.options
            )
            kept = list(results)
        else:
            kept += torch.autograd.grad(kept, leaves, [made.dout, made.dlse])
        torch.cuda.synchronize()
        peaks[phase] = torch.cuda.max_memory_allocated() - before
    sizes = [x.numel() * x.element_size() for x in kept]
    return {"forward": peaks["forward"] - sum(sizes[:2]), "backward": peaks["backward"] - sum(sizes[2:])}


@pytest.mark.parametrize("target", CUDA_BF16)
def test_extra_memory_is_linear_in_the_lists(target: Target):
    """Entries E = T * Hkv * S. Forward: the canonical lists and on Hopper the tiles' unions, 22 bytes an entry.
    Backward also: an index of a few words an entry, fp32 partial tiles of 4 * l' * (Dk + Dv) bytes, at most 2 E / C of
    them for chunks of C >= E / 2048 entries, a word per query row and head, and on Hopper 1 GiB for dS and fp32 sums of
    all windows. Nothing is O(T * Tk)."""
    measured = {}
    for T in (16384, 32768):
        case = Case(f"memory_{T}", Tq=T, Tk=T, Hq=64, Hkv=4, Dk=128, Dv=128, S=16)
        made = long_inputs(case, "cuda", target.dtype, seed=1)
        run(made, target.backend)
        measured[T] = extra_memory(made, target)
        entries = T * 4 * 16
        lists = 22 * entries
        delta = 4 * T * 64
        index = 12 * entries
        sums = 2 * 2048 * 4 * 64 * 256
        if target.backend != "sm80":
            sums += (1 << 30) + 4 * T * 4 * 256
        assert measured[T]["forward"] <= lists + (1 << 21), measured
        assert measured[T]["backward"] <= lists + 2 * delta + index + sums + (1 << 22), measured
    assert measured[32768]["backward"] <= 2.2 * measured[16384]["backward"] + (1 << 22), measured


# dS of 256 query rows fills what it may take, so that these few rows need several windows: with tiles that end where
# windows do, and with tiles that lie over their borders.
WINDOWS = [
    Case("windows", Tq=700, Tk=900, Hq=64, Hkv=4, Dk=128, Dv=128, S=512, indices="wild", block_counts="random"),
    Case("windows_full", Tq=900, Tk=700, Hq=40, Hkv=2, S=256, block_size=128, causal=False, indices="some_empty"),
    Case("windows_d256", Tq=600, Tk=600, Hq=32, Hkv=4, Dk=256, Dv=256, S=1024, indices="wild", block_counts="random"),
    Case("windows_d192", Tq=600, Tk=600, Hq=64, Hkv=4, Dk=192, Dv=128, S=512, indices="wild", block_counts="random"),
    Case("windows_batched", B=3, Tq=233, Tk=300, Hq=32, Hkv=32, S=512, indices="wild", block_counts="random"),
    Case("windows_packed", seqlens_q=(100, 301, 0, 290), seqlens_k=(130, 301, 7, 400), pad_q=20, pad_k=30, Hq=48,
         Hkv=16, Dk=128, Dv=128, S=512, indices="wild", block_counts="random", nan_outside=True),
    Case("windows_packed_g64", seqlens_q=(1, 430, 260), seqlens_k=(90, 500, 260), Hq=64, Hkv=1, Dk=128, Dv=128,
         S=512, indices="wild", block_counts="random"),
]  # fmt: skip


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in WINDOWS])
def test_backward_in_windows(target: Target, case: Case):
    """Also the gradients of q alone and of k and v alone are the same."""
    made = make(case, target)
    found = run(made, target.backend)
    check(made, target, found)
    assert_same_bits(found, run(made, target.backend))
    leaves = [x.detach().requires_grad_() for x in (made.q, made.k, made.v)]
    results = made.attend(leaves, target.backend, return_lse=True)
    alone = torch.autograd.grad(results, leaves[:1], [made.dout, made.dlse], retain_graph=True)
    assert_same_bits({"dq": alone[0]}, {"dq": found["dq"]})
    keys = torch.autograd.grad(results, leaves[1:], [made.dout, made.dlse])
    if target.backend == "sm80":
        assert_same_bits(dict(zip(("dk", "dv"), keys, strict=True)), {name: found[name] for name in ("dk", "dv")})
    else:  # at once, not in windows
        check(made, target, found | dict(zip(("dk", "dv"), keys, strict=True)))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_long_backward_repeats(target: Target):
    """Gathered rows miss the L2 here and arrive out of order, as they don't in small calls: a stage taken before it had
    landed showed at 64K tokens alone."""
    T = 49152
    made = long_inputs(Case("repeats", Tq=T, Tk=T, Hq=64, Hkv=4, Dk=128, Dv=128, S=16), "cuda", target.dtype, seed=2)
    first = run(made, target.backend)
    for _ in range(15):
        again = run(made, target.backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("target", CUDA)
def test_default_backend_is_one_of_the_kernels(target: Target):
    """backend=None picks a kernel family by itself and gives its result."""
    made = make(named("d128_g16"), target)
    found = run(made, None)
    check(made, target, found)
    assert set(found) == set(OUTPUTS)
