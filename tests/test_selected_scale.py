"""Long sequences and offsets beyond 32 bits, checked on sampled rows and key blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import Results, check, run
from cases import Case
from inputs import Inputs, make
from sampled import check_key_block, check_rows, long_inputs
from targets import ALL, CPU, CUDA, CUDA_BF16, Target
from torch import Tensor

# Elements that no 32-bit offset reaches.
BEYOND = 2**31 + 2**20


def sample(T: int, device: str, number: int = 48) -> Tensor:
    gen = torch.Generator().manual_seed(T)
    rows = torch.cat(
        [torch.tensor([0, 1, 63, 64, T // 2, T - 2, T - 1]), torch.randint(0, T, (number,), generator=gen)]
    )
    return rows.to(device)


def need_memory(target: Target, gib: float) -> None:
    if target.is_cuda and torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def run_and_check(made: Inputs, target: Target, *blocks: tuple[int, int], rows: int = 48) -> Results:
    """The operation's results, of which some rows and these (key block, kv head) are right."""
    found = run(made, target.backend)
    lines = check_rows(made, found, sample(made.case.Tq, target.device, rows))
    for block, head in blocks:
        lines += check_key_block(made, found, block, head)
    assert not lines, "\n".join(lines)
    return found


@pytest.mark.parametrize("target", CPU[1:3])
def test_16k_tokens_on_the_cpu(target: Target):
    case = Case("16k", Tq=16384, Tk=16384, Hq=4, Hkv=1, S=8)
    made = long_inputs(case, target.device, target.dtype, seed=3)
    run_and_check(made, target, (100, 0), (255, 0), rows=30)


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("dims", [(192, 128), (128, 128)], ids=["d192_128", "d128"])
def test_64k_tokens_at_the_papers_heads(target: Target, dims: tuple[int, int]):
    need_memory(target, 30)
    case = Case("64k", Tq=65536, Tk=65536, Hq=64, Hkv=4, Dk=dims[0], Dv=dims[1], S=16)
    made = long_inputs(case, target.device, target.dtype, seed=5)
    run_and_check(made, target, (511, 0), (900, 3), (1023, 1), (17, 2))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_the_sink_block_of_64k_tokens(target: Target):
    """Every query reads block 0: the longest list that the dk, dv kernel meets, split and reduced."""
    need_memory(target, 20)
    case = Case("sink_64k", Tq=65536, Tk=65536, Hq=4, Hkv=1, S=4)
    made = long_inputs(case, target.device, target.dtype, seed=7)
    found = run(made, target.backend)
    lines = check_key_block(made, found, 0, 0, chunk=4096) + check_key_block(made, found, 1, 0)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("target", CUDA_BF16)
def test_short_lists_of_many_rows(target: Target):
    """130 to 350 entries a block, 41 MB of q and dout a kv head: then the items of dk and dv are ordered by their
    middle rows. Every third block is in no list."""
    case = Case("short_lists", Tq=5000, Tk=5000, Hq=32, Hkv=2, Dk=128, Dv=128, S=4)
    made = long_inputs(case, target.device, target.dtype, seed=13)
    lists = made.block_indices
    made = replace(made, block_indices=lists.where(lists % 3 != 1, -1))
    found = run_and_check(made, target, (0, 0), (2, 1), (42, 0), (78, 1))
    unread = torch.arange(case.Tk, device=target.device) // case.block_size % 3 == 1
    assert not found["dk"][:, unread].any() and not found["dv"][:, unread].any()


@pytest.mark.parametrize("target", CUDA_BF16)
@pytest.mark.parametrize("S", [32, 30])
def test_blocks_that_several_ctas_index(target: Target, S: int):
    """4000 blocks of 16: the inverted index takes a span of rows with half of the blocks at a time."""
    case = Case("ranges", Tq=64000, Tk=64000, Hq=4, Hkv=2, block_size=16, S=S)
    made = long_inputs(case, target.device, target.dtype, seed=15)
    run_and_check(made, target, (0, 0), (1999, 1), (2000, 0), (3999, 1))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_one_million_tokens(target: Target):
    """q, o, do and dq of more than 2^31 elements each."""
    need_memory(target, 40)
    case = Case("1m", Tq=2**20 + 64, Tk=2**20 + 64, Hq=16, Hkv=1, Dk=128, Dv=128, S=4)
    made = long_inputs(case, target.device, target.dtype, seed=9)
    assert made.q.numel() > 2**31
    run_and_check(made, target, (8000, 0), (16383, 0), (16384, 0))


@pytest.mark.parametrize("target", CUDA_BF16)
def test_unions_of_thousands_of_blocks(target: Target):
    """One head a group: a tile of 192 rows is 192 tokens, whose 64 choices of 16384 blocks have 8600 blocks in all."""
    need_memory(target, 8)
    case = Case("unions", Tq=2**18, Tk=2**18, Hq=1, Hkv=1, block_size=16, S=64)
    made = long_inputs(case, target.device, target.dtype, seed=11)
    assert made.block_indices[0, -192:].unique().numel() > 8000
    run_and_check(made, target, (3000, 0), (9000, 0), (16383, 0))


def spread(x: Tensor) -> Tensor:
    """The same values in a buffer whose last row lies past 2^31 elements. On the CPU untouched pages cost nothing."""
    rows, rest = x.shape[1], x[0, 0].numel()
    row_stride = (BEYOND // max(rows - 1, 1) + 63) // 64 * 64
    try:
        buffer = torch.empty(row_stride * (rows - 1) + rest, device=x.device, dtype=x.dtype)
    except RuntimeError as error:
        pytest.skip(f"no {row_stride * rows * x.element_size() / 2**30:.1f} GiB buffer: {error}")
    strides = (row_stride * rows, row_stride, *x[0, 0].contiguous().stride())
    return buffer.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("target", [p for p in ALL if "bf16" in p.id])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "block_indices"])
def test_rows_far_apart(target: Target, which: str, block_size: int):
    """One tensor at a time with row offsets beyond 32 bits."""
    need_memory(target, 12)
    made = make(Case("far", Tq=130, Tk=130, Hq=16, Hkv=2, S=3, block_size=block_size), target)
    setattr(made, which, spread(getattr(made, which)))
    assert (getattr(made, which).shape[1] - 1) * getattr(made, which).stride(1) > 2**31
    check(made, target)


@pytest.mark.parametrize("target", [p for p in ALL if "bf16" in p.id])
@pytest.mark.parametrize("block_size", [32, 64])
def test_batch_entries_far_apart(target: Target, block_size: int):
    need_memory(target, 12)
    case = Case("far_batch", B=2, Tq=70, Tk=70, Hq=4, Hkv=2, S=3, block_size=block_size)
    made: Inputs = make(case, target)
    buffer = torch.empty(BEYOND + made.k[0].numel(), device=target.device, dtype=target.dtype)
    made.k = buffer.as_strided(made.k.shape, (BEYOND, *made.k.stride()[1:])).copy_(made.k)
    check(made, target)
