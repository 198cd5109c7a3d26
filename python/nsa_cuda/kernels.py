"""Which CUDA kernels a call runs, and in what tiles; ``python -m nsa_cuda --choose`` prints it.

The choice is a function of sizes, dtype and GPU alone. It is made in ``csrc/common/cuda_backend.cu``; what a kernel
takes at a time is in the ``config.h`` of its folder, with the reason.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from nsa_cuda import _ops

if TYPE_CHECKING:
    from nsa_cuda.attention import Backend

# Compute capability (10 major + minor), streaming multiprocessors, bytes of shared memory that a CTA may ask for.
GPUS = {
    "a100": (80, 108, 166912),
    "l40s": (89, 142, 101376),
    "h100": (90, 132, 232448),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and what it takes at a time on that GPU."""

    name: str  # "sm90.selected_forward.bfloat16.128.128": family, operation, dtype, Dk, Dv
    query_rows: int  # (token, head of the group) pairs: of a CTA in forward and dQ, of a stage in dK, dV
    keys: int  # of a stage in forward and dQ, of a CTA in dK, dV
    stages: int  # in shared memory
    threads: int  # of a CTA
    shared_memory: int  # bytes of a CTA
    ctas: int  # of a multiprocessor


@dataclass(frozen=True)
class SelectedAttentionKernels:
    """What `selected_attention` runs for a shape, in the forward and in a backward for q, k and v."""

    forward: Kernel
    dq: Kernel
    dkdv: Kernel
    windows: int  # of query rows; dK's kernel leaves dS for dQ's in one after the other. 0: dQ's computes it again
    window_rows: int  # tokens of a window

    def __str__(self) -> str:
        titles = ("", "query rows", "keys", "stages", "threads", "shared memory", "CTAs an SM")
        rows = [titles, *(tuple(map(str, astuple(k))) for k in (self.forward, self.dq, self.dkdv))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        kept = f"in {self.windows} windows of {self.window_rows} query rows" if self.windows else "computed twice"
        return "\n".join((*lines, f"dS: {kept}"))


def selected_attention_kernels(
    *,
    seqlen: int,
    heads_q: int,
    heads_k: int,
    dim_qk: int = 128,
    dim_v: int | None = None,
    block_size: int = 64,
    topk: int = 16,
    batch: int = 1,
    causal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    gpu: str | tuple[int, int, int] | None = None,
) -> SelectedAttentionKernels:
    """The kernels of `selected_attention` on CUDA tensors [batch, seqlen, heads, dim] with lists of `topk` blocks.

    Args:
        seqlen: Tq = Tk.
        heads_q: Hq, a multiple of heads_k.
        heads_k: Hkv.
        dim_qk: Dk.
        dim_v: Dv. None: Dk.
        block_size: l'.
        topk: S, the width of the block lists.
        batch: B.
        causal: as in `selected_attention`.
        dtype: torch.bfloat16 or torch.float16.
        backend: None, "sm80" or "sm90".
        gpu: a name of `GPUS`, the three numbers that stand there for another GPU, or None: the current device.

    Raises:
        ValueError: a size that can't be right, or a name that `GPUS` doesn't hold.
        NotImplementedError: no kernel for it in this build, or on that GPU.
    """
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ValueError(f"gpu is {gpu!r}; allowed are {', '.join(map(repr, GPUS))} or three numbers")
        gpu = GPUS[gpu]
    dim_v = dim_qk if dim_v is None else dim_v
    problem = _ops.problem_of_sizes(
        dtype, backend, batch, seqlen, heads_q, heads_k, dim_qk, dim_v, block_size, topk, causal
    )
    forward, dq, dkdv, windows, rows = _ops.native().choose_selected_attention(problem, gpu or (0, 0, 0))
    return SelectedAttentionKernels(Kernel(*forward), Kernel(*dq), Kernel(*dkdv), windows, rows)
