"""The main job, measured: one real model, dense and compressed cache side by side.

Both sides run the same model on the same prompt through ``generate`` with a compiled
decoding step; only the cache differs. Fidelity is measured on a continuation of the
document that is scored through the cache, against the same model with an exact cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from transformers import CompileConfig, DynamicCache

import skv_compile as skv
from skv_compile import metrics, models, text
from skv_compile.commands import common, generate

#: Tokens of the document in the prompt, and before the scored continuation.
PREFIX = 1_500
#: Tokens of the continuation that are scored through the cache.
SCORED = 256


class Shows(Protocol):
    """The part of ``Screen`` this module needs."""

    def step(self, title: str) -> Any:
        """A step of unknown length."""

    def bar(self, title: str, total: int) -> Any:
        """A step of known length."""


@dataclasses.dataclass(frozen=True)
class Side:
    """What one kind of cache made of the prompt."""

    text: str
    new_tokens: int
    resident_bytes: int
    bits_per_coordinate: float
    speed: dict[str, Any]
    token_ids: list[int]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything ``skv demo`` prints."""

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    prefix_tokens: int
    question: str
    dense: Side
    spherical: Side
    fidelity: metrics.Comparison
    #: ``summary()`` of the cache that generated, and the settings it was made with.
    cache: dict[str, Any]
    config: dict[str, Any]
    #: The machine's load before the work began; above its cores, the speeds mean little.
    load_before: float | None

    @property
    def common_tokens(self) -> int:
        """How many first tokens of the two texts are the same."""
        pairs = zip(self.dense.token_ids, self.spherical.token_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), self.shorter)

    @property
    def shorter(self) -> int:
        """Length of the shorter text, in tokens."""
        return min(self.dense.new_tokens, self.spherical.new_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, for JSON."""
        return {**dataclasses.asdict(self), "common_tokens": self.common_tokens}


def run(
    name: str, screen: Shows, *, max_new_tokens: int = 48, overrides: dict[str, Any] | None = None
) -> Result:
    """Load ``name`` and measure both sides. Each side compiles its decoding step once."""
    config = skv.Config(**(overrides or {}))
    load_before = common.load_average()
    with screen.step("Model") as update:
        loaded = models.load(name, report=update)
    model, tokenizer = loaded.model, loaded.tokenizer

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    prompt = f"{text.document_of(PREFIX, encode)}\n\n{text.QUESTION}"
    inputs = generate.encode(tokenizer, prompt).to(model.device)
    ids = torch.tensor(encode(text.document())[: PREFIX + SCORED + 1], device=model.device)
    scored, targets = ids[:-1], ids[PREFIX + 1 :]
    if len(targets) != SCORED:
        raise models.ModelError(f"the document makes only {len(ids)} tokens with {name}")

    # The exact side runs first, before skv.compile changes the model in place.
    title = f"scoring {SCORED} tokens after {PREFIX}"
    with common.forwards(screen, f"Exact model: {title}", model, 2):
        exact = metrics.score_continuation(model, scored, PREFIX, DynamicCache(config=model.config))
    dense, _ = _generate(
        model,
        tokenizer,
        inputs,
        max_new_tokens,
        screen,
        "Dense cache",
        cache_implementation="static",
        compile_config=_compiled_everywhere(),
    )

    model = skv.compile(model, config=config)
    with common.forwards(screen, f"Spherical cache: {title}", model, 2):
        through = skv.SphericalCache(model.config, max_cache_len=len(ids), config=config)
        other = metrics.score_continuation(model, scored, PREFIX, through)
        fidelity = metrics.compare(exact, other, targets)
    spherical, cache = _generate(
        model, tokenizer, inputs, max_new_tokens, screen, "Spherical cache"
    )
    return Result(
        model=name,
        device=common.device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=inputs["input_ids"].shape[1],
        prefix_tokens=PREFIX,
        question=text.QUESTION,
        dense=dense,
        spherical=spherical,
        fidelity=fidelity,
        cache=cache.summary(),
        config=dataclasses.asdict(config),
        load_before=load_before,
    )


def _generate(
    model: Any, tokenizer: Any, inputs: Any, count: int, screen: Shows, title: str, **kwargs: Any
) -> tuple[Side, Any]:
    """Generate greedily and measure; also returns the cache that was used."""
    length = inputs["input_ids"].shape[1]
    with screen.bar(f"{title}: {length} tokens in, {count} out (compiles first)", count) as step:
        timer = common.TokenTimer(each=step)
        out = model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=timer,
            **kwargs,
        )
    new = out.sequences[0, length:]
    cache = out.past_key_values
    if isinstance(cache, skv.SphericalCache):
        resident, bits = cache.resident_bytes, cache.bits_per_coordinate
    else:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        resident = sum(t.numel() * t.element_size() for t in tensors)
        bits = 8.0 * tensors[0].element_size()
    side = Side(
        text=tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        resident_bytes=resident,
        bits_per_coordinate=bits,
        speed=timer.speed(),
        token_ids=new.tolist(),
    )
    return side, cache


def _compiled_everywhere() -> CompileConfig:
    """``generate`` compiles decoding on CUDA by itself; on the CPU only when told so."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config
