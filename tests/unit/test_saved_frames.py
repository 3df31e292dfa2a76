"""Frames in a file: fitted once, the same ever after, and refused where they do not belong."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL, VOCAB, greedy, layer_state, tiny
from torch import Tensor

import skv_compile as skv
from skv_compile import cli
from skv_compile.backend import SkvBackend
from skv_compile.cache.state import LayerState
from skv_compile.codec.saved import SavedFrames, check_model, load_frames, sample_weights
from skv_compile.codec.tiers import layouts
from skv_compile.commands.calibrate import Calibration, cut
from skv_compile.errors import ConfigError, SkvError
from skv_compile.lowering.codes import decode, encode
from skv_compile.lowering.state import FIRST_FRAME
from skv_compile.lowering.turn import turn

CONFIG = skv.Config(bits=64.0, **SMALL)


def sequences(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def fitted(
    model: Any, ids: list[list[int]], config: skv.Config = CONFIG, every: bool = True
) -> Any:
    return Calibration(model, ids, [config], every_tier=every).run(name="tiny")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def frames(model: Any) -> SavedFrames:
    return fitted(model, sequences(300, 260))


@pytest.fixture
def file(frames: SavedFrames, tmp_path: Path) -> str:
    frames.save(tmp_path / "frames.safetensors")
    return str(tmp_path / "frames.safetensors")


def cache_for(model: Any, file: str, length: int = 512, **kw: Any) -> skv.SphericalCache:
    return skv.SphericalCache(model.config, length, CONFIG.replace(frame=file, **kw))


# ---------------------------------------------------------------- round trip


def test_a_file_gives_back_what_was_saved(frames: SavedFrames, file: str) -> None:
    loaded = load_frames(file)
    assert {k: v for k, v in loaded.about.items() if k != "sha256"} == frames.about
    assert loaded.tensors.keys() == frames.tensors.keys()
    for name, x in frames.tensors.items():
        assert x.dtype == loaded.tensors[name].dtype
        assert torch.equal(x, loaded.tensors[name])


def test_the_same_text_gives_the_same_bytes(model: Any, file: str, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    fitted(model, sequences(300, 260)).save(again)
    assert again.read_bytes() == Path(file).read_bytes()
    fitted(model, sequences(300, 261)).save(again)
    assert again.read_bytes() != Path(file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "frames.safetensors"]


@torch.no_grad()
def test_a_cache_uses_the_saved_frames_and_no_prompt_changes_them(model: Any, file: str) -> None:
    saved, ids = load_frames(file), torch.tensor(sequences(320, seed=5))
    used = []
    for prompt in (ids, ids[:, :20]):
        cache = cache_for(model, file)
        model(prompt, past_key_values=cache)
        for index, state in enumerate(cache.states):
            assert state.layout.calibrate == 0
            assert state.layout.block == 128
            expected = saved.layer(index, 2, state.layout)
            for found, part in zip(state.tensors[FIRST_FRAME:], expected, strict=True):
                assert found.dtype == part.dtype
                assert torch.equal(found, part)
        used.append(cache.states[0].tensors[FIRST_FRAME:])
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(*used, strict=True))


def test_state_tensors_have_the_dtypes_of_fitted_frames(model: Any, file: str) -> None:
    """What kernels see of a saved frame is what they see of one fitted to the prompt."""
    own = layer_state("frame")
    cache = cache_for(model, file)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    for a, b in zip(own.tensors[FIRST_FRAME:], cache.states[0].tensors[FIRST_FRAME:], strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


@torch.no_grad()
@pytest.mark.parametrize("retention", ["none", "rdr"])
def test_one_sequence_gives_the_frames_of_an_automatic_calibration(
    model: Any, retention: str
) -> None:
    """Of a uniform cache, or of all tiers. Those share a head's transform, which is chosen for
    the tier of as many digits as coordinates: the one that a uniform cache has here."""
    ids, config = sequences(300), CONFIG.replace(retention=retention, bits=2.5)
    cache = skv.SphericalCache(model.config, 300, config)
    model(torch.tensor(ids), past_key_values=cache)
    saved = fitted(model, ids, config)
    for index, state in enumerate(cache.states):
        parts = saved.layer(index, 2, state.layout)
        for found, part in zip(state.tensors[FIRST_FRAME:], parts, strict=True):
            torch.testing.assert_close(found, part, rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi"])
def test_other_models_round_trip(name: str, tmp_path: Path) -> None:
    """Without a rotary embedding, with sliding layers, with a partial embedding."""
    other, file = tiny(name), str(tmp_path / "f.safetensors")
    fitted(other, sequences(256), every=False).save(file)
    check_model(load_frames(file), other)
    cache = cache_for(other, file, 300)
    assert torch.isfinite(other(torch.tensor(sequences(40)), past_key_values=cache).logits).all()


def test_compiled_steps_agree_with_eager_ones(model: Any, file: str) -> None:
    ids = torch.tensor(sequences(40, seed=9))
    mask = torch.ones_like(ids)
    torch._dynamo.reset()
    backend = SkvBackend(config=CONFIG.replace(frame=file), options={"inner": "eager"})
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    tokens, logits = greedy(model, cache_for(model, file, 128), ids, mask, new=24)
    _, compiled = greedy(
        step, cache_for(model, file, 128), ids, mask, new=24, prefill=model, forced=tokens
    )
    torch.testing.assert_close(compiled, logits, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- what they are good for


def coded_error(state: LayerState, keys: Tensor) -> float:
    """Mean squared error of keys [1, H, T, D], all of one block, coded in a state's frame."""
    if state.layout.block:
        keys = turn(keys, torch.full(keys.shape[2:3], -state.layout.sinks), state.tensors.turn)
    frame, _ = state.tensors.frames(state.layout, 0)
    digits, radius = encode(keys, frame, unbiased=True)
    return (decode(digits, radius, frame) - keys).square().mean().item()


