"""What must hold whatever the kernel: identities of attention and of the list being a set."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import OUTPUTS, baseline, check, failures, oracle, run
from cases import Case, named, on_every_target
from inputs import Inputs, generator, make
from nsa_cuda import selected_attention
from targets import ALL, CPU, CUDA_BF16, ONE_EACH, Target
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DENSE = [
    Case("mha", B=2, Tq=130, Tk=130, Hq=2, Hkv=2, S=3, indices="all"),
    Case("gqa", B=2, Tq=130, Tk=130, Hq=8, Hkv=2, S=3, indices="all"),
    Case("mqa_d128", Tq=130, Tk=130, Hq=16, Hkv=1, Dk=128, Dv=128, S=3, indices="all"),
    Case("d192_128", Tq=130, Tk=130, Hq=4, Hkv=1, Dk=192, Dv=128, S=9, block_size=16, indices="all"),
    Case("d256", Tq=130, Tk=130, Hq=4, Hkv=1, Dk=256, Dv=256, S=3, indices="all"),
    Case("tail", Tq=50, Tk=200, Hq=4, Hkv=2, S=7, block_size=32, indices="all"),
]
DENSE += [replace(c, name=c.name + "_noncausal", causal=False) for c in DENSE]


def dense(made: Inputs) -> dict[str, Tensor]:
    """torch's dense attention in float64, kv heads repeated, the causal mask aligned to the end of the keys."""
    leaves = [x.detach().double().requires_grad_() for x in (made.q, made.k, made.v)]
    G = made.q.shape[2] // made.k.shape[2]
    q, k, v = leaves[0], leaves[1].repeat_interleave(G, 2), leaves[2].repeat_interleave(G, 2)
    tq, tk = q.shape[1], k.shape[1]
    mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device)
    if made.case.causal:
        mask = mask.tril(tk - tq)
    o = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    s = torch.einsum("bqhd,bkhd->bqhk", q, k) / math.sqrt(q.shape[-1])
    lse = s.masked_fill(~mask[None, :, None, :], -math.inf).logsumexp(-1)
    grads = torch.autograd.grad([o, lse], leaves, [made.dout.double(), made.dlse.double()])
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize(("target", "case"), on_every_target(DENSE))
def test_all_blocks_is_dense_attention(target: Target, case: Case):
    made = make(case, target)
    lines = failures(made, run(made, target.backend), dense(made), baseline(made), target.dtype)
    assert not lines, "\n".join(lines)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], names: tuple[str, ...] = OUTPUTS) -> None:
    for name in names:
        if name in a or name in b:
            assert torch.equal(a[name].nan_to_num(), b[name].nan_to_num()), name
            assert not a[name].isnan().any(), name


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_order_of_the_list_does_not_matter(target: Target, causal: bool):
    case = Case("order", B=2, Tq=150, Tk=200, Hq=8, Hkv=2, S=6, block_size=16, causal=causal)
    made = make(case, target)
    first = run(made, target.backend)
    order = torch.rand(made.block_indices.shape, generator=generator("order")).argsort(-1)
    made.block_indices = made.block_indices.gather(-1, order.to(made.q.device))
    assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_duplicates_and_invalid_entries_do_not_matter(target: Target):
    made = make(Case("set", B=2, Tq=150, Tk=200, Hq=8, Hkv=2, S=5, block_size=16), target)
    first = run(made, target.backend)
    entries = made.block_indices
    junk = torch.full_like(entries, 2**31 - 1)
    made.block_indices = torch.cat([junk, entries, entries.flip(-1), junk.neg()], -1)
    assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_int64_lists_equal_int32_lists(target: Target):
    made = make(named("wild"), target)
    first = run(made, target.backend)
    made.block_indices = made.block_indices.long()
    assert_same_bits(first, run(made, target.backend))


