"""The examples run and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("own_module.py", "bytes of the key buffer: 2097152 -> 4"),
        ("decorator.py", "largest difference to the dense module:"),
        pytest.param(  # nearly all of the bits, and no more
            "generate.py",
            r"bits_per_coordinate +2\.12(5|[0-4]\d*)\n",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_example_runs(name: str, promise: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, name], cwd=EXAMPLES, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert re.search(promise, done.stdout)
