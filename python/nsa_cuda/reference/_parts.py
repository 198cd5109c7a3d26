"""The parts of a call, each with the keys that its rows see: one function per operation."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from nsa_cuda import _checks
from nsa_cuda.reference._layout import Part, QOffset, batched_part, num_rows, packed_parts, sanitised, token_parts
from nsa_cuda.reference._visibility import CompressedKeys, SelectedKeys, WindowKeys
from nsa_cuda.reference.compression import compressed_cu_seqlens, num_compressed


def selected_parts(
    q: Tensor,
    k: Tensor,
    block_indices: Tensor,
    block_size: int,
    block_counts: int | Tensor | None,
    causal: bool,
    q_offset: QOffset,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> list[tuple[Part, SelectedKeys]]:
    """Each part with the keys its rows selected."""
    parts = []
    for part in token_parts(q, k, q_offset, cu_seqlens_q, cu_seqlens_k):
        counts = part.q(block_counts) if isinstance(block_counts, Tensor) else block_counts
        parts.append((part, SelectedKeys.from_lists(part, part.q(block_indices), counts, block_size, causal)))
    return parts


def compressed_parts(
    q: Tensor,
    k_cmp: Tensor,
    kernel_size: int,
    kernel_stride: int,
    seqlen_k: int | None,
    q_offset: QOffset,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
) -> list[tuple[Part, CompressedKeys]]:
    """Checks q and k_cmp; each part with the compressed keys its rows see. part.k cuts k_cmp, seqlen_k is in tokens."""
    _checks.compression(kernel_size, kernel_stride)
    packed = _checks.packing(q, cu_seqlens_q, cu_seqlens_k)
    _checks.query_and_key(q, k_cmp, "k_cmp", packed)
    _checks.head_sizes(q, k_cmp, "k_cmp")
    _checks.q_offset(q_offset, q, _checks.batch_size(q, cu_seqlens_q))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        tokens = _checks.compressed_length(seqlen_k, q.shape[1], k_cmp.shape[1], kernel_size, kernel_stride)
        parts = [batched_part(q.shape[1], tokens, q_offset)]
    else:
        token_offsets = sanitised(cu_seqlens_k)
        lengths = [stop - start for start, stop in pairwise(token_offsets)]
        row_offsets = sanitised(compressed_cu_seqlens(cu_seqlens_k, kernel_size, kernel_stride), k_cmp.shape[0])
        parts = packed_parts(sanitised(cu_seqlens_q, q.shape[0]), row_offsets, lengths, q_offset)
    result = []
    for part in parts:
        number = num_compressed(part.seqlen_k, kernel_size, kernel_stride)
        if part.k_rows is not None:
            number = min(number, part.k_rows.stop - part.k_rows.start)
        result.append(
            (part, CompressedKeys(part, num_rows(part, q), number, kernel_size, kernel_stride, causal, q.device))
        )
    return result


def window_parts(
    q: Tensor,
    k: Tensor,
    window_size: int,
    causal: bool,
    q_offset: QOffset,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> list[tuple[Part, WindowKeys]]:
    """Each part with the windows of its rows."""
    window_size = min(window_size, 1 << 60)  # positions and their sums with w fit into int64
    parts = token_parts(q, k, q_offset, cu_seqlens_q, cu_seqlens_k)
    return [(part, WindowKeys(part, num_rows(part, q), window_size, causal, q.device)) for part in parts]
