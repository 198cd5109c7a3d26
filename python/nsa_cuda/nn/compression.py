"""Compression of keys and values: the phi of the paper's eq. 7, as modules.

Every window of l tokens, one every d tokens, becomes one row. Input [B, Tk, Hkv, D] gives [B, Nc, Hkv, Do] with
Nc = (Tk - l) // d + 1 (0 if Tk < l); packed input [total_k, Hkv, D] with `cu_seqlens` gives [total_k // d, Hkv,
Do], packed per sequence at `nsa_cuda.compressed_cu_seqlens(cu_seqlens, l, d)`, zero from its last value on. Keys
are compressed before RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nsa_cuda import _checks
from nsa_cuda.nn._segments import Windows


class _Compression(Module):
    """kernel_size l, kernel_stride d (d divides l), optionally a learned position embedding [l, Hkv, D], first zero."""

    position: Parameter | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        position_embedding: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _checks.compression(kernel_size, kernel_stride)
        _checks.at_least(1, num_heads=num_heads, head_dim=head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        if position_embedding:
            shape = (kernel_size, num_heads, head_dim)
            self.position = Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("position", None)

    def reset_parameters(self) -> None:
        """Starting values, also of parameters made on the meta device."""
        if self.position is not None:
            torch.nn.init.zeros_(self.position)

    def _windows(self, x: Tensor, cu_seqlens: Tensor | None) -> Windows:
        _checks.compression_input(x, cu_seqlens, self.num_heads, self.head_dim)
        return Windows(self.kernel_size, self.kernel_stride, cu_seqlens)

    def _split(self, x: Tensor) -> Tensor:
        """[l, ...] -> [l / d, d, ...]: what belongs to each segment of a window."""
        return x.reshape(self.kernel_size // self.kernel_stride, self.kernel_stride, *x.shape[1:])

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"kernel_stride={self.kernel_stride}, position_embedding={self.position is not None}"
        )


class MeanCompression(_Compression):
    """The mean of each window. Do = D.

    Args:
        num_heads: Hkv.
        head_dim: D.
        kernel_size, kernel_stride: l and d in tokens; d divides l.
        position_embedding: add a learned [l, Hkv, D] to every window first.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        position_embedding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, kernel_size, kernel_stride, position_embedding, device, dtype)
        self.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        windows = self._windows(x, cu_seqlens)
        exact = x.dtype if x.dtype == torch.float64 else torch.float32
        sums = windows.segments(x).sum(-3, dtype=exact).unsqueeze(-3)  # [.., segments, 1, Hkv, D]
        per_window = self.kernel_size // self.kernel_stride
        parts = sums.expand(*sums.shape[:-3], per_window, *sums.shape[-2:]) / self.kernel_size
        if self.position is not None:
            parts = parts + self._split(self.position).sum(1, dtype=exact) / self.kernel_size
        return windows.zero_past_end(windows.sum(parts, x.shape[-3]), x.shape[-3]).to(x.dtype)


