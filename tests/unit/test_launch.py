"""How kernels are launched: what is kept on disk, and when it counts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skv_compile.codec.tiers import choose_layout
from skv_compile.config import Config
from skv_compile.lowering import kernels, launch
from skv_compile.lowering.generate import Spec
from skv_compile.lowering.launch import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT = choose_layout(Config(bits=1.125), 64, 2000, "bfloat16", True)
SPEC = Spec(LAYOUT.key, 4, 1)  # what a schedule asks for
FORWARD = replace(SPEC, layout=launch.same_kernels(LAYOUT.key), raw=True, chained=True)
FOUND = Launch(2, 4, None, 16, 8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A GPU as far as launches know, whose properties can be changed, and an empty folder."""
    about = {"name": "NVIDIA L4", "capability": (9, 0), "triton": "3.6.0"}
    monkeypatch.setenv("SKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: about["capability"])
    monkeypatch.setattr(launch, "triton_version", lambda: about["triton"])
    monkeypatch.setattr(launch, "source", lambda spec: f"a kernel of {spec}")
    new_process()
    yield about
    new_process()


def new_process() -> None:
    Launch.of.cache_clear()
    launch.tuned.cache_clear()


def keep(found: Launch = FOUND) -> Path:
    return launch.save(launch.general(SPEC, GPU), launch.name_of(GPU), found, {"tokens": 2000})


def test_what_was_kept_is_used_by_schedules_and_forwards_of_one_token(device):
    assert Launch.built_in(SPEC) != FOUND
    assert Launch.of(SPEC, GPU) == Launch.built_in(SPEC)
    file = keep()
    new_process()
    for spec in (
        SPEC,
        FORWARD,
        replace(FORWARD, mask="bool"),
        replace(FORWARD, mask="float", mask_min=-1e30),
        replace(SPEC, layout=replace(LAYOUT, max_tokens=3000, calibrate=0).key),
    ):
        assert Launch.of(spec, GPU) == FOUND
    for spec in (
        replace(FORWARD, tokens=2),
        replace(FORWARD, group=2),
        replace(FORWARD, least=16),
        replace(SPEC, layout=replace(LAYOUT, page_tokens=32).key),
        replace(SPEC, layout=replace(LAYOUT, dtype="float16").key),
    ):
        assert Launch.of(spec, GPU) == Launch.built_in(spec)
    assert Launch.of(SPEC, CPU) == Launch.built_in(SPEC)
    record = json.loads(file.read_text())
    assert record["launch"] == asdict(FOUND)
    assert (record["device"], record["tokens"]) == ("NVIDIA L4", 2000)


def test_a_schedule_has_room_for_the_segments_of_a_launch_that_was_kept(device, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 58)
    keep()
    assert kernels.programs_of(SPEC, GPU) == kernels.programs_of(FORWARD, GPU) == 58 * 16


def test_a_launch_stays_what_it_is_for_the_life_of_a_process(device):
    file = keep()
    assert Launch.of(SPEC, GPU) == FOUND
    keep(replace(FOUND, pages_per_sm=4))
    masked = replace(FORWARD, mask="bool")  # not asked for before
    assert Launch.of(SPEC, GPU) == Launch.of(masked, GPU) == FOUND
    file.unlink()
    assert Launch.of(replace(FORWARD, mask="float"), GPU) == FOUND
    new_process()
    assert Launch.of(SPEC, GPU) == Launch.built_in(SPEC)
    keep()
    assert Launch.of(FORWARD, GPU) == Launch.built_in(SPEC)


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ("name", None),
        ("capability", None),
        ("triton", "another version of Triton"),
        ("source", "another version of the kernels"),
    ],
)
def test_on_another_device_or_with_other_kernels_it_is_not_used(
    device, monkeypatch, caplog, change, warned
):
    keep()
    if change == "source":
        monkeypatch.setattr(launch, "source", lambda spec: "another kernel")
    else:
        device[change] = {"name": "NVIDIA A10", "capability": (8, 9), "triton": "3.7.0"}[change]
    for spec in (SPEC, FORWARD, SPEC):
        assert Launch.of(spec, GPU) == Launch.built_in(SPEC)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (warned is not None)
    assert all(warned in line and "skv tune" in line for line in said)


GOOD = asdict(FOUND)
BAD = {
    "empty": b"",
    "cut off": b'{"launch": {"pages_w',
    "not text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "nothing of ours": b"{}",
    "a launch that is none": {"launch": 3},
    "a setting too many": {"launch": {**GOOD, "more": 1}},
    "a setting too few": {"launch": {"pages_warps": 1}},
    "three warps": {"launch": {**GOOD, "pages_warps": 3}},
    "no program": {"launch": {**GOOD, "pages_per_sm": 0}},
    "a number with a point": {"launch": {**GOOD, "pages_stages": 2.0}},
    "true": {"launch": {**GOOD, "pages_stages": True}},
    "no stages": {"launch": {**GOOD, "pages_stages": None}},
    "a folder": None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_said_once_and_the_table_is_taken(device, caplog, name):
    file, content = keep(), BAD[name]
    if content is None:
        file.unlink()
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | content))
    for spec in (SPEC, FORWARD, replace(FORWARD, mask="bool"), SPEC):
        assert Launch.of(spec, GPU) == Launch.built_in(spec)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(file) in caplog.text
