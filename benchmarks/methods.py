"""What is timed: nsa_cuda, flash-linear-attention where it is installed, and torch's dense attention per backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import nsa_cuda
import torch
import torch.nn.functional as F
from nsa_cuda.attention import Backend
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .shapes import DTYPES, Shape

Call = Callable[[], object]
DENSE_GPU = {
    "dense, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "dense, flash": SDPBackend.FLASH_ATTENTION,
    "dense, efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DENSE_CPU = {"dense, CPU": None}


@dataclass
class Inputs:
    """q [B, T, Hq, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv], dout [B, T, Hq, Dv]; q, k, v are leaves."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.dout))


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, dim: int) -> Tensor:
        size = (shape.batch, shape.seqlen, heads, dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(DTYPES[shape.dtype])

    q = normal(shape.heads_q, shape.dim_qk).requires_grad_()
    k = normal(shape.heads_k, shape.dim_qk).requires_grad_()
    v = normal(shape.heads_k, shape.dim_v).requires_grad_()
    return Inputs(q, k, v, normal(shape.heads_q, shape.dim_v))


def _backward_of(o: Tensor, leaves: tuple[Tensor, ...], dout: Tensor) -> Call:
    """The gradient of o alone; the graph is kept, so that it can be timed again."""
    return lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True)


def ours_forward(inputs: Inputs, block_indices: Tensor, block_size: int, backend: Backend | None) -> Tensor:
    o: Tensor = nsa_cuda.selected_attention(
        inputs.q, inputs.k, inputs.v, block_indices, block_size=block_size, backend=backend
    )
    return o


def ours(
    sets: Sequence[Inputs], block_indices: Tensor, shape: Shape, backend: Backend | None
) -> tuple[list[Call], list[Call]]:
    """(forward calls, backward calls), one of each per input set."""

    def forward_of(inputs: Inputs) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return ours_forward(inputs, block_indices, shape.block_size, backend)

        return call

    def backward_of(inputs: Inputs) -> Call:
        o = ours_forward(inputs, block_indices, shape.block_size, backend)
        return _backward_of(o, (inputs.q, inputs.k, inputs.v), inputs.dout)

    return [forward_of(inputs) for inputs in sets], [backward_of(inputs) for inputs in sets]


def fla_module() -> Any | None:
    """flash-linear-attention's NSA, or None. Its kernels take groups that are a power of two and at least 16."""
    try:
        module = importlib.import_module("fla.ops.nsa.parallel")
    except Exception:  # a broken or half installed package is one that can't be compared with
        return None
    return module if hasattr(module, "parallel_nsa_fwd") and hasattr(module, "parallel_nsa_bwd") else None


def fla(sets: Sequence[Inputs], block_indices: Tensor, shape: Shape) -> tuple[list[Call], list[Call]]:
    """Its forward and backward kernels called directly, without its torch.compile wrapper."""
    module = fla_module()
    if module is None:
        raise RuntimeError("flash-linear-attention is not installed")
    if shape.group < 16 or shape.group & (shape.group - 1):
        raise NotImplementedError("flash-linear-attention needs a power-of-two group of at least 16")
    common = {
        "block_indices": block_indices,
        "block_counts": shape.topk,
        "block_size": shape.block_size,
        "scale": shape.dim_qk**-0.5,
    }

    def forward_of(inputs: Inputs) -> Call:
        q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
        return lambda: module.parallel_nsa_fwd(q=q, k=k, v=v, **common)

    def backward_of(inputs: Inputs) -> Call:
        q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
        o, lse = module.parallel_nsa_fwd(q=q, k=k, v=v, **common)
        return lambda: module.parallel_nsa_bwd(q=q, k=k, v=v, o=o, lse=lse, do=inputs.dout, **common)

    return [forward_of(inputs) for inputs in sets], [backward_of(inputs) for inputs in sets]


def dense(sets: Sequence[Inputs], shape: Shape, backend: SDPBackend | None) -> tuple[list[Call], list[Call]]:
    """torch's causal scaled_dot_product_attention on contiguous [B, H, T, D].

    Backends that share k and v inside a group get them so (enable_gqa); for the others they are repeated beforehand,
    outside what is timed.
    """
    shares = backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)

    def prepared(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group = 1 if shares else shape.group
        q, dout = (x.detach().transpose(1, 2).contiguous() for x in (inputs.q, inputs.dout))
        k, v = (x.detach().transpose(1, 2).repeat_interleave(group, dim=1).contiguous() for x in (inputs.k, inputs.v))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)

    def forward_of(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return attend(*tensors[:3])

        return call

    def backward_of(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> Call:
        return _backward_of(attend(*tensors[:3]), tensors[:3], tensors[3])

    copies = [prepared(inputs) for inputs in sets]
    return [forward_of(tensors) for tensors in copies], [backward_of(tensors) for tensors in copies]