class WeightedCompression(_Compression):
    """A learned weighted sum of each window. Do = D.

    weight [l, Hkv] starts as the mean, 1 / l. Arguments as in `MeanCompression`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        position_embedding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, kernel_size, kernel_stride, position_embedding, device, dtype)
        self.weight = Parameter(torch.empty((kernel_size, num_heads), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.constant_(self.weight, 1.0 / self.kernel_size)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        windows = self._windows(x, cu_seqlens)
        weight = self._split(self.weight)  # [l / d, d, Hkv]
        parts = torch.einsum("...thd,cth->...chd", windows.segments(x), weight)
        if self.position is not None:
            parts = parts + torch.einsum("cthd,cth->chd", self._split(self.position), weight)
        return windows.zero_past_end(windows.sum(parts, x.shape[-3]), x.shape[-3])


class _WindowLinear(Module):
    """Linear map of flattened windows: weight [Hkv, l * D, Do] (token-major), bias [Hkv, Do]."""

    def __init__(
        self,
        num_heads: int,
        window_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty((num_heads, window_features, out_features), device=device, dtype=dtype))
        if bias:
            self.bias: Parameter | None = Parameter(torch.empty((num_heads, out_features), device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Linear: uniform within 1 / sqrt(inputs)."""
        bound = self.weight.shape[1] ** -0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, windows: Windows, position: Tensor | None) -> Tensor:
        """[B, T, Hkv, D] -> [B, Nc, Hkv, Do]; packed without B."""
        num_heads, features, out_features = self.weight.shape
        per_window = windows.kernel_size // windows.kernel_stride
        segments = windows.segments(x).transpose(-3, -2).flatten(-2)  # [.., segments, Hkv, d * D]
        # Columns of all l / d places in a window side by side: one product reads each token once.
        weight = self.weight.view(num_heads, per_window, features // per_window, out_features)
        wide = weight.transpose(1, 2).flatten(2)  # [Hkv, d * D, l / d * Do]
        parts = torch.einsum("...hi,hio->...ho", segments, wide)
        parts = parts.reshape(*parts.shape[:-1], per_window, out_features).transpose(-3, -2)
        out = windows.sum(parts, x.shape[-3])
        constant: Tensor | None = self.bias
        if position is not None:
            # The embedding is the same in every window, so it is one more bias.
            shift = torch.einsum("hi,hio->ho", position.transpose(0, 1).flatten(1), self.weight)
            constant = shift if constant is None else constant + shift
        return out if constant is None else out + constant

    def extra_repr(self) -> str:
        num_heads, features, out_features = self.weight.shape
        return f"num_heads={num_heads}, window_features={features}, out_features={out_features}"


class LinearCompression(_Compression):
    """A learned linear map of each flattened window, one per kv head.

    linear.weight [Hkv, l * D, Do] (rows ordered by token), linear.bias [Hkv, Do].

    Args:
        out_dim: Do; None means head_dim.
        bias: learn a bias.
        The rest: as in `MeanCompression`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        out_dim: int | None = None,
        bias: bool = True,
        position_embedding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, kernel_size, kernel_stride, position_embedding, device, dtype)
        self.linear = _WindowLinear(num_heads, kernel_size * head_dim, out_dim or head_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.linear.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        windows = self._windows(x, cu_seqlens)
        return windows.zero_past_end(self.linear(x, windows, self.position), x.shape[-3])


class MLPCompression(_Compression):
    """The paper's phi: a two-layer MLP with GELU on each flattened window, with its intra-block position embedding.

    linear.weight [Hkv, l * D, hidden] (rows ordered by token), linear.bias [Hkv, hidden], weight2 [Hkv, hidden, Do],
    bias2 [Hkv, Do].

    Args:
        hidden_dim: hidden units; None means 4 * head_dim.
        out_dim: Do; None means head_dim.
        bias: learn biases.
        The rest: as in `MeanCompression`; here position_embedding is on by default.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        position_embedding: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, kernel_size, kernel_stride, position_embedding, device, dtype)
        hidden, out = hidden_dim or 4 * head_dim, out_dim or head_dim
        self.linear = _WindowLinear(num_heads, kernel_size * head_dim, hidden, bias, device, dtype)
        self.weight2 = Parameter(torch.empty((num_heads, hidden, out), device=device, dtype=dtype))
        if bias:
            self.bias2: Parameter | None = Parameter(torch.empty((num_heads, out), device=device, dtype=dtype))
        else:
            self.register_parameter("bias2", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.linear.reset_parameters()
        bound = self.weight2.shape[1] ** -0.5
        torch.nn.init.uniform_(self.weight2, -bound, bound)
        if self.bias2 is not None:
            torch.nn.init.zeros_(self.bias2)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        windows = self._windows(x, cu_seqlens)
        hidden = torch.nn.functional.gelu(self.linear(x, windows, self.position))
        out = torch.einsum("...hi,hio->...ho", hidden, self.weight2)
        out = out if self.bias2 is None else out + self.bias2
        return windows.zero_past_end(out, x.shape[-3])
