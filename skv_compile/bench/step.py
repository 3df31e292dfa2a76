"""A whole decoding step of a model of Llama-3-8B's shapes, with random weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..cache.spherical import SphericalCache
from . import quantized
from .attend import DIM, HEADS
from .fill import fill
from .timing import times

SHAPES = ((8192, 1), (32768, 1), (131072, 1), (32768, 8))
LAYERS = 8
WARM_UP = 6
STRIDE = 256  # steps between two decisions about all tokens, or a multiple of that
SLACK = 1024  # tokens that a cache is larger than its context
OURS: dict[str, dict[str, Any]] = {
    "uniform 2.0625": {"bits": 2.125, "retention": "none"},
    **{f"rdr {bits}": {"bits": bits} for bits in (1.125, 2.125, 3.125)},
}
DENSE = "HF static"


def names(tokens: int, batch: int) -> list[str]:
    """What is measured at a context."""
    return [DENSE, *quantized.names(tokens, batch), *OURS]


def missing() -> list[str]:
    """What is not measured, as a package is not installed."""
    return quantized.missing()


def model() -> Any:
    """Llama-3-8B with 8 layers, bfloat16, on the GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.eval().requires_grad_(False)


def line(name: str, llama: Any, tokens: int, batch: int, bandwidth: float) -> dict[str, Any]:
    """Time of a step at a context of random tokens, compiled unless the cache is HF's quantized.

    ``ms``: median of steps. ``mean_ms``: wall time of ``STRIDE`` steps, with what the
    cache does between them, over their number; fewer, none of which quantizes, for that cache.
    """
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache, kept = _cache(name, llama, tokens, batch)
    held = torch.cuda.memory_allocated() - before
    kept = kept or held
    step, steps = llama.forward, quantized.STEPS
    if name != quantized.NAME:
        backend, steps = "inductor" if name == DENSE else "skv", STRIDE
        step = torch.compile(step, backend=backend, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    position = torch.full((batch, 1), tokens, device="cuda")

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(ids, position_ids=position, past_key_values=cache)
        position.add_(1)

    with torch.no_grad():
        # The first decisions of a process load what later ones have.
        for _ in range(WARM_UP + (STRIDE if name in OURS else 0)):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        each = times(run, steps)
        torch.cuda.synchronize()
        mean = (time.perf_counter() - begin) * 1e3 / steps
    if name in OURS:
        cache.raise_flags()
    ms = sorted(each)[steps // 2]
    weights = sum(p.nbytes for p in llama.parameters()) - llama.model.embed_tokens.weight.nbytes
    floor = (weights + kept) / bandwidth * 1e3
    found = {
        "name": name,
        "tokens": tokens,
        "batch": batch,
        "ms": ms,
        "mean_ms": mean,
        "floor_ms": floor,
        "of_floor": floor / ms,
        "cache_bytes": kept,
        "allocated_bytes": held,
    }
    if name != DENSE:  # whose bytes are those of its room, not of its tokens
        found["bits"] = kept * 8 / (2 * LAYERS * batch * HEADS * DIM * tokens)
    return found


def _cache(name: str, llama: Any, tokens: int, batch: int) -> tuple[Any, int]:
    """A full cache, and the bytes of it that are in use; 0: all that it allocates."""
    if name == DENSE:
        return _static(llama, tokens, batch)
    if name == quantized.NAME:
        return quantized.quantized(llama, HEADS, DIM, tokens, batch), 0
    return _ours(name, llama, tokens, batch)


def _static(llama: Any, tokens: int, batch: int) -> tuple[Any, int]:
    from transformers import StaticCache

    cache = StaticCache(config=llama.config, max_cache_len=tokens + SLACK)
    cache.early_initialization(batch, HEADS, DIM, torch.bfloat16, torch.device("cuda"))
    size = 0
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
        size += layer.keys.nbytes + layer.values.nbytes
    return cache, size


def _ours(name: str, llama: Any, tokens: int, batch: int) -> tuple[Any, int]:
    cache = SphericalCache(llama.config, tokens + SLACK, **OURS[name])
    cache.early_initialization(batch, HEADS, DIM, torch.bfloat16, torch.device("cuda"))
    fill(cache.states, tokens)
    pool = cache.states[0].keeper.pool
    exact = sum(s.tensors.exact_keys.nbytes * 2 for s in cache.states)
    return cache, pool.used * pool.layout.page_bytes + exact
