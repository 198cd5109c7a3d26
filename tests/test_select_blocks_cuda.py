"""select_blocks where only a GPU goes: long sequences on sampled rows, scores that keep rising, budgets beyond the
registers, memory, graphs."""

from __future__ import annotations

import math

import nsa_cuda
import pytest
import torch
from nsa_cuda.reference.selection import block_scores
from selection_cases import PAPER, SelectionCase, row_failure, select
from selection_cases import make as make_selection
from targets import CUDA, CUDA_BF16, Target
from test_selected_scale import need_memory, sample
from torch import Tensor

pytestmark = pytest.mark.gpu


def long_inputs(case: SelectionCase, target: Target, rising: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cmp and lse of one sequence. rising: later keys score higher, so that every block enters the list."""
    gen = torch.Generator(target.device).manual_seed(case.Tq)
    number = (case.Tk - case.kernel_size) // case.kernel_stride + 1

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device=target.device, dtype=torch.float32)

    q, k = randn(1, case.Tq, case.Hq, case.Dk), randn(1, number, case.Hkv, case.Dk)
    if rising:
        q, k = q.abs(), 0.01 * k + torch.linspace(0, 0.3, number, device=target.device)[None, :, None, None]
    q, k = q.to(target.dtype), k.to(target.dtype)
    v = torch.zeros((1, number, case.Hkv, case.Dv), device=target.device, dtype=target.dtype)
    _, lse = nsa_cuda.compressed_attention(
        q, k, v, kernel_size=case.kernel_size, kernel_stride=case.kernel_stride, seqlen_k=case.Tk, return_lse=True
    )
    return q, k, lse


def run(case: SelectionCase, q: Tensor, k: Tensor, lse: Tensor, backend: str | None) -> Tensor:
    return nsa_cuda.select_blocks(
        q, k, lse, kernel_size=case.kernel_size, kernel_stride=case.kernel_stride, block_size=case.block_size,
        topk=case.topk, init_blocks=case.init_blocks, local_blocks=case.local_blocks, seqlen_k=case.Tk, backend=backend,
    )  # fmt: skip


def wrong_rows(case: SelectionCase, q: Tensor, k: Tensor, lse: Tensor, ids: Tensor, rows: Tensor) -> list[str]:
    """The sampled rows against float64, by the rule of selection_cases."""
    group = case.Hq // case.Hkv
    number = -(-case.Tk // case.block_size)
    lines = []
    for row in rows.tolist():
        p = row + case.Tk - case.Tq
        seen = torch.arange(k.shape[1], device=k.device) * case.kernel_stride + case.kernel_size - 1 <= p
        for h in range(case.Hkv):
            heads = slice(h * group, (h + 1) * group)
            s = q[0, row, heads].double() @ k[0, :, h].double().T / math.sqrt(case.Dk)
            mass = (s - lse[0, row, heads, None].double()).exp().masked_fill(~seen, 0.0)
            mass = mass.masked_fill(lse[0, row, heads, None] == -math.inf, 0.0).sum(0)
            scores = block_scores(mass, number, case.kernel_size, case.kernel_stride, case.block_size)
            slack = torch.finfo(torch.float32).eps * (64 + 16 * float(s.abs().max()))
            found = row_failure(case, ids[0, row, h].tolist(), scores.tolist(), p, slack)
            lines += [f"row {row}, kv head {h}: {found}"] if found else []
    return lines


LONG = [
    SelectionCase("paper_64k", Tq=65536, Tk=65536, Hq=64, Hkv=4, Dk=192, Dv=128, topk=16, **PAPER),
    SelectionCase("d128_64k", Tq=65536, Tk=65536, Hq=64, Hkv=4, Dk=128, Dv=128, topk=16, **PAPER),
    SelectionCase("g4_topk64", Tq=20000, Tk=20011, Hq=8, Hkv=2, topk=64, **PAPER),
    SelectionCase("g1_topk200", Tq=9000, Tk=30000, Hq=2, Hkv=2, topk=200, **PAPER),
    SelectionCase("g1_topk40", Tq=9000, Tk=30000, Hq=2, Hkv=2, topk=40, **PAPER),
    SelectionCase("g80", Tq=2000, Tk=20000, Hq=80, Hkv=1, topk=9, **PAPER),
    SelectionCase("other_pooling", Tq=9000, Tk=20000, Hq=16, Hkv=1, topk=70, kernel_size=64, block_size=32,
                  kernel_stride=16),
    SelectionCase("one_key_a_block", Tq=9000, Tk=20000, Hq=16, Hkv=1, topk=8, kernel_size=512, block_size=16,
                  kernel_stride=16),
    SelectionCase("one_block_many_keys", Tq=5000, Tk=20000, Hq=4, Hkv=1, topk=6, kernel_size=4, block_size=512,
                  kernel_stride=2),
]  # fmt: skip


@pytest.mark.parametrize("target", CUDA_BF16)
@pytest.mark.parametrize("rising", [False, True], ids=["random", "rising"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in LONG])
def test_long_sequences(target: Target, case: SelectionCase, rising: bool):
    need_memory(target, 8)
    made = long_inputs(case, target, rising)
    ids = run(case, *made, target.backend)
    lines = wrong_rows(case, *made, ids, sample(case.Tq, target.device, 24))
    assert not lines, "\n".join(lines)
    assert torch.equal(ids, run(case, *made, target.backend))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_a_million_tokens(target: Target):
    need_memory(target, 8)
    case = SelectionCase("1m", Tq=2**20, Tk=2**20, Hq=16, Hkv=1, Dk=64, Dv=64, topk=16, **PAPER)
    made = long_inputs(case, target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = run(case, *made, target.backend)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - ids.numel() * 4
    assert extra < 1 << 20, "nothing grows with the length but the result"
    lines = wrong_rows(case, *made, ids, sample(case.Tq, target.device, 8))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("target", CUDA)
def test_graph_replays_with_changed_offsets(target: Target):
    """Captured once, without a host synchronisation; lengths and values may change between replays."""
    cases = [
        SelectionCase(f"graph_{i}", seqlens_q=lengths, seqlens_k=lengths, pad_q=400 - sum(lengths),
                      pad_k=400 - sum(lengths), Hq=16, Hkv=1)
        for i, lengths in enumerate(((100, 250, 50), (1, 0, 399), (0, 0, 0), (130, 30, 140)))
    ]  # fmt: skip
    made = [make_selection(case, target) for case in cases]
    rows = max(inputs.k.shape[0] for inputs, _ in made)
    for inputs, _ in made:
        inputs.k = torch.nn.functional.pad(inputs.k, (0, 0, 0, 0, 0, rows - inputs.k.shape[0]))
    static, static_lse = make_selection(cases[0], target)
    static.k = torch.nn.functional.pad(static.k, (0, 0, 0, 0, 0, rows - static.k.shape[0]))
    select(static, static_lse, target.backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select(static, static_lse, target.backend)
    for other, lse in made[1:] + made[:1]:
        static.q.copy_(other.q)
        static.k.copy_(other.k)
        static_lse.copy_(lse)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            static.options[name].copy_(other.options[name])
        captured.fill_(-7)
        graph.replay()
        assert torch.equal(captured, select(other, lse, target.backend))
