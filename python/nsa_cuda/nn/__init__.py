"""Modules of Native Sparse Attention: the layer, and compressions of keys and values."""

from nsa_cuda.nn.compression import LinearCompression, MeanCompression, MLPCompression, WeightedCompression
from nsa_cuda.nn.layer import NativeSparseAttention

__all__ = [
    "LinearCompression",
    "MLPCompression",
    "MeanCompression",
    "NativeSparseAttention",
    "WeightedCompression",
]
