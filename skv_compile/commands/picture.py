"""A :class:`~skv_compile.look.Look` at a cache, drawn in characters; it reads without colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.text import Text

from skv_compile.commands import common

if TYPE_CHECKING:
    from skv_compile.look import Look

#: Rows of a picture at most, of heads and of bands of layers.
HEADS, BANDS = 8, 4

DROPPED, EXACT, NONE = "·", "■", " "
SHADES = "░▒▓█"
GREY, WHITE = "#8a8a8a", "bold"
#: viridis at 0, 1/4, ... 1, lightened at its dark end: terminals are dark as often as light.
SCALE = ((94, 60, 153), (70, 103, 160), (45, 145, 140), (94, 180, 98), (214, 190, 40))


def picture(look: Look, width: int, speed: float | None = None) -> Group:
    """Bytes against dense, tiers by layer and head, which tokens are kept, tokens a second.

    ``width``: columns it may take. ``speed``: tokens a second, if they are known.
    """
    parts = [_bytes(look, width), _words(look, speed), Text()]
    parts += [Text("bits by layer (across) and kv head (down)", GREY), *_grid(look, width)]
    parts += [Text(), Text("tokens, first to last, for bands of layers", GREY)]
    parts += [*_strips(look, width), Text(), _legend(look)]
    return Group(*parts)


def _bytes(look: Look, width: int) -> Text:
    """The cache's bytes as a bar as long as the dense cache's."""
    full = max(1, width - 2)
    part = look.resident_bytes / max(1, look.dense_bytes)
    own = min(full, max(1, round(full * part)))
    bar = Text.assemble(("█" * own, _colour(1.0)), ("░" * (full - own), GREY))
    line = f"cache  {look.resident_bytes:>13,} bytes\ndense  {look.dense_bytes:>13,} bytes"
    return Text.assemble(line, f", {1 / part:.1f}x\n", bar)


def _words(look: Look, speed: float | None) -> Text:
    rate = f"\n{speed:.1f} tokens a second" if speed else ""
    return Text(
        f"{look.tokens:,} of {look.max_tokens:,} tokens in {len(look.heads)} heads: "
        f"{look.kept:,} kept, {look.dropped:,} dropped\n"
        f"{look.bits_per_coordinate:.3f} bits a coordinate{rate}"
    )


def _grid(look: Look, width: int) -> list[Text]:
    def fitted(values: np.ndarray) -> np.ndarray:
        return _merged(_merged(look.grid(values), HEADS).T, max(1, width - 3)).T

    table, there = fitted(look.bits), ~np.isnan(fitted(np.ones_like(look.bits)))
    wide = 2 if 2 * table.shape[1] + 3 <= width else 1
    step = -(-int(look.heads.max() + 1) // len(table))
    rows = []
    for n, row in enumerate(table):
        line = Text(f"{n * step:>2} ", GREY)
        for bits, is_head in zip(row, there[n], strict=True):
            cell = _cell(look, bits, float(np.isnan(bits))) if is_head else Text(NONE)
            line.append_text(Text("").join([cell] * wide))
        rows.append(line)
    return rows


def _strips(look: Look, width: int) -> list[Text]:
    bits, exact = look.strips(max(1, width - 3), BANDS)
    rows = []
    for band, (mean, share) in enumerate(zip(bits, exact, strict=True)):
        line = Text(f"{band + 1:>2} ", GREY)
        for one, part in zip(mean, share, strict=True):
            line.append_text(_cell(look, one, part))
        rows.append(line)
    return rows


def _legend(look: Look) -> Text:
    """Every level that there is, with its share of all tokens."""
    line, total = Text(), max(1, look.levels.size)
    rates = (0.0, *look.rates, max(look.rates))
    for level, (name, count) in enumerate(look.counts.items()):
        if count:
            mark = _cell(look, rates[level], float(level == look.exact))
            line.append_text(Text.assemble(mark, f" {name} {100 * count / total:.1f} %  "))
    return line


def _cell(look: Look, bits: float, exact: float) -> Text:
    """One character for tokens of so many bits on average, a share of them exact."""
    if exact >= 0.5:
        return Text(EXACT, WHITE)
    if bits == 0:
        return Text(DROPPED, GREY)
    part = min(1.0, bits / max(look.rates))
    return Text(SHADES[min(len(SHADES) - 1, int(part * len(SHADES)))], _colour(part))


def _colour(part: float) -> str:
    place = part * (len(SCALE) - 1)
    n = min(int(place), len(SCALE) - 2)
    mixed = (a + (b - a) * (place - n) for a, b in zip(SCALE[n], SCALE[n + 1], strict=True))
    return "#" + "".join(f"{round(x):02x}" for x in mixed)


def _merged(table: np.ndarray, most: int) -> np.ndarray:
    """Neighbouring rows taken together until there are at most ``most``."""
    step = -(-len(table) // most)
    if step == 1:
        return table
    return np.stack([_mean(table[n : n + step]) for n in range(0, len(table), step)])


def _mean(rows: np.ndarray) -> np.ndarray:
    """Over rows, NaN only where all are."""
    there = ~np.isnan(rows)
    total = np.where(there, rows, 0.0).sum(0)
    return np.where(there.any(0), total / np.maximum(1, there.sum(0)), np.nan)


def line(look: Look, new: int, answered: int, speed: float | None) -> str:
    """A turn in one line."""
    rate = f"; {speed:.1f} tokens/s" if speed else ""
    dropped = 100 * look.dropped / max(1, look.levels.size)
    return (
        f"{new} + {answered} tokens, {look.tokens:,} of {look.max_tokens:,} in the cache, "
        f"{dropped:.1f} % dropped; {common.size(look.resident_bytes)} instead of "
        f"{common.size(look.dense_bytes)}, {look.bits_per_coordinate:.3f} bits per coordinate{rate}"
    )


def clean(text: str) -> str:
    """Text without what would move a terminal's cursor or change its colours."""
    return "".join(x for x in text if x in "\n\t" or not (x < " " or "\x7f" <= x <= "\x9f"))


__all__: list[Any] = ["clean", "line", "picture"]
