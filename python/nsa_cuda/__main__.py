"""``python -m nsa_cuda``: what this installation holds."""

import argparse
from pathlib import Path

import torch

from nsa_cuda import _C
from nsa_cuda.kernels import GPUS, selected_attention_kernels


def cmake_dir() -> Path:
    """Folder of ``nsa_cuda-config.cmake``, for ``cmake -Dnsa_cuda_DIR=...`` (CMake's ``find_package``)."""
    assert _C.__file__ is not None
    return Path(_C.__file__).resolve().parent / "lib" / "cmake" / "nsa_cuda"


def report() -> str:
    """Version, build, architectures and compiled kernels as text."""
    if _C.built_with_cuda():
        build = f"CPU + CUDA {_C.cuda_toolkit()}"
    else:
        build = "CPU only (nvcc at build time, and a GPU or FORCE_CUDA=1, would add the CUDA kernels)"
    kernels = _C.compiled_kernels()
    lines = [
        f"nsa_cuda {_C.version()}",
        f"build: {build}",
        f"architectures: {_C.cuda_architectures() or 'none'}",
        f"library: {Path(str(_C.__file__)).resolve()}",
        f"compiled kernels: {len(kernels)}",
        *(f"  {kernel}" for kernel in kernels),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nsa_cuda", description="What this installation of nsa_cuda holds.")
    parser.add_argument("--cmakedir", action="store_true", help="print the folder for CMake's find_package(nsa_cuda)")
    choose = parser.add_argument_group("kernels of selected attention for a shape")
    choose.add_argument("--choose", action="store_true", help="print them and what they take at a time")
    choose.add_argument("--seqlen", type=int, default=65536, help="T (65536)")
    choose.add_argument("--heads", type=int, nargs=2, default=(64, 4), metavar=("HQ", "HKV"), help="(64 4)")
    choose.add_argument("--dims", type=int, nargs=2, default=(128, 128), metavar=("DK", "DV"), help="(128 128)")
    choose.add_argument("--block-size", type=int, default=64, help="(64)")
    choose.add_argument("--topk", type=int, default=16, help="blocks a query (16)")
    choose.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    choose.add_argument("--backend", choices=("sm80", "sm90"))
    choose.add_argument("--gpu", choices=tuple(GPUS), help="the current device without it")
    arguments = parser.parse_args()
    if not arguments.choose:
        print(cmake_dir() if arguments.cmakedir else report())
        return
    try:
        kernels = selected_attention_kernels(
            seqlen=arguments.seqlen,
            heads_q=arguments.heads[0],
            heads_k=arguments.heads[1],
            dim_qk=arguments.dims[0],
            dim_v=arguments.dims[1],
            block_size=arguments.block_size,
            topk=arguments.topk,
            dtype=getattr(torch, arguments.dtype),
            backend=arguments.backend,
            gpu=arguments.gpu,
        )
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    print(kernels)


if __name__ == "__main__":
    main()
