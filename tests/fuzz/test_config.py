"""Settings of every kind and none: accepted and kept as they are, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import time
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import tiny
from torch._dynamo.exc import BackendCompilerFailed

import skv_compile as skv
from skv_compile import cli, files
from skv_compile.backend import SkvBackend
from skv_compile.config import MOST_BYTES, make_config, parse_bytes
from skv_compile.errors import ConfigError, SkvError, shown
from skv_compile.retention.policies import POLICIES

from .calls import EXAMPLES, Refused, attempt

WHERE = "test_config"
FIELDS = [f.name for f in dataclasses.fields(skv.Config)]
MANY = EXAMPLES or 250
FEW = max(20, MANY // 10)


class Broken:
    """No number, no name, and nothing that can be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __fspath__(self) -> bytes:
        return b"bytes"


class Level(IntEnum):
    LOW = 8


STRANGE = [
    Broken(), Level.LOW, 10**5000, -(10**5000), 2**31, 2**63, 2**64, -0.0, 1e308, 5e-324,
    Fraction(1, 3), Decimal("NaN"), 1j, np.int64(8), np.float32(2.5), np.float64("nan"),
    np.bool_(True), np.arange(3), np.zeros(()), torch.zeros(2), torch.tensor(8), torch.float16,
    Path("f"), Path(""), "", " ", "\0", "a\0b", "\ud800", "~nobody-here/f", "rdr ", "RDR", "8",
    "2GiB", "9" * 400, "9" * 20_000, "0.5", "0.0001B", "1e9", "nan", "inf", "-1", "٣", "½",
    "'; drop table", "../" * 50, "x" * 100_000, b"8", bytearray(8), range(3), lambda: 8, type,
    skv.Config, NotImplemented, ..., float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
# By number: hypothesis prints what it samples from, which some of these refuse.
strange = st.integers(0, len(STRANGE) - 1).map(lambda n: STRANGE[n])
GOOD: dict[str, Any] = {
    "bits": st.floats(0.1, 64) | st.integers(1, 64),
    "codec": st.sampled_from(["frame", "grid", "rings", "identity"]),
    "retention": st.sampled_from(["", *POLICIES]),
    "sinks": st.integers(0, 99),
    "recent": st.integers(1, 999),
    "page_tokens": st.none() | st.integers(1, 64).map(lambda n: 8 * n),
    "budget": st.none() | st.integers(1, 2**50) | st.sampled_from(["2GiB", "500 MB", "1.5TiB"]),
    "frame": st.none() | st.just("frames.safetensors"),
    "strict": st.booleans(),
    "retention_table": st.none() | st.just("heads.json"),
}
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.complex_numbers(),
    strange,
    *GOOD.values(),
)
anything = st.one_of(
    plain,
    st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=6,
    ),
)


@pytest.fixture(scope="module")
def model_config() -> Any:
    return tiny("llama").config


def doors(options: dict[str, Any]) -> dict[str, Any]:
    """Every way to give the same settings: name -> a Config, or the refusal."""
    ways = {
        "Config": lambda: skv.Config(**options),
        "make_config": lambda: make_config(None, **options),
        "replace": lambda: skv.Config().replace(**options),
        "decorator": lambda: skv.compile(**options).keywords["config"],
        "options": lambda: SkvBackend(options=options).config,
    }
    return {name: attempt(WHERE, way) for name, way in ways.items()}


def check_accepted(config: skv.Config) -> None:
    """It can be compared, hashed, printed, copied and made again, and is what it says."""
    assert hash(config) == hash(copy.deepcopy(config))
    for same in (
        skv.Config(**dataclasses.asdict(config)),
        pickle.loads(pickle.dumps(config)),
        config.replace(),
        copy.copy(config),
    ):
        assert same == config
        assert hash(same) == hash(config)
    assert repr(config)
    assert 0 < config.bits <= 64
    assert config.codec in ("frame", "grid", "rings", "identity")
    assert config.retention in POLICIES
    assert config.sinks >= 0
    assert config.recent >= 1
    assert config.page_tokens is None or config.page_tokens % 8 == 0
    assert config.strict in (True, False)
    budget = config.budget_bytes
    assert budget is None or (type(budget) is int and 1 <= budget <= MOST_BYTES)
    for name in (config.frame, config.retention_table):
        assert name is None or (isinstance(name, str) and name)


@settings(max_examples=MANY)
@given(st.sampled_from(FIELDS), anything)
def test_any_value_of_any_field_is_kept_or_refused_by_name(field: str, value: Any) -> None:
    results = doors({field: value})
    kinds = {type(result) for result in results.values()}
    assert len(kinds) == 1, results
    for result in results.values():
        if isinstance(result, Refused):
            assert isinstance(result.error, ConfigError)
            assert field in result.text
            assert shown(value)[:60] in result.text or value == "retrieval"
            assert len(result.text) < 1000
        else:
            check_accepted(result)
            kept = getattr(result, field)
            if not (field == "retention" and value == ""):
                assert kept == value or kept == os.fspath(value)


