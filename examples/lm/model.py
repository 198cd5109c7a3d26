"""A small byte-level transformer whose attention is either NSA or dense; everything else is equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nsa_cuda
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    layers: int = 2
    width: int = 128
    heads: int = 4  # Hq
    kv_heads: int = 1  # Hkv
    head_dim: int = 32  # Dk = Dv
    kernel_size: int = 16  # l, bytes behind one compressed key
    kernel_stride: int = 8  # d
    block_size: int = 32  # l', bytes in one selected block
    topk: int = 8  # n, blocks a query selects
    window_size: int = 64  # w


def rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates the halves of ``x`` ``[B, T, H, D]`` by angles that grow with ``positions`` ``[T]``."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None, None] * frequencies  # [T, 1, half]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().split(half, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class _Projections(nn.Module):
    """What both attentions share: q, k, v in, o out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, T, width]`` -> q ``[B, T, Hq, D]``, k and v ``[B, T, Hkv, D]``, all without RoPE; q and k normed."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        # Norms keep the scores small while the learning rate is high; the dtype is v's under autocast too.
        dims = (self.config.head_dim,)
        return F.rms_norm(q, dims).to(v.dtype), F.rms_norm(k, dims).to(v.dtype), v


class DenseAttention(_Projections):
    """Causal grouped-query attention over all keys (torch's scaled_dot_product_attention)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        positions = torch.arange(x.shape[1], device=x.device)
        q, k = rope(q, positions), rope(k, positions)
        group = self.config.heads // self.config.kv_heads
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2))


class SparseAttention(_Projections):
    """NSA: o = g_cmp o_cmp + g_slc o_slc + g_win o_win, the gates a sigmoid of a linear map of x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sizes: dict[str, Any] = {
            "kernel_size": config.kernel_size,
            "kernel_stride": config.kernel_stride,
            "hidden_dim": config.head_dim,
        }
        self.compress_k = nsa_cuda.nn.MLPCompression(config.kv_heads, config.head_dim, **sizes)
        self.compress_v = nsa_cuda.nn.MLPCompression(config.kv_heads, config.head_dim, **sizes)
        self.gates = nn.Linear(config.width, config.heads * 3)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v of the selected and window branches, k_cmp and v_cmp ``[B, Nc, Hkv, D]``."""
        q, k, v = self.project(x)
        positions = torch.arange(x.shape[1], device=x.device)
        # Compression reads k before RoPE; compressed key i then stands at the first byte of its window, i * d.
        k_cmp, v_cmp = self.compress_k(k), self.compress_v(v)
        k_cmp = rope(k_cmp, torch.arange(k_cmp.shape[1], device=x.device) * self.config.kernel_stride)
        return rope(q, positions), rope(k, positions), v, k_cmp, v_cmp

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, k_cmp, v_cmp = self._inputs(x)
        gates = torch.sigmoid(self.gates(x)).unflatten(-1, (self.config.heads, 3))  # [B, T, Hq, 3]
        c = self.config
        o = nsa_cuda.native_sparse_attention(
            q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, kernel_size=c.kernel_size, kernel_stride=c.kernel_stride,
            block_size=c.block_size, topk=c.topk, window_size=c.window_size,
        )  # fmt: skip
        return self.out(o.flatten(2))

    @torch.no_grad()
    def selected_blocks(self, x: Tensor) -> Tensor:
        """The block lists that ``forward`` uses: int32 ``[B, T, Hkv, n]``, padded with -1."""
        q, _, _, k_cmp, v_cmp = self._inputs(x)
        sizes: dict[str, Any] = {"kernel_size": self.config.kernel_size, "kernel_stride": self.config.kernel_stride}
        _, lse = nsa_cuda.compressed_attention(q, k_cmp, v_cmp, **sizes, return_lse=True)
        blocks: Tensor = nsa_cuda.select_blocks(
            q, k_cmp, lse, **sizes, block_size=self.config.block_size, topk=self.config.topk
        )
        return blocks


class Layer(nn.Module):
    """Attention and a two-layer MLP, each after a norm and added to the stream ``[B, T, width]``."""

    def __init__(self, config: ModelConfig, attention: SparseAttention | DenseAttention) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.attention = attention
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        y: Tensor = x + self.down(F.relu(self.up(self.norm_mlp(x))).square())
        return y


class ByteEmbedding(nn.Module):
    """A byte and its three predecessors, each through a table of its own, summed.

    Letters say little alone: with their neighbours the first layer starts from something like syllables.
    """

    def __init__(self, width: int, reach: int = 4) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(256, width) for _ in range(reach))
        for table in self.tables:
            nn.init.normal_(table.weight, std=reach**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """bytes ``[B, T]`` -> ``[B, T, width]``; before the start stand zero bytes."""
        x = self.tables[0](tokens)
        for distance, table in enumerate(list(self.tables)[1:], start=1):
            x = x + table(F.pad(tokens, (distance, 0))[:, : tokens.shape[1]])
        return x


class ByteModel(nn.Module):
    """Next-byte prediction: bytes ``[B, T]`` -> logits ``[B, T, 256]``."""

    def __init__(self, config: ModelConfig, sparse: bool) -> None:
        super().__init__()
        self.config = config
        attention = SparseAttention if sparse else DenseAttention
        self.embed = ByteEmbedding(config.width)
        self.layers = nn.ModuleList(Layer(config, attention(config)) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Branches and the head start at zero: the first loss is 8 bits and a high learning rate is safe."""
        nn.init.zeros_(self.head.weight)
        for layer in self._layers():
            nn.init.zeros_(layer.down.weight)
            nn.init.zeros_(layer.attention.out.weight)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def selected_blocks(self, tokens: Tensor, layer_index: int = -1) -> Tensor:
        """Block lists of one layer for ``tokens`` ``[B, T]``: int32 ``[B, T, Hkv, n]`` (sparse models only)."""
        layers = self._layers()
        chosen = layers[layer_index]
        if not isinstance(chosen.attention, SparseAttention):
            raise TypeError("only a sparse model selects blocks")
        x = self.embed(tokens)
        for layer in layers[: layers.index(chosen)]:
            x = layer(x)
        return chosen.attention.selected_blocks(chosen.norm_attention(x))
