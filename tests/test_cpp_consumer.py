"""tests/cpp, a CMake project that knows only ``find_package(nsa_cuda)``, built and run against this installation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nsa_cuda import _C

PROJECT = Path(__file__).parent / "cpp"
OLDEST_CMAKE = (3, 26)


def find_tool(name: str) -> str | None:
    """The tool beside this interpreter (pip's cmake and ninja), else on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def cmake() -> str:
    tool = find_tool("cmake")
    if tool is None:
        pytest.skip("no cmake")
    version = re.search(r"(\d+)\.(\d+)", run(tool, "--version"))
    if version is None or tuple(map(int, version.groups())) < OLDEST_CMAKE:
        pytest.skip("cmake is older than 3.26")
    return tool


@pytest.fixture(scope="module")
def output(cmake: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the consumer prints."""
    build = tmp_path_factory.mktemp("consumer")
    # stdout alone: importing torch may warn.
    cmake_dir = subprocess.check_output([sys.executable, "-m", "nsa_cuda", "--cmakedir"], text=True).strip()
    ninja = find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(cmake, "-S", PROJECT, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=Release", f"-Dnsa_cuda_DIR={cmake_dir}")
    run(cmake, "--build", build, "--parallel", 2)
    return run(build / "consumer")


def checks_passed(output: str, what: str) -> int:
    line = re.search(rf"^{what}: (\d+) checks passed$", output, re.MULTILINE)
    return int(line.group(1)) if line else 0


def test_consumer_on_cpu(output: str) -> None:
    assert checks_passed(output, "api") >= 10, output
    # Two masks with o, lse, dq, dk, dv, and a selection.
    assert checks_passed(output, "ranges") >= 16, output
    # 4 dtypes x 3 head dims x 8 cases, each with o, lse and twice dq, dk, dv.
    assert checks_passed(output, "cpu") >= 96 * 8, output


@pytest.mark.gpu
def test_consumer_on_gpu(output: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if not _C.built_with_cuda():
        pytest.skip("CPU-only build")
    if "no CUDA toolkit here" in output:
        pytest.skip("CMake found no CUDA toolkit to build the consumer's CUDA part with")
    # 2 dtypes x 4 head dims x 8 cases.
    assert checks_passed(output, "cuda") >= 64 * 8, output


def test_consumer_reports_version(output: str) -> None:
    assert output.startswith(f"nsa_cuda {_C.version()}\n")
