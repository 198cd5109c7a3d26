"""What happens to tensors before an operation sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocast(*tensors: Any) -> Any:
    """The tensors in the dtype of an active torch.autocast; as torch does, float64 stays, and what is no tensor too."""
    q = tensors[0]
    if not isinstance(q, Tensor):
        return tensors
    device = q.device.type
    # torch 2.4's compiler can't trace is_autocast_available; what it compiles for has autocast.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


_once: Callable[[Tensor], Tensor] = _DifferentiableOnce.apply


def differentiable_once(*tensors: Any) -> Any:
    """Views whose gradients can't be differentiated again, as those of the kernels can't; None stays None."""
    # torch.compile refuses second derivatives itself.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tensors
    return tuple(_once(x) if isinstance(x, Tensor) and x.requires_grad else x for x in tensors)
