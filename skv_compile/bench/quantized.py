"""The quantized cache of transformers, which does not compile, filled with random tokens."""

from __future__ import annotations

from typing import Any

import torch

from .extras import installed

NAME = "HF QuantizedCache 4 bits"
#: module -> what transformers calls it, and an axis along which 64 coordinates of a token share a
#: scale; the first that is installed is used
BACKENDS = {"optimum.quanto": ("quanto", 0), "hqq": ("hqq", 1)}
MOST = 32768  # tokens, at batch 1: every step decodes the whole cache, so longer ones take too long
STEPS = 10  # for the same reason


def names(tokens: int, batch: int) -> list[str]:
    """What is measured: nothing where no backend is installed, or where it takes too long."""
    return [NAME] if not missing() and batch == 1 and tokens <= MOST else []


def missing() -> list[str]:
    """Why nothing is measured, if so."""
    if any(map(installed, BACKENDS)):
        return []
    return [f"{NAME}: neither optimum-quanto nor hqq is installed"]


def quantized(llama: Any, heads: int, dim: int, tokens: int, batch: int) -> Any:
    """A cache for a model that holds ``tokens`` random tokens a row, all of them coded."""
    from transformers import QuantizedCache

    backend, axis = next(BACKENDS[module] for module in BACKENDS if installed(module))
    cache = QuantizedCache(backend, llama.config, nbits=4, axis_key=axis, axis_value=axis)
    like = {"device": llama.device, "dtype": llama.dtype}
    with torch.no_grad():
        for layer in cache.layers:
            # The first update codes everything; later ones wait, exact, for 128 tokens.
            layer.update(*(torch.randn(batch, heads, tokens, dim, **like) for _ in range(2)))
    return cache
