"""What the C++ library refuses before it runs anything: every rule that an argument struct can show, with its message.

Addresses here are made up and never read: each call is refused first, or is a query that looks at sizes alone.
"""

import math
from typing import Any

import pytest
from nsa_cuda import _C

CPU, CUDA = 0, 1
AUTO, SM80 = 0, 2
FLOAT64, FLOAT32, BFLOAT16 = 0, 1, 2
SOMEWHERE = 1 << 20  # an aligned address

# In the order of _C.Problem: B = 2, Tq = Tk = 8, Hq = 4, Hkv = 2, Dk = Dv = 16, l' = 16, S = 4.
VALID: dict[str, Any] = {
    "device": CPU,
    "backend": AUTO,
    "dtype": FLOAT32,
    "batch": 2,
    "seqlen_q": 8,
    "seqlen_k": 8,
    "num_heads_q": 4,
    "num_heads_k": 2,
    "head_dim_qk": 16,
    "head_dim_v": 16,
    "block_size": 16,
    "num_indices": 4,
    "causal": True,
    "softmax_scale": 1.0,
    "cu_seqlens_q": 0,
    "cu_seqlens_k": 0,
    "q_offsets": 0,
    "has_q_offset": False,
    "q_offset": 0,
    "block_indices": (SOMEWHERE, False, 64, 8, 4, 1),
    "block_counts": (0, False, 0, 0, 0),
    "block_count": -1,
}
Q = (SOMEWHERE, 8 * 4 * 16, 4 * 16, 16)
K = (SOMEWHERE, 8 * 2 * 16, 2 * 16, 16)
LSE = (SOMEWHERE, 8 * 4, 4, 1)
ABSENT = (0, 0, 0, 0)
TENSORS = {"q": Q, "k": K, "v": K, "o": Q, "lse": LSE}
GATE = (SOMEWHERE, FLOAT32, *LSE[1:], 0)
NO_GATE = (0, FLOAT32, 0, 0, 0, 0)
GRADIENTS = {
    **TENSORS, "dout": Q, "dlse": LSE, "delta": ABSENT, "gate": NO_GATE, "dq": Q, "dk": K, "dv": K,
    "accumulate_dq": False,
}  # fmt: skip

needs_cuda_build = pytest.mark.skipif(not _C.built_with_cuda(), reason="CPU-only build")
cpu_only_build = pytest.mark.skipif(_C.built_with_cuda(), reason="build with CUDA kernels")


def problem(**changes: Any) -> _C.Problem:
    assert changes.keys() <= VALID.keys()
    return _C.Problem(*{**VALID, **changes}.values())


def forward(given: _C.Problem, workspace: tuple[int, int] = (0, 0), num_threads: int = 1, **changes: Any) -> None:
    assert changes.keys() <= TENSORS.keys()
    _C.forward(given, *{**TENSORS, **changes}.values(), *workspace, 0, num_threads)


