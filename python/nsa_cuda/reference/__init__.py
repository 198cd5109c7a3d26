"""The whole of Native Sparse Attention in readable PyTorch: any device, any floating dtype, nothing compiled.

The oracle of the tests (in float64), `backend="reference"`, and the definition to read. `nsa_cuda.reference.baseline`
holds what an ideal low-precision kernel computes.
"""

from nsa_cuda.reference import baseline
from nsa_cuda.reference.attention import (
    compressed_attention,
    native_sparse_attention,
    selected_attention,
    sliding_window_attention,
)
from nsa_cuda.reference.compression import (
    compress,
    compress_linear,
    compress_mean,
    compress_mlp,
    compress_weighted,
    compressed_cu_seqlens,
)
from nsa_cuda.reference.selection import select_blocks

__all__ = [
    "baseline",
    "compress",
    "compress_linear",
    "compress_mean",
    "compress_mlp",
    "compress_weighted",
    "compressed_attention",
    "compressed_cu_seqlens",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
