"""A prompt through an uncompiled model: coding and retention included, against a static cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..cache.spherical import SphericalCache
from .step import DENSE, OURS

SHAPES = ((2048, 1), (8192, 1), (32768, 1))
REPEAT = 2  # the last counts


def names(tokens: int, batch: int) -> list[str]:
    """What is measured at a context."""
    return [DENSE, *OURS]


def missing() -> list[str]:
    """Nothing needs a package of its own."""
    return []


def line(name: str, llama: Any, tokens: int, batch: int, bandwidth: float) -> dict[str, Any]:
    """Seconds of a prompt of random tokens, and the most memory beyond weights and cache.

    ``bandwidth`` is not used: a prompt is bound by arithmetic.
    """
    from transformers import StaticCache

    ids = torch.randint(0, 1000, (batch, tokens), device="cuda")
    seconds, peak, held = 0.0, 0, 0
    for _ in range(REPEAT):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        if name == DENSE:
            cache: Any = StaticCache(config=llama.config, max_cache_len=tokens + 256)
        else:
            cache = SphericalCache(llama.config, tokens + 256, **OURS[name])
        cache.early_initialization(batch, 8, 128, torch.bfloat16, torch.device("cuda"))
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.no_grad():
            llama(ids, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() - before - held
        del cache
    return {
        "name": name,
        "tokens": tokens,
        "batch": batch,
        "ms": seconds * 1e3,
        "cache_bytes": held,
        "peak_bytes_beside": peak,
    }
