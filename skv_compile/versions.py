"""The versions that a number or a report depends on."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str | None]:
    """Of this package, of what it builds on, and of Python; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("skv-compile", "torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["python"] = platform.python_version()
    return found