@torch.no_grad()
def test_held_out_keys_are_coded_better_than_in_the_fixed_rotation(tmp_path: Path) -> None:
    """Keys with few strong directions, from text that no frame was fitted to."""
    model = tiny("llama")
    for layer in model.model.layers:
        scale = torch.logspace(0.5, -1.5, 16).repeat(2)[:, None]
        layer.self_attn.k_proj.weight.mul_(scale)
    file = str(tmp_path / "f.safetensors")
    fitted(model, sequences(512, 512)).save(file)
    ids = torch.tensor(sequences(100, seed=11))
    keys: list[Tensor] = []
    errors = []
    for config in (CONFIG.replace(frame=file, bits=3.125), CONFIG.replace(bits=3.125)):
        cache = skv.SphericalCache(model.config, 128, config)
        model(ids, past_key_values=cache)  # too short for frames of its own
        keys = keys or [state.dense()[0][:, :, :100] for state in exact_states(model, ids)]
        errors.append([coded_error(s, k) for s, k in zip(cache.states, keys, strict=True)])
    for saved, fixed in zip(*errors, strict=True):
        assert saved < 0.6 * fixed


def exact_states(model: Any, ids: Tensor) -> list[LayerState]:
    cache = skv.SphericalCache(model.config, 128, CONFIG.replace(codec="identity"))
    model(ids, past_key_values=cache)
    return cache.states


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("codec", ["identity", "grid"])
def test_a_frame_is_for_the_frame_codec(codec: str) -> None:
    with pytest.raises(ConfigError, match=rf"frame='f'.*codec='{codec}'.*codec='frame'"):
        skv.Config(codec=codec, frame="f")


@pytest.mark.parametrize("value", ["", 3, True, b"f"])
def test_a_frame_is_the_name_of_a_file(value: object) -> None:
    with pytest.raises(ConfigError, match="skv calibrate"):
        skv.Config(frame=value)
    assert skv.Config(frame=Path("a/b")).frame == os.path.join("a", "b")


def test_a_plain_module_has_no_saved_frames() -> None:
    with pytest.raises(ConfigError, match="Leave it out"):
        layer_state("frame", frame="f")


# ---------------------------------------------------------------- another model, other bits


