"""Options and fixtures shared by every test."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_cuda")
    group.addoption("--require-gpu", action="store_true", help="fail instead of skipping when CUDA tests cannot run")
    group.addoption("--seed", type=int, default=0, help="shifts the seed of every random input (default 0)")


def pytest_configure(config: pytest.Config) -> None:
    import inputs

    inputs.SEED = config.getoption("--seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import targets

    reason = targets.why_no_cuda()
    if config.getoption("--require-gpu"):
        if reason:
            raise pytest.UsageError(f"--require-gpu: {reason}")
        return
    if reason:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def release_gpu_memory(request: pytest.FixtureRequest):
    """Tests of one process share the card: a scale test must not find the cache of the one before."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_available() and torch.cuda.memory_reserved() > 8 << 30:
        torch.cuda.empty_cache()


@pytest.fixture
def one_thread():
    """Restores torch's thread count, for tests that change it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
