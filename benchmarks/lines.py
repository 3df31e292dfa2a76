"""What a fidelity run measures: the product's tiers, the baselines, and our keys alone.

A line takes what the exact model made of a document and gives the logits of the continuation.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import baselines
from torch import Tensor

import skv_compile as skv
from skv_compile import evaluate
from skv_compile.evaluate import Exact, Past

CODECS = ("grid", "rings", "frame")
RATES = (1.125, 1.625, 2.125, 2.625, 3.125, 3.625, 4.125)
KEY_RATES = (1.125, 1.625, 2.125)
LLOYD, KIVI = "Hadamard + Lloyd-Max", "KIVI, groups of {}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Logits [tokens, vocabulary], what the layers' past looked like, and the bytes it took."""

    logits: Tensor
    past: Callable[[], Past]
    cost: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that is measured. ``bits`` count what is coded: both sides, or keys alone."""

    codec: str
    bits: float
    run: Callable[[Exact], Outcome]
    keys_only: bool = False
    simulated: bool = True  # on the exact cache, not through the product
    note: str = ""

    @property
    def name(self) -> str:
        """Codec, rate and side in words."""
        side = ", keys only" if self.keys_only else ""
        return f"{self.codec} {self.bits:.4g}{side}"


def spherical(model: Any, codec: str, config: skv.Config, bits: float, note: str = "") -> Line:
    """A line through the product."""

    def run(exact: Exact) -> Outcome:
        logits, cache = evaluate.run_spherical(model, exact, config)

        def past() -> Past:
            again = skv.SphericalCache(model.config, len(exact.document.ids) - 1, config)
            evaluate.fill(model, exact.document.ids[: exact.prefix], again)
            decoded = [state.dense() for state in again.states]
            return [(k[:, :, : exact.prefix], v[:, :, : exact.prefix]) for k, v in decoded]

        return Outcome(logits, past, evaluate.sizes(cache))

    return Line(codec, bits, run, simulated=False, note=note)


def on_exact(
    model: Any,
    codec: str,
    bits: float,
    past_of: Callable[[Exact], Past],
    frames: int = 0,
    **more: Any,
) -> Line:
    """A line that replaces the exact cache's past; its frames would take ``frames`` bytes."""

    def run(exact: Exact) -> Outcome:
        past = past_of(exact)
        logits = evaluate.score(model, exact, evaluate.fork(exact.cache, past))
        cost: dict[str, Any] = {"bits_per_coordinate": bits, "frame_bytes": frames}
        return Outcome(logits, lambda: past, cost)

    return Line(codec, bits, run, **more)


def product_lines(model: Any, args: argparse.Namespace, notes: list[str]) -> Iterator[Line]:
    """Every tier of every codec that this version of the product has."""
    windows = {"sinks": args.sinks, "recent": args.recent, "retention": "none"}
    exact = skv.Config(codec="identity", bits=64, **windows)
    yield spherical(model, "identity", exact, 8.0 * model.dtype.itemsize, "shows rounding alone")
    wanted: list[tuple[str, str, dict[str, Any]]] = [(codec, codec, {}) for codec in CODECS]
    if args.frame:
        wanted.append(("frame", "frame, other text", {"frame": args.frame}))
    for codec, title, more in wanted:
        seen = set()
        for rate in RATES:
            try:
                config = skv.Config(codec=codec, bits=rate, **windows, **more)
                bits = probe(model, config).bits_per_coordinate
            except skv.ConfigError as error:
                if codec not in skv.config.CODECS or "coarsest" not in str(error):
                    notes.append(f"{title} at {rate} bits skipped: {error}")
                continue
            if bits not in seen:
                seen.add(bits)
                yield spherical(model, title, config, bits)


def probe(model: Any, config: skv.Config, tokens: int = 1024) -> Any:
    """An allocated, empty cache for the model: it tells rates, layouts and turns."""
    cache = skv.SphericalCache(model.config, tokens, config)
    text = model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache.early_initialization(1, text.num_key_value_heads, dim, model.dtype, model.device)
    return cache


def baseline_lines(model: Any, args: argparse.Namespace) -> Iterator[Line]:
    """Hadamard + Lloyd-Max and KIVI, and our keys with exact values."""
    plain = {"codec": "frame", "retention": "none", "bits": 2.125}
    config = skv.Config(**plain, sinks=args.sinks, recent=args.recent)
    state = probe(model, config).states[0]
    layout, plan = state.layout, state.tensors.turn
    dim = layout.head_dim
    coded = baselines.coded_region(args.prefix, args.sinks, args.recent, layout.page_tokens)
    window = baselines.coded_region(args.prefix, args.sinks, args.recent)

    def both(region: slice, of_keys: baselines.Quantise, of_values: baselines.Quantise | None):
        def past_of(exact: Exact) -> Past:
            replace = baselines.replace_region
            return [
                (replace(k, region, of_keys), replace(v, region, of_values) if of_values else v)
                for k, v in exact.past
            ]

        return past_of

    for bits in (2, 3, 4, 5):  # 5 only to compare with frames counted
        rate = baselines.lloyd_bits(dim, bits)
        sides = [
            partial(baselines.lloyd_max, bits=bits, unbiased=unbiased) for unbiased in (True, False)
        ]
        yield on_exact(model, LLOYD, rate, both(coded, *sides))
        if window != coded and bits < 5:
            note = f"codes all but the last {args.recent} tokens, not whole pages"
            title = f"{LLOYD}, up to the window"
            yield on_exact(model, title, rate, both(window, *sides), note=note)
        if bits in (2, 3):
            yield on_exact(model, LLOYD, rate, both(coded, sides[0], None), keys_only=True)
    for group in (32, 64):
        for bits in (2, 3, 4):
            rate = baselines.kivi_bits(coded.stop - coded.start, dim, bits, group)
            sides = [
                partial(of, bits=bits, group=group)
                for of in (baselines.kivi_keys, baselines.kivi_values)
            ]
            yield on_exact(model, KIVI.format(group), rate, both(coded, *sides))
    for rate in KEY_RATES:
        digits = baselines.frame_digits(dim, rate)

        def past_of(exact: Exact, digits: int = digits) -> Past:
            rows = zip(exact.prompt.queries, exact.past, strict=True)
            return [(baselines.frame_keys(q, k, v, plan, layout, digits), v) for q, (k, v) in rows]

        note = "simulated with the codec's own calibration, encoder and decoder: V exact"
        twin = probe(model, dataclasses.replace(config, bits=rate))
        frames = evaluate.frame_bytes(twin) // 2  # of the keys, in the tier with these digits
        yield on_exact(model, "frame", rate, past_of, frames, keys_only=True, note=note)