def test_another_model_is_refused_by_what_differs(file: str) -> None:
    for other, word in (
        (tiny("qwen2"), 'model_type is "llama" there and "qwen2" here'),
        (tiny("llama", layers=3), "num_hidden_layers is 2 there and 3 here"),
        (tiny("llama", num_key_value_heads=4), "num_key_value_heads"),
        (tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_param"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            cache_for(other, file)
        assert file in str(caught.value)
        assert "Run skv calibrate" in str(caught.value)


def test_other_weights_of_the_same_shape_are_refused(model: Any, file: str) -> None:
    frames = load_frames(file)
    assert len(frames.about["weights"]) == 5  # embedding, and two of each layer
    check_model(frames, model)
    for dtype in (torch.bfloat16, torch.float16):
        check_model(frames, tiny("llama").to(dtype))
    other = tiny("llama")
    torch.nn.init.normal_(other.model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(ConfigError, match=r"other weights.*layers\.1\.self_attn\.k_proj"):
        check_model(frames, other)


def test_a_fingerprint_survives_torch_compile(model: Any) -> None:
    assert sample_weights(torch.compile(tiny("llama"))).keys() == sample_weights(model).keys()


def test_a_tier_that_the_file_lacks_is_refused_with_what_it_has(model: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "f.safetensors")
    # The tiers that policies choose among are in every file.
    two, four = (layout.rate(0) for layout in layouts(CONFIG, 16, 0, "float32")[1::2])
    fitted(model, sequences(256), CONFIG.replace(bits=two), every=False).save(file)
    assert cache_for(model, file, bits=two)
    with pytest.raises(ConfigError, match=f"frames for bits={two:g}, and tiers of {four:g} bits"):
        cache_for(model, file, bits=four)


def test_other_blocks_are_refused(model: Any, file: str) -> None:
    assert cache_for(model, file, page_tokens=64)
    with pytest.raises(ConfigError, match=r"page_tokens=48 makes blocks of 96.*\(8\)"):
        cache_for(model, file, page_tokens=48)


# ---------------------------------------------------------------- damaged and foreign files


def refuses(file: str, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_frames(file)
    text = str(caught.value)
    for word in (os.path.basename(file), "skv calibrate", *words):
        assert word in text


def test_what_is_no_file_of_frames_is_refused(tmp_path: Path) -> None:
    refuses(str(tmp_path / "none.safetensors"), "No such file")
    refuses(str(tmp_path), "not a file")
    foreign = str(tmp_path / "foreign")
    save_file({"x": torch.zeros(3)}, foreign)
    refuses(foreign, "without frames")
    for data in (b"", b"hello, world", pickle.dumps({"x": 1}), os.urandom(4096)):
        Path(foreign).write_bytes(data)
        refuses(foreign, "not a safetensors file")
    torch.save({"x": torch.zeros(3)}, foreign)
    refuses(foreign, "not a safetensors file")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(file: str, keep: float) -> None:
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: int(keep * len(data))])
    refuses(file, "damaged")


@pytest.mark.parametrize("where", [0.4, 0.7, 0.99])
def test_a_flipped_bit_is_refused(file: str, where: float) -> None:
    data = bytearray(Path(file).read_bytes())
    data[int(where * len(data))] ^= 1
    Path(file).write_bytes(data)
    refuses(file, "damaged")


INTO, BACK = (f"layers.0.key.{part}" for part in ("into", "back"))
PLAN, GRID, LOSS = (f"layers.0.key.32.{part}" for part in ("plan", "grid", "loss"))


def _set(name: str, at: tuple[int, ...], value: float) -> Callable[[dict, dict], None]:
    def change(about: dict, tensors: dict) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda about, x: x.pop(INTO), f"{INTO} is missing"),
        (lambda about, x: x.update(more=torch.zeros(1)), "more is not expected"),
        (lambda about, x: x.update({INTO: x[INTO][:, :8].clone()}), "[2, 8, 16]"),
        (lambda about, x: x.update({INTO: x[INTO].float()}), "torch.float32, not"),
        (lambda about, x: x.pop(BACK), f"{BACK} is missing"),
        (lambda about, x: x.update({BACK: x[BACK][:, 1:].clone()}), "[2, 16, 16]"),
        (lambda about, x: x.pop(LOSS), f"{LOSS} is missing"),
        (lambda about, x: x.update({PLAN: x[PLAN].long()}), "torch.int64, not"),
        (_set(INTO, (0, 1, 2), float("nan")), "not finite"),
        (_set(GRID, (0, 0, 2), float("inf")), "not finite"),
        (_set(LOSS, (1,), float("inf")), "not finite"),
        (_set(GRID, (0, 0, 2), -1.0), "not positive"),
        (_set(PLAN, (0, 0, 1), 16), "a dimension that is not there"),
        (_set(PLAN, (0, 0, 1), 255), "a dimension that is not there"),
        (_set(PLAN, (1, 1, 1), 3), "shift other than"),
        (_set(PLAN, (1, 1, 1), 8), "shift other than"),
        (lambda about, x: about.update(version=1), "version 1, and this program reads 2"),
        (lambda about, x: about.update(version=3), "version 3, and this program reads 2"),
        (lambda about, x: about.pop("layers"), "metadata"),
        (lambda about, x: about.update(layers=3), "metadata"),
        (lambda about, x: about["layers"].update({"0": {"shape": "x"}}), "metadata"),
        (lambda about, x: about.update(weights=[]), "weights is"),
        (lambda about, x: about.pop("block"), "metadata"),
        (lambda about, x: about.update(model=None), "metadata"),
    ],
)
def test_each_kind_of_damage_is_named(
    frames: SavedFrames, tmp_path: Path, change: Callable[[dict, dict], None], word: str
) -> None:
    about, tensors = json.loads(json.dumps(frames.about)), dict(frames.tensors)
    change(about, tensors)
    file = str(tmp_path / "f.safetensors")
    SavedFrames(about, tensors).save(file)
    refuses(file, word)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"version": 2}', "{", "null"])
