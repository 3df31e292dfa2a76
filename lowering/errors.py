"""The errors a user may meet. Each message says what, why and what to do."""

from __future__ import annotations


class SkvError(RuntimeError):
    """Base class of every error this project raises on purpose."""


class NonFiniteError(SkvError):
    """NaN or Inf in keys or values that were about to be stored. Nothing was stored."""


class CacheStateError(SkvError):
    """The cache is not in a state in which the call makes sense."""


class CapacityError(SkvError):
    """More tokens than the cache was made for."""
