"""SKV_FUZZ_COUNT=FILE keeps how many calls each file made, as JSON."""

from __future__ import annotations

import json
import os

from .calls import CALLS


def pytest_sessionfinish(session):
    if target := os.environ.get("SKV_FUZZ_COUNT"):
        with open(target, "w") as file:
            json.dump(dict(CALLS), file, indent=2, sort_keys=True)


def pytest_terminal_summary(terminalreporter):
    if CALLS:
        counts = ", ".join(f"{name} {n:,}" for name, n in sorted(CALLS.items()))
        terminalreporter.write_line(f"fuzz: calls of public doors: {counts}")
