"""Packages that only some lines need, and which of them are installed."""

from __future__ import annotations

from importlib.util import find_spec


def installed(module: str) -> bool:
    """Whether a module is there; it is not imported, only the packages that it is in."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False
