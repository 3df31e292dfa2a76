"""Files of frames of any content: the same frames as were saved, or refused. Never code."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import SMALL, VOCAB, tiny
from torch import Tensor

import skv_compile as skv
from skv_compile.codec.saved import SavedFrames, _checksum, load_frames
from skv_compile.commands.calibrate import Calibration
from skv_compile.errors import ConfigError
from skv_compile.retention.table import load_table, save_table

from .calls import EXAMPLES, Refused, attempt

WHERE = "test_frames"
MANY = EXAMPLES or 150
FEW = max(25, MANY // 5)
KINDS = ("llama", "qwen3", "neox")


def _frames(model: Any) -> SavedFrames:
    ids = torch.randint(1, VOCAB, (260,), generator=torch.Generator().manual_seed(3)).tolist()
    config = skv.Config(bits=64.0, **SMALL)
    made = Calibration(model, [ids], [config], every_tier=True).run(name="tiny")
    return SavedFrames(made.about, {name: x.contiguous() for name, x in made.tensors.items()})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@cache
def good() -> SavedFrames:
    """No fixture: a failing example would print all of it."""
    return _frames(tiny("llama"))


@pytest.fixture(scope="module")
def frames() -> SavedFrames:
    return good()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def data(frames: SavedFrames, folder: Path) -> bytes:
    frames.save(folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


def refused(result: Any, file: Path | str) -> bool:
    """Whether it was, and then as a file that cannot be meant."""
    if not isinstance(result, Refused):
        return False
    assert isinstance(result.error, ConfigError)
    assert os.path.basename(file) in result.text
    assert "skv calibrate" in result.text
    return True


def same(one: SavedFrames, other: SavedFrames) -> bool:
    if {**one.about, "sha256": 0} != {**other.about, "sha256": 0}:
        return False
    pairs = [(x, other.tensors.get(name)) for name, x in one.tensors.items()]
    return len(one.tensors) == len(other.tensors) and all(
        y is not None and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
    )


def run(model: Any, file: Path | str, **kw: Any) -> Tensor:
    """Logits of a prompt and of one more token, with frames from a file."""
    config = skv.Config(frame=file, **{"bits": 64.0, **SMALL, **kw})
    cache = skv.SphericalCache(model.config, 64, config)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        return model(ids[:, :1], past_key_values=cache).logits


# ---------------------------------------------------------------- bytes

#: (what, where: share of the file or, if negative, of its header, how much, value)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "zero", "copy", "end", "length"]),
        st.floats(-1, 1),
        st.integers(1, 64),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=4,
)


def edit(data: bytes, what: str, where: float, count: int, value: int) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little") if len(data) > 8 else len(data)
    size = min(header, len(data)) if where < 0 else len(data)
    at = min(int(abs(where) * size), max(0, len(data) - 1))
    before, after = data[:at], data[at:]
    if what == "flip":
        return before + bytes([after[0] ^ 1 << value % 8]) + after[1:] if after else data
    if what == "set":
        return before + bytes([value % 256]) + after[1:]
    if what == "cut":
        return before + after[count:]
    if what == "insert":
        return before + (value % 256).to_bytes(1, "little") * count + after
    if what == "zero":
        return before + bytes(min(count, len(after))) + after[count:]
    if what == "copy":
        return before + data[:count] + after[count:]
    if what == "end":
        return before
    return struct.pack("<Q", value) + data[8:]


@settings(max_examples=MANY)
@given(edits)
@example([("length", 0.0, 1, 2**64 - 1)])
@example([("length", 0.0, 1, 2**63)])
@example([("length", 0.0, 1, 0)])
def test_changed_bytes_are_refused_or_change_nothing(folder, data, changes) -> None:
    changed = data
    for change in changes:
        changed = edit(changed, *change)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        Path(file.name).write_bytes(changed)
        result = attempt(WHERE, load_frames, file.name)
        assert refused(result, file.name) or same(result, good())


@settings(max_examples=FEW)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_refused(folder, noise: bytes, header: int) -> None:
    texts = [noise, struct.pack("<Q", header) + noise, struct.pack("<Q", len(noise)) + noise]
    texts.append(struct.pack("<Q", 2) + b"{}" + noise)
    for content in texts:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            Path(file.name).write_bytes(content)
            assert refused(attempt(WHERE, load_frames, file.name), file.name)


def raw(header: dict[str, Any] | str, body: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        raw("{" * 5000),
        raw('{"a":' * 5000 + "1" + "}" * 5000),
        raw({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        raw({"x": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}}, bytes(4)),
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        raw({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        raw({"x": {"dtype": "PY", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)),
        raw({"__metadata__": {"skv_frames": "[" * 100_000}}),
        raw({"__metadata__": {"skv_frames": '{"version": ' + "9" * 5000 + "}"}}),
        raw({"__metadata__": {"skv_frames": '{"version": 2, "bits": [1' + "0" * 400 + "]}"}}),
        raw({"__metadata__": {"skv_frames": 3}}),
        raw({"__metadata__": 3}),
        raw('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2, bytes(1)),
    ],
    ids=range(13),
)
def test_a_header_that_lies_is_refused(folder: Path, content: bytes) -> None:
    file = folder / "lies.safetensors"
    file.write_bytes(content)
    assert refused(attempt(WHERE, load_frames, file), file)


# ---------------------------------------------------------------- consistent, and still wrong

numbers = st.one_of(
    st.integers(-3, 300),
    st.just(10**400),
    st.just(2**63),
    st.floats(-1e9, 1e9),
    st.booleans(),
)
values = st.recursive(
    st.none() | numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PARTS = ("into", "back", "grid", "plan", "loss", "weights")


def replaced(node: Any, draw: Any) -> Any:
    """The same JSON with one node, wherever it is, something else."""
    if isinstance(node, (dict, list)) and node and draw(st.integers(0, 4)):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            node.pop(key)
        elif kind == 1 and isinstance(node, dict):
            node[draw(st.text(max_size=4) | st.sampled_from(["-1", "01", "9" * 5000]))] = node.pop(
                key
            )
        else:
            node[key] = replaced(node[key], draw)
        return node
    return draw(values)


def bent(x: Tensor, draw: Any) -> Tensor:
    """A tensor with one thing about it changed."""
    kind = draw(st.sampled_from(["dtype", "shape", "flat", "empty", "value", "value", "bytes"]))
    if kind == "dtype":
        return x.to(draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool])))
    if kind == "shape":
        return (
            x.repeat(2, *[1] * (x.dim() - 1)) if draw(st.booleans()) else x[..., :-1].contiguous()
        )
    if kind == "flat":
        return x.flatten()
    if kind == "empty":
        return x[:0].contiguous()
    x = x.clone()
    flat = x.view(-1)
    at = draw(st.integers(0, flat.numel() - 1))
    if kind == "bytes":
        flat.view(torch.uint8)[at] ^= draw(st.integers(1, 255))
    elif x.is_floating_point():
        flat[at] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 1e30, 1e-30]))
    else:
        flat[at] = draw(st.integers(0, 255))
    return x


@settings(max_examples=MANY // 3)
@given(st.data())
def test_frames_with_a_right_checksum_are_refused_or_of_use(model, folder, data) -> None:
    """Who can write the file can write its checksum: what is accepted must be safe to use."""
    about, tensors = json.loads(json.dumps(good().about)), dict(good().tensors)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            about = replaced(about, data.draw)
        else:
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = bent(tensors[name], data.draw)
    if not isinstance(about, dict):
        about = {"version": 2, "layers": about}
    about = {"version": 2, **about}
    about["sha256"] = _checksum(about, tensors)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        save_file(tensors, file.name, {"skv_frames": json.dumps(about, sort_keys=True)})
        loaded = attempt(WHERE, load_frames, file.name)
        if refused(loaded, file.name):
            return
        attached = attempt(WHERE, skv.compile, tiny("llama"), frame=file.name)
        assert isinstance(attached, (Refused, torch.nn.Module)), attached
        for retention in ("none", "rdr"):
            logits = attempt(WHERE, run, model, file.name, retention=retention)
            assert isinstance(logits, Refused) or logits.shape == (1, 1, VOCAB)


# ---------------------------------------------------------------- what is at a path


class Evil:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("way", ["pickle", "torch", "torch_old", "in_metadata", "named"])
@pytest.mark.parametrize("door", ["frame", "retention_table"])
def test_a_pickle_is_not_run(model, frames, tmp_path: Path, way: str, door: str) -> None:
    mark, file = str(tmp_path / "mark"), tmp_path / f"evil.{'pt' if way == 'named' else 'st'}"
    if way == "in_metadata":
        text = pickle.dumps(Evil(mark), protocol=0).decode("ascii")
        save_file(dict(frames.tensors), file, {"skv_frames": text})
    elif way == "pickle":
        file.write_bytes(pickle.dumps(Evil(mark)))
    else:
        zipped = way != "torch_old"
        torch.save({"x": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    load = load_frames if door == "frame" else load_table
    retention = {} if door == "frame" else {"retention": "retrieval"}
    settings = skv.Config(**{door: str(file)}, **retention)
    assert refused(attempt(WHERE, load, file), file)
    attached = attempt(WHERE, skv.compile, tiny("llama"), settings)
    assert isinstance(attached, Refused) == (door == "frame")
    found = attempt(WHERE, skv.SphericalCache, model.config, 64, settings)
    if not isinstance(found, Refused):
        k = torch.zeros(1, 2, 4, 16)
        assert isinstance(attempt(WHERE, found.layers[0].update, k, k), Refused)
    assert not os.path.exists(mark)
    pickle.loads(pickle.dumps(Evil(mark)))  # which would have been seen
    assert os.path.exists(mark)


def test_what_is_no_file_is_refused_and_a_link_is_followed(frames, data, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(data)
    for name, target in (("link", good), ("loop", tmp_path / "loop"), ("gone", tmp_path / "none")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "again").symlink_to(tmp_path / "link")
    (tmp_path / "hard").hardlink_to(good)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "é\n").write_bytes(data)
    for name in ("good", "link", "again", "hard", "é\n"):
        assert same(attempt(WHERE, load_frames, tmp_path / name), frames)
    bad = [tmp_path / x for x in ("loop", "gone", "folder", "pipe", "none", "x" * 300, "good/x")]
    for file in [*bad, "/dev/null", "/dev/zero", "/proc/self/mem", ""]:
        for door in (load_frames, lambda x: skv.Config(frame=x) and load_frames(x)):
            result = attempt(WHERE, door, file)
            assert isinstance(result, Refused)
            assert "skv calibrate" in result.text


@settings(max_examples=FEW)
@given(st.text(max_size=30) | st.text("/.~\0\ud800ab", max_size=8))
def test_any_name_is_refused_where_nothing_is(name: str) -> None:
    for door in (load_frames, load_table):
        result = attempt(WHERE, door, name)
        assert isinstance(result, Refused)
        assert "skv calibrate" in result.text


def test_frames_stay_what_they_were_when_their_file_changes(frames, data, tmp_path: Path) -> None:
    """A process that has read a file must survive its being written over, or cut, in place."""
    file = tmp_path / "f"
    file.write_bytes(data)
    loaded = attempt(WHERE, load_frames, file)
    with open(file, "r+b") as handle:
        handle.write(bytes(len(data)))
    assert same(loaded, frames)
    assert refused(attempt(WHERE, load_frames, file), file)
    with open(file, "r+b") as handle:
        handle.truncate(0)  # with the file mapped, reading the tensors would now be fatal
    assert same(loaded, frames)


@pytest.mark.parametrize("mine", KINDS)
def test_frames_of_another_model_are_refused(mine: str, tmp_path: Path) -> None:
    file = tmp_path / f"{mine}.st"
    _frames(tiny(mine)).save(file)
    others = [tiny(kind) for kind in KINDS] + [tiny(mine, layers=3), tiny(mine, hidden_size=128)]
    for n, other in enumerate(others):
        result = attempt(WHERE, run, other, file)
        assert refused(result, file) == (n != KINDS.index(mine))
    assert torch.isfinite(attempt(WHERE, run, tiny(mine), file)).all()


# ---------------------------------------------------------------- tables of retrieval heads


@settings(max_examples=MANY // 2)
@given(st.data())
def test_a_changed_table_is_refused_or_a_table(folder: Path, data: st.DataObject) -> None:
    file = folder / "heads.json"
    save_table(file, ((0.1, 0.9), (0.5, 0.3)))
    text = file.read_bytes()
    if data.draw(st.booleans()):
        for change in data.draw(edits):
            text = edit(text, *change)
    else:
        text = json.dumps(replaced(json.loads(text), data.draw)).encode("utf-8", "surrogatepass")
    file.write_bytes(text)
    found = attempt(WHERE, load_table, file)
    if refused(found, file):
        return
    assert len({len(row) for row in found}) == 1
    assert all(isinstance(x, float) and abs(x) < float("inf") for row in found for x in row)


def test_the_file_is_what_was_saved(frames, data, folder: Path) -> None:
    """The tests above compare with these."""
    tensors = load_file(folder / "good.safetensors")
    assert same(SavedFrames(frames.about, tensors), frames)
    assert same(load_frames(folder / "good.safetensors"), frames)
