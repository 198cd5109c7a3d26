"""Make the virtual environment that the Makefile works in: ``make_venv.py FOLDER TORCH_REQUIREMENT``.

Where this interpreter already has a torch that the package accepts, the new environment sees it (and everything
beside it) instead of installing another: a GPU machine keeps the torch that fits its driver, and no network is needed.
"""

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

# pyproject.toml's build requirements, and the tools that pip's build isolation would bring by itself.
BUILD_TOOLS = ["scikit-build-core>=0.11", "pybind11>=2.12", "cmake>=3.26", "ninja"]
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)


def has_torch() -> bool:
    """Whether this interpreter has a torch that the package accepts."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= OLDEST_TORCH


def share_packages(folder: Path) -> None:
    """Let the environment see this interpreter's packages, also where that is a virtual environment itself."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "zz_parent_packages.pth").write_text("\n".join(packages) + "\n")


def main() -> None:
    folder, torch_requirement = Path(sys.argv[1]), sys.argv[2]
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"Python is {sys.version.split()[0]}; 3.10 or newer is needed: make PYTHON=python3.12 ...")
    print(f"setting up {folder} (Python {sys.version.split()[0]})", flush=True)
    venv.create(folder, with_pip=True, clear=folder.exists())
    requirements = list(BUILD_TOOLS)
    if has_torch():
        share_packages(folder)
        print(f"using this machine's torch {importlib.metadata.version('torch')}", flush=True)
    else:
        requirements.append(torch_requirement)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True)


if __name__ == "__main__":
    main()
