"""NativeSparseAttention: the attention layer of a transformer, from hidden states to hidden states."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, RMSNorm

from nsa_cuda import _checks
from nsa_cuda.attention import compressed_attention, native_sparse_attention, select_blocks
from nsa_cuda.nn._positions import compressed_positions, rotate, rotation, token_positions
from nsa_cuda.nn.compression import LinearCompression, MeanCompression, MLPCompression, WeightedCompression

_COMPRESSIONS: dict[str, Any] = {
    "mean": MeanCompression,
    "weighted": WeightedCompression,
    "linear": LinearCompression,
    "mlp": MLPCompression,
}


class Branches(NamedTuple):
    """What `native_sparse_attention` reads, rotated; without B where packed. k_win and v_win are None where shared."""

    q: Tensor  # [B, T, Hq, Dk]
    k: Tensor  # [B, T, Hkv, Dk]
    v: Tensor  # [B, T, Hkv, Dv]
    k_cmp: Tensor  # [B, Nc, Hkv, Dk]
    v_cmp: Tensor  # [B, Nc, Hkv, Dv]
    k_win: Tensor | None
    v_win: Tensor | None


class NativeSparseAttention(Module):
    """Native Sparse Attention as a layer (the paper's section 3): x [B, T, dim] -> [B, T, dim].

    With h a query head, its kv head h // G and the branches c of (cmp, slc, win):

        q = R(x Wq),  k_c = R(x Wk_c),  v_c = x Wv_c          R turns by the position (RoPE)
        k_cmp = R(phi_k(x Wk_cmp)),  v_cmp = phi_v(x Wv_cmp)  phi maps l tokens, every d, to one row (eq. 7)
        g = sigmoid(x Wg + b)                                 [B, T, Hq, 3]
        y = (sum over c of g_c * Attention_c(q, k_c, v_c)) Wo  (eq. 5)

    phi_k reads keys before RoPE; compressed key i then stands at position i d, its first token. The selected branch
    attends to the `topk` blocks that `nsa_cuda.select_blocks` finds (eqs. 8-12), the window branch to the last
    `window_size` tokens. `rotate_dim` r of a head's dims turn: element i < r / 2 together with i + r / 2, by the angle
    position * rotary_base^(-2 i / r).

    Args:
        dim: width of x and of the result.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq; None means Hq.
        head_dim: Dk; None means dim / Hq. On CUDA (Dk, Dv) is one of (64, 64), (128, 128), (192, 128), (256, 256).
        head_dim_v: Dv; None means Dk.
        kernel_size, kernel_stride: l and d of the compression, in tokens; d divides l and block_size.
        block_size, topk, init_blocks, local_blocks: l' in tokens, n and the forced blocks inside it of the selection.
        window_size: w, in tokens.
        shared_kv: one k and one v for all three branches; otherwise each has projections of its own, as in the paper.
        compression: "mlp" (the paper's), "linear", "weighted" or "mean", a module of `nsa_cuda.nn` each for k and v.
        compression_options: more arguments of that module: position_embedding, and hidden_dim, bias where it has them.
        bias: biases of the projections to q, k, v and of the output projection.
        gate_bias: a bias of the gates, which starts at zero: every branch at one half.
        qk_norm: RMSNorm with learned weights over each head of q and of k, before compression and RoPE.
        rotary_base: None means no RoPE.
        rotary_dim: r, even; None means Dk.
        softmax_scale: None means 1 / sqrt(Dk).
        causal: False lets every token see all others.
        recompute: False, "window" or True: branch outputs that the backward computes again instead of keeping them;
            `nsa_cuda.native_sparse_attention` says what is kept.
        backend: as in `nsa_cuda.selected_attention`, for all branches.
        device, dtype: of the parameters. On the meta device call `reset_parameters` after `to_empty`.

    Raises:
        ValueError, TypeError naming the argument, what it was and what is allowed: here for sizes that don't fit
        together, in forward for a wrong x or cu_seqlens. NotImplementedError where no kernel exists.

    Parameters can be float32 under torch.autocast, or of a half type themselves. There are no buffers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window_size: int = 512,
        shared_kv: bool = False,
        compression: Literal["mean", "weighted", "linear", "mlp"] = "mlp",
        compression_options: dict[str, Any] | None = None,
        bias: bool = False,
        gate_bias: bool = True,
        qk_norm: bool = False,
        rotary_base: float | None = 10000.0,
        rotary_dim: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = True,
        recompute: bool | Literal["window"] = False,
        backend: Literal["reference", "cpu", "sm80", "sm90"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _checks.at_least(1, dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, window_size=window_size)
        _checks.compression(kernel_size, kernel_stride)
        _checks.selection(block_size, kernel_stride, topk, init_blocks, local_blocks)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: must divide num_heads = {num_heads}, was {num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"head_dim: must be given where num_heads = {num_heads} doesn't divide dim = {dim}")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.head_dim_v = self.head_dim if head_dim_v is None else head_dim_v
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        _checks.at_least(1, head_dim=self.head_dim, head_dim_v=self.head_dim_v)
        if rotary_base is not None and (self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim: must be even and from 0 to head_dim = {self.head_dim}, was {self.rotary_dim}"
            )
        if compression not in _COMPRESSIONS:
            raise ValueError(f"compression: must be one of {', '.join(_COMPRESSIONS)}, was {compression!r}")
        self.kernel_size, self.kernel_stride, self.block_size = kernel_size, kernel_stride, block_size
        self.topk, self.init_blocks, self.local_blocks = topk, init_blocks, local_blocks
        self.window_size, self.causal, self.shared_kv = window_size, causal, shared_kv
        self.rotary_base, self.softmax_scale = rotary_base, softmax_scale
        self.recompute: bool | Literal["window"] = recompute
        self.backend: Literal["reference", "cpu", "sm80", "sm90"] | None = backend

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, num_heads * self.head_dim, bias=bias, **made)
        # One product per branch: a view of a product that all share would keep the whole of it for the backward.
        for branch in ("kv",) if shared_kv else ("cmp", "slc", "win"):
            self.add_module(self._name("k", branch), Linear(dim, num_kv_heads * self.head_dim, bias=bias, **made))
            self.add_module(self._name("v", branch), Linear(dim, num_kv_heads * self.head_dim_v, bias=bias, **made))
        sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, **(compression_options or {}), **made}
        self.compress_k = _COMPRESSIONS[compression](num_kv_heads, self.head_dim, **sizes)
        self.compress_v = _COMPRESSIONS[compression](num_kv_heads, self.head_dim_v, **sizes)
        self.q_norm = RMSNorm(self.head_dim, **made) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, **made) if qk_norm else None
        self.gate_proj = Linear(dim, num_heads * 3, bias=gate_bias, **made)
        self.o_proj = Linear(num_heads * self.head_dim_v, dim, bias=bias, **made)
        self.reset_parameters()

    @staticmethod
    def _name(kind: str, branch: str) -> str:
        return f"{kind}_proj" if branch == "kv" else f"{kind}_{branch}_proj"

    def reset_parameters(self) -> None:
        """New starting values for every parameter, also after `to_empty` from the meta device."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        if self.gate_proj.bias is not None:
            torch.nn.init.zeros_(self.gate_proj.bias)

    def _heads(self, name: str, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[.., T, dim] -> [.., T, heads, D]."""
        projected: Tensor = getattr(self, name)(x)
        heads = self.num_heads if name == "q_proj" else self.num_kv_heads
        rows = projected.view(*projected.shape[:-1], heads, projected.shape[-1] // heads)
        if norm is None:
            return rows
        # Under autocast the weight is float32 and the rows are not: the fused norm takes one dtype.
        return torch.nn.functional.rms_norm(rows, norm.normalized_shape, norm.weight.to(rows.dtype), norm.eps)

    def _k_and_v(self, branch: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """k before RoPE."""
        return self._heads(self._name("k", branch), x, self.k_norm), self._heads(self._name("v", branch), x)

    def branches(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Branches:
        """q, k and v of all branches as `nsa_cuda.native_sparse_attention` takes them; arguments as in `forward`."""
        self._check(x, cu_seqlens)
        total = x.shape[-2]
        if self.rotary_base is None or self.rotary_dim == 0:
            turn = turn_compressed = _unchanged
        else:
            tokens = rotation(token_positions(x, cu_seqlens), self.rotary_dim, self.rotary_base)

            def turn(rows: Tensor) -> Tensor:
                return rotate(rows, *tokens)

            def turn_compressed(rows: Tensor) -> Tensor:
                assert self.rotary_base is not None
                at = compressed_positions(rows, cu_seqlens, total, self.kernel_size, self.kernel_stride)
                return rotate(rows, *rotation(at, self.rotary_dim, self.rotary_base))

        q = turn(self._heads("q_proj", x, self.q_norm))
        if self.shared_kv:
            k, v = self._k_and_v("kv", x)
            k_cmp, v_cmp = self.compress_k(k, cu_seqlens), self.compress_v(v, cu_seqlens)
            return Branches(q, turn(k), v, turn_compressed(k_cmp), v_cmp, None, None)
        k_cmp, v_cmp = self._k_and_v("cmp", x)
        k_cmp, v_cmp = self.compress_k(k_cmp, cu_seqlens), self.compress_v(v_cmp, cu_seqlens)
        (k, v), (k_win, v_win) = self._k_and_v("slc", x), self._k_and_v("win", x)
        return Branches(q, turn(k), v, turn_compressed(k_cmp), v_cmp, turn(k_win), v_win)

    def gates(self, x: Tensor) -> Tensor:
        """[.., T, Hq, 3] in (0, 1), in the order (compressed, selected, window)."""
        gates: Tensor = torch.sigmoid(self.gate_proj(x))
        return gates.view(*gates.shape[:-1], self.num_heads, 3)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, T, dim], or packed [total, dim] with cu_seqlens.
            cu_seqlens: int32 [B + 1] on x's device, offsets of packed sequences, in which positions restart. Rows
                outside every sequence come back as the output projection's bias.

        Returns:
            [B, T, dim] or [total, dim].
        """
        b = self.branches(x, cu_seqlens)
        o = native_sparse_attention(
            b.q, b.k, b.v, self.gates(x), k_cmp=b.k_cmp, v_cmp=b.v_cmp, k_win=b.k_win, v_win=b.v_win,
            kernel_size=self.kernel_size, kernel_stride=self.kernel_stride, block_size=self.block_size, topk=self.topk,
            init_blocks=self.init_blocks, local_blocks=self.local_blocks, window_size=self.window_size,
            causal=self.causal, softmax_scale=self.softmax_scale, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            recompute=self.recompute, backend=self.backend,
        )  # fmt: skip
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    @torch.no_grad()
    def selected_blocks(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The block lists that `forward` attends to: int32 [B, T, Hkv, topk] or [total, Hkv, topk], -1 after them."""
        b = self.branches(x, cu_seqlens)
        options: dict[str, Any] = {
            "kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride, "causal": self.causal,
            "softmax_scale": self.softmax_scale, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
            "backend": self.backend,
        }  # fmt: skip
        _, lse = compressed_attention(b.q, b.k_cmp, b.v_cmp, return_lse=True, **options)
        return select_blocks(
            b.q, b.k_cmp, lse, block_size=self.block_size, topk=self.topk, init_blocks=self.init_blocks,
            local_blocks=self.local_blocks, **options,
        )  # fmt: skip

    def _check(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        _checks.tensors(x=x)
        letters, rank = ("[B, T, dim] without cu_seqlens", 3) if cu_seqlens is None else ("[total, dim]", 2)
        if x.dim() != rank or x.shape[-1] != self.dim:
            raise ValueError(f"x: must be {letters}, dim = {self.dim}, was {list(x.shape)}")
        if cu_seqlens is not None:
            _checks.cu_seqlens("cu_seqlens", cu_seqlens)
            if cu_seqlens.device != x.device:
                raise ValueError(f"cu_seqlens: must be on x's device {x.device}, was on {cu_seqlens.device}")

    def extra_repr(self) -> str:
        names = "kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks", "window_size"
        return f"{self.num_heads} / {self.num_kv_heads} heads, " + ", ".join(f"{n}={getattr(self, n)}" for n in names)


def _unchanged(rows: Tensor) -> Tensor:
    return rows
