"""Modules of Native Sparse Attention: compressions of keys and values."""

from nsa_cuda.nn.compression import LinearCompression, MeanCompression, MLPCompression, WeightedCompression

__all__ = ["LinearCompression", "MLPCompression", "MeanCompression", "WeightedCompression"]
