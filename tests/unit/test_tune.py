"""``skv tune``: the search, a cache full of codes, and the command."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny

from skv_compile import cli, models, tune
from skv_compile.codec.tiers import choose_layout
from skv_compile.config import Config
from skv_compile.errors import ConfigError, SkvError, UnsupportedError
from skv_compile.lowering import kernels, launch
from skv_compile.lowering.generate import Spec
from skv_compile.lowering.launch import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FOUND = Launch(2, 4, None, 16, 8)


# ---------------------------------------------------------------- the search


def bowl(at: Launch) -> Callable[[Launch], float]:
    """Times with one valley."""

    def ms(one: Launch) -> float:
        found = 1.0
        for name, want in asdict(at).items():
            found *= 1.0 if getattr(one, name) == want else 1.1
        return found

    return ms


@pytest.mark.parametrize("first", [Launch(), Launch(2, 2, None, 4, 8), Launch(4, 3, None, 4, 4)])
@pytest.mark.parametrize("best", [Launch(1, 4, 128, 16, 8), Launch(2, 2, None, 6, 4)])
def test_the_search_finds_the_valley(first, best):
    search = tune.Search(bowl(best))
    assert search.run(first) == best
    assert search.trials[best] == 1.0
    assert len(search.trials) < 100


def test_a_gain_of_less_than_two_percent_is_none():
    first, other = Launch(), Launch(prepare_warps=8)
    for ms, want in ((0.985, first), (0.979, other)):
        times = {first: 1.0, other: ms}
        assert tune.Search(lambda one, t=times: t.get(one, 2.0)).run(first) == want


def test_every_launch_is_measured_once_and_the_two_that_matter_twice():
    seen: list[Launch] = []
    first, best = Launch(), Launch(2, 2, None, 6, 4)

    def measure(one: Launch) -> float:
        seen.append(one)
        return bowl(best)(one)

    search = tune.Search(measure)
    search.run(first)
    assert seen[0] == first
    assert seen[-2:] == [first, best]
    assert len(seen) - 2 == len(set(seen)) == len(search.trials)


def test_what_was_only_faster_because_it_came_later_is_not_kept():
    first, times = Launch(), iter([1.5, *[1.0] * 1000])
    search = tune.Search(lambda one: next(times))
    assert search.run(first) == first
    assert search.trials[first] == 1.0


def test_a_launch_that_fails_is_slow_and_said():
    best, said = Launch(2, 2, None, 6, 4), []

    def measure(one: Launch) -> float:
        if one.pages_stages == 2:
            raise RuntimeError("out of resource: shared memory\nRequired: a lot")
        return bowl(best)(one)

    search = tune.Search(measure, report=said.append)
    found = search.run(Launch())
    assert found == replace(best, pages_stages=3)
    failed = {one for one in search.trials if one.pages_stages == 2}
    assert failed
    assert set(search.errors) == failed
    assert set(search.errors.values()) == {"RuntimeError: out of resource: shared memory"}
    assert all(search.trials[one] == math.inf for one in failed)
    assert sum("out of resource" in line for line in said) == len(failed)
    assert len(said) == len(search.trials)


def test_a_launch_that_fails_with_a_mask_is_passed_over():
    best = Launch(2, 2, None, 6, 4)

    def check(one: Launch) -> None:
        if one.pages_warps == 2 and one.pages_per_sm == 6:
            raise RuntimeError("out of registers")

    search = tune.Search(bowl(best), check)
    found = search.run(Launch())
    assert (found.pages_warps, found.pages_per_sm) != (2, 6)
    assert bowl(best)(found) < bowl(best)(Launch())
    assert search.errors


def test_where_the_first_launch_fails_another_is_found_and_where_all_fail_that_is_an_error():
    def measure(one: Launch) -> float:
        if one.pages_registers is None:
            raise RuntimeError("too many registers")
        return 1.0

    search = tune.Search(measure)
    assert search.run(Launch()).pages_registers
    assert search.trials[Launch()] == math.inf

    def never(one: Launch) -> float:
        raise RuntimeError("no device")

    checked: list[Launch] = []
    with pytest.raises(SkvError, match="no device"):
        tune.Search(never, checked.append).run(Launch())
    assert not checked


def test_registers_are_bounded_for_one_warp_only():
    tried = [one for name in tune.AXES for one in tune.around(Launch(pages_registers=160), name)]
    assert {one.pages_registers for one in tried if one.pages_warps == 1} == {None, 128, 160}
    assert {one.pages_registers for one in tried if one.pages_warps == 2} == {None}


@given(st.randoms(use_true_random=False))
def test_no_neighbour_of_what_is_found_is_much_faster(random):
    times: dict[Launch, float] = {}

    def measure(one: Launch) -> float:
        if one not in times:
            times[one] = random.choice([0.5, 0.7, 0.99, 1.0, math.inf])
        if times[one] == math.inf:
            raise RuntimeError("does not fit")
        return times[one]

    first = Launch()
    times[first] = 1.0
    best = tune.Search(measure).run(first)
    assert best == first or times[best] <= 0.98 * times[first]
    for name in tune.AXES:
        for other in tune.around(best, name):
            assert times[other] > 0.98 * times[best]


# ---------------------------------------------------------------- a cache full of codes

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted in this process"
)
SMALL = {"sinks": 4, "recent": 12, "page_tokens": 16, "bits": 2.5}


@interpreted
@pytest.mark.filterwarnings("ignore:overflow")  # random radii
def test_forwards_with_masks_run_on_a_full_cache(monkeypatch):
    given, steps = [], kernels.steps

    def seen(*args, **kw):
        given.append((args[3].dtype, kw["launch"]))
        return steps(*args, **kw)

    monkeypatch.setattr(kernels, "steps", seen)
    config = Config(**{**SMALL, "recent": 4, "retention": "none"})
    full = tune.Full(config, (1, 1, 16, 60, torch.float32, CPU), 2, None, 1)
    full.check(FOUND)
    assert given == [(torch.bool, FOUND), (torch.float32, FOUND)]


@pytest.mark.parametrize("retention", ["rdr", "streaming", "none"])
def test_what_is_found_is_written(monkeypatch, tmp_path, retention):
    pytest.importorskip("triton")
    monkeypatch.setenv("SKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune.Full, "check", lambda self, one: None)
    counts = []

    def timer(forwards) -> float:
        counts.append(len(forwards))
        return 0.9 ** len(counts)  # the later the faster

    config = Config(retention=retention, **SMALL)
    found = tune.tune(config, 1, 2, 16, torch.float32, 600, 1, CPU, timer=timer)
    assert set(counts) == {1} == {found["caches"]}
    assert len(counts) == len(found["trials"]) + 2
    assert found["before"] == asdict(Launch.built_in(Spec(found["layout"], 2, 1)))
    assert found["before"] != found["after"]
    assert found["before_ms"] > found["after_ms"]
    record = json.loads(Path(found["file"]).read_text())
    assert record["launch"] == found["after"]
    assert record["spec"]["layout"] == launch.same_kernels(found["layout"])
    tracked = choose_layout(config, 16, 600, "float32").tracked
    assert f":{int(tracked)}:" in found["layout"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("bits", [0.6, 1.125, 2.125, 4.125])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_pool_is_filled(bits, dim):
    shape = (1, 2, dim, 9000, torch.bfloat16, CPU)
    full = tune.Full(Config(codec="grid", bits=bits), shape, 4, None, 1)
    pool = full.states[0].keeper.pool
    assert 0.8 * pool.pages < pool.used <= pool.pages


def test_a_budget_is_shared_by_all_layers():
    shape = (1, 2, 64, 4000, torch.bfloat16, CPU)
    config = Config(codec="grid", budget="8MB")
    sizes = [tune.Full(config, shape, 4, None, n).states[0].keeper.pool.pages for n in (8, 16)]
    assert 1.5 < sizes[0] / sizes[1] < 3


def test_a_pool_with_less_than_a_page_for_every_tier_is_refused():
    state = tune.Full(Config(**SMALL), (1, 1, 16, 600, torch.float32, CPU), 2, None, 1).states[0]
    state.keeper.pool.pages = len(state.layout.tiers)
    with pytest.raises(ConfigError, match="too few"):
        tune.shares_of(state, 600)


@pytest.mark.parametrize(
    ("error", "word", "settings", "tokens"),
    [
        (UnsupportedError, "'exact'", {"codec": "identity"}, 4000),
        (UnsupportedError, "'rings'", {"codec": "rings"}, 4000),
        (ConfigError, "all exact", {}, 100),
    ],
)
def test_what_cannot_be_tuned_is_refused(error, word, settings, tokens):
    pytest.importorskip("triton")
    with pytest.raises(error, match=word):
        tune.tune(Config(**settings), 2, 2, 64, torch.float32, tokens, 1, CPU)


# ---------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    assert cli.main(["tune", "no/such/model"]) == 2
    assert "skv tune needs a CUDA device" in capsys.readouterr().err


def test_the_command_takes_the_shapes_of_a_model(monkeypatch, tmp_path, capsys):
    tiny("llama", layers=3).config.save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {}

    def fake(*args, turn, layers, report):
        given.update(args=args, turn=turn, layers=layers)
        report("one launch")
        trial = {**asdict(FOUND), "ms": None, "error": "OutOfResources: shared memory"}
        return {
            **{"before": asdict(Launch()), "after": asdict(FOUND), "trials": [trial] * 2},
            **{"before_ms": None, "after_ms": 0.0123, "file": "here.json"},
            **{"tokens": 1000, "batch": 2, "device": "NVIDIA L4"},
        }

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(models, "default_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(tune, "tune", fake)
    file = tmp_path / "tune.json"
    arguments = ["tune", str(tmp_path / "model"), "--bits", "1.5", "--tokens", "1000"]
    assert cli.main([*arguments, "--batch", "2", "--json", str(file)]) == 0
    config = tiny("llama", layers=3).config
    dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    shape = (config.num_key_value_heads, group, dim, torch.bfloat16, 1000, 2, GPU)
    assert given["args"] == (Config(bits=1.5), *shape)
    assert given["turn"].shape == (2, dim)
    assert given["layers"] == 3
    said = capsys.readouterr().out
    assert "fails" in said
    assert "0.0123" in said
    assert "2 launches failed: OutOfResources" in said
    assert "here.json" in said
    record = json.loads(file.read_text())
    assert record["after"] == asdict(FOUND)
    assert (record["dtype"], record["command"][:8]) == ("bfloat16", "skv tune")