@settings(max_examples=MANY)
@given(st.data())
def test_any_mixture_of_settings_is_kept_or_refused_by_a_name_in_it(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(FIELDS), unique=True, min_size=1))
    options = {n: data.draw(GOOD[n] if data.draw(st.integers(0, 9)) else anything) for n in names}
    results = doors(options)
    assert len({type(result) for result in results.values()}) == 1, results
    for result in results.values():
        if isinstance(result, Refused):
            assert isinstance(result.error, ConfigError)
            assert any(name in result.text for name in names)
        else:
            check_accepted(result)


@settings(max_examples=FEW)
@given(
    st.one_of(st.text(), st.sampled_from(["bit", "", "Bits", "self", "options", 3, None, ()])),
    anything,
)
@example(1, 2)
@example(None, 2)
@example(("bits",), 2)
def test_any_other_name_is_refused(name: Any, value: Any) -> None:
    if isinstance(name, str) and name in FIELDS:
        return
    refusals = [attempt(WHERE, SkvBackend, options={name: value})]
    if isinstance(name, str):
        refusals += [
            attempt(WHERE, skv.Config, **{name: value}),
            attempt(WHERE, skv.Config().replace, **{name: value}),
        ]
        if name != "config":
            refusals.append(attempt(WHERE, make_config, None, **{name: value}))
    for refusal in refusals:
        assert isinstance(refusal, Refused)
        assert isinstance(refusal.error, ConfigError)
        assert shown(name) in refusal.text
        assert "Known: bits, codec" in refusal.text


@settings(max_examples=FEW)
@given(anything)
def test_any_preset_or_config_is_one_or_refused(value: Any) -> None:
    for door in (skv.Config.preset, make_config, lambda x: skv.compile(None, x)):
        result = attempt(WHERE, door, value)
        assert isinstance(result, Refused) or value is None
        if isinstance(result, Refused):
            assert isinstance(result.error, ConfigError)
            assert shown(value)[:60] in result.text


@settings(max_examples=FEW)
@given(st.sampled_from(FIELDS), anything)
def test_options_of_torch_compile_are_kept_or_refused(field: str, value: Any) -> None:
    torch._dynamo.reset()

    def run() -> torch.Tensor:
        options = {field: value, "inner": "eager"}
        try:
            return torch.compile(torch.sin, backend="skv", options=options)(torch.zeros(2))
        except BackendCompilerFailed as error:
            raise error.inner_exception from error

    expected = attempt(WHERE, skv.Config, **{field: value})
    found = attempt(WHERE, run)
    assert isinstance(found, Refused) == isinstance(expected, Refused)
    if isinstance(found, Refused):
        assert found.text == expected.text


# ---------------------------------------------------------------- a cache made with them


@settings(max_examples=FEW)
@given(st.sampled_from(FIELDS), anything)
@example("sinks", 2**31 - 1)
@example("recent", 2**31 - 1)
@example("page_tokens", 2**31 - 8)
@example("budget", 1)
@example("budget", "0.5")
@example("budget", "1000TB")
@example("budget", MOST_BYTES)
@example("frame", "~nobody-here/f")
@example("bits", 5e-324)
def test_a_cache_with_any_setting_answers_or_refuses(model_config, field: str, value: Any) -> None:
    cache = attempt(WHERE, skv.SphericalCache, model_config, 64, **{field: value})
    if isinstance(cache, Refused):
        return
    if field in ("sinks", "recent", "page_tokens") and 5000 < value < 2**31 - 8:
        return  # there may be memory for it, and then it takes its time
    k = torch.randn(1, 2, 8, 16)
    q = torch.randn(1, 4, 8, 16)
    found = attempt(WHERE, cache.layers[0].update, k, k)
    if isinstance(found, Refused):
        assert isinstance(found.error, (ConfigError, skv.CapacityError))
        assert cache.states == []
        assert cache.resident_bytes == 0
        return
    mask = torch.arange(64) <= torch.arange(8)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, *found, mask[None, None], enable_gqa=True
    )
    assert torch.isfinite(out).all()
    if cache.config.budget is not None:
        assert cache.resident_bytes <= cache.config.budget_bytes


