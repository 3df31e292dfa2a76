"""On a CPU: one attention, a decoding step and a prompt, against dense ones in the same run.

Everything of one shape is prepared first and then measured in turn, over and over, so that what
else the machine does falls on all alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .. import models
from ..cache.spherical import SphericalCache
from ..cache.state import LayerState
from ..config import Config
from ..lowering import ops
from ..lowering.turn import half_split_plan
from .fill import fill

#: kv heads, query heads a kv head, head dim, tokens
ATTEND = ((8, 4, 128, 8192), (8, 4, 128, 32768), (3, 3, 64, 4096))
OURS: dict[str, dict[str, Any]] = {
    "uniform 4.125": {"bits": 4.125, "retention": "none"},
    "uniform 2.125": {"bits": 2.125, "retention": "none"},
    "rdr 1.125": {"bits": 1.125},
}
STEP = {name: OURS[name] for name in ("uniform 2.125", "rdr 1.125")}
STEP |= {f"rdr {bits}": {"bits": bits} for bits in (2.125, 3.125)}
PREFILL = ("uniform 2.125", "rdr 1.125")
CONTEXT, PROMPT = 4096, 2048
SLACK = 256  # tokens that a cache is larger than its context
ROUNDS = {"attend": 30, "step": 40, "prefill": 5}
CACHES = 2  # of a shape, in turn, so that one call does not leave its data to the next
DENSE = "HF static"

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Run = Callable[[], Any]


def measure(runs: dict[str, list[Run]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, those of all names in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for several in runs.values():
        for run in several:
            run()
    for _ in range(rounds):
        for name, several in runs.items():
            for run in several:
                begin = time.perf_counter()
                run()
                found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def lines(found: dict[str, list[float]], dense: list[str], **about: Any) -> list[dict[str, Any]]:
    """A line for every name: median, and how many times faster than the best dense one."""
    ms = {name: statistics.median(times) for name, times in found.items()}
    best = min(ms[name] for name in dense)
    return [
        {
            "name": name,
            **about,
            "ms": ms[name],
            "least_ms": min(times),
            "mean_ms": statistics.fmean(times),
            "faster": best / ms[name],
        }
        for name, times in found.items()
    ]


# ------------------------------------------------------------ one attention


def _dense(heads: int, group: int, dim: int, tokens: int) -> dict[str, list[Run]]:
    """SDPA as it is called for grouped queries, and with the queries of a kv head as the rows of
    one: PyTorch's CPU kernel then reads a key once for all of them."""
    runs: dict[str, list[Run]] = {}
    for dtype, word in DTYPES.items():
        grouped: list[Run] = []
        folded: list[Run] = []
        for _ in range(CACHES):
            q = torch.randn(1, heads * group, 1, dim, dtype=dtype)
            k, v = (torch.randn(1, heads, tokens, dim, dtype=dtype) for _ in range(2))
            rows = q.view(1, heads, group, dim)
            grouped.append(partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True))
            folded.append(partial(F.scaled_dot_product_attention, rows, k, v))
        runs[f"sdpa enable_gqa, {word}"] = grouped
        runs[f"sdpa of folded queries, {word}"] = folded
    return runs


