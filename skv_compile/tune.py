"""How the kernels are launched best on a device, measured: what ``skv tune`` does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bench.fill import SHARES, fill
from .bench.timing import milliseconds
from .cache.state import LayerState
from .codec.tiers import choose_layout, frames_of
from .config import Config
from .errors import ConfigError, SkvError, UnsupportedError
from .lowering import kernels
from .lowering.generate import Spec
from .lowering.launch import Launch, general, name_of, save
from .lowering.layout import Layout

#: Values of the settings that compile something new, each tried with every one of ``SPLITS``.
AXES: dict[str, tuple[int | None, ...]] = {
    "pages_warps": (1, 2),
    "pages_registers": (None, 160, 128),
    "pages_stages": (2, 3, 4),
    "prepare_warps": (4, 8),
}
SPLITS = (4, 6, 8, 12, 16)  # programs of ``pages`` on a multiprocessor
GAIN = 0.98  # of the time before: what is gained less is noise
L2_CACHES = 4  # that a measurement goes through, so that no page is found in one
MOST_LAYERS = 64
ROOM = 0.95  # part of the pool that is filled: tokens are drawn at random


def around(best: Launch, name: str) -> Iterator[Launch]:
    """Launches that differ from one in a setting, and in what goes with it."""
    for value in AXES[name]:
        for splits in SPLITS if name.startswith("pages") else (best.pages_per_sm,):
            changes: dict[str, Any] = {name: value, "pages_per_sm": splits}
            found = replace(best, **changes)
            if found.pages_warps > 1:  # they share the registers anyway
                found = replace(found, pages_registers=None)
            yield found


@dataclass
class Search:
    """Coordinate descent over launches.

    ``measure``: milliseconds under a launch. ``check``: raises where a launch fails in forwards
    that are not measured. One that fails is as slow as can be.
    """

    measure: Callable[[Launch], float]
    check: Callable[[Launch], Any] = lambda launch: None
    report: Callable[[str], None] = lambda text: None
    trials: dict[Launch, float] = field(default_factory=dict)
    errors: dict[Launch, str] = field(default_factory=dict)

    def ms(self, launch: Launch) -> float:
        """Measured once."""
        if launch not in self.trials:
            try:
                self.trials[launch] = self.measure(launch)
                self.report(f"{words(launch)}: {self.trials[launch]:.4g} ms")
            except Exception as error:
                self._fail(launch, error)
        return self.trials[launch]

    def _works(self, launch: Launch) -> bool:
        try:
            self.check(launch)
        except Exception as error:
            self._fail(launch, error)
        return launch not in self.errors

    def _fail(self, launch: Launch, error: Exception) -> None:
        said = str(error).strip().splitlines()
        self.trials[launch] = math.inf
        self.errors[launch] = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        self.report(f"{words(launch)}: {self.errors[launch]}")

    def run(self, first: Launch) -> Launch:
        """The best one, from ``first`` on; that one, unless another is clearly faster.

        Raises:
            SkvError: none works.
        """
        best, moved = first, True
        while moved:
            moved = False
            for name in AXES:
                better = self._better(best, name)
                if better is not None:
                    best, moved = better, True
        if self.ms(best) == math.inf:
            raise SkvError(f"the kernels cannot be launched at all. {self.errors[first]}")
        if best != first and first not in self.errors:
            # The first was measured when the device was cold.
            self.trials |= {launch: self.measure(launch) for launch in (first, best)}
            if self.trials[best] > GAIN * self.trials[first]:
                best = first
        return best

    def _better(self, best: Launch, name: str) -> Launch | None:
        """The fastest along an axis, if that is much faster, and works."""
        limit = GAIN * self.ms(best)
        for launch in sorted(around(best, name), key=self.ms):
            if self.ms(launch) > limit or launch in self.errors:
                break
            if self._works(launch):
                return launch
        return None


def words(launch: Launch) -> str:
    """A launch as people read it."""
    registers = f", {launch.pages_registers} registers" if launch.pages_registers else ""
    return (
        f"{launch.pages_per_sm} programs an SM of {launch.pages_warps} warps, "
        f"{launch.pages_stages} stages{registers}; prepare {launch.prepare_warps} warps"
    )


# ---------------------------------------------------------------- on a device


def tune(
    config: Config,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    tokens: int,
    batch: int,
    device: torch.device,
    *,
    turn: Tensor | None = None,
    layers: int = 1,
    report: Callable[[str], None] = lambda text: None,
    timer: Callable[[list[Callable[[], Any]]], float] = milliseconds,
) -> dict[str, Any]:
    """Measure the attention of a decoding step under several launches, and keep the best on disk.

    It is used by processes that begin later, for every cache whose layout has the same kernels, of
    whatever length, budget, batch and number of heads. Takes minutes: every setting is compiled.

    Args:
        config: of the cache. heads: its kv heads; group: query heads of each; tokens: its slots,
            which are filled with random codes. device: a GPU.
        turn: the model's rotary plan (``codec.rotary``), if it has one. layers: that share
            ``config.budget``.
        report: is told about every launch. timer: (forwards) -> milliseconds of one.

    Returns:
        Plain numbers: ``before`` and ``after``, every launch tried, the ``file`` that was written.

    Raises:
        ConfigError: the cache is too small to be measured.
        UnsupportedError: forwards of it do not run on kernels.
    """
    if config.retention != "none":  # policies that keep some tokens have the same kernels
        config = config.replace(retention="rdr", retention_table=None)
    name = str(dtype).removeprefix("torch.")
    layout = choose_layout(config, head_dim, tokens, name, turn is not None)
    q = torch.empty(batch, heads * group, 1, head_dim, dtype=dtype, device=device)
    reason = kernels.refusal(layout, q, None, group)
    if reason is not None:
        raise UnsupportedError(f"there is nothing to tune: {reason}.")
    if coded_of(layout, tokens) <= 0:
        least = layout.sinks + layout.recent + layout.stride + 1
        raise ConfigError(f"a cache of {tokens} tokens is all exact; take at least {least}.")
    shape = (batch, heads, head_dim, tokens, dtype, device)
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, torch.no_grad():  # Triton launches on the current one
        full = Full(config, shape, group, turn, layers)
        spec = general(Spec(full.layout.key, group, 1), device)
        search = Search(lambda launch: timer(full.forwards(launch)), full.check, report)
        first = Launch.built_in(spec)
        best = search.run(first)
    numbers = {"tokens": tokens, "batch": batch, "heads": heads}
    times = {"before_ms": _finite(search.trials[first]), "after_ms": _finite(search.trials[best])}
    file = save(spec, name_of(device), best, {**numbers, **times})
    return {
        "device": name_of(device),
        "layout": full.layout.key,
        "group": group,
        **numbers,
        "caches": len(full.states),
        **times,
        "before": asdict(first),
        "after": asdict(best),
        "trials": [
            {**asdict(launch), "ms": _finite(ms), "error": search.errors.get(launch)}
            for launch, ms in search.trials.items()
        ],
        "file": str(file),
    }


def _finite(ms: float) -> float | None:
    return ms if ms < math.inf else None


def coded_of(layout: Layout, tokens: int) -> int:
    """Tokens in pages of a row of a cache of which one slot is free."""
    return (tokens - 1 - layout.sinks - layout.recent) // layout.stride * layout.stride


#: Batch, kv heads, head dim, slots, dtype and device.
Shape = tuple[int, int, int, int, torch.dtype, torch.device]


class Full:
    """Layers full of random codes, and forwards of one token that attend to them.

    They are so many that one replay after another finds no page in the L2 cache.
    """

    def __init__(
        self, config: Config, shape: Shape, group: int, turn: Tensor | None, layers: int
    ) -> None:
        batch, heads, dim, tokens, dtype, self.device = shape
        budget = None if config.budget_bytes is None else config.budget_bytes // layers
        like: Any = {"dtype": dtype, "device": self.device}
        self.states: list[LayerState] = []
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []

        def plain(heads: int, layout: Layout) -> tuple[Tensor, ...]:
            # What is in a frame makes no difference to time.
            return frames_of(layout, heads, self.device)

        count = 1
        while len(self.states) < count:
            state = LayerState(config, *shape, budget, turn, plain, group)
            self.states.append(state)
            fill([state], tokens - 1, shares_of(state, tokens))
            q = torch.randn(batch, heads * group, 1, dim, **like)
            k, v = torch.randn(2, batch, heads, 1, dim, **like)
            self.inputs.append((q, k, v))
            pool, exact = state.keeper.pool, state.tensors.exact_keys
            size = pool.used * pool.layout.page_bytes + 2 * exact.nbytes
            count = min(MOST_LAYERS, -(-L2_CACHES * _l2_bytes(self.device) // size))
        self.layout = self.states[0].layout
        self.position = torch.tensor([tokens - 1], device=self.device)

    def forwards(self, launch: Launch, mask: Tensor | None = None) -> list[Callable[[], None]]:
        """The attention of every layer."""
        found: list[Callable[[], None]] = []
        scale, raw = self.layout.head_dim**-0.5, self.device.type == "cuda"
        for state, (q, k, v) in zip(self.states, self.inputs, strict=True):
            inputs = (q, k, v, mask, self.position, state.tensors, scale, self.layout)
            _, steps = kernels.steps(*inputs, raw=raw, launch=launch)
            found.append(partial(_all, steps))
        return found

    def check(self, launch: Launch) -> None:
        """Forwards with masks, which are kernels of their own."""
        shape = (self.states[0].batch, 1, 1, self.layout.max_tokens)
        seen = torch.ones(shape, dtype=torch.bool, device=self.device)
        for mask in (seen, torch.zeros(shape, dtype=self.states[0].dtype, device=self.device)):
            self.forwards(launch, mask)[0]()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _all(steps: tuple[Callable[[], None], ...]) -> None:
    for step in steps:
        step()


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def shares_of(state: LayerState, tokens: int) -> list[float]:
    """The parts of all coded tokens in each tier that fill the pool.

    From the shares of ``rdr`` at 1 bit: fewer of everything where the pool is smaller, more of the
    finest tier where it is larger.
    """
    layout, pool = state.layout, state.keeper.pool
    if not layout.tracked:
        return [1.0]
    tiers = len(layout.tiers)
    shares = [0.0] * tiers
    for tier, share in zip((0, tiers // 2, tiers - 1), SHARES[3][1.125], strict=True):
        shares[tier] += share
    # Every head has a page begun in every tier.
    pages = ROOM * (pool.pages / (state.batch * state.heads) - tiers)
    room = pages / coded_of(layout, tokens)
    need = sum(share / slots for share, slots in zip(shares, layout.capacity, strict=True))
    if room <= 0:
        raise ConfigError(
            f"{pool.pages} pages for {state.batch * state.heads} heads in {tiers} tiers are too "
            "few to be measured; take more tokens or bits."
        )
    if room < need:
        return [share * room / need for share in shares]
    finest = 1 / layout.capacity[-1]
    more = min(1.0, (room - need) / (finest - need)) if finest > need else 1.0
    shares = [share * (1 - more) for share in shares]
    shares[-1] += more
    return shares
