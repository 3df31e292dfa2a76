"""A whole decoding step of a model of Llama-3-8B's shapes, with random weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..cache.spherical import SphericalCache
from .fill import fill
from .timing import times

SHAPES = ((8192, 1), (32768, 1), (131072, 1), (32768, 8))
LAYERS = 8
WARM_UP = 6
STRIDE = 256  # steps between two decisions about all tokens, or a multiple of that
SLACK = 1024  # tokens that a cache is larger than its context
OURS: dict[str, dict[str, Any]] = {
    "uniform 2.0625": {"bits": 2.125, "retention": "none"},
    "rdr 1.125": {"bits": 1.125},
}
DENSE = "HF static"


def names(tokens: int) -> list[str]:
    """What is measured at a context."""
    return [DENSE, *OURS]


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
    """Time of a compiled step at a context of random tokens.

    ``ms``: median of steps. ``mean_ms``: wall time of ``STRIDE`` steps, with what the
    cache does between them, over their number.
    """
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache, kept = (
        _static(llama, tokens, batch) if name == DENSE else _ours(name, llama, tokens, batch)
    )
    held = torch.cuda.memory_allocated() - before
    backend = "inductor" if name == DENSE else "skv"
    step = torch.compile(llama.forward, backend=backend, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    position = torch.full((batch, 1), tokens, device="cuda")

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(ids, position_ids=position, past_key_values=cache)
        position.add_(1)

    with torch.no_grad():
        # The first decisions of a process load what later ones have.
        for _ in range(WARM_UP + (0 if name == DENSE else STRIDE)):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        each = times(run, STRIDE)
        torch.cuda.synchronize()
        mean = (time.perf_counter() - begin) * 1e3 / STRIDE
    if name != DENSE:
        cache.raise_flags()
    ms = sorted(each)[STRIDE // 2]
    weights = sum(p.nbytes for p in llama.parameters()) - llama.model.embed_tokens.weight.nbytes
    floor = (weights + kept) / bandwidth * 1e3
    return {
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


def _static(llama: Any, tokens: int, batch: int) -> tuple[Any, int]:
    from transformers import StaticCache

    cache = StaticCache(config=llama.config, max_cache_len=tokens + SLACK)
    cache.early_initialization(batch, 8, 128, torch.bfloat16, torch.device("cuda"))
    size = 0
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
        size += layer.keys.nbytes + layer.values.nbytes
    return cache, size


def _ours(name: str, llama: Any, tokens: int, batch: int) -> tuple[Any, int]:
    cache = SphericalCache(llama.config, tokens + SLACK, **OURS[name])
    cache.early_initialization(batch, 8, 128, torch.bfloat16, torch.device("cuda"))
    fill(cache.states, tokens)
    pool = cache.states[0].keeper.pool
    exact = sum(s.tensors.exact_keys.nbytes * 2 for s in cache.states)
    return cache, pool.used * pool.layout.page_bytes + exact
