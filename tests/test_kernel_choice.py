"""Which kernels selected attention runs, and in what tiles: sizes and a GPU's name in, so no GPU is needed."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from nsa_cuda import _C, selected_attention_kernels
from nsa_cuda.kernels import GPUS, SelectedAttentionKernels
from test_package import run_module

needs_cuda_build = pytest.mark.skipif(not _C.built_with_cuda(), reason="this build has the CPU backend alone")
needs_hopper_build = pytest.mark.skipif(
    not any(kernel.startswith("sm90.selected") for kernel in _C.compiled_kernels()),
    reason="this build holds no Hopper kernels (NSA_CUDA_ARCHITECTURES)",
)
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
PAPER = {"seqlen": 65536, "heads_q": 64, "heads_k": 4}


def choose(gpu: Any = "h100", **changes: Any) -> SelectedAttentionKernels:
    return selected_attention_kernels(**{**PAPER, **changes}, gpu=gpu)


def families(chosen: SelectedAttentionKernels) -> list[str]:
    return [kernel.name.split(".")[0] for kernel in (chosen.forward, chosen.dq, chosen.dkdv)]


@needs_hopper_build
def test_the_papers_heads_on_an_h100() -> None:
    chosen = choose()
    assert chosen.forward.name == "sm90.selected_forward.bfloat16.128.128"
    assert chosen.dq.name == "sm90.selected_dq.bfloat16.128.128"
    assert chosen.dkdv.name == "sm90.selected_dkdv.bfloat16.128.128"
    assert (chosen.forward.query_rows, chosen.forward.keys, chosen.forward.stages) == (192, 64, 5)
    assert (chosen.dq.query_rows, chosen.dq.keys, chosen.dq.stages) == (192, 64, 9)
    assert (chosen.dkdv.query_rows, chosen.dkdv.keys, chosen.dkdv.ctas) == (64, 64, 1)
    assert (chosen.windows, chosen.window_rows) == (8, 8196)


@needs_hopper_build
def test_rows_of_few_heads_are_copied_by_two_ctas() -> None:
    assert [choose(heads_k=64 // group).dkdv.ctas for group in (1, 2, 4, 8, 16, 64)] == [2, 2, 2, 1, 1, 1]


@needs_hopper_build
def test_the_family_goes_by_gpu_block_size_and_backend() -> None:
    assert families(choose()) == ["sm90"] * 3
    assert families(choose(block_size=32)) == ["sm80"] * 3
    assert families(choose(block_size=32, backend="sm90")) == ["sm90", "sm80", "sm80"]
    assert families(choose(backend="sm80")) == ["sm80"] * 3
    assert families(choose("a100")) == families(choose("l40s")) == ["sm80"] * 3
    assert families(choose((100, 148, 232448))) == ["sm80"] * 3


@needs_cuda_build
@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_fits_its_gpu(gpu: str) -> None:
    for (dk, dv), heads_k, block_size in product(DIMS, (1, 4, 64), (16, 64, 128)):
        chosen = choose(gpu, dim_qk=dk, dim_v=dv, heads_k=heads_k, block_size=block_size)
        for kernel in (chosen.forward, chosen.dq, chosen.dkdv):
            reserved = 1024  # of every CTA
            assert kernel.ctas * (kernel.shared_memory + reserved) <= GPUS[gpu][2] + reserved, kernel
            assert kernel.stages >= 1 and kernel.threads % 32 == 0 and kernel.threads <= 1024, kernel
            assert kernel.query_rows % 16 == 0 and kernel.keys in (32, 64), kernel


@needs_hopper_build
@pytest.mark.parametrize("seqlen", [1, 8192, 8193, 65535, 65536, 70000, 1 << 20])
@pytest.mark.parametrize("heads_q", [4, 40, 64])
def test_windows_are_even_and_bounded(seqlen: int, heads_q: int) -> None:
    chosen = choose(seqlen=seqlen, heads_q=heads_q)
    windows, rows = chosen.windows, chosen.window_rows
    assert 1 <= windows <= 16
    assert (windows - 1) * rows < seqlen <= windows * rows
    row_bytes = 2 * heads_q * 16 * 64
    tile = chosen.dq.query_rows  # tokens at most, with G = 1
    assert rows * row_bytes <= (1 << 30) + tile * row_bytes or windows == 16
    last = seqlen - (windows - 1) * rows
    assert last > rows - windows * tile


@needs_cuda_build
def test_no_ds_is_kept_where_dq_computes_it() -> None:
    assert (choose("a100").windows, choose("a100").window_rows) == (0, 0)


@needs_hopper_build
def test_the_command_prints_it() -> None:
    text = run_module("--choose", "--gpu", "h100", "--seqlen", "16384", "--heads", "32", "8")
    for name in ("sm90.selected_forward.bfloat16.128.128", "sm90.selected_dq", "sm90.selected_dkdv"):
        assert name in text
    assert "dS: in 1 windows of 16384 query rows" in text
    assert text == f"{choose(seqlen=16384, heads_q=32, heads_k=8)}\n"


@needs_cuda_build
@pytest.mark.parametrize(
    ("gpu", "changes", "error", "message"),
    [
        ((75, 72, 101376), {}, NotImplementedError, r"compute capability 7.5; the CUDA kernels need 8.0"),
        ("a100", {"backend": "sm90"}, NotImplementedError, r"backend is sm90; the GPU has compute capability 8.0"),
        ("h100", {"dtype": torch.float32}, NotImplementedError, r"dtype is float32"),
        ("h100", {"block_size": 48}, NotImplementedError, r"block_size is 48; CUDA kernels take 16, 32, 64 or 128"),
        ("h100", {"dim_qk": 96}, NotImplementedError, r"head_dim_qk is 96, head_dim_v is 96"),
        ("h100", {"heads_q": 62}, ValueError, r"num_heads_q is 62"),
        ("h100", {"seqlen": -1}, ValueError, r"seqlen_q is -1"),
        ((90, 0, 232448), {}, ValueError, r"gpu.num_sms is 0; allowed is 1 or more"),
        ((90, 132, 1000), {}, ValueError, r"gpu.shared_memory is 1000; allowed is 101376 or more"),
        ((-1, 132, 232448), {}, ValueError, r"gpu.compute_capability is -1"),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_refused(
    gpu: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose(gpu, **changes)


def test_names_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="gpu is 'v100'; allowed are 'a100', 'l40s', 'h100' or three numbers"):
        choose("v100")
    with pytest.raises(ValueError, match="backend: must be one of None, 'cpu', 'sm80', 'sm90', was 'sm70'"):
        choose(backend="sm70")
    with pytest.raises(ValueError, match=r"dtype: must be one of torch\.float64.*, was torch\.int32"):
        choose(dtype=torch.int32)


@pytest.mark.skipif(_C.built_with_cuda(), reason="this build has CUDA kernels")
def test_a_build_without_kernels_says_so() -> None:
    with pytest.raises(NotImplementedError, match="FORCE_CUDA=1"):
        choose()
