"""Settings: what is accepted, and what an error says to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, layer_state, tiny

import skv_compile as skv
from skv_compile.backend import SkvBackend, split_options
from skv_compile.cache.state import LayerState
from skv_compile.codec.tiers import choose_layout, layouts
from skv_compile.config import HEAD_DIMS, make_config, parse_bytes
from skv_compile.errors import ConfigError, SkvError, UnsupportedError


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bits", 0),
        ("bits", -1),
        ("bits", 65),
        ("bits", "4"),
        ("bits", True),
        ("bits", float("nan")),
        ("codec", "grdi"),
        ("codec", None),
        ("retention", "rdr2"),
        ("sinks", -1),
        ("sinks", 1.5),
        ("sinks", True),
        ("recent", 0),
        ("recent", "64"),
        ("page_tokens", 0),
        ("page_tokens", 12),
        ("budget", 0),
        ("budget", -5),
        ("budget", "lots"),
        ("budget", "1 parsec"),
    ],
)
def test_an_impossible_value_is_refused_by_its_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        skv.Config(**{setting: value})


def test_a_config_error_is_a_value_error_and_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SkvError)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("bit", "bits"), ("page_token", "page_tokens"), ("recents", "recent"), ("sink", "sinks")],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    for refuse in (
        lambda: make_config(None, **{wrong: 1}),
        lambda: skv.Config().replace(**{wrong: 1}),
        lambda: split_options({wrong: 1}),
        lambda: SkvBackend(options={wrong: 1}),
    ):
        with pytest.raises(ConfigError, match=rf"{wrong!r}.*Did you mean {right!r}\?"):
            refuse()


def test_an_unknown_codec_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'identity'\? Known: .*grid"):
        skv.Config(codec="identiti")


def test_a_config_cannot_be_changed() -> None:
    config = skv.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 2
    assert config.replace(bits=3.0) == skv.Config(bits=3.0)
    assert config == skv.Config()
    assert hash(config) == hash(skv.Config())


def test_something_else_than_a_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a skv\.Config"):
        make_config({"bits": 2})


def test_overrides_win_over_the_config() -> None:
    assert make_config(skv.Config(bits=3.0, sinks=2), bits=4.0) == skv.Config(bits=4.0, sinks=2)
    assert make_config(None, codec="identity") == skv.Config(codec="identity")


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (17, 17),
        ("17", 17),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2GiB", 2 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5MiB", 3 * 2**19),
        (".5TiB", 2**39),
    ],
)
def test_sizes_are_read_with_their_units(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size
    assert skv.Config(budget=text).budget_bytes == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3", "0", "-1KB", "1 KBB", True, None, []])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        parse_bytes(text)


# ---------------------------------------------------------------- tiers


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiers_go_from_coarse_to_fine(head_dim: int) -> None:
    rates = [layout.rate(0) for layout in layouts(skv.Config(), head_dim, 100, "float32")]
    assert rates == sorted(rates)
    assert len(set(rates)) == len(rates)


@given(st.sampled_from(HEAD_DIMS), st.floats(0.1, 64))
def test_the_tier_is_the_finest_within_the_bits(head_dim: int, bits: float) -> None:
    config = skv.Config(bits=bits, retention="none")
    available = layouts(config, head_dim, 100, "float32")
    if bits < available[0].rate(0):
        with pytest.raises(ConfigError, match="below the coarsest tier"):
            choose_layout(config, head_dim, 100, "float32")
        return
    rate = choose_layout(config, head_dim, 100, "float32").rate(0)
    assert rate <= bits + 1e-9
    assert not any(rate < other.rate(0) <= bits for other in available)


def test_bits_below_the_coarsest_tier_name_the_lowest_rate() -> None:
    config = skv.Config(bits=1.0, codec="grid", retention="none")
    with pytest.raises(ConfigError, match=r"2\.125 bits per coordinate\. Ask for at least that"):
        choose_layout(config, 64, 100, "float32")


@pytest.mark.parametrize("retention", ["none", "rdr"])
@pytest.mark.parametrize("head_dim", [8, 24, 100, 512])
def test_a_head_dim_without_a_tier_is_refused_with_what_to_do(head_dim: int, retention) -> None:
    with pytest.raises(UnsupportedError, match=r"supported are 16, .*Use a dense cache"):
        choose_layout(skv.Config(retention=retention), head_dim, 100, "float32")


def test_a_cache_refuses_head_dim_and_bits_when_it_is_made() -> None:
    odd = tiny("llama", hidden_size=96)  # head_dim 24
    with pytest.raises(UnsupportedError, match="head_dim=24"):
        skv.SphericalCache(odd.config, 64)
    with pytest.raises(ConfigError, match="coarsest"):
        skv.SphericalCache(tiny("llama").config, 64, bits=0.5, retention="none")


@pytest.mark.parametrize("retention", ["none", "rdr"])
def test_a_dtype_without_arithmetic_is_refused(retention: str) -> None:
    with pytest.raises(UnsupportedError, match="int8 is not supported"):
        choose_layout(skv.Config(retention=retention), 64, 100, "int8")


@pytest.mark.parametrize("length", [0, -1, 1.5, "64", True, None])
def test_a_cache_length_is_a_positive_integer(length: object) -> None:
    with pytest.raises(ConfigError, match="max_cache_len"):
        skv.SphericalCache(tiny("llama").config, length)


# ---------------------------------------------------------------- budget


def bytes_taken(state: LayerState) -> int:
    """Everything that is held for the one layer of a pool."""
    return state.own_bytes + state.keeper.bytes


@pytest.mark.parametrize("slack", [0, 1, 5000, 10**9])
def test_a_budget_is_never_exceeded_and_takes_the_finest_tier(slack: int) -> None:
    sizes = []
    for bits in (3.0, 4.0, 64.0):  # the three tiers at head_dim 16
        sizes.append(bytes_taken(layer_state("grid", tokens=4096, bits=bits)))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    for n, size in enumerate(sizes):
        config = skv.Config(codec="grid", bits=64.0, **SMALL)
        got = LayerState(config, 2, 2, 16, 4096, torch.float32, torch.device("cpu"), size + slack)
        taken = bytes_taken(got)
        assert taken <= size + slack
        assert taken == max(s for s in sizes if s <= size + slack)
        assert taken >= size or n == 0


def test_a_budget_below_the_coarsest_tier_says_what_the_window_takes() -> None:
    config = skv.Config(**SMALL)
    window = 2 * 2 * 2 * 24 * 16 * 4  # sides, rows, heads, slots, dim, bytes
    with pytest.raises(ConfigError, match=rf"window alone take {window}.*Raise the budget, lower"):
        LayerState(config, 2, 2, 16, 4096, torch.float32, torch.device("cpu"), 1000)


def test_public_names_are_importable_and_no_other() -> None:
    for name in skv.__all__:
        assert getattr(skv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Spherical'"):
        _ = skv.Spherical


@pytest.mark.parametrize("name", ["exact", "quality", "balanced", "small"])
def test_a_preset_is_a_config_and_compiles_nothing(name: str) -> None:
    config = skv.Config.preset(name)
    assert isinstance(config, skv.Config)
    assert (config.codec == "identity") == (name == "exact")


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="balanced"):
        skv.Config.preset("balance")
