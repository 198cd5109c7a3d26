"""What Python checks: tensors (rank, dtype, device, agreement). The C++ library checks sizes and support.

TypeError: not a tensor, or a dtype that can't be. ValueError: everything else. Messages name the argument, what it
was and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int32, torch.int64)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def given_scale(softmax_scale: float | None, scale: float | None) -> float | None:
    """The scale that was given under either name; None stands for `default_scale`."""
    if scale is not None:
        if softmax_scale is not None:
            raise ValueError(f"scale: an alias of softmax_scale, give one of them; was {scale} beside {softmax_scale}")
        softmax_scale = scale
    if softmax_scale is not None and not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: must be a number or None, was {type(softmax_scale).__name__}")
    return softmax_scale


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(max(head_dim, 1))


def softmax_scale(softmax_scale: float | None, scale: float | None, head_dim: int) -> float:
    """The scale to use."""
    given = given_scale(softmax_scale, scale)
    return default_scale(head_dim) if given is None else float(given)


def _tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, was {type(x).__name__}")


def tensors(**arguments: object) -> None:
    for name, x in arguments.items():
        _tensor(name, x)


def _dims(name: str, x: Tensor, letters: str, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name}: must have {rank} dims, {letters}; had {x.dim()}, {list(x.shape)}")


def integer(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name}: must be an int, was {value!r} ({type(value).__name__})")


def _device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: must be on q's device {q.device}, was on {x.device}")


def _shape(name: str, x: Tensor, letters: str, expected: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: must be {letters} = {list(expected)}, was {list(x.shape)}")


def attention_tensors(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, suffix: str = ""
) -> bool:
    """q, k, v and the sequence offsets of a batched or packed call agree; `suffix` names k and v. True if packed."""
    k_name, v_name = "k" + suffix, "v" + suffix
    tensors(**{"q": q, k_name: k, v_name: v})
    packed = packing(q, cu_seqlens_q, cu_seqlens_k)
    query_and_key(q, k, k_name, packed)
    if v.dtype != q.dtype:
        raise TypeError(f"{v_name}: must have q's dtype {q.dtype}, was {v.dtype}")
    _device(v_name, v, q)
    letters = "[total_k, Hkv, Dv]" if packed else "[B, Tk, Hkv, Dv]"
    _dims(v_name, v, letters, k.dim())
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{v_name}: must be {letters} = {_text(*k.shape[:-1], 'Dv')} like {k_name}, was {list(v.shape)}"
        )
    return packed


def query_and_key(q: Tensor, k: Tensor, k_name: str, packed: bool) -> None:
    """q and k agree in rank, dtype, device, batch and head dim."""
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q: dtype must be float64, float32, bfloat16 or float16, was {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"{k_name}: must have q's dtype {q.dtype}, was {k.dtype}")
    _device(k_name, k, q)
    rank = 3 if packed else 4
    _dims("q", q, "[total_q, Hq, Dk] with cu_seqlens" if packed else "[B, Tq, Hq, Dk] without cu_seqlens", rank)
    letters = "[total_k, Hkv, Dk]" if packed else "[B, Tk, Hkv, Dk]"
    _dims(k_name, k, letters, rank)
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        expected = _text("total_k", "Hkv", q.shape[-1]) if packed else _text(q.shape[0], "Tk", "Hkv", q.shape[-1])
        raise ValueError(f"{k_name}: must be {letters} = {expected} to match q, was {list(k.shape)}")


def _text(*sizes: object) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def head_sizes(q: Tensor, k: Tensor, k_name: str = "k", v: Tensor | None = None) -> None:
    """Hq a multiple of Hkv, no empty head. For what runs without the C++ library, which checks this itself."""
    num_heads_q, num_heads_k = q.shape[-2], k.shape[-2]
    if num_heads_k < 1 or num_heads_q < 1 or num_heads_q % num_heads_k:
        raise ValueError(f"{k_name}: Hkv must divide q's Hq = {num_heads_q}, both at least 1, was {num_heads_k}")
    for name, x in (("Dk", q), ("Dv", q if v is None else v)):
        if x.shape[-1] < 1:
            raise ValueError(f"head dim {name}: must be at least 1, was {x.shape[-1]}")


def packing(q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> bool:
    """Both offsets or none, int32 [B + 1] on q's device. True if packed."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return False
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: packed calls take cu_seqlens_q and cu_seqlens_k together, was None")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        cu_seqlens(name, x)
        _device(name, x, q)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k: must be [B + 1] = [{len(cu_seqlens_q)}] like cu_seqlens_q, was [{len(cu_seqlens_k)}]"
        )
    return True