@settings(max_examples=FEW)
@given(anything)
@example(2**31 - 1)
@example(2**31)
@example(2**62)
@example(10**30)
def test_a_cache_of_any_length_answers_or_refuses(model_config, length: Any) -> None:
    cache = attempt(WHERE, skv.SphericalCache, model_config, length)
    if isinstance(cache, Refused):
        assert "max_cache_len" in cache.text
        assert shown(length)[:60] in cache.text
        return
    assert type(length) is int or isinstance(length, Level)
    if 1 << 16 < length < 1 << 31:
        return  # may or may not fit the memory there is; the largest is tried below
    k = torch.randn(1, 2, 1, 16)
    found = attempt(WHERE, cache.layers[0].update, k, k)
    assert not isinstance(found, Refused)
    assert found[0].shape == (1, 2, length, 16)


def test_a_cache_for_which_there_is_no_memory_says_so(model_config) -> None:
    for length, kw in ((2**31 - 1, {}), (64, {"recent": 2**31 - 1}), (2**31 - 1, {"bits": 64})):
        cache = skv.SphericalCache(model_config, length, **kw)
        k = torch.randn(4096, 2, 1, 16)
        found = attempt(WHERE, cache.layers[0].update, k, k)
        assert isinstance(found, Refused)
        assert isinstance(found.error, skv.CapacityError)
        assert "Lower max_cache_len" in found.text
        assert cache.states == []


# ---------------------------------------------------------------- sizes in words

UNITS = {"": 1, "B": 1, "kB": 1000}
for _n, _prefix in enumerate("KMGT", 1):
    UNITS |= {f"{_prefix}B": 1000**_n, f"{_prefix}iB": 1024**_n}


@settings(max_examples=MANY)
@given(
    st.integers(0, 10**20),
    st.none() | st.text("0123456789", min_size=1, max_size=20),
    st.sampled_from(sorted(UNITS)),
    st.text(" \t", max_size=2),
)
def test_a_size_is_read_to_the_byte(whole: int, part: str | None, unit: str, gap: str) -> None:
    number = f"{whole}" + (f".{part}" if part is not None else "")
    exact = math.floor(Fraction(number) * UNITS[unit])
    text = f"{gap}{number}{gap}{unit}{gap}"
    found = attempt(WHERE, parse_bytes, text)
    if 1 <= exact <= MOST_BYTES:
        assert found == exact
        assert skv.Config(budget=text).budget_bytes == exact
    else:
        assert isinstance(found, Refused)
        assert "2GiB" in found.text


@settings(max_examples=MANY)
@given(st.text("0123456789. \tkKMGTiBeE+-_,\n٣½", max_size=60) | st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    found = attempt(WHERE, parse_bytes, text)
    assert isinstance(found, Refused) or 1 <= found <= MOST_BYTES


@pytest.mark.parametrize("piece", ["9", "9.", " ", ".", "9 ", "G", "1GB", "\ud800"])
def test_a_long_text_is_refused_at_once(piece: str) -> None:
    began = time.perf_counter()
    for text in (piece * 100_000, f"1{piece * 100_000}!", f"{piece * 100_000}GiB"):
        assert isinstance(attempt(WHERE, parse_bytes, text), Refused)
        assert isinstance(attempt(WHERE, make_config, codec=text), Refused)
        assert isinstance(attempt(WHERE, make_config, None, **{text: 1}), Refused)
    assert time.perf_counter() - began < 5


# ---------------------------------------------------------------- the command and the environment

words = st.one_of(
    st.text("0123456789.kMGTiB eE+-", max_size=12),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["nan", "inf", "-1", "0", "rdr", "none", "grid", "2GiB", "1e400", "9" * 5000]),
)


class Loaded(SkvError):
    """Raised in the place of loading a model: the arguments were accepted."""


@settings(max_examples=FEW)
@given(st.sampled_from(["bits", "codec", "retention", "retention-table", "budget"]), words)
def test_any_argument_of_the_command_is_accepted_or_refused(name: str, text: str) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise Loaded("load it")

    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        patch.setattr("skv_compile.models.load", load)
        patch.setattr(cli, "_explain_error", lambda error: seen.append(error) or 2)
        try:
            code = attempt(WHERE, cli.main, ["generate", "--prompt", "x", f"--{name}={text}"])
        except SystemExit as stop:  # argparse's own refusal
            code = stop.code
        assert code == 2
        for error in seen:
            assert isinstance(error, (Loaded, ConfigError))
            assert isinstance(error, Loaded) or name.replace("-", "_") in str(error)


@settings(max_examples=FEW)
@given(st.sampled_from(["SKV_CACHE_DIR", "XDG_CACHE_HOME"]), words)
@example("SKV_CACHE_DIR", "~nobody-here/x")
@example("XDG_CACHE_HOME", "~nobody-here/x")
def test_any_folder_of_the_environment_is_taken_as_it_is(name: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SKV_CACHE_DIR", raising=False)
        patch.setenv(name, text)
        folder = attempt(WHERE, files.cache_folder)
    assert isinstance(folder, Path)
    if text and name == "SKV_CACHE_DIR":
        assert folder == Path(os.path.expanduser(text))