def _ours(
    settings: dict[str, Any], dtype: torch.dtype, heads: int, group: int, dim: int, tokens: int
) -> list[Run]:
    plan = half_split_plan(5e5 ** -(torch.arange(dim // 2) * 2 / dim), dim)
    position = torch.tensor([tokens])
    runs: list[Run] = []
    for _ in range(CACHES):
        shape = (1, heads, dim, tokens + SLACK, dtype, torch.device("cpu"))
        state = LayerState(Config(**settings), *shape, turn=plan, group=group)
        fill([state], tokens)
        state.keeper.tick(1)
        q = torch.randn(1, heads * group, 1, dim, dtype=dtype)
        k, v = (torch.randn(1, heads, 1, dim, dtype=dtype) for _ in range(2))
        rest = (*state.tensors, False, dim**-0.5, state.layout.key)
        runs.append(partial(ops.attend, q, k, v, None, position, *rest))
    return runs


def attend(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Lines of one attention of ``ATTEND``."""
    runs = _dense(*shape)
    dense = list(runs)
    runs |= {
        f"{name}, {word}": _ours(settings, dtype, *shape)
        for name, settings in OURS.items()
        for dtype, word in DTYPES.items()
    }
    keys = ("kv_heads", "group", "head_dim", "tokens")
    with torch.no_grad():
        found = measure(runs, ROUNDS["attend"])
    return lines(found, dense, **dict(zip(keys, shape, strict=True)))


# ------------------------------------------------------------ a model


def model() -> Any:
    """The demo's."""
    return models.load("demo").model


def _shape(config: Any) -> tuple[int, int]:
    heads = config.num_key_value_heads
    return heads, config.hidden_size // config.num_attention_heads


def _static(loaded: Any, tokens: int, full: bool) -> Any:
    from transformers import StaticCache

    heads, dim = _shape(loaded.config)
    cache = StaticCache(config=loaded.config, max_cache_len=tokens + SLACK)
    cache.early_initialization(1, heads, dim, loaded.dtype, torch.device("cpu"))
    for layer in cache.layers if full else ():
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    return cache


def _spherical(loaded: Any, settings: dict[str, Any], tokens: int, full: bool) -> Any:
    heads, dim = _shape(loaded.config)
    cache = SphericalCache(loaded.config, tokens + SLACK, **settings)
    cache.early_initialization(1, heads, dim, loaded.dtype, torch.device("cpu"))
    if full:
        fill(cache.states, tokens)
    return cache


def step(loaded: Any) -> list[dict[str, Any]]:
    """Lines of a compiled decoding step at ``CONTEXT`` random tokens.

    ``ms`` is the median; ``mean_ms`` has what a cache does between steps in it, as often as it
    falls into so many steps.
    """
    runs: dict[str, list[Run]] = {}
    caches = {DENSE: _static(loaded, CONTEXT, True)}
    word = DTYPES[loaded.dtype]
    caches |= {f"{n}, {word}": _spherical(loaded, kw, CONTEXT, True) for n, kw in STEP.items()}
    ids = torch.randint(0, 1000, (1, 1))
    for name, cache in caches.items():
        backend = "inductor" if name == DENSE else "skv"
        compiled = torch.compile(loaded.forward, backend=backend, fullgraph=True)
        runs[name] = [partial(_step, compiled, ids, torch.full((1, 1), CONTEXT), cache)]
    with torch.no_grad():
        found = measure(runs, ROUNDS["step"])
    made = lines(found, [DENSE], tokens=CONTEXT)
    for one in made:
        cache = caches[one["name"]]
        one["cache_bytes"] = (
            sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            if one["name"] == DENSE
            else cache.resident_bytes
        )
    return made


def _step(forward: Any, ids: torch.Tensor, position: torch.Tensor, cache: Any) -> None:
    forward(ids, position_ids=position, past_key_values=cache)
    position.add_(1)


def _coded_prompt(prompt: Callable[..., None], ours: Any, settings: dict[str, Any]) -> None:
    prompt(ours, _spherical(ours, settings, PROMPT, False))


def prefill(loaded: Any) -> list[dict[str, Any]]:
    """Lines of an uncompiled prompt of ``PROMPT`` random tokens. ``beside``: the share of the
    dense prompt's time that coding and retention take on top of it."""
    import skv_compile as skv

    ids = torch.randint(0, 1000, (1, PROMPT))
    ours = skv.compile(copy.deepcopy(loaded))  # queries reach a cache through its attention

    def prompt(model: Any, cache: Any) -> None:
        model(ids, past_key_values=cache, logits_to_keep=1)

    runs: dict[str, list[Run]] = {DENSE: [lambda: prompt(loaded, _static(loaded, PROMPT, False))]}
    for name in PREFILL:
        settings = STEP[name]
        run = partial(_coded_prompt, prompt, ours, settings)
        runs[f"{name}, {DTYPES[loaded.dtype]}"] = [run]
    with torch.no_grad():
        found = measure(runs, ROUNDS["prefill"])
    made = lines(found, [DENSE], tokens=PROMPT)
    for one in made:
        one["beside"] = one["ms"] / made[0]["ms"] - 1
    return made
