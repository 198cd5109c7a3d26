"""What the suite runs on: every (device, dtype, backend) that this machine and this build have.

A test is written once and parametrised over targets. CUDA targets always appear in the collection, so that a machine
without a GPU shows them as skipped and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

CUDA_HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
CUDA_BLOCK_SIZES = (16, 32, 64, 128)

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Target:
    device: str
    dtype: torch.dtype
    backend: str | None

    @property
    def id(self) -> str:
        return f"{self.backend or self.device}-{DTYPE_NAMES[self.dtype]}"

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def supports(self, head_dim_qk: int, head_dim_v: int, block_size: int) -> bool:
        """Spec section 1: the CPU takes any head dim and block size."""
        if not self.is_cuda:
            return True
        return (head_dim_qk, head_dim_v) in CUDA_HEAD_DIMS and block_size in CUDA_BLOCK_SIZES


@lru_cache
def why_no_cuda() -> str:
    """Empty when CUDA tests can run, else the reason to show."""
    if not torch.cuda.is_available():
        return "no CUDA GPU: torch.cuda.is_available() is false"
    from nsa_cuda import _C

    if not _C.built_with_cuda():
        return "this build of nsa_cuda has no CUDA kernels"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the GPU's compute capability is {torch.cuda.get_device_capability()}; the kernels need 8.0"
    return ""


@lru_cache
def cuda_backends() -> tuple[str, ...]:
    """The kernel families of this build that this GPU runs; sm80 stands in where there is none, to be skipped."""
    if why_no_cuda():
        return ("sm80",)
    from nsa_cuda import _C

    families = {name.split(".")[0] for name in _C.compiled_kernels()}
    found = ["sm80"] if "sm80" in families else []
    if "sm90" in families and torch.cuda.get_device_capability()[0] == 9:
        found.append("sm90")
    return tuple(found)


CPU_TARGETS = [Target("cpu", dtype, None) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
CUDA_TARGETS = [Target("cuda", dtype, b) for b in cuda_backends() for dtype in (torch.bfloat16, torch.float16)]


def param(target: Target, *values: object, name: str = "", marks: tuple = ()):
    """A pytest parameter set (target, *values), marked `gpu` where it needs one."""
    gpu = (pytest.mark.gpu,) if target.is_cuda else ()
    return pytest.param(target, *values, id=f"{target.id}-{name}" if name else target.id, marks=gpu + tuple(marks))


ALL = [param(t) for t in CPU_TARGETS + CUDA_TARGETS]
CPU = [param(t) for t in CPU_TARGETS]
CUDA = [param(t) for t in CUDA_TARGETS]
# One dtype a device, for what does not depend on the dtype.
ONE_EACH = [param(t) for t in [CPU_TARGETS[1], *[t for t in CUDA_TARGETS if t.dtype == torch.bfloat16]]]
CUDA_BF16 = [param(t) for t in CUDA_TARGETS if t.dtype == torch.bfloat16]
