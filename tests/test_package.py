"""What the installed package says of itself and what it links."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nsa_cuda
import pytest
import torch
from nsa_cuda import _C

ROOT = Path(__file__).parents[1]


def run_module(*arguments: str) -> str:
    command = [sys.executable, "-m", "nsa_cuda", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def library_folder() -> Path:
    return Path(str(_C.__file__)).resolve().parent


def needed_libraries(path: Path) -> set[str]:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf (binutils)")
    text = subprocess.run([readelf, "-d", str(path)], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


def test_report_names_build_and_kernels() -> None:
    report = run_module()
    assert report.startswith(f"nsa_cuda {_C.version()}\n")
    assert f"CUDA {_C.cuda_toolkit()}" in report if _C.built_with_cuda() else "build: CPU only" in report
    for kernel in _C.compiled_kernels():
        assert f"  {kernel}\n" in report


def test_compiled_kernels_are_named_once() -> None:
    kernels = _C.compiled_kernels()
    assert len(kernels) == len(set(kernels))
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert f"cpu.selected_forward.{dtype}" in kernels
        assert f"cpu.selected_backward.{dtype}" in kernels
    assert any(kernel.startswith("sm") for kernel in kernels) == _C.built_with_cuda()


def test_architectures_and_toolkit_go_with_the_build() -> None:
    if _C.built_with_cuda():
        assert re.fullmatch(r"\d+\.\d+", _C.cuda_toolkit())
        assert all(re.fullmatch(r"\d+[af]?-(real|virtual)", part) for part in _C.cuda_architectures().split(";"))
    else:
        assert (_C.cuda_toolkit(), _C.cuda_architectures()) == ("", "")


def test_cmakedir_holds_the_package() -> None:
    folder = Path(run_module("--cmakedir").strip())
    assert (folder / "nsa_cuda-config.cmake").is_file()
    assert (folder / "nsa_cuda-config-version.cmake").is_file()
    prefix = folder.parents[2]
    assert (prefix / "lib" / "libnsa_cuda.so").is_file()
    assert (prefix / "include" / "nsa_cuda" / "nsa.h").is_file()


def test_versions_agree() -> None:
    assert _C.version() == importlib.metadata.version("nsa_cuda") == nsa_cuda.__version__
    assert f'\nversion = "{_C.version()}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {_C.version()}" in (ROOT / "CHANGELOG.md").read_text()


def test_build_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert requires is not None
    assert "torch" not in requires.group(1)
    for path in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()]:
        commands = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert "torch" not in commands.lower(), path.name


@pytest.mark.parametrize("which", ["module", "library"])
def test_no_shared_object_of_cuda_or_torch_is_needed(which: str) -> None:
    path = Path(str(_C.__file__)) if which == "module" else library_folder() / "lib" / "libnsa_cuda.so"
    needed = needed_libraries(path)
    assert needed, "readelf shows no needed library"
    foreign = [name for name in needed if re.match(r"lib(cuda|cudart|nv|cub|torch|c10|python)", name)]
    assert not foreign


def test_process_has_one_openmp_where_torch_uses_the_same_name() -> None:
    """libgomp.so.1 of the system and of torch must not both be loaded: two pools would fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    if not (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists():
        pytest.skip("this torch brings no libgomp.so.1")
    loaded = set(re.findall(r"\S*/libgomp\.so\.1\S*", maps.read_text()))
    assert len(loaded) == 1, loaded
