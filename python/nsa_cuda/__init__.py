"""Native Sparse Attention (arXiv 2502.11089): block-sparse attention with gradients, on CUDA GPUs and CPUs."""

from importlib import metadata

from nsa_cuda import nn, reference
from nsa_cuda.attention import (
    compressed_attention,
    compressed_cu_seqlens,
    debug_checks,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa_cuda.kernels import selected_attention_kernels

try:
    __version__ = metadata.version("nsa_cuda")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

__all__ = [
    "compressed_attention",
    "compressed_cu_seqlens",
    "debug_checks",
    "native_sparse_attention",
    "nn",
    "reference",
    "select_blocks",
    "selected_attention",
    "selected_attention_kernels",
    "sliding_window_attention",
]
