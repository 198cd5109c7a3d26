"""Every refusal of specification section 8: the exception's type, and a message that names the argument, what it was
and what is allowed. Each rule is one row: what is done to good arguments, and what the message must hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_cuda import selected_attention
from targets import CPU, CUDA, CUDA_BF16, Target
from torch import Tensor

Arguments = dict[str, Any]
REFUSALS = (ValueError, TypeError, NotImplementedError)


def batched(device: str = "cpu", dtype: torch.dtype = torch.float32, D: int = 64) -> Arguments:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    return {
        "q": zeros(2, 30, 4, D),
        "k": zeros(2, 50, 2, D),
        "v": zeros(2, 50, 2, D),
        "block_indices": torch.zeros(2, 30, 2, 3, dtype=torch.int32, device=device),
    }


def packed(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Arguments:
    arguments = {name: x.flatten(0, 1) for name, x in batched(device, dtype).items()}
    bounds = torch.arange(3, dtype=torch.int32, device=device)
    return arguments | {"cu_seqlens_q": bounds * 30, "cu_seqlens_k": bounds * 50}


def setting(**changes: Any) -> Callable[[Arguments], Arguments]:
    """Arguments with some replaced; a function is applied to the argument it replaces."""

    def change(arguments: Arguments) -> Arguments:
        new = dict(arguments)
        for name, value in changes.items():
            new[name] = value(arguments.get(name)) if callable(value) else value
        return new

    return change


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# (id, change, exceptions, what the message must hold: patterns of the argument, the value, what is allowed)
BATCHED_RULES = [
    ("q_rank_2", setting(q=lambda x: x[0, 0]), ValueError, [r"\bq\b", "2"]),
    ("q_rank_5", setting(q=lambda x: x[None]), ValueError, [r"\bq\b", "5"]),
    ("k_rank", setting(k=lambda x: x[0]), ValueError, [r"\bk\b", "3"]),
    ("v_rank", setting(v=lambda x: x[0]), ValueError, [r"\bv\b", "3"]),
    ("k_batch", setting(k=lambda x: x[:1]), ValueError, [r"\bk\b", "1", "2"]),
    ("v_batch", setting(v=lambda x: x[:1]), ValueError, [r"\bv\b", "1", "2"]),
    ("v_length", setting(v=lambda x: x[:, :49]), ValueError, [r"\bv\b", "49", "50"]),
    ("v_heads", setting(v=lambda x: x[:, :, :1]), ValueError, [r"\bv\b", "1", "2"]),
    ("k_head_dim", setting(k=lambda x: x[..., :32]), ValueError, [r"\bk\b", "32", "64"]),
    ("group_ratio", setting(q=lambda x: x[:, :, :3]), ValueError, ["3", "2", "multiple|divi"]),
    ("more_kv_heads", setting(q=lambda x: x[:, :, :1]), ValueError, ["1", "2", "multiple|divi"]),
    ("no_kv_heads", setting(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0], block_indices=lambda x: x[:, :, :0]),
     ValueError, ["0"]),
    ("head_dim_0", setting(q=lambda x: x[..., :0], k=lambda x: x[..., :0]), ValueError, ["0"]),
    ("q_dtype_int", setting(q=lambda x: x.int()), (TypeError, ValueError, NotImplementedError), [r"\bq\b", "int32"]),
    ("all_int", setting(q=lambda x: x.int(), k=lambda x: x.int(), v=lambda x: x.int()), REFUSALS, ["int32", "float"]),
    ("all_complex", setting(q=lambda x: x.cfloat(), k=lambda x: x.cfloat(), v=lambda x: x.cfloat()), REFUSALS,
     ["complex64", "float"]),
    ("k_dtype", setting(k=lambda x: x.bfloat16()), (TypeError, ValueError), [r"\bk\b", "bfloat16", "float32"]),
    ("v_dtype", setting(v=lambda x: x.double()), (TypeError, ValueError), [r"\bv\b", "float64", "float32"]),
    ("q_not_a_tensor", setting(q=lambda x: x.tolist()), TypeError, [r"\bq\b", "list", "[Tt]ensor"]),
    ("k_none", setting(k=None), TypeError, [r"\bk\b", "None", "[Tt]ensor"]),
    ("q_last_stride", setting(q=lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)), ValueError,
     [r"\bq\b", "contiguous|stride"]),
    ("v_last_stride", setting(v=lambda x: x.repeat_interleave(2, -1)[..., ::2]), ValueError,
     [r"\bv\b", "2", "contiguous|stride"]),
    ("k_device", setting(k=lambda x: x.to("meta")), ValueError, [r"\bk\b", "meta", "cpu"]),
    ("indices_device", setting(block_indices=lambda x: x.to("meta")), ValueError, ["block_indices", "meta", "cpu"]),
    ("indices_rank", setting(block_indices=lambda x: x[..., 0]), ValueError, ["block_indices", "3"]),
    ("indices_batch", setting(block_indices=lambda x: x[:1]), ValueError, ["block_indices", "1", "2"]),
    ("indices_rows", setting(block_indices=lambda x: x[:, :29]), ValueError, ["block_indices", "29", "30"]),
    ("indices_heads", setting(block_indices=lambda x: x.repeat(1, 1, 2, 1)), ValueError, ["block_indices", "4", "2"]),
    ("indices_float", setting(block_indices=lambda x: x.float()), (TypeError, ValueError),
     ["block_indices", "float32", "int32"]),
    ("indices_int16", setting(block_indices=lambda x: x.short()), (TypeError, ValueError),
     ["block_indices", "int16", "int32"]),
    ("indices_list", setting(block_indices=lambda x: x.tolist()), TypeError, ["block_indices", "list"]),
    ("block_size_0", setting(block_size=0), ValueError, ["block_size", "0"]),
    ("block_size_negative", setting(block_size=-64), ValueError, ["block_size", "-64"]),
    ("block_size_float", setting(block_size=64.5), (TypeError, ValueError), ["block_size", "64.5|float"]),
    ("counts_shape", setting(block_counts=torch.zeros(2, 30, dtype=torch.int32)), ValueError, ["block_counts", "30"]),
    ("counts_heads", setting(block_counts=torch.zeros(2, 30, 4, dtype=torch.int32)), ValueError,
     ["block_counts", "4", "2"]),
    ("counts_float", setting(block_counts=torch.zeros(2, 30, 2)), (TypeError, ValueError),
     ["block_counts", "float32", "int32"]),
    ("count_float", setting(block_counts=1.5), (TypeError, ValueError), ["block_counts", "1.5|float"]),
    ("counts_device", setting(block_counts=torch.zeros(2, 30, 2, dtype=torch.int32, device="meta")), ValueError,
     ["block_counts", "meta"]),
    ("offset_shape", setting(q_offset=int32(1, 2, 3)), ValueError, ["q_offset", "3", "2"]),
    ("offset_rank", setting(q_offset=int32(1, 2)[None]), ValueError, ["q_offset", "2"]),
    ("offset_dtype", setting(q_offset=torch.zeros(2)), (TypeError, ValueError), ["q_offset", "float32", "int32"]),
    ("offset_float", setting(q_offset=0.5), (TypeError, ValueError), ["q_offset", "0.5|float"]),
    ("scale_string", setting(softmax_scale="1"), (TypeError, ValueError), ["softmax_scale"]),
    ("both_scales", setting(softmax_scale=1.0, scale=2.0), (TypeError, ValueError), [r"\bscale\b", "softmax_scale"]),
    ("backend_unknown", setting(backend="cudnn"), ValueError, ["backend", "cudnn", "reference"]),
    ("backend_sm80_on_cpu", setting(backend="sm80"), (ValueError, NotImplementedError), ["sm80", "cpu|CPU"]),
    ("batched_with_cu_seqlens", setting(cu_seqlens_q=int32(0, 30), cu_seqlens_k=int32(0, 50)), ValueError,
     [r"\bq\b", "4", "3"]),
]  # fmt: skip

PACKED_RULES = [
    ("packed_without_cu_seqlens", setting(cu_seqlens_q=None, cu_seqlens_k=None), ValueError, [r"\bq\b", "3", "4"]),
    ("only_cu_seqlens_q", setting(cu_seqlens_k=None), (ValueError, TypeError), ["cu_seqlens_k"]),
    ("only_cu_seqlens_k", setting(cu_seqlens_q=None), (ValueError, TypeError), ["cu_seqlens_q"]),
    ("cu_seqlens_int64", setting(cu_seqlens_q=lambda x: x.long()), (TypeError, ValueError),
     ["cu_seqlens_q", "int64", "int32"]),
    ("cu_seqlens_rank", setting(cu_seqlens_q=lambda x: x[None]), ValueError, ["cu_seqlens_q", "2", "1"]),
    ("cu_seqlens_empty", setting(cu_seqlens_q=int32(), cu_seqlens_k=int32()), ValueError, ["cu_seqlens", "0"]),
    ("cu_seqlens_disagree", setting(cu_seqlens_k=int32(0, 20, 50, 100)), ValueError, ["cu_seqlens_k", "4", "3"]),
    ("cu_seqlens_device", setting(cu_seqlens_q=lambda x: x.to("meta")), ValueError, ["cu_seqlens_q", "meta", "cpu"]),
    ("cu_seqlens_list", setting(cu_seqlens_q=lambda x: x.tolist()), TypeError, ["cu_seqlens_q", "list"]),
    ("cu_seqlens_descend", setting(cu_seqlens_q=int32(0, 40, 30)), ValueError, ["cu_seqlens_q", "40|30"]),
    ("cu_seqlens_negative", setting(cu_seqlens_k=int32(-1, 50, 100)), ValueError, ["cu_seqlens_k", "-1"]),
    ("cu_seqlens_past_the_end", setting(cu_seqlens_k=int32(0, 50, 101)), ValueError, ["cu_seqlens_k", "101", "100"]),
    ("packed_rows", setting(block_indices=lambda x: x[:59]), ValueError, ["block_indices", "59", "60"]),
    ("packed_v_rows", setting(v=lambda x: x[:99]), ValueError, [r"\bv\b", "99", "100"]),
    ("packed_offset", setting(q_offset=int32(1)), ValueError, ["q_offset", "1", "2"]),
    ("packed_counts", setting(block_counts=torch.zeros(2, 30, 2, dtype=torch.int32)), ValueError,
     ["block_counts", "30|3"]),
]  # fmt: skip


def params(rules: list) -> list:
    return [pytest.param(*rule[1:], id=rule[0]) for rule in rules]


def refuses(arguments: Arguments, exceptions: Any, patterns: list[str]) -> None:
    with pytest.raises(exceptions) as raised:
        selected_attention(**arguments)
    message = str(raised.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} not in {message!r}"


@pytest.mark.parametrize(("change", "exceptions", "patterns"), params(BATCHED_RULES))
def test_batched(change: Callable, exceptions: Any, patterns: list[str]):
    refuses(change(batched()), exceptions, patterns)


@pytest.mark.parametrize(("change", "exceptions", "patterns"), params(PACKED_RULES))
def test_packed(change: Callable, exceptions: Any, patterns: list[str]):
    refuses(change(packed()), exceptions, patterns)


@pytest.mark.parametrize(
    "rule", [pytest.param(r, id=r[0]) for r in BATCHED_RULES + PACKED_RULES if "backend" not in r[0]]
)
def test_the_reference_refuses_the_same(rule: tuple):
    """backend="reference" is the oracle of refusals too; what one accepts the other does."""
    _, change, exceptions, _ = rule
    arguments = packed() if rule in PACKED_RULES else batched()
    with pytest.raises(exceptions):
        selected_attention(**change(arguments), backend="reference")


def test_good_arguments_are_accepted():
    """The arguments that the rules start from, so that no refusal above is for another reason."""
    for arguments in (batched(), packed()):
        for backend in (None, "reference"):
            assert selected_attention(**arguments, backend=backend).shape == arguments["q"].shape
    assert selected_attention(**batched(), scale=0.5).shape == (2, 30, 4, 64)
    short = packed() | {"cu_seqlens_q": int32(0, 10, 30), "cu_seqlens_k": int32(0, 10, 40)}
    assert selected_attention(**short).shape == (60, 4, 64)


def test_positional_options_are_refused():
    with pytest.raises(TypeError):
        selected_attention(*batched().values(), 64)


@pytest.mark.parametrize("target", CPU)
def test_scale_is_an_alias(target: Target):
    arguments = {n: torch.randn(x.shape).to(target.dtype) if x.is_floating_point() else x for n, x in batched().items()}
    a, b = selected_attention(**arguments, scale=0.3), selected_attention(**arguments, softmax_scale=0.3)
    assert torch.equal(a, b)
    assert not torch.equal(a, selected_attention(**arguments))


@pytest.mark.parametrize("target", CUDA_BF16)
@pytest.mark.parametrize(("change", "exceptions", "patterns"), [
    pytest.param(setting(block_size=48), (ValueError, NotImplementedError), ["block_size", "48", "64"],
                 id="block_size"),
    pytest.param(setting(block_size=256), (ValueError, NotImplementedError), ["block_size", "256", "128"],
                 id="large_block"),
    pytest.param(setting(q=lambda x: x[..., :48], k=lambda x: x[..., :48], v=lambda x: x[..., :48]),
                 (ValueError, NotImplementedError), ["48", "128"], id="head_dim"),
    pytest.param(setting(v=lambda x: x.repeat(1, 1, 1, 2)), (ValueError, NotImplementedError), ["64", "128", "192"],
                 id="head_dims_unequal"),
    pytest.param(setting(q=lambda x: x.float(), k=lambda x: x.float(), v=lambda x: x.float()), REFUSALS,
                 ["float32", "bfloat16"], id="float32"),
    pytest.param(setting(q=lambda x: x.double(), k=lambda x: x.double(), v=lambda x: x.double()), REFUSALS,
                 ["float64|double", "bfloat16"], id="float64"),
    pytest.param(setting(k=lambda x: x.cpu()), ValueError, [r"\bk\b", "cpu", "cuda"], id="k_on_cpu"),
    pytest.param(setting(block_indices=lambda x: x.cpu()), ValueError, ["block_indices", "cpu", "cuda"],
                 id="lists_on_cpu"),
    pytest.param(setting(q_offset=int32(1, 2)), ValueError, ["q_offset", "cpu", "cuda"], id="offset_on_cpu"),
    pytest.param(setting(block_counts=torch.zeros(2, 30, 2, dtype=torch.int32)), ValueError,
                 ["block_counts", "cpu", "cuda"], id="counts_on_cpu"),
])  # fmt: skip
def test_cuda(target: Target, change: Callable, exceptions: Any, patterns: list[str]):
    refuses(change(batched("cuda", target.dtype)) | {"backend": target.backend}, exceptions, patterns)


@pytest.mark.parametrize("target", CUDA)
def test_cuda_cu_seqlens_on_cpu(target: Target):
    arguments = packed("cuda", target.dtype)
    arguments["cu_seqlens_k"] = arguments["cu_seqlens_k"].cpu()
    refuses(arguments | {"backend": target.backend}, ValueError, ["cu_seqlens_k", "cpu", "cuda"])


@pytest.mark.gpu
def test_sm90_elsewhere_is_refused():
    if torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("this GPU runs sm90 kernels")
    refuses(batched("cuda", torch.bfloat16) | {"backend": "sm90"}, (NotImplementedError, ValueError), ["sm90"])
