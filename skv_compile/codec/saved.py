"""Frames in a file: written by ``skv calibrate``, used through ``Config(frame=...)``.

A safetensors file. Its tensors are, for each layer and side, the transform that all tiers share, as
in ``layers.3.key.into``, for each number of digits the rest, as in ``layers.3.key.64.grid``, and
``weights`` [n, SAMPLES], a few values of the model.
The metadata is one JSON text: the order of several entries would change from run to run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from ..errors import ConfigError, shown
from ..files import replacing
from ..lowering.layout import Layout

VERSION = 2
SAMPLES = 8  # values looked at of each weight

_KEY = "skv_frames"
SIDES = ("key", "value")
#: Of each part, as in ``codes.stored``; ``weights`` is float32 too.
DTYPES = {
    "into": torch.bfloat16,
    "back": torch.bfloat16,
    "grid": torch.float32,
    "plan": torch.uint8,
    "loss": torch.float32,
}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
_MODEL_FIELDS = ("model_type", *_SIZES, "head_dim", "rope_parameters")
#: Weights that a fine-tuned model shares with nobody: what keys and queries are made with.
_WEIGHTS = re.compile(r"(^|[._])(w?[qk]|w?qkv|query|key|\w*_key_value|c_attn)(_proj)?\.weight$")
_AGAIN = "Make it with: skv calibrate MODEL --text FILE --out"
#: What reading a file raises that is not what it should be.
_DAMAGE = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class SavedFrames:
    """What a file of frames holds.

    ``about``: the metadata. ``name`` of the model and ``model``, what of its config must agree;
    ``layers`` {index: {shape: [kv heads, head dim], key: [digits], value: [digits]}}; ``bits`` of
    the tiers; ``block``: tokens that share a rotary turn; ``weights``: names of the rows of that
    tensor. ``tensors``: as in the file.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    path: str = "frames"

    def check_config(self, model_config: Any) -> None:
        """Refuse a model whose config names another architecture, shape or rotary embedding."""
        mine, its = identity(model_config), self.about["model"]
        wrong = [
            f"{name} is {json.dumps(its.get(name))} there and {json.dumps(mine[name])} here"
            for name in _MODEL_FIELDS
            if its.get(name) != mine[name]
        ]
        if wrong:
            raise ConfigError(
                f"{self.path} was made for another model ({self.about['name']}): "
                f"{'; '.join(wrong)}. Run skv calibrate on this model."
            )

    def layer(self, index: int, heads: int, layout: Layout) -> tuple[Tensor, ...]:
        """The nine frame tensors of a layer (``lowering.state.State``).

        Raises:
            ConfigError: the layer has another shape, or its tier is not in the file.
        """
        found = self.about["layers"].get(str(index), {"shape": [0, 0]})["shape"]
        if found != [heads, layout.head_dim]:
            raise ConfigError(
                f"{self.path} has {found[0]} kv heads of dim {found[1]} in layer {index}, the "
                f"model {heads} of dim {layout.head_dim}. Run skv calibrate on this model."
            )
        if layout.block != self.about["block"]:
            raise ConfigError(
                f"{self.path}: its keys were fitted in blocks of {self.about['block']} tokens, and "
                f"page_tokens={layout.page_tokens} makes blocks of {layout.block}. Set the "
                f"page_tokens of the file ({self.about['page_tokens']}), or run skv calibrate "
                f"--page-tokens {layout.page_tokens}."
            )
        bases: list[Tensor] = []
        losses: list[Tensor] = []
        for side, digits in zip(SIDES, zip(*layout.tiers, strict=True), strict=True):
            if not set(digits) <= set(self.about["layers"][str(index)][side]):
                has = " or ".join(f"{bits:g}" for bits in self.about["bits"])
                rate = " and ".join(f"{layout.rate(n):g}" for n in range(len(digits)))
                raise ConfigError(
                    f"{self.path} has frames for bits={has}, and tiers of {rate} bits were asked "
                    "for. Set bits to what the file has, or run skv calibrate without --bits."
                )

            def part(name: str, n: int | None = None, side: str = side) -> Tensor:
                return self.tensors[tensor_name(index, side, n, name)]

            grid = torch.stack([part("grid", n) for n in digits], 1)
            plan = torch.cat([part("plan", n) for n in digits], -1)
            bases += [part("into"), part("back"), grid, plan]
            losses.append(torch.stack([part("loss", n) for n in digits], -1))
        return (*bases, torch.cat(losses, 1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        target = Path(path).expanduser().absolute()
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors.items()}
        about = {"version": VERSION, **self.about}
        about["sha256"] = _checksum(about, tensors)
        with replacing(target) as temporary:
            save_file(tensors, temporary, {_KEY: json.dumps(about, sort_keys=True)})


def identity(model_config: Any) -> dict[str, Any]:
    """What of a model's config decides whether frames fit it, in JSON's types."""
    text = model_config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in _MODEL_FIELDS}
    return json.loads(json.dumps(found, sort_keys=True, default=str))


def sample_weights(model: Any) -> dict[str, Tensor]:
    """{name: [SAMPLES] float32} of the embedding and the query and key projections, where they
    are plain floating-point tensors."""
    embedding = model.get_input_embeddings()
    found = {}
    for name, weight in model.named_parameters():
        if not (weight is getattr(embedding, "weight", None) or _WEIGHTS.search(name)):
            continue
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            at = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long()
            values = weight.detach().flatten()[at.to(weight.device)]
            found[name.replace("_orig_mod.", "")] = values.float().cpu()
    return dict(sorted(found.items()))


