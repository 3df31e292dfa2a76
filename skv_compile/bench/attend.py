"""One attention of a decoding step: ours against dense ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from ..cache.state import LayerState
from ..config import Config
from ..lowering import kernels
from ..lowering.turn import half_split_plan
from ..lowering.work import Work
from . import paged
from .fill import fill
from .timing import Launch, milliseconds

HEADS, GROUP, DIM = 8, 4, 128
SHAPES = (
    (2048, 1),
    (8192, 1),
    (32768, 1),
    (131072, 1),
    (16384, 8),
    (4096, 32),
    (2048, 64),
    (1048576, 1),
)
READ = 200 << 20  # least bytes that a measurement goes through in turn: four L2 caches


def _sets(size: int) -> int:
    """How many caches of ``size`` bytes are that much."""
    return max(3, -(-READ // size))


#: name -> settings of the cache
OURS: dict[str, dict[str, Any]] = {
    "uniform 2.0625": {"bits": 2.125, "retention": "none"},
    "uniform 4.0625": {"bits": 4.125, "retention": "none"},
    "rdr 1.125": {"bits": 1.125},
}


def line(name: str, tokens: int, batch: int, bandwidth: float) -> dict[str, Any]:
    """Time one implementation; ``bandwidth`` in bytes a second makes the floor."""
    if name in DENSE:
        launches, size = _dense(DENSE[name], tokens, batch)
    elif name in paged.PAGED:
        launches, size = _paged(paged.PAGED[name], tokens, batch)
    else:
        launches, size = _ours(name, tokens, batch)
    found = {"name": name, "tokens": tokens, "batch": batch, "bytes": size}
    parts = launches.pop("parts", None)
    ms = milliseconds(launches["all"])
    floor = size / bandwidth * 1e3
    found |= {"ms": ms, "floor_ms": floor, "of_floor": floor / ms}
    if parts:
        found["parts_ms"] = {part: milliseconds(each) for part, each in parts.items()}
    return found


def _dense(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], tokens: int, batch: int
) -> tuple[dict[str, Any], int]:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, HEADS * GROUP, 1, DIM, **like)
    launches: list[Launch] = []
    size = 2 * batch * HEADS * tokens * DIM * 2
    for _ in range(_sets(size)):
        k, v = (torch.randn(batch, HEADS, tokens, DIM, **like) for _ in range(2))
        launches.append(partial(attend, q, k, v))
    return {"all": launches}, size


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _flex_compiled()(q, k, v, enable_gqa=True)


@cache
def _flex_compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


DENSE = {"sdpa enable_gqa": _sdpa, "sdpa of repeated keys": _repeated, "flex_attention": _flex}
LONG_ONLY = {"flex_attention": 16384}  # compiles for every shape, and is for long contexts


def names(tokens: int, batch: int) -> list[str]:
    """What is measured at a context."""
    every = (*DENSE, *paged.names(), *OURS)
    return [n for n in every if tokens >= LONG_ONLY.get(n, 0)]


def missing() -> list[str]:
    """What is not measured, as a package is not installed."""
    return paged.missing()


def _paged(dtype: torch.dtype, tokens: int, batch: int) -> tuple[dict[str, Any], int]:
    q = torch.randn(batch, HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)
    size = 2 * batch * HEADS * tokens * DIM * dtype.itemsize
    return {"all": paged.launches(dtype, q, HEADS, tokens, _sets(size))}, size


def _all(steps: Sequence[Launch]) -> None:
    for step in steps:
        step()


def _ours(name: str, tokens: int, batch: int) -> tuple[dict[str, Any], int]:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    plan = half_split_plan(5e5 ** -(torch.arange(DIM // 2) * 2 / DIM), DIM)
    position = torch.tensor([tokens], device="cuda")
    every: list[Launch] = []
    parts: dict[str, list[Launch]] = {"prepare": [], "pages": [], "merge": []}
    size = 0
    while len(every) < (_sets(size) if size else 1):
        shape = (batch, HEADS, DIM, tokens + 256, torch.bfloat16, torch.device("cuda"))
        state = LayerState(Config(**OURS[name]), *shape, turn=plan, group=GROUP)
        fill([state], tokens)
        state.keeper.tick(1)
        t, pool = state.tensors, state.keeper.pool
        used = pool.used * state.layout.page_bytes + pool.schedule.bytes
        size = used + t.exact_keys.nbytes + t.exact_values.nbytes
        q = torch.randn(batch, HEADS * GROUP, 1, DIM, **like)
        k, v = (torch.randn(batch, HEADS, 1, DIM, **like) for _ in range(2))
        work = Work(t.visits, t.segments, t.first)
        _, steps = kernels.steps(q, k, v, None, position, t, DIM**-0.5, state.layout, work=work)
        for launches, step in zip(parts.values(), steps, strict=True):
            launches.append(step)
        every.append(partial(_all, steps))
    return {"all": every, "parts": parts}, size
