"""The README's Python runs as printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "NativeSparseAttention" in blocks[0]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == names["x"].shape == names["x"].grad.shape
    assert torch.isfinite(names["x"].grad).all()
    assert all(p.grad is not None for p in names["attention"].parameters())
    assert names["o"].shape == names["o_slc"].shape == names["o_win"].shape == names["q"].shape
    assert names["blocks"].shape == (1, 2048, 1, 16)
