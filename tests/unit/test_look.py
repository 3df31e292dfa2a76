"""The numbers of a cache that pictures are drawn from, and the picture itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support import VOCAB, tiny

import skv_compile as skv
from skv_compile.commands.picture import clean, line, picture
from skv_compile.look import Look, look_at
from skv_compile.retention.map import retention_map

SIZES = {"sinks": 4, "recent": 16, "bits": 2.125}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", layers=3)


def filled(model: Any, tokens: int = 400, **kw: Any) -> skv.SphericalCache:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (1, tokens), generator=generator)
    cache = skv.SphericalCache(model.config, tokens + 5, **(SIZES | kw))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def drawn(look: Look, width: int = 66, speed: float | None = None) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(picture(look, width, speed))
    return capture.get()


@pytest.mark.parametrize(
    "how", [{"retention": "rdr"}, {"retention": "none"}, {"codec": "identity"}]
)
def test_the_numbers_are_those_of_the_cache(model: Any, how: dict[str, Any]) -> None:
    cache = filled(model, **how)
    look = look_at(cache)
    assert look.levels.shape == (6, 400)
    assert (look.tokens, look.max_tokens) == (400, 405)
    assert (look.resident_bytes, look.dense_bytes) == (cache.resident_bytes, cache.dense_bytes)
    assert look.bits_per_coordinate == cache.bits_per_coordinate
    assert look.kept + look.dropped == sum(look.counts.values()) == 6 * 400
    assert look.dropped == cache.summary().get("tokens_dropped", 0)
    assert list(look.counts.values())[1:-1] == cache.summary().get(
        "tokens_by_tier", [look.levels.size - 6 * exact_tokens(cache)]
    )


def exact_tokens(cache: skv.SphericalCache) -> int:
    return 400 - int(cache.states[0].tensors.meta[0, 2])


def test_tokens_stand_where_the_map_has_them(model: Any) -> None:
    cache = filled(model, retention="rdr")
    look, found = look_at(cache), retention_map(cache)
    end = found["first"] + found["levels"].shape[1]
    assert (look.levels[:, found["first"] : end] == found["levels"]).all()
    assert (look.levels[:, : found["first"]] == look.exact).all()
    assert (look.levels[:, end:] == look.exact).all()
    assert (look.layers.tolist(), look.heads.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1] * 3)
    assert look.bits.tolist() == found["bits"].tolist()


def test_a_short_sequence_is_exact_throughout(model: Any) -> None:
    look = look_at(filled(model, 20))
    assert (look.levels == look.exact).all()
    assert np.isnan(look.bits).all()
    assert look.dropped == 0


def test_an_empty_cache_has_no_look(model: Any) -> None:
    with pytest.raises(skv.CacheStateError, match="not seen a token"):
        look_at(skv.SphericalCache(model.config, 100, **SIZES))


def made_up(**kw: Any) -> Look:
    """Two layers with one and two heads, ten tokens."""
    values: dict[str, Any] = {
        "tokens": 10,
        "max_tokens": 20,
        "resident_bytes": 1_234_567,
        "dense_bytes": 9_876_543,
        "bits_per_coordinate": 1.5,
        "layers": np.array([5, 7, 7]),
        "heads": np.array([0, 0, 1]),
        "tiers": ("low", "high"),
        "rates": (1.0, 3.0),
        "levels": np.array(
            [[3, 0, 0, 1, 1, 2, 2, 2, 3, 3], [3, *[1] * 7, 3, 3], [3, *[2] * 7, 3, 3]],
            dtype=np.uint8,
        ),
        "bits": np.array([1.5, 1.25, 3.0]),
    }
    return Look(**values | kw)


def test_grid_and_strips_are_means() -> None:
    look = made_up()
    table = look.grid(look.bits)
    assert table[0].tolist() == [1.5, 1.25]
    assert np.isnan(table[1, 0])
    assert table[1, 1] == 3.0
    bits, exact = look.strips(bins=5, bands=2)
    assert bits.tolist() == [[1.5, 0.5, 2.0, 3.0, 3.0], [2.5, 2.0, 2.0, 2.0, 3.0]]
    assert exact.tolist() == [[0.5, 0, 0, 0, 1], [0.5, 0, 0, 0, 1]]
    assert look.strips(bins=99, bands=99)[0].shape == (2, 10)
    assert look.strips(bins=99, bands=1)[0].shape == (1, 10)


def test_the_picture_says_the_numbers() -> None:
    text = drawn(made_up(), speed=12.34)
    assert re.search(r"cache +1,234,567 bytes", text)
    assert re.search(r"dense +9,876,543 bytes, 8\.0x", text)
    assert "10 of 20 tokens in 3 heads: 28 kept, 2 dropped" in text
    assert "12.3 tokens a second" in text
    assert "tokens a second" not in drawn(made_up())
    shares = [float(x) for x in re.findall(r"([\d.]+) %", text)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert "\x1b" not in text


def test_the_picture_draws_each_head_and_token() -> None:
    lines = drawn(made_up()).splitlines()
    above = next(n for n, x in enumerate(lines) if "kv head (down)" in x)
    # Half of 3 bits, a bit less; no second head in the first layer, all of 3 bits.
    assert [x.rstrip() for x in lines[above + 1 : above + 3]] == [" 0 ▓▓▒▒", " 1   ██"]
    below = next(n for n, x in enumerate(lines) if "bands of layers" in x)
    assert lines[below + 1].rstrip() == " 1 ■··▒▒███■■"


def test_a_picture_fits_its_width_and_many_heads_few_rows(model: Any) -> None:
    for width in (20, 40, 66):
        assert max(map(len, drawn(look_at(filled(model)), width).splitlines())) <= width
    layers, heads = np.divmod(np.arange(80 * 32), 32)
    many = made_up(
        layers=layers,
        heads=heads,
        bits=np.full(80 * 32, 2.0),
        levels=np.ones((80 * 32, 10), dtype=np.uint8),
    )
    text = drawn(many, 66)
    assert len(text.splitlines()) < 26
    assert " 4 ▓" in text  # every fourth head begins a row


def test_a_turn_is_one_line() -> None:
    said = line(made_up(), 7, 12, 9.87)
    assert "\n" not in said
    for word in ("7 + 12 tokens", "10 of 20", "6.7 % dropped", "1.2 MB", "9.9 MB", "9.9 tokens/s"):
        assert word in said


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert clean("a\x1b[31mb\x07\r\x9bc\n\tdé漢") == "a[31mbc\n\tdé漢"