# Views of the same lists: CUDA reads four entries at a time where they lie on 16 bytes.
LIST_VIEWS = {
    "padded": lambda lists: torch.cat([lists, lists], -1)[..., : lists.shape[-1]],
    "one_off": lambda lists: torch.cat([lists[..., :1], lists, lists[..., :3]], -1)[..., 1:-3],
    "every_second": lambda lists: lists.repeat_interleave(2, -1)[..., ::2],
    "heads_first": lambda lists: lists.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("S", [6, 16, 24, 40])
@pytest.mark.parametrize("int64", [False, True], ids=["int32", "int64"])
def test_views_of_lists(target: Target, S: int, int64: bool):
    """Some lists come in ascending order, as most do, and some don't."""
    made = make(Case("views", B=2, Tq=90, Tk=900, Hq=4, Hkv=2, S=S, block_size=16, block_counts="random"), target)
    lists = made.block_indices.long() if int64 else made.block_indices
    lists = torch.cat([lists[:, :50].sort(-1).values, lists[:, 50:]], 1)
    made.block_indices = lists
    first = run(made, target.backend)
    for name, view in LIST_VIEWS.items():
        made.block_indices = view(lists)
        assert torch.equal(made.block_indices, lists), name
        assert_same_bits(first, run(made, target.backend))


NEW_PROCESS = """
import torch
from nsa_cuda import selected_attention

device, dtype = "{device}", torch.{dtype}
torch.manual_seed(0)
q, k, v, dout = (torch.randn(7, 3840, 1, 64, device=device, dtype=dtype) for _ in range(4))
lists = torch.randint(0, 240, (7, 3840, 1, 16), device=device, dtype=torch.int32)
lists[..., 0] = 0
leaves = [x.requires_grad_() for x in (q, k, v)]
o = selected_attention(*leaves, lists, block_size=16, backend={backend!r})
dk, dv = torch.autograd.grad(o, leaves[1:], dout)
assert dk.isfinite().all()
# probabilities add up to 1
torch.testing.assert_close(dv.double().sum(1), dout.double().sum(1), rtol=1e-2, atol=1.0)
"""


@pytest.mark.parametrize("target", [*CPU[:1], *CUDA_BF16])
def test_first_backward_of_a_process(target: Target):
    """With 1680 blocks the inverted index needs almost the 48 KB of shared memory that a kernel has without asking for
    more. What an earlier call of the process asked for would hide that nobody did."""
    dtype = str(target.dtype).removeprefix("torch.")
    code = NEW_PROCESS.format(device=target.device, dtype=dtype, backend=target.backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ALL)
def test_counts_equal_a_shorter_list(target: Target):
    made = make(replace(named("count_2"), lse=True), target)
    first = run(made, target.backend)
    del made.options["block_counts"]
    made.block_indices = made.block_indices[..., :2]
    assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_hints_do_not_matter(target: Target):
    made = make(named("packed_hints_small"), target)
    first = run(made, target.backend)
    for hints in ({}, {"max_seqlen_q": 10**9, "max_seqlen_k": 1}, {"max_seqlen_q": 90}, {"max_seqlen_k": 64}):
        made.hints = hints
        assert_same_bits(first, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
def test_packed_equals_batched(target: Target):
    """Equal lengths packed one after another are the same computation."""
    made = make(Case("packing", B=3, Tq=70, Tk=90, Hq=8, Hkv=2, S=3, block_size=32), target)
    batched = run(made, target.backend)
    for name in ("q", "k", "v", "block_indices", "dout", "dlse"):
        setattr(made, name, getattr(made, name).flatten(0, 1))
    bounds = torch.arange(4, dtype=torch.int32, device=made.q.device)
    made.options |= {"cu_seqlens_q": bounds * 70, "cu_seqlens_k": bounds * 90}
    packed = run(made, target.backend)
    check(made, target, packed)
    for name in OUTPUTS:
        torch.testing.assert_close(packed[name], batched[name].flatten(0, 1), rtol=0.02, atol=0.02, msg=name)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("value", [1e4, math.nan, math.inf], ids=["large", "nan", "inf"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("tokens", [5, 37])
def test_another_sequence_does_not_matter(target: Target, value: float, causal: bool, tokens: int):
    """Nothing crosses a sequence: what the second holds never shows in the first, whose last block reaches into it.
    5 tokens share a tile of 12 units of 16 rows with the second sequence, the last of 37 one of 8 units."""
    case = Case("neighbours", seqlens_q=(tokens, 60), seqlens_k=(70, 60), Hq=8, Hkv=2, S=3, causal=causal)
    made = make(case, target)
    first = run(made, target.backend)
    for x, start in ((made.q, tokens), (made.k, 70), (made.v, 70), (made.dout, tokens)):
        x[start + 5 :: 11] = value
    second = run(made, target.backend)
    rows = {"o": tokens, "lse": tokens, "dq": tokens, "dk": 70, "dv": 70}
    assert_same_bits({n: x[: rows[n]] for n, x in first.items()}, {n: x[: rows[n]] for n, x in second.items()})
    assert not torch.equal(first["o"][tokens:], second["o"][tokens:])


@pytest.mark.parametrize("target", ALL)
def test_non_finite_inputs_reach_their_own_row(target: Target):
    """A NaN in q makes its own row NaN. It may spread over its query tile; it never hides, and never crashes."""
    made = make(Case("nan_row", B=2, Tq=90, Tk=90, Hq=8, Hkv=2, S=3, block_size=32), target)
    made.q[1, 50, 3, 7] = math.nan
    found = run(made, target.backend)
    for name in ("o", "lse", "dq"):
        assert found[name][1, 50, 3].isnan().all(), name
        assert not found[name][0].isnan().any(), name


@pytest.mark.parametrize("target", ALL)
def test_constant_values_come_back(target: Target):
    made = make(Case("ones", B=2, Tq=150, Tk=200, Hq=8, Hkv=2, S=5, block_size=32, magnitude=2.0), target)
    o = selected_attention(
        made.q, made.k, torch.ones_like(made.v), made.block_indices, block_size=32, backend=target.backend
    )
    # p is rounded to the dtype before the product, so the weights sum to 1 within one rounding; then o is rounded.
    assert (o.double() - 1.0).abs().max() <= max(
        2 * torch.finfo(target.dtype).eps, 64 * torch.finfo(target.lse_dtype).eps
    )


def lse_of(made: Inputs, target: Target, **changes: object) -> tuple[Tensor, Tensor]:
    arguments = {"q": made.q, "k": made.k, "v": made.v} | {n: x for n, x in changes.items() if n in ("q", "k", "v")}
    options = made.options | {n: x for n, x in changes.items() if n not in ("q", "k", "v")}
    return selected_attention(
        *arguments.values(), made.block_indices, return_lse=True, backend=target.backend, **options
    )


@pytest.mark.parametrize("target", ALL)
def test_scaling_q_is_scaling_the_scores(target: Target):
    made = make(Case("scaled", Tq=150, Tk=200, Hq=8, Hkv=2, S=5, block_size=32, softmax_scale=0.125), target)
    o, lse = lse_of(made, target)
    for changes in ({"q": made.q * 4.0}, {"k": made.k * 4.0}):
        o_4, lse_4 = lse_of(made, target, softmax_scale=0.03125, **changes)
        assert torch.equal(o, o_4)  # powers of two: exact
        assert torch.equal(lse, lse_4)


@pytest.mark.parametrize("target", ALL)
def test_shifting_the_keys_shifts_lse(target: Target):
    """k + a adds scale * q.a to every score of a row: lse moves by it, o does not. Quarters are exact."""
    gen = generator("shift")
    made = make(Case("shift", Tq=150, Tk=200, Hq=8, Hkv=2, S=5, block_size=32, softmax_scale=0.125), target)
    quarters = [torch.randint(-8, 9, x.shape, generator=gen) / 4.0 for x in (made.q, made.k, made.k[:, :1])]
    made.q, made.k, a = (x.to(made.q.device, target.dtype) for x in quarters)
    o, lse = lse_of(made, target)
    o_shifted, lse_shifted = lse_of(made, target, k=made.k + a)
    moved = 0.125 * torch.einsum(
        "bthd,bthd->bth", made.q.double(), a.double().repeat_interleave(4, 2).expand_as(made.q)
    )
    eps = torch.finfo(target.lse_dtype).eps
    torch.testing.assert_close(lse_shifted.double(), lse.double() + moved, rtol=16 * eps, atol=64 * eps)
    slack = max(4 * torch.finfo(target.dtype).eps, 256 * eps)
    torch.testing.assert_close(o_shifted.double(), o.double(), rtol=slack, atol=slack)


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One attention over disjoint sets of keys, from the attention over each: weights exp(lse_i - lse)."""
    lses = torch.stack([lse for _, lse in parts])
    whole = lses.logsumexp(0)
    weights = (lses - whole).exp()
    return sum(w[..., None] * o.to(lses.dtype) for w, (o, _) in zip(weights, parts, strict=True)), whole


@pytest.mark.parametrize("target", ALL)
def test_halves_of_the_keys_merge(target: Target):
    """The returned lse merges results, and its gradient goes through the merge: everything equals the whole's."""
    case = Case("halves", B=2, Tq=100, Tk=256, Hq=8, Hkv=2, S=8, block_size=32, indices="all", causal=False)
    made = make(case, target)
    leaves = [x.detach().requires_grad_() for x in (made.q, made.k, made.v)]
    q, k, v = leaves
    parts = []
    for keys in (slice(0, 96), slice(96, 256)):
        parts.append(
            selected_attention(q, k[:, keys], v[:, keys], made.block_indices, block_size=32, causal=False,
                               return_lse=True, backend=target.backend)
        )  # fmt: skip
    o, lse = merged(parts)
    grads = torch.autograd.grad([o, lse], leaves, [made.dout.to(o.dtype), made.dlse])
    found = {"o": o.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    ref = oracle(made)
    # Each half is rounded on its own and the gradient passes through o of the halves: a few roundings more.
    slack = max(4 * torch.finfo(target.dtype).eps, 16 * torch.finfo(target.lse_dtype).eps)
    for name in OUTPUTS:
        assert (found[name].double() - ref[name]).norm() <= slack * ref[name].norm(), name


@pytest.mark.parametrize("target", ONE_EACH)
def test_strided_zero_gradient(target: Target):
    """o.sum() sends back a gradient whose strides are all 0."""
    made = make(named("d64_no_lse"), target)
    made.dout = torch.ones((), device=made.q.device, dtype=target.dtype).expand(made.dout.shape)
    expanded = run(made, target.backend)
    made.dout = made.dout.contiguous()
    assert_same_bits(expanded, run(made, target.backend))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", ["heads_first", "sliced_heads", "inside_nan", "odd_strides"])
def test_layout_does_not_change_a_bit(target: Target, layout: str):
    case = Case("layout", B=2, Tq=80, Tk=120, Hq=4, Hkv=2, S=3, block_size=32)
    plain = run(make(case, target), target.backend)
    assert_same_bits(plain, run(make(replace(case, layout=layout), target), target.backend))
