"""The include rule: what each layer of the C++ code may know about."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
STD_HEADERS = {"cstddef", "cstdint"}
CUDA_HEADER = re.compile(
    r"^(cuda|cub/|thrust/|cute/|cutlass/|cooperative_groups|mma\.h|vector_types|driver_types|device_)"
)
FRAMEWORK_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)\b")
CUDA_FOLDERS = ("device/", "sm80/", "sm90/", "common/")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (CSRC / folder).rglob("*") if path.suffix in SUFFIXES)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_layer_has_sources() -> None:
    for folder in ("include", "host", "cpu", "binding"):
        assert sources(folder), folder


@pytest.mark.parametrize("path", sources("include"), ids=name)
def test_public_headers_use_std_alone(path: Path) -> None:
    assert set(includes(path)) <= STD_HEADERS


@pytest.mark.parametrize("path", sources("host", "cpu", "binding"), ids=name)
def test_host_cpu_and_binding_know_no_cuda(path: Path) -> None:
    # One door: the plain C++ header through which host/ reaches the kernels.
    found = [header for header in includes(path) if header != "common/cuda_backend.h"]
    assert not [header for header in found if CUDA_HEADER.match(header) or header.startswith(CUDA_FOLDERS)]


def test_door_to_the_kernels_is_plain_cpp() -> None:
    found = includes(CSRC / "common" / "cuda_backend.h")
    assert not [header for header in found if CUDA_HEADER.match(header)]


@pytest.mark.parametrize("path", sources("cpu"), ids=name)
def test_cpu_backend_knows_no_host(path: Path) -> None:
    assert not [header for header in includes(path) if header.startswith(("host/", "binding/"))]


def test_only_the_binding_knows_python() -> None:
    wrong = [name(path) for path in sources(".") if "pybind11" in path.read_text() and "binding" not in path.parts]
    assert not wrong


@pytest.mark.parametrize("path", sources("."), ids=name)
def test_no_framework_in_cpp(path: Path) -> None:
    assert not [header for header in includes(path) if FRAMEWORK_HEADER.match(header)]
    assert not re.search(r"\b(torch|at|c10)::", path.read_text())
