"""Cases for the generated kernels, against the reference: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from skv_compile.cache.state import LayerState
from skv_compile.config import Config
from skv_compile.lowering import kernels, reference
from skv_compile.lowering.layout import Layout
from skv_compile.lowering.state import State
from skv_compile.lowering.turn import half_split_plan

UNIFORM = {"retention": "none", "page_tokens": 16, "bits": 2.5}
TRACKED = {"page_tokens": 16, "bits": 2.0}

#: name -> settings of :func:`attend_both`. Small: the interpreter runs one program at a time.
CASES: dict[str, dict[str, Any]] = {
    "grid": {"codec": "grid", "turned": False, **UNIFORM},
    "frame": {**UNIFORM},
    "pages of 64": {"dim": 128, "group": 4, **UNIFORM, "page_tokens": 64, "bits": 3.2},
    "4 bits": {"dim": 128, "group": 2, **UNIFORM, "page_tokens": 64, "bits": 4.2},
    "left padding": {"batch": 2, "mask": "bool", **UNIFORM},
    "hidden tokens": {"batch": 2, "mask": "hole", **UNIFORM},
    "float mask": {"batch": 2, "mask": "float", **UNIFORM},
    "tiers": {"batch": 2, "group": 4, "mask": "bool", **TRACKED, "bits": 1.5},
    "tiers, hidden": {"batch": 2, "group": 4, "mask": "hole", **TRACKED, "bits": 1.5},
    "tiers, grid": {"codec": "grid", "turned": False, "group": 4, **TRACKED},
    "tiers, D=128": {"dim": 128, "group": 4, "heads": 1, **TRACKED},
    "tiers, D=128, group 1": {"dim": 128, "group": 1, "heads": 1, "mask": "bool", **TRACKED},
    "3 queries": {"queries": 3, "batch": 2, "mask": "bool", **TRACKED},
    "5 queries": {"queries": 5, "group": 1, **UNIFORM},
    "16 queries": {"queries": 16, "group": 4, "heads": 1, "mask": "hole", **UNIFORM},
    "D=80, group 7": {"dim": 80, "group": 7, **TRACKED},
    "D=96, group 8": {"dim": 96, "group": 8, "heads": 1, **UNIFORM},
    "D=256, group 16": {"dim": 256, "group": 16, "heads": 1, **UNIFORM},
    "nothing coded": {"length": 40, **UNIFORM, "recent": 64},
}


def filled(
    device: torch.device,
    codec: str = "frame",
    dim: int = 64,
    heads: int = 2,
    group: int = 2,
    batch: int = 1,
    slots: int = 512,
    length: int = 300,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    turned: bool = True,
    seed: int = 0,
    **kw: Any,
) -> tuple[LayerState, Any]:
    """A state with a random prompt in it, poison everywhere else, and a maker of tensors."""
    config = Config(codec=codec, **{"sinks": 4, "recent": 12, **kw})
    speeds = 10000 ** -(torch.arange(dim // 2).float() * 2 / dim)
    plan = half_split_plan(speeds, dim) if turned else None
    state = LayerState(config, batch, heads, dim, slots, dtype, device, group=group, turn=plan)
    state.tensors.pool.fill_(0xFF)
    state.tensors.exact_keys.fill_(torch.nan)
    state.tensors.exact_values.fill_(torch.nan)
    generator = torch.Generator().manual_seed(seed)

    def random(n: int, tokens: int) -> Tensor:
        return torch.randn(batch, n, tokens, dim, generator=generator).to(device, dtype)

    q, k, v = random(heads * group, length), random(heads, length), random(heads, length)
    k = k + 2 * torch.randn(1, heads, 1, dim, generator=generator).to(device, dtype)
    position = torch.arange(length, device=device)
    seen = None if mask is None else mask[:, :, :length]
    state.keeper.tick(length)
    state.calibrate(q, k, v, seen, position)
    state.retain(q, k, v, seen, position, dim**-0.5)
    state.append(k, v, seen, position)
    return state, random


def masks(kind: str | None, batch: int, slots: int, device: torch.device) -> Tensor | None:
    """A causal mask [B, 1, slots, slots], rows left-padded by 5 n; ``hole`` hides 50 more."""
    if kind is None:
        return None
    full = torch.ones(batch, 1, slots, slots, dtype=torch.bool, device=device).tril()
    for row in range(batch):
        full[row, :, :, : 5 * row] = False
    if kind == "hole":
        full[:, :, :, 90:140] = False
    return full


def one_token(
    data: st.DataObject, batch: int, random: Any, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Queries, keys, values, mask and position of the n-th step after 40 tokens of 64: where they
    are expected or not, finite or not, seen or not."""
    start = data.draw(st.sampled_from([0, 39 + n, 40 + n, 41 + n, 63]))
    k, v, q = random(2, 1), random(2, 1), random(4, 1)
    if data.draw(st.integers(0, 4)) == 0:
        bad = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        k[data.draw(st.integers(0, batch - 1)), 1, 0, 3] = bad
    mask = None
    kind = data.draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        shape = (data.draw(st.sampled_from([1, batch])), 1, 1, 64)
        mask = torch.rand(shape) > data.draw(st.sampled_from([0.0, 0.5]))
        if kind == "float":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return q, k, v, mask, torch.tensor([start])


class Forward(NamedTuple):
    """One forward after a prompt, as ``reference.attend`` takes it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    position: Tensor
    state: State
    scale: float
    layout: Layout

    def reference(self) -> Tensor:
        *first, scale, layout = self
        return reference.attend(*first, False, scale, layout)


def forward(
    device: torch.device,
    *,
    queries: int = 1,
    mask: str | None = None,
    coded: bool = True,
    **kw: Any,
) -> Forward:
    """A forward of some random queries."""
    heads, group = kw.get("heads", 2), kw.get("group", 2)
    batch, slots, length = kw.get("batch", 1), kw.get("slots", 512), kw.get("length", 300)
    dim = kw.get("dim", 64)
    full = masks(mask, batch, slots, device)
    state, random = filled(device, mask=full, **kw)
    q, k, v = random(heads * group, queries), random(heads, queries), random(heads, queries)
    position = torch.arange(length, length + queries, device=device)
    own = None if full is None else full[:, :, length : length + queries]
    if own is None and queries > 1:
        own = torch.ones(1, 1, queries, slots, dtype=torch.bool, device=device).tril(length)
    if mask == "float":
        own = torch.where(own, 0.0, torch.finfo(torch.float32).min)
    state.keeper.tick(queries)
    tensors, layout = state.tensors, state.layout
    assert bool((tensors.meta[:, 2] > 0).all()) or length < 64 or not coded
    return Forward(q, k, v, own, position, tensors, dim**-0.5, layout)


def attend_both(device: torch.device, *, raw: bool, **kw: Any) -> tuple[Tensor, Tensor]:
    """What the kernels and the reference make of one forward after a prompt."""
    one = forward(device, **kw)
    return kernels.attend(*one, raw=raw), one.reference()


def error(got: Tensor, want: Tensor) -> float:
    """Distance relative to the length of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())
