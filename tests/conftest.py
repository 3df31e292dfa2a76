"""Settings of every test: one thread, a fresh Dynamo, fixed seeds, the ``slow`` marker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before Triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny tensors run slower on many threads, and test processes share the cores.
torch.set_num_threads(1)

# Time says nothing about correctness on a shared machine; the same examples every time.
settings.register_profile(
    "skv",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("skv")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graph, counter or random state of another test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_inner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten graphs run as they are, also where no option can be given: saves Inductor time."""
    from skv_compile.backend import SkvBackend

    original = SkvBackend.__init__

    def init(self, **kwargs):
        original(self, **kwargs)
        self.inner = "eager"

    monkeypatch.setattr(SkvBackend, "__init__", init)
