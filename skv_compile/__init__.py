"""A torch.compile pass that turns the KV cache of an unmodified model into a compressed one.

>>> import skv_compile as skv
>>> model = skv.compile(model, bits=2.125)
>>> model.generate(**inputs, max_new_tokens=100)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when asked for: TORCH_LOGS imports every module of this package during `import torch`.
_WHERE = {
    "compile": "api",
    "explain": "api",
    "Config": "config",
    "SphericalCache": "cache.spherical",
    "Report": "report",
    "SkvError": "errors",
    "ConfigError": "errors",
    "UnsupportedError": "errors",
    "CacheStateError": "errors",
    "CapacityError": "errors",
    "NonFiniteError": "errors",
}

__all__ = [
    "CacheStateError",
    "CapacityError",
    "Config",
    "ConfigError",
    "NonFiniteError",
    "Report",
    "SkvError",
    "SphericalCache",
    "UnsupportedError",
    "__version__",
    "compile",
    "explain",
]

if TYPE_CHECKING:
    from .api import compile, explain
    from .cache.spherical import SphericalCache
    from .config import Config
    from .errors import (
        CacheStateError,
        CapacityError,
        ConfigError,
        NonFiniteError,
        SkvError,
        UnsupportedError,
    )
    from .report import Report


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
