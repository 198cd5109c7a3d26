"""A small byte-level transformer whose attention is either NSA or dense; everything else is equal."""

from __future__ import annotations

from dataclasses import dataclass

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
    rotary_dim: int | None = None  # dims of a head that RoPE turns; None: all


def rope(x: Tensor, positions: Tensor, rotary_dim: int | None, base: float = 10000.0) -> Tensor:
    """Turns the first ``rotary_dim`` dims of ``x`` ``[B, T, H, D]`` by angles that grow with ``positions`` ``[T]``."""
    half = (rotary_dim or x.shape[-1]) // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None, None] * frequencies  # [T, 1, half]
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class DenseAttention(nn.Module):
    """Causal grouped-query attention over all keys (torch's scaled_dot_product_attention)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(config.head_dim), nn.RMSNorm(config.head_dim)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        positions = torch.arange(x.shape[1], device=x.device)
        # The dtype is v's under autocast too, which takes norms to float32.
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        q, k = (rope(y, positions, self.config.rotary_dim).to(v.dtype) for y in (q, k))
        group = self.config.heads // self.config.kv_heads
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return y


def sparse_attention(config: ModelConfig) -> nsa_cuda.nn.NativeSparseAttention:
    """NSA with one k and v for all branches, so that it has the size of its dense twin but for compression and gates.

    Norms keep the scores small while the learning rate is high.
    """
    return nsa_cuda.nn.NativeSparseAttention(
        config.width, config.heads, config.kv_heads, head_dim=config.head_dim, kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride, block_size=config.block_size, topk=config.topk,
        window_size=config.window_size, rotary_dim=config.rotary_dim, shared_kv=True, qk_norm=True,
        compression_options={"hidden_dim": config.head_dim},
    )  # fmt: skip


class Layer(nn.Module):
    """Attention and a two-layer MLP, each after a norm and added to the stream ``[B, T, width]``."""

    def __init__(self, config: ModelConfig, attention: nsa_cuda.nn.NativeSparseAttention | DenseAttention) -> None:
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
        attention = sparse_attention if sparse else DenseAttention
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
            nn.init.zeros_(layer.attention.o_proj.weight)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits of the bytes that follow: [B, T, 256], or [B, len(at), 256] after the positions ``at`` alone."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x if at is None else x[:, at]))
        return logits

    @torch.no_grad()
    def selected_blocks(self, tokens: Tensor, layer_index: int = -1) -> Tensor:
        """Block lists of one layer for ``tokens`` ``[B, T]``: int32 ``[B, T, Hkv, n]`` (sparse models only)."""
        layers = self._layers()
        chosen = layers[layer_index]
        if not isinstance(chosen.attention, nsa_cuda.nn.NativeSparseAttention):
            raise TypeError("only a sparse model selects blocks")
        x = self.embed(tokens)
        for layer in layers[: layers.index(chosen)]:
            x = layer(x)
        return chosen.attention.selected_blocks(chosen.norm_attention(x))
