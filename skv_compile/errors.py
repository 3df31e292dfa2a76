"""Every error this project raises on purpose, under one base class."""

from __future__ import annotations

from .lowering.errors import CacheStateError, CapacityError, NonFiniteError, SkvError


class ConfigError(SkvError, ValueError):
    """A setting that cannot be meant: unknown, out of range, or in contradiction with another."""


class UnsupportedError(SkvError):
    """A model, shape or mode that the compressed cache does not support."""


__all__ = [
    "CacheStateError",
    "CapacityError",
    "ConfigError",
    "NonFiniteError",
    "SkvError",
    "UnsupportedError",
]