def cu_seqlens(name: str, x: Tensor) -> None:
    """int32 [B + 1]."""
    _tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: dtype must be int32, was {x.dtype}")
    _dims(name, x, "[B + 1]", 1)
    if len(x) < 1:
        raise ValueError(f"{name}: must be [B + 1] with B >= 0, was [0]")


def cu_seqlens_values(name: str, x: Tensor, total: int | None) -> None:
    """Ascending offsets inside [0, total] (total None: not known). On a GPU reading them synchronises."""
    values = x.tolist()
    for i, value in enumerate(values):
        if value < 0 or (total is not None and value > total):
            rows = "" if total is None else f" and at most {total}, the number of rows"
            raise ValueError(f"{name}: offsets must be at least 0{rows}; {name}[{i}] was {value}")
        if i and value < values[i - 1]:
            raise ValueError(f"{name}: offsets must ascend; {name}[{i - 1}] was {values[i - 1]}, {name}[{i}] {value}")


def q_offset(q_offset: int | Tensor | None, q: Tensor, batch: int) -> None:
    """An int, or int32 [B] on q's device."""
    if q_offset is None or isinstance(q_offset, int):
        return
    if not isinstance(q_offset, Tensor):
        raise TypeError(f"q_offset: must be an int or an int32 tensor [B], was {q_offset!r}")
    if q_offset.dtype != torch.int32:
        raise TypeError(f"q_offset: must be an int or an int32 tensor [B], dtype was {q_offset.dtype}")
    _device("q_offset", q_offset, q)
    _shape("q_offset", q_offset, "[B]", [batch])


