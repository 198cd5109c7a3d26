"""Times a training step of the layer nsa_cuda.nn.NativeSparseAttention, forward and backward, beside a dense twin.

    python -m benchmarks.layer                                          # GPU if there is one, else CPU
    python -m benchmarks.layer --seqlens 8192 32768 --recompute

The twin has projections of q, k, v and o, the same RoPE, and torch's causal scaled_dot_product_attention; it has no
compression, no gates, and one k and v. Times are medians of forward + backward with gradients for x and every
parameter. "kept" is what autograd holds in between, parameters apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from nsa_cuda.nn import NativeSparseAttention
from nsa_cuda.nn._positions import rotate, rotation, token_positions
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .shapes import DTYPES
from .timing import measure


class DenseTwin(nn.Module):
    """Causal grouped-query attention with the projections and the RoPE of the sparse layer."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        self.projections = nn.ModuleList(nn.Linear(dim, h * head_dim, bias=False) for h in self.heads)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        turn = rotation(token_positions(x, None), self.head_dim, 10000.0, x.dtype)
        q, k, v = (p(x).view(*x.shape[:2], h, -1) for p, h in zip(self.projections, self.heads, strict=True))
        q, k = rotate(q, *turn), rotate(k, *turn)
        y: Tensor = self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; [B, T, heads, D] -> [B, Hq, T, D]."""
    if q.is_cuda:  # cuDNN's is torch's fastest on Hopper
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # torch's fused CPU kernel takes no groups: the copies of k and v are part of what dense attention costs there.
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
    return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)


def step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward once; gradients are dropped."""
    wanted = [x, *module.parameters()]

    def run() -> object:
        y = module(x)
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor] = ()) -> int:
    """Of all storages that autograd holds between forward and backward, without the parameters'."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(y: Tensor) -> Tensor:
        storage = y.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        result = function(x)
    del result
    return sum(sizes.values())


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048, 4096, 8192] + [32768] * on_gpu)
    parser.add_argument("--heads", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--kv-heads", type=int, default=4 if on_gpu else 1)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--dim", type=int, help="width of the hidden states (default: heads * head dim)")
    parser.add_argument("--recompute", action="store_true", help="also with recompute=True")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    dim = a.dim or a.heads * a.head_dim
    made = {"device": a.device, "dtype": DTYPES[a.dtype]}

    def sparse(**options: bool) -> nn.Module:
        return NativeSparseAttention(dim, a.heads, a.kv_heads, head_dim=a.head_dim, **options, **made)

    modules: dict[str, nn.Module] = {"NSA": sparse(), "NSA, shared k and v": sparse(shared_kv=True)}
    if a.recompute:
        modules["NSA, recompute"] = sparse(recompute=True)
    if not a.no_dense:
        modules["dense twin"] = DenseTwin(dim, a.heads, a.kv_heads, a.head_dim).to(**made)
    threads = f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(a.device) if 'cuda' in a.device else threads}")
    print(f"B 1, {a.heads} / {a.kv_heads} heads of {a.head_dim}, dim {dim}, {a.dtype}: forward + backward")
    rows = []
    for T in a.seqlens:
        x = torch.randn(1, T, dim, **made).requires_grad_()
        for name, module in modules.items():
            timing = measure([step(module, x)], torch.device(a.device))
            kept = kept_bytes(module, x, module.parameters())
            rows.append({"T": T, "layer": name, "ms": timing.milliseconds, "kept_bytes": kept})
            print(f"{T:>7}  {name:<22}{timing.milliseconds:>10.1f} ms   kept {kept / 1e6:>8.1f} MB", flush=True)
    if a.json:
        a.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(a).items()}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