def backward(given: _C.Problem, **changes: Any) -> None:
    assert changes.keys() <= GRADIENTS.keys()
    _C.backward(given, *{**GRADIENTS, **changes}.values(), 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": 5}, r"device is 5; allowed are 0 \(cpu\) and 1 \(cuda\)"),
        ({"backend": -1}, r"backend is -1; allowed are 0 \(auto\)"),
        ({"dtype": 4}, r"dtype is 4; allowed are 0 \(float64\)"),
        ({"backend": SM80}, r"backend is sm80, which runs on cuda; for device cpu auto and cpu are allowed"),
        ({"batch": -1}, r"batch is -1; allowed is 0 or more"),
        ({"seqlen_q": -3}, r"seqlen_q is -3; allowed is 0 or more"),
        ({"seqlen_k": -3}, r"seqlen_k is -3; allowed is 0 or more"),
        ({"num_heads_q": 0}, r"num_heads_q is 0; allowed is 1 or more"),
        ({"num_heads_k": 0}, r"num_heads_k is 0; allowed is 1 or more"),
        ({"num_heads_q": 5}, r"num_heads_q is 5; allowed is a multiple of num_heads_k, which is 2"),
        ({"head_dim_qk": 0}, r"head_dim_qk is 0; allowed is 1 or more"),
        ({"head_dim_v": -8}, r"head_dim_v is -8; allowed is 1 or more"),
        ({"block_size": 0}, r"block_size is 0; allowed is 1 or more"),
        ({"num_indices": -1}, r"num_indices is -1; allowed is 0 or more"),
        ({"softmax_scale": math.nan}, r"softmax_scale is nan; allowed is a finite number"),
        ({"softmax_scale": math.inf}, r"softmax_scale is inf; allowed is a finite number"),
        ({"cu_seqlens_q": SOMEWHERE}, r"cu_seqlens_k is null and cu_seqlens_q is not; allowed are both or neither"),
        ({"cu_seqlens_k": SOMEWHERE}, r"cu_seqlens_q is null and cu_seqlens_k is not; allowed are both or neither"),
        ({"q_offsets": SOMEWHERE + 2}, r"q_offsets is 0x\w+; allowed is a multiple of 4 bytes"),
        (
            {"q_offsets": SOMEWHERE, "has_q_offset": True, "q_offset": 3},
            r"q_offsets and q_offset \(3\) are both given; allowed is one of them",
        ),
        ({"has_q_offset": True, "q_offset": 2**31}, r"q_offset is 2147483648; allowed is -2147483648 to 2147483647"),
        ({"block_indices": (SOMEWHERE + 4, True, 1, 1, 1, 1)}, r"block_indices is 0x\w+; allowed is a multiple of 8"),
        ({"block_counts": (SOMEWHERE, True, 0, 0, 0)}, r"block_counts is int64; allowed is int32"),
        ({"block_count": -2}, r"block_count is -2; allowed is 0 or more, or -1 for num_indices"),
        ({"batch": 2**40, "seqlen_q": 2**40}, r"batch is 1099511627776 and seqlen_q 1099511627776 \(batched\)"),
        ({"batch": 2**40, "seqlen_k": 2**40}, r"batch is 1099511627776 and seqlen_k 1099511627776 \(batched\)"),
        ({"num_indices": 2**31}, r"num_indices is 2147483648; allowed are 2147483584 entries a row"),
        (
            {"num_indices": 2**31 - 64, "num_heads_q": 2**27, "num_heads_k": 2**27},
            r"num_indices is 2147483584 with 16 rows of q and num_heads_k 134217728; allowed are 2\^57 entries",
        ),
    ],
    ids=str,
)
def test_problem_is_refused(changes: dict[str, Any], message: str) -> None:
    for query in (
        lambda: _C.forward_workspace(problem(**changes), True),
        lambda: _C.backward_workspace(problem(**changes), True, True, True, False),
        lambda: _C.kernel_name(problem(**changes)),
        lambda: forward(problem(**changes)),
        lambda: backward(problem(**changes)),
    ):
        with pytest.raises(ValueError, match=message):
            query()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 0},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
        {"num_indices": 0, "block_indices": (0, False, 0, 0, 0, 0)},
        {"softmax_scale": 0.0},
        {"softmax_scale": -1.0},
        {"block_size": 48, "head_dim_qk": 7, "head_dim_v": 5},
        {"has_q_offset": True, "q_offset": -(2**31)},
        {"cu_seqlens_q": SOMEWHERE, "cu_seqlens_k": SOMEWHERE, "seqlen_q": 2**33},
        {"block_count": 9},
    ],
    ids=str,
)
def test_problem_is_accepted(changes: dict[str, Any]) -> None:
    assert _C.forward_workspace(problem(**changes), True) >= 0
    assert _C.backward_workspace(problem(**changes), True, True, True, True) >= 0
    assert _C.kernel_name(problem(**changes)) == "cpu.selected_forward.float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": ABSENT}, r"q is null; allowed is the address of its \[2, 8, 4, 16\] elements"),
        ({"v": ABSENT}, r"v is null; allowed is the address of its \[2, 8, 2, 16\] elements"),
        ({"k": (SOMEWHERE + 2, *K[1:])}, r"k is 0x\w+; allowed is a multiple of 4 bytes"),
        ({"o": (*Q[:3], 8)}, r"o.head_stride is 8 elements; o is written, so 16 or more are allowed"),
        ({"o": (*Q[:2], 0, 16)}, r"o.row_stride is 0 elements; o is written, so 16 or more are allowed"),
        ({"lse": (SOMEWHERE, 0, 4, 1)}, r"lse.batch_stride is 0 elements; lse is written, so 1 or more are allowed"),
        ({"q": (SOMEWHERE, 2**62, 64, 16)}, r"q has strides \(4611686018427387904, 64, 16\) that lead past 2\^63"),
    ],
    ids=str,
)
def test_tensor_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(problem(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lse": ABSENT}, r"lse is null; allowed is the address of its \[2, 8, 4, 1\] elements"),
        ({"dout": ABSENT}, r"dout is null"),
        ({"dlse": (SOMEWHERE + 1, *LSE[1:])}, r"dlse is 0x\w+; allowed is a multiple of 4 bytes"),
        ({"o": ABSENT}, r"o is null; allowed is the address of its \[2, 8, 4, 16\] elements"),
        ({"o": ABSENT, "delta": (SOMEWHERE + 2, *LSE[1:])}, r"delta is 0x\w+; allowed is a multiple of 4 bytes"),
        ({"o": ABSENT, "delta": LSE, "dlse": ABSENT}, r"workspace_bytes is 0; this call needs"),
        ({"gate": GATE}, r"gate and dlse are both given; allowed is one of them"),
        ({"dlse": ABSENT, "gate": (SOMEWHERE, 4, *GATE[2:])}, r"gate.dtype is 4; allowed are 0 \(float64\)"),
        ({"dlse": ABSENT, "gate": (SOMEWHERE + 4, FLOAT64, *GATE[2:])}, r"gate is 0x\w+; allowed is a multiple of 8"),
        (
            {"dlse": ABSENT, "gate": (SOMEWHERE, FLOAT32, 2**62, 1, 1, 0)},
            r"gate has strides \(4611686018427387904, 1, 1\)",
        ),
        ({"dlse": ABSENT, "gate": GATE}, r"workspace_bytes is 0; this call needs"),
        ({"dq": (*Q[:3], 15)}, r"dq.head_stride is 15 elements; dq is written"),
        ({"dk": (SOMEWHERE, 0, 32, 16)}, r"dk.batch_stride is 0 elements; dk is written"),
        ({"dv": (SOMEWHERE, 256, -15, 16)}, r"dv.row_stride is -15 elements; dv is written"),
    ],
    ids=str,
)
def test_gradient_tensor_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backward(problem(), **changes)