def check_model(frames: SavedFrames, model: Any) -> None:
    """Refuse a model that has the right shape but other weights, in whatever floating dtype.

    What is quantised now, or was then, is not compared.
    """
    frames.check_config(model.config)
    mine = sample_weights(model)
    for name, its in zip(frames.about["weights"], frames.tensors["weights"], strict=True):
        # The rounding of bfloat16, twice, and what float16 makes of tiny numbers.
        slack = its.abs() * 2**-7 + 1e-3 * its.square().mean().sqrt()
        if name in mine and not bool(((mine[name] - its).abs() <= slack).all()):
            raise ConfigError(
                f"{frames.path} was made for other weights of the same shape "
                f"({frames.about['name']}): {name} differs. Run skv calibrate on this model."
            )


def load_frames(path: str | os.PathLike[str]) -> SavedFrames:
    """Read and check a file of frames; the file is read again only if it has changed.

    Raises:
        ConfigError: it is missing, damaged, foreign, or of another version.
    """
    name = os.fspath(path)
    try:
        full = os.path.realpath(os.path.expanduser(name))
        stat = os.stat(full)
    except (OSError, ValueError) as error:  # ValueError: no name that a system can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"frame={name!r}: {reason}. {_AGAIN} {name}") from error
    if not os.path.isfile(full):
        raise ConfigError(f"frame={name!r} is not a file. {_AGAIN} FILE.")
    return _load(name, full, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=2)
def _load(name: str, full: str, *_changes: int) -> SavedFrames:
    try:
        with safe_open(full, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        # Read, not mapped: a mapping changes with the file, and kills where that gets shorter.
        tensors = {} if text is None else load(Path(full).read_bytes())
    except (SafetensorError, OSError, *_DAMAGE) as error:
        raise ConfigError(
            f"{name} is not a safetensors file, or is damaged: {error}. {_AGAIN} {name}"
        ) from error
    if text is None:
        raise ConfigError(f"{name} is a safetensors file without frames. {_AGAIN} FILE.")
    try:
        about = json.loads(text)
        if about["version"] != VERSION:
            problem = f"has version {shown(about['version'])}, and this program reads {VERSION}"
        else:
            problem = next(_problems(about, tensors), "")
    except _DAMAGE as error:
        problem = f"is damaged: its metadata does not describe frames ({shown(error)})"
    if problem:
        raise ConfigError(f"{name} {problem}. {_AGAIN} {name}")
    return SavedFrames(about, tensors, name)


def tensor_name(index: int | str, side: str, digits: int | None, part: str) -> str:
    """The name of a part of a frame; without digits, one that all tiers share."""
    return f"layers.{index}.{side}.{part if digits is None else f'{digits}.{part}'}"


def _checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of everything but itself."""
    rest = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _problems(about: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with a file, in words that follow its name."""
    about["name"], about["model"]["model_type"], about["block"] + about["page_tokens"]
    [f"{bits:g}" for bits in about["bits"]]
    shapes: dict[str, tuple[int, ...]] = {"weights": (len(about["weights"]), SAMPLES)}
    if not all(isinstance(name, str) for name in about["weights"]):
        yield "is damaged: a name among its weights is no text"
    for index, layer in about["layers"].items():
        if not re.fullmatch("[0-9]{1,9}", index):
            yield f"is damaged: {shown(index)} is no number of a layer"
        heads, dim = layer["shape"]
        for side in SIDES:
            for name, size in (("into", (dim, dim)), ("back", (dim + 1, dim))):
                shapes[tensor_name(index, side, None, name)] = (heads, *size)
            for n in layer[side]:
                for part, rest in (("grid", (3, dim)), ("plan", (2, n)), ("loss", (2,))):
                    shapes[tensor_name(index, side, n, part)] = (heads, *rest)
    for name in sorted(shapes.keys() - tensors.keys()):
        yield f"is damaged: {name} is missing"
    for name in sorted(tensors.keys() - shapes.keys()):
        yield f"is damaged: {name} is not expected in it"
    for name, shape in shapes.items():
        x = tensors[name]
        dtype = DTYPES.get(name.split(".")[-1], torch.float32)
        if tuple(x.shape) != shape or x.dtype != dtype:
            yield f"is damaged: {name} is {list(x.shape)} {x.dtype}, not {list(shape)} {dtype}"
        elif not bool(torch.isfinite(x).all()):
            yield f"is damaged: {name} is not finite"
        elif name.endswith(".plan"):
            dims, shifts = x.unbind(1)
            if bool(((dims < 0) | (dims >= about["layers"][name.split(".")[1]]["shape"][1])).any()):
                yield f"is damaged: {name} names a dimension that is not there"
            elif not bool(torch.isin(shifts, torch.tensor([0, 2, 4, 6])).all()):
                yield f"is damaged: {name} has a shift other than 0, 2, 4, 6"
        elif name.endswith(".grid") and not bool((x[:, :2] > 0).all() and (x[:, 2] >= 0).all()):
            yield f"is damaged: {name} has steps or levels that are not positive"
    if about["sha256"] != _checksum(about, tensors):
        yield "is damaged: its checksum is wrong"
