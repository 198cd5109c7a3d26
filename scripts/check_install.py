"""A minimal use of the installed package on the CPU: numbers and gradients against the reference backend.

Also for a build with CUDA kernels on a machine without a GPU or driver, where importing it and asking it for a kernel
must not crash.
"""

import nsa_cuda
import torch
from nsa_cuda import _C


def check_cpu_backend() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 100, 8, 64), "k": (2, 100, 2, 64), "v": (2, 100, 2, 32)}
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    block_indices = torch.randint(-1, 8, (2, 100, 2, 4), generator=generator, dtype=torch.int32)
    results = []
    for backend in (None, "reference"):
        tensors = [tensor.clone().requires_grad_() for tensor in inputs]
        o = nsa_cuda.selected_attention(*tensors, block_indices, block_size=16, backend=backend)
        results.append([o, *torch.autograd.grad(o.square().sum(), tensors)])
    for name, ours, reference in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        print(f"{name}: largest difference {(ours - reference).abs().max():.1e}")
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def check_cuda_without_gpu() -> None:
    indices, counts = (0, False, 0, 0, 0, 0), (0, False, 0, 0, 0)
    bfloat16, cuda, auto = 2, 1, 0
    sizes = (1, 64, 64, 16, 1, 128, 128, 64, 4)
    problem = _C.Problem(cuda, auto, bfloat16, *sizes, True, 0.1, 0, 0, 0, False, 0, indices, counts, -1)
    try:
        print("CUDA kernel:", _C.kernel_name(problem))
    except (NotImplementedError, RuntimeError) as error:
        print(f"CUDA is refused here, as it should be: {type(error).__name__}: {error}")
        if torch.cuda.is_available() and _C.built_with_cuda():
            raise


if __name__ == "__main__":
    check_cpu_backend()
    check_cuda_without_gpu()
    print(f"nsa_cuda {_C.version()} works")
