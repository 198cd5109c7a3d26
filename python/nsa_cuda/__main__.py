"""``python -m nsa_cuda``: what this installation holds."""

import argparse
from pathlib import Path

from nsa_cuda import _C


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
    arguments = parser.parse_args()
    print(cmake_dir() if arguments.cmakedir else report())


if __name__ == "__main__":
    main()
