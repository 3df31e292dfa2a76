"""Skipped without a CUDA device. SKV_GPU_RESULTS=FILE keeps what a run found, as JSON."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

_outcomes: dict[str, str] = {}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    target = os.environ.get("SKV_GPU_RESULTS")
    if not target or not torch.cuda.is_available():
        return
    import transformers
    import triton

    found = {
        "command": "python -m pytest tests/gpu",
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "tests": _outcomes,
    }
    with open(target, "w") as file:
        json.dump(found, file, indent=2)
