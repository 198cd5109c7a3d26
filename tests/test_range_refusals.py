"""What the sliding window, compressed attention and select_blocks refuse, by tensors (Python) and by structs (C++)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import nsa_cuda
import pytest
import torch
from nsa_cuda import _C
from test_selected_refusals import Arguments, int32, setting
from torch import Tensor

REFUSALS = (ValueError, TypeError, NotImplementedError)
FUNCTIONS = {
    "window": nsa_cuda.sliding_window_attention,
    "compressed": nsa_cuda.compressed_attention,
    "select": nsa_cuda.select_blocks,
}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def batched(operation: str) -> Arguments:
    """Good arguments: 30 queries, 50 tokens; l = 8, d = 4 give 11 compressed keys."""
    if operation == "window":
        return {"q": zeros(2, 30, 4, 16), "k": zeros(2, 50, 2, 16), "v": zeros(2, 50, 2, 16), "window_size": 9}
    sizes = {"kernel_size": 8, "kernel_stride": 4, "seqlen_k": 50}
    common = {"q": zeros(2, 30, 4, 16), "k_cmp": zeros(2, 11, 2, 16), **sizes}
    if operation == "compressed":
        return {**common, "v_cmp": zeros(2, 11, 2, 16)}
    return {**common, "lse": zeros(2, 30, 4), "block_size": 8, "topk": 4}


def packed(operation: str) -> Arguments:
    arguments = {n: x.flatten(0, 1) if isinstance(x, Tensor) else x for n, x in batched(operation).items()}
    arguments.pop("seqlen_k", None)
    return arguments | {"cu_seqlens_q": int32(0, 30, 60), "cu_seqlens_k": int32(0, 50, 100)}


def refuses(operation: str, arguments: Arguments, exceptions: Any, patterns: list[str]) -> None:
    with pytest.raises(exceptions) as raised:
        FUNCTIONS[operation](**arguments)
    for pattern in patterns:
        assert re.search(pattern, str(raised.value)), f"{pattern!r} not in {str(raised.value)!r}"


# (id, change, exceptions, what the message must hold); for every operation
COMMON_RULES = [
    ("q_rank", setting(q=lambda x: x[0]), ValueError, [r"\bq\b", "3", "4"]),
    ("q_dtype_int", setting(q=lambda x: x.int()), REFUSALS, [r"\bq\b", "int32"]),
    ("q_last_stride", setting(q=lambda x: x.mT.contiguous().mT), ValueError, [r"\bq\b", "contiguous"]),
    ("q_not_a_tensor", setting(q=None), TypeError, [r"\bq\b", "None", "Tensor"]),
    ("group_ratio", setting(q=lambda x: x[:, :, :3], lse=lambda x: None if x is None else x[:, :, :3]), ValueError,
     ["3", "2", "multiple|divi"]),
    ("offset_shape", setting(q_offset=int32(1, 2, 3)), ValueError, ["q_offset", "3", "2"]),
    ("offset_dtype", setting(q_offset=torch.zeros(2)), TypeError, ["q_offset", "float32", "int32"]),
    ("offset_too_large", setting(q_offset=2**31), ValueError, ["q_offset", "2147483648", "2147483647"]),
    ("scale_string", setting(softmax_scale="1"), TypeError, ["softmax_scale"]),
    ("scale_nan", setting(softmax_scale=float("nan")), ValueError, ["softmax_scale", "nan", "finite"]),
    ("both_scales", setting(softmax_scale=1.0, scale=2.0), ValueError, [r"\bscale\b", "softmax_scale"]),
    ("backend_unknown", setting(backend="cudnn"), ValueError, ["backend", "cudnn", "reference"]),
    ("backend_sm80_on_cpu", setting(backend="sm80"), ValueError, ["sm80", "cpu"]),
    ("backend_sm90_on_cpu", setting(backend="sm90"), ValueError, ["sm90", "cpu"]),
]  # fmt: skip
PACKED_RULES = [
    ("only_cu_seqlens_q", setting(cu_seqlens_k=None), ValueError, ["cu_seqlens_k"]),
    ("cu_seqlens_int64", setting(cu_seqlens_q=lambda x: x.long()), TypeError, ["cu_seqlens_q", "int64", "int32"]),
    ("cu_seqlens_disagree", setting(cu_seqlens_k=int32(0, 20, 50, 100)), ValueError, ["cu_seqlens_k", "4", "3"]),
    ("cu_seqlens_descend", setting(cu_seqlens_q=int32(0, 40, 30)), ValueError, ["cu_seqlens_q", "40|30"]),
    ("cu_seqlens_negative", setting(cu_seqlens_k=int32(-1, 50, 100)), ValueError, ["cu_seqlens_k", "-1"]),
    ("cu_seqlens_past_the_end", setting(cu_seqlens_q=int32(0, 30, 61)), ValueError, ["cu_seqlens_q", "61", "60"]),
    ("packed_offset", setting(q_offset=int32(1)), ValueError, ["q_offset", "1", "2"]),
]
OWN_RULES = [
    ("window", setting(k=lambda x: x[:1]), ValueError, [r"\bk\b", "1", "2"]),
    ("window", setting(v=lambda x: x[:, :49]), ValueError, [r"\bv\b", "49", "50"]),
    ("window", setting(v=lambda x: x.double()), TypeError, [r"\bv\b", "float64", "float32"]),
    ("window", setting(k=lambda x: x.to("meta")), ValueError, [r"\bk\b", "meta", "cpu"]),
    ("window", setting(window_size=0), ValueError, ["window_size", "0", "1 or more"]),
    ("window", setting(window_size=-5), ValueError, ["window_size", "-5"]),
    ("window", setting(window_size=4.5), TypeError, ["window_size", "4.5"]),
    ("compressed", setting(k_cmp=lambda x: x[..., :8]), ValueError, ["k_cmp", "8", "16"]),
    ("compressed", setting(v_cmp=lambda x: x[:, :10]), ValueError, ["v_cmp", "10", "11"]),
    ("compressed", setting(v_cmp=lambda x: x.mT.contiguous().mT), ValueError, ["v_cmp", "contiguous"]),
    ("compressed", setting(kernel_stride=3), ValueError, ["kernel_stride", "3", "8"]),
    ("compressed", setting(kernel_size=0), ValueError, ["kernel_size", "0"]),
    ("compressed", setting(kernel_stride=0), ValueError, ["kernel_stride", "0"]),
    ("compressed", setting(seqlen_k=None), ValueError, ["seqlen_k", "None", "30", "11"]),
    ("compressed", setting(seqlen_k=54), ValueError, ["k_cmp", "12", "54", "11"]),
    ("compressed", setting(seqlen_k=-1), ValueError, ["seqlen_k", "-1"]),
    ("select", setting(lse=lambda x: x[..., :2]), ValueError, ["lse", "2", "4"]),
    ("select", setting(lse=lambda x: x.double()), TypeError, ["lse", "float64", "float32"]),
    ("select", setting(lse=None), TypeError, ["lse", "None"]),
    ("select", setting(k_cmp=lambda x: x.bfloat16()), TypeError, ["k_cmp", "bfloat16", "float32"]),
    ("select", setting(seqlen_k=54), ValueError, ["k_cmp", "12", "54", "11"]),
    ("select", setting(block_size=6), ValueError, ["block_size", "6", "kernel_stride", "4"]),
    ("select", setting(block_size=0), ValueError, ["block_size", "0"]),
    ("select", setting(block_size=8.0), TypeError, ["block_size", "8.0"]),
    ("select", setting(topk=0), ValueError, ["topk", "0"]),
    ("select", setting(topk=2), ValueError, ["topk is 2", "init_blocks", "1", "local_blocks", "2"]),
    ("select", setting(init_blocks=-1), ValueError, ["init_blocks", "-1"]),
    ("select", setting(local_blocks=-1), ValueError, ["local_blocks", "-1"]),
    ("select", setting(block_size=4 * 65537), ValueError, ["block_size", "262148", "65536", "kernel_stride"]),
]


@pytest.mark.parametrize("operation", FUNCTIONS)
@pytest.mark.parametrize(("change", "exceptions", "patterns"), [pytest.param(*r[1:], id=r[0]) for r in COMMON_RULES])
def test_batched(operation: str, change: Callable, exceptions: Any, patterns: list[str]):
    arguments = change(batched(operation))
    if operation != "select":
        arguments.pop("lse", None)
    refuses(operation, arguments, exceptions, patterns)


@pytest.mark.parametrize("operation", FUNCTIONS)
@pytest.mark.parametrize(("change", "exceptions", "patterns"), [pytest.param(*r[1:], id=r[0]) for r in PACKED_RULES])
def test_packed(operation: str, change: Callable, exceptions: Any, patterns: list[str]):
    refuses(operation, change(packed(operation)), exceptions, patterns)


@pytest.mark.parametrize(("operation", "change", "exceptions", "patterns"), OWN_RULES)
def test_one_operation(operation: str, change: Callable, exceptions: Any, patterns: list[str]):
    refuses(operation, change(batched(operation)), exceptions, patterns)


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_good_arguments_are_accepted(operation: str):
    """The arguments that the rules start from, so that no refusal above is for another reason."""
    for arguments in (batched(operation), packed(operation)):
        for backend in (None, "cpu", "reference"):
            FUNCTIONS[operation](**arguments, backend=backend)


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_other_devices_are_refused(operation: str):
    arguments = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in batched(operation).items()}
    refuses(operation, arguments, NotImplementedError, ["meta", "cpu and cuda"])


# -------------------------------------------------------------------------------------------- structs

SOMEWHERE = 1 << 20  # an aligned address, never read
WINDOW, COMPRESSED = 0, 1
# In the order of _C.RangeProblem: B = 2, Tq = Tk = 8, Hq = 4, Hkv = 2, Dk = Dv = 16.
VALID: dict[str, Any] = {
    "device": 0, "backend": 0, "dtype": 1, "batch": 2, "seqlen_q": 8, "seqlen_k": 8, "num_heads_q": 4, "num_heads_k": 2,
    "head_dim_qk": 16, "head_dim_v": 16, "mask": WINDOW, "window_size": 4, "kernel_size": 2, "kernel_stride": 1,
    "num_tokens": 8, "causal": True, "softmax_scale": 1.0, "cu_seqlens_q": 0, "cu_seqlens_k": 0, "q_offsets": 0,
    "has_q_offset": False, "q_offset": 0,
}  # fmt: skip
Q, K, LSE = (SOMEWHERE, 512, 64, 16), (SOMEWHERE, 256, 32, 16), (SOMEWHERE, 32, 4, 1)
ABSENT, NO_GATE = (0, 0, 0, 0), (0, 1, 0, 0, 0, 0)
SELECTION = (16, 4, 1, 2)  # l', n, init, local


def problem(**changes: Any) -> _C.RangeProblem:
    assert changes.keys() <= VALID.keys()
    return _C.RangeProblem(*{**VALID, **changes}.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"device": 5}, r"device is 5; allowed are 0 \(cpu\) and 1 \(cuda\)"),
    ({"mask": 2}, r"mask is 2; allowed are 0 \(window\) and 1 \(compressed\)"),
    ({"window_size": 0}, r"window_size is 0; allowed is 1 or more"),
    ({"mask": COMPRESSED, "kernel_size": 0}, r"kernel_size is 0; allowed is 1 or more"),
    ({"mask": COMPRESSED, "kernel_stride": -1}, r"kernel_stride is -1; allowed is 1 or more"),
    ({"mask": COMPRESSED, "kernel_stride": 3}, r"kernel_stride is 3; allowed is a divisor of kernel_size, which is 2"),
    ({"mask": COMPRESSED, "num_tokens": -1}, r"num_tokens is -1; allowed is 0 or more"),
    ({"mask": COMPRESSED, "num_tokens": 10},
     r"seqlen_k is 8; allowed is 9 or more, the compressed keys of num_tokens = 10 tokens"),
    ({"num_heads_q": 5}, r"num_heads_q is 5; allowed is a multiple of num_heads_k, which is 2"),
    ({"head_dim_v": 0}, r"head_dim_v is 0; allowed is 1 or more"),
    ({"cu_seqlens_q": SOMEWHERE}, r"cu_seqlens_k is null and cu_seqlens_q is not; allowed are both or neither"),
    ({"has_q_offset": True, "q_offset": 2**31}, r"q_offset is 2147483648; allowed is -2147483648 to 2147483647"),
    ({"batch": 2**40, "seqlen_q": 2**40}, r"batch is 1099511627776 and seqlen_q 1099511627776 \(batched\)"),
])  # fmt: skip
def test_problem_is_refused(changes: dict[str, Any], message: str):
    given = problem(**changes)
    for query in (
        lambda: _C.range_forward_workspace(given, True, 1),
        lambda: _C.range_backward_workspace(given, True, True, True, True, 1),
        lambda: _C.range_forward(given, Q, K, K, Q, LSE, 0, 0, 0, 1),
        lambda: _C.range_backward(given, Q, K, K, Q, LSE, Q, LSE, ABSENT, NO_GATE, Q, K, K, False, 0, 0, 0, 1),
    ):
        with pytest.raises(ValueError, match=message):
            query()


@pytest.mark.parametrize("changes", [
    {}, {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"window_size": 2**63 - 1}, {"softmax_scale": -1.0},
    {"mask": COMPRESSED, "window_size": 0}, {"mask": COMPRESSED, "num_tokens": 0, "seqlen_k": 0},
    {"mask": COMPRESSED, "kernel_size": 2**62, "kernel_stride": 2**61}, {"batch": 2**62, "seqlen_q": 0, "seqlen_k": 0},
    {"cu_seqlens_q": SOMEWHERE, "cu_seqlens_k": SOMEWHERE, "mask": COMPRESSED, "num_tokens": -1},
], ids=str)  # fmt: skip
def test_problem_is_accepted(changes: dict[str, Any]):
    assert _C.range_forward_workspace(problem(**changes), True, 1) >= 0
    assert _C.range_backward_workspace(problem(**changes), True, True, True, True, 1) >= 0


def test_tensor_is_refused():
    given = problem()
    with pytest.raises(ValueError, match=r"v is null; allowed is the address of its \[2, 8, 2, 16\] elements"):
        _C.range_forward(given, Q, K, ABSENT, Q, LSE, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"o.head_stride is 8 elements; o is written, so 16 or more are allowed"):
        _C.range_forward(given, Q, K, K, (*Q[:3], 8), LSE, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"dk.batch_stride is 0 elements; dk is written"):
        _C.range_backward(
            given, Q, K, K, Q, LSE, Q, LSE, ABSENT, NO_GATE, Q, (SOMEWHERE, 0, 32, 16), K, False, 0, 0, 0, 1
        )  # fmt: skip
    gate = (SOMEWHERE, 1, *LSE[1:], 0)
    with pytest.raises(ValueError, match="gate and dlse are both given; allowed is one of them"):
        _C.range_backward(given, Q, K, K, Q, LSE, Q, LSE, ABSENT, gate, Q, K, K, False, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="workspace_bytes is 0; this call needs"):  # o isn't needed
        _C.range_backward(given, Q, K, K, ABSENT, LSE, Q, ABSENT, LSE, gate, Q, K, K, True, 0, 0, 0, 1)
    needed = _C.range_forward_workspace(given, True, 1)
    with pytest.raises(ValueError, match=f"workspace_bytes is 0; this call needs {needed}"):
        _C.range_forward(given, Q, K, K, Q, LSE, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="num_threads is -1; allowed is 1 to 4096"):
        _C.range_forward_workspace(given, True, -1)


def test_selection_is_refused():
    given = problem(mask=COMPRESSED, head_dim_v=0)  # which is ignored
    assert _C.selection_workspace(given, *SELECTION, 1) >= 0
    with pytest.raises(ValueError, match="mask is window; blocks are selected from compressed keys"):
        _C.selection_workspace(problem(), *SELECTION, 1)
    with pytest.raises(ValueError, match=r"topk is 4; allowed is init_blocks \+ local_blocks = 3 \+ 2 or more"):
        _C.selection_workspace(given, 16, 4, 3, 2, 1)
    with pytest.raises(ValueError, match=r"num_tokens is 4294967296 with block_size 1; allowed are 2\^31 - 1 blocks"):
        _C.selection_workspace(problem(mask=COMPRESSED, num_tokens=2**32, seqlen_k=2**32), 1, 4, 1, 2, 1)
    with pytest.raises(ValueError, match=r"topk is \d+; allowed are 2147483584 entries a row"):
        _C.selection_workspace(given, 16, 2**60, 1, 2, 1)
    with pytest.raises(ValueError, match=r"block_indices is null; allowed is the address of its \[2, 8, 2, 4\]"):
        _C.select_blocks(given, *SELECTION, Q, K, LSE, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="lse is null"):
        _C.select_blocks(given, *SELECTION, Q, K, (0, 0, 0, 0), SOMEWHERE, 0, 0, 0, 1)