def test_strange_metadata_is_refused(file: str, text: str) -> None:
    save_file(load_file(file), file, {"skv_frames": text})
    refuses(file, "metadata")


def test_a_changed_file_is_read_again(frames: SavedFrames, file: str) -> None:
    first = load_frames(file)
    assert load_frames(file) is first
    SavedFrames({**frames.about, "name": "another"}, frames.tensors).save(file)
    assert load_frames(file).about["name"] == "another"


def test_a_failed_save_leaves_nothing(frames: SavedFrames, file: str) -> None:
    before = Path(file).read_bytes()
    bad = SavedFrames(frames.about, {**frames.tensors, "x": torch.empty(2, device="meta")})
    with pytest.raises(NotImplementedError):
        bad.save(file)
    assert Path(file).read_bytes() == before
    assert len(list(Path(file).parent.iterdir())) == 1


# ---------------------------------------------------------------- the command


def test_texts_are_cut_first_pieces_first() -> None:
    a, b = list(range(1, 701)), list(range(1001, 1301))
    assert cut([a, b], 300) == [a[:300], b, a[300:600]]
    assert cut([a], 300, bos=1) == [a[:300], [1, *a[300:599]]]
    with pytest.raises(SkvError, match="200 tokens in 2 files"):
        cut([a[:100], b[:100]], 300)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with a tokenizer of one token a byte."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    path = str(tmp_path_factory.mktemp("model") / "tiny")
    words = {chr(n): n for n in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    inner.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(path)
    model.save_pretrained(path)
    return path


def test_the_command_writes_frames_that_a_model_uses(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out, result = (str(tmp_path / n) for n in ("a.txt", "f.safetensors", "r.json"))
    Path(text).write_text("A sphere has no edges, only directions. " * 30)
    arguments = ["calibrate", folder, "--text", text, text, "--out", out, "--tokens", "400"]
    assert cli.main([*arguments, "--sequences", "3", "--json", result]) == 0
    record = json.loads(Path(result).read_text())
    assert record["sequence_tokens"] == [400, 400, 400]
    assert record["bits"] == load_frames(out).about["bits"]
    assert "frame=" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    check_model(load_frames(out), model)
    cache = skv.SphericalCache(model.config, 128, frame=out, bits=3.125)
    new = model.generate(
        torch.tensor(sequences(90)), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    assert new.shape == (1, 94)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--text": "none.txt"}, "none.txt"),
        ({"--out": "no/such/folder/f"}, "--out"),
        ({"--out": "."}, "folder"),
        ({"--tokens": "20"}, "256"),
        ({"--bits": "0.1"}, "coarsest"),
        ({"--bits": "-1"}, "bits"),
        ({"--page-tokens": "12"}, "page_tokens"),
    ],
)
def test_the_command_refuses(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A sphere has no edges. " * 20)
    arguments = {"--text": "a.txt", "--out": "f.safetensors", **change}
    assert cli.main(["calibrate", folder, *(x for pair in arguments.items() for x in pair)]) == 2
    assert word in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