def test_float64_lse_is_aligned_to_eight_bytes() -> None:
    with pytest.raises(ValueError, match=r"lse is 0x\w+; allowed is a multiple of 8 bytes"):
        forward(problem(dtype=FLOAT64), lse=(SOMEWHERE + 4, *LSE[1:]))


def test_missing_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_indices is null; .* its \[2, 8, 2, 4\] entries"):
        forward(problem(block_indices=(0, False, 0, 0, 0, 0)))
    with pytest.raises(ValueError, match=r"block_indices has strides \(0, 4611686018427387904, 0, 1\)"):
        forward(problem(block_indices=(SOMEWHERE, False, 0, 2**62, 0, 1)))


def test_thread_count_is_refused() -> None:
    with pytest.raises(ValueError, match="num_threads is -1; allowed is 1 to 4096, or 0 for OpenMP's default"):
        forward(problem(), num_threads=-1)


def test_workspace_is_refused() -> None:
    given = problem()
    needed = _C.backward_workspace(given, True, True, True, True, num_threads=1)
    if needed == 0:
        pytest.skip("this backend needs no workspace")
    with pytest.raises(ValueError, match=f"workspace_bytes is 0; this call needs {needed}"):
        backward(given)
    with pytest.raises(ValueError, match=f"workspace is null; this call needs {needed} bytes"):
        _C.backward(given, *GRADIENTS.values(), 0, needed, 0, 1)
    with pytest.raises(ValueError, match=r"workspace is 0x\w+; allowed on cpu is a multiple of 64 bytes"):
        _C.backward(given, *GRADIENTS.values(), SOMEWHERE + 8, needed, 0, 1)


@cpu_only_build
def test_cuda_needs_a_build_with_cuda() -> None:
    with pytest.raises(NotImplementedError, match=r"device is cuda, but this build .* FORCE_CUDA=1 pip"):
        _C.kernel_name(problem(device=CUDA, dtype=BFLOAT16))


def cuda_problem(**changes: Any) -> _C.Problem:
    return problem(**{"device": CUDA, "dtype": BFLOAT16, "head_dim_qk": 64, "head_dim_v": 64, **changes})


@needs_cuda_build
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": 1}, ValueError, r"backend is cpu, which runs on cpu; for device cuda auto, sm80 and sm90"),
        ({"dtype": FLOAT32}, NotImplementedError, r"dtype is float32; CUDA kernels take bfloat16 or float16"),
        ({"block_size": 48}, NotImplementedError, r"block_size is 48; CUDA kernels take 16, 32, 64 or 128"),
        ({"batch": 2**16, "seqlen_q": 2**15}, ValueError, r"allowed are 2147483647 rows of q in total on cuda"),
        ({"batch": 2**16, "seqlen_k": 2**15}, ValueError, r"allowed are 2147483647 rows of k in total on cuda"),
        (
            {"seqlen_k": 2**29, "num_heads_k": 64, "num_heads_q": 64},
            ValueError,
            r"num_heads_k is 64 with block_size 16 and 1073741824 rows of k; allowed are 2147483647 \(kv head, block\)",
        ),
    ],
    ids=str,
)
def test_cuda_problem_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _C.forward_workspace(cuda_problem(**changes), True)


@needs_cuda_build
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (SOMEWHERE + 8, 2048, 256, 64)}, r"q is 0x\w+; allowed is a multiple of 16 bytes"),
        ({"q": (SOMEWHERE, 2048, 257, 64)}, r"q.row_stride is 257 elements; allowed is a multiple of 8 \(16 bytes\)"),
        ({"q": (SOMEWHERE, 2052, 256, 64)}, r"q.batch_stride is 2052 elements; allowed is a multiple of 8"),
    ],
    ids=str,
)
def test_cuda_tensor_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(cuda_problem(), **changes)
