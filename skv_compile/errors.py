"""Every error this project raises on purpose, under one base class."""

from __future__ import annotations

from .lowering.errors import CacheStateError, CapacityError, NonFiniteError, SkvError


class ConfigError(SkvError, ValueError):
    """A setting that cannot be meant: unknown, out of range, or in contradiction with another."""


class UnsupportedError(SkvError):
    """A model, shape or mode that the compressed cache does not support."""


def shown(value: object, most: int = 200) -> str:
    """A value as an error message shows it: short, and never an error itself."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


__all__ = [
    "CacheStateError",
    "CapacityError",
    "ConfigError",
    "NonFiniteError",
    "SkvError",
    "UnsupportedError",
    "shown",
]