def batch_size(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1


def block_lists(q: Tensor, k: Tensor, block_indices: Tensor, block_counts: int | Tensor | None) -> None:
    """block_indices int32 or int64 [B, Tq, Hkv, S], block_counts an int or integers [B, Tq, Hkv]; packed without B."""
    _tensor("block_indices", block_indices)
    if block_indices.dtype not in INTEGER_DTYPES:
        raise TypeError(f"block_indices: dtype must be int32 or int64, was {block_indices.dtype}")
    _device("block_indices", block_indices, q)
    rows = (*q.shape[:-2], k.shape[-2])
    letters = "total_q, Hkv" if q.dim() == 3 else "B, Tq, Hkv"
    _dims("block_indices", block_indices, f"[{letters}, S]", len(rows) + 1)
    if tuple(block_indices.shape[:-1]) != rows:
        raise ValueError(
            f"block_indices: must be [{letters}, S] = {_text(*rows, 'S')}, was {list(block_indices.shape)}"
        )
    if block_counts is None or isinstance(block_counts, int):
        return
    if not isinstance(block_counts, Tensor):
        raise TypeError(f"block_counts: must be an int or an int32 or int64 tensor, was {block_counts!r}")
    if block_counts.dtype not in INTEGER_DTYPES:
        raise TypeError(f"block_counts: must be an int or an int32 or int64 tensor, dtype was {block_counts.dtype}")
    _device("block_counts", block_counts, q)
    _shape("block_counts", block_counts, f"[{letters}]", rows)


def same_tokens(name: str, x: Tensor, k: Tensor) -> None:
    """Keys of two branches come from the same tokens."""
    if x.shape[-3] != k.shape[-3]:
        raise ValueError(f"{name}: must have k's {k.shape[-3]} rows, had {x.shape[-3]}")


def last_dim_contiguous(**tensors: Tensor) -> None:
    """The kernels read vectors along the last dim; every other stride is free."""
    for name, x in tensors.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: the last dim must be contiguous, its stride was {x.stride(-1)}")


def at_least(minimum: int, **sizes: int) -> None:
    integer(**sizes)
    for name, value in sizes.items():
        if value < minimum:
            raise ValueError(f"{name}: must be at least {minimum}, was {value}")


def compression(kernel_size: int, kernel_stride: int) -> None:
    """l and d: d divides l."""
    at_least(1, kernel_size=kernel_size, kernel_stride=kernel_stride)
    if kernel_size % kernel_stride:
        raise ValueError(f"kernel_stride: must divide kernel_size = {kernel_size}, was {kernel_stride}")


def selection(block_size: int, kernel_stride: int, topk: int, init_blocks: int, local_blocks: int) -> None:
    """l', d and the budget: d divides l', the forced blocks fit into topk."""
    at_least(1, block_size=block_size, topk=topk)
    at_least(0, init_blocks=init_blocks, local_blocks=local_blocks)
    if block_size % kernel_stride:
        raise ValueError(f"kernel_stride: must divide block_size = {block_size}, was {kernel_stride}")
    if init_blocks + local_blocks > topk:
        raise ValueError(
            f"topk: must be at least init_blocks + local_blocks = {init_blocks} + {local_blocks}, was {topk}"
        )


def compressed_length(seqlen_k: int | None, seqlen_q: int, rows: int, kernel_size: int, kernel_stride: int) -> int:
    """Tokens behind k_cmp of a batched call: seqlen_k, or Tq where that agrees with k_cmp's number of rows."""
    tokens = seqlen_q if seqlen_k is None else seqlen_k
    at_least(0, seqlen_k=tokens)
    number = (tokens - kernel_size) // kernel_stride + 1 if tokens >= kernel_size else 0
    if seqlen_k is None and number != rows:
        raise ValueError(
            f"seqlen_k: must be given where k_cmp doesn't come from Tq = {seqlen_q} tokens (which give {number} rows), "
            f"was None with {rows} rows"
        )
    if rows < number:
        raise ValueError(f"k_cmp: must have at least {number} rows for seqlen_k = {tokens} tokens, had {rows}")
    return tokens


def query_lse(lse: Tensor, q: Tensor) -> None:
    """lse of the compressed branch: floating, [B, Tq, Hq] or [total_q, Hq]."""
    _tensor("lse", lse)
    if lse.dtype != lse_dtype(q.dtype):
        raise TypeError(f"lse: dtype must be {lse_dtype(q.dtype)} for {q.dtype} inputs, was {lse.dtype}")
    _device("lse", lse, q)
    _shape("lse", lse, "[total_q, Hq]" if q.dim() == 3 else "[B, Tq, Hq]", q.shape[:-1])


def gates(gates: Tensor, q: Tensor) -> None:
    """[B, Tq, Hq, 3] or [total_q, Hq, 3], floating."""
    _tensor("gates", gates)
    if gates.dtype not in FLOAT_DTYPES:
        raise TypeError(f"gates: dtype must be float64, float32, bfloat16 or float16, was {gates.dtype}")
    _device("gates", gates, q)
    letters = "[total_q, Hq, 3]" if q.dim() == 3 else "[B, Tq, Hq, 3]"
    _shape("gates", gates, letters, [*q.shape[:-1], 3])


def compression_input(x: Tensor, offsets: Tensor | None, num_heads: int, head_dim: int) -> None:
    """x [B, T, Hkv, D], or [total, Hkv, D] with int32 offsets [B + 1] on its device."""
    _tensor("x", x)
    letters = "[B, T, Hkv, D] without cu_seqlens" if offsets is None else "[total, Hkv, D] with cu_seqlens"
    _dims("x", x, letters, 4 if offsets is None else 3)
    if tuple(x.shape[-2:]) != (num_heads, head_dim):
        raise ValueError(f"x: Hkv and D must be {num_heads} and {head_dim}, were {x.shape[-2]} and {x.shape[-1]}")
    if offsets is not None:
        cu_seqlens("cu_seqlens", offsets)
        if offsets.device != x.device:
            raise ValueError(f"cu_seqlens: must be on x's device {x.device}, was on {offsets.device}")


def not_one_of(argument: str, value: object, allowed: Iterable[object]) -> ValueError:
    return ValueError(f"{argument}: must be one of {', '.join(map(repr, allowed))}, was {value!r}")


def backend(name: str | None, known: Collection[str | None], q: Tensor) -> None:
    """One of the known backends, which run on cpu and cuda, or "reference"."""
    if name != "reference" and name not in known:
        raise not_one_of("backend", name, (*known, "reference"))
    if name != "reference" and q.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"q: compiled kernels run on cpu and cuda, was on {q.device}; backend='reference' runs there"
        )


def same_heads(suffix: str, k_branch: Tensor, v_branch: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys and values of a branch have the heads of k and the head dim of v."""
    for name, x, y, letters in (("k", k_branch, k, "Hkv and Dk"), ("v", v_branch, v, "Hkv and Dv")):
        if x.shape[-2:] != y.shape[-2:]:
            raise ValueError(
                f"{name}{suffix}: {letters} must be {name}'s {list(y.shape[-2:])}, were {list(x.shape[-2:])}"
            )


def recompute(value: object) -> None:
    """Which branch outputs of native_sparse_attention the backward computes again."""
    if value not in (False, True, "window"):
        raise ValueError(f'recompute: must be False, "window" or True, was {value!r}')
