"""``skv calibrate``: what is measured once on a model and kept in a file.

Frames, from text; and which heads look far back, from random tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen
from skv_compile.errors import SkvError

if TYPE_CHECKING:
    from torch import Tensor

    from skv_compile.codec.saved import SavedFrames
    from skv_compile.config import Config
    from skv_compile.lowering.layout import Layout

HELP = (
    "fit the frames of a model to text once, and save them for Config(frame=FILE); or measure "
    "its retrieval heads for Config(retention_table=FILE)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text, and where the results go."""
    add, positive = parser.add_argument, common.positive
    add("model", metavar="MODEL", help="Hugging Face id, local folder, GGUF file, or 'demo'")
    add("--text", nargs="+", metavar="FILE", help="UTF-8 text for frames, cut in sequences")
    add("--out", metavar="FILE", help="the file to write frames to; needs --text")
    add(
        "--retrieval-heads",
        metavar="FILE",
        help="the file to write a score of every kv head to; needs no text",
    )
    add(
        "--bits",
        type=float,
        nargs="+",
        metavar="B",
        help="of uniform tiers, only these (default: all)",
    )
    add("--tokens", type=positive, default=3072, metavar="N", help="of a sequence at most (3072)")
    add("--sequences", type=positive, default=4, metavar="N", help="at most, all at once (4)")
    add("--page-tokens", type=positive, metavar="N", help="as in Config(page_tokens=N)")


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Load the model, then fit frames, measure heads, or both."""
    import skv_compile as skv
    from skv_compile import models

    if not args.out and not args.retrieval_heads:
        raise common.UsageError(
            "nothing to do: give --text FILE --out FILE for frames, or --retrieval-heads FILE"
        )
    if bool(args.out) != bool(args.text):
        raise common.UsageError("frames need both --text FILE, to fit them to, and --out FILE")
    pages = {} if args.page_tokens is None else {"page_tokens": args.page_tokens}
    plain = {"codec": "frame", "retention": "none", **pages}
    configs = [skv.Config(**plain, bits=b) for b in args.bits or (64.0,)]
    for option, file in (("--out", args.out), ("--retrieval-heads", args.retrieval_heads)):
        if file:
            _check_writable(option, file)
    texts = list(map(_read, args.text or ()))
    with screen.step("Model") as update:
        loaded = models.load(args.model, report=update)
    result = {"model": args.model, "device": common.device_name(loaded.device)}
    if args.out:
        result |= _fit_frames(args, screen, loaded, texts, configs)
    if args.retrieval_heads:
        result |= _measure_heads(args, screen, loaded)
    return result


def _check_writable(option: str, file: str) -> None:
    path = Path(file).expanduser().absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise common.UsageError(f"{option} {file}: a folder, or in none that can be written")


def _fit_frames(
    args: argparse.Namespace, screen: Screen, loaded: Any, texts: list[str], configs: list[Config]
) -> dict[str, Any]:
    """Read the text through the model, fit, save."""
    ids = [loaded.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    found = cut(ids, args.tokens, loaded.tokenizer.bos_token_id)
    sequences = found[: args.sequences]
    screen.note(f"Using {len(sequences)} of the text's {len(found)} sequences")
    fit = Calibration(loaded.model, sequences, configs, every_tier=not args.bits)
    with screen.bar("Calibrating", fit.steps) as advance:
        frames = fit.run(advance, name=Path(args.model).name)
    frames.save(Path(args.out).expanduser().absolute())
    bits = frames.about["bits"]
    screen.write(
        f"{args.out}: frames of {len(fit.states)} layers for {', '.join(f'{b:g}' for b in bits)} "
        f"bits per coordinate, from {sum(map(len, sequences))} tokens.\n"
        f"Use it with skv.compile(model, bits={bits[-1]:g}, frame={args.out!r})."
    )
    return {
        "file": args.out,
        "layers": len(fit.states),
        **{key: frames.about[key] for key in ("bits", "sequence_tokens")},
    }


def _measure_heads(args: argparse.Namespace, screen: Screen, loaded: Any) -> dict[str, Any]:
    """Measure how far every head looks back, save."""
    from skv_compile.retention.table import measure_heads, save_table

    with common.forwards(screen, "Retrieval heads", loaded.model):
        table = measure_heads(loaded.model, args.tokens)
    save_table(args.retrieval_heads, table, model=Path(args.model).name)
    screen.write(
        f"{args.retrieval_heads}: scores of {len(table[0])} kv heads in {len(table)} layers, from "
        f"{max(map(max, table)):.3f} down to {min(map(min, table)):.3f}.\n"
        "Use it with skv.compile(model, retention='retrieval', "
        f"retention_table={args.retrieval_heads!r})."
    )
    return {"retrieval_heads": args.retrieval_heads, "scores": [list(row) for row in table]}


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise common.UsageError(f"--text {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise common.UsageError(f"--text {file} is not UTF-8") from error


def cut(texts: Sequence[list[int]], tokens: int, bos: int | None = None) -> list[list[int]]:
    """Texts in sequences of at most ``tokens`` tokens: the first of every text, then the second.

    All of a text begin with ``bos`` if the first does. What is too short for frames is left out.
    """
    from skv_compile.codec.tiers import CALIBRATE_TOKENS

    starts = range(0, max(map(len, texts), default=0), tokens)
    heads = [ids[:1] if ids[:1] == [bos] else [] for ids in texts]
    pairs = [(i, ids, head) for i in starts for ids, head in zip(texts, heads, strict=True)]
    pieces = [((head if i else []) + ids[i : i + tokens])[:tokens] for i, ids, head in pairs]
    found = [piece for piece in pieces if len(piece) >= CALIBRATE_TOKENS]
    if not found:
        raise common.UsageError(
            f"the text makes {sum(map(len, texts))} tokens in {len(texts)} files, and no sequence "
            f"of the {CALIBRATE_TOKENS} that frames need. Give more text, or a larger --tokens."
        )
    return found


class Calibration:
    """Frames of every compressed layer of a transformers model, from lists of token ids.

    The tiers that ``configs`` choose are fitted, or with ``every_tier`` all of the first one's.
    Queries, keys and values of all layers and sequences are held at once.
    """

    def __init__(
        self, model: Any, sequences: list[list[int]], configs: list[Config], every_tier: bool
    ) -> None:
        from skv_compile.cache.layer import SphericalLayer
        from skv_compile.cache.spherical import SphericalCache, refuse_several_shapes
        from skv_compile.codec.rotary import rotary_plan

        refuse_several_shapes(model.config)
        self.model, self.sequences = model, sequences
        self.longest = max(map(len, sequences))
        exact = configs[0].replace(codec="identity", bits=64.0)
        self.cache = SphericalCache(model.config, self.longest, exact)
        self._forward([0])  # allocates every layer
        self.states = {
            layer.index: layer.state
            for layer in self.cache.layers
            if isinstance(layer, SphericalLayer) and layer.state is not None
        }
        self.layouts: dict[int, Layout] = {}
        self.bits: list[float] = []  # rates of the uniform tiers
        for index, state in self.states.items():
            dim = state.layout.head_dim
            turned = rotary_plan(model.config, dim) is not None
            found = _layouts(configs, every_tier, dim, turned)
            self.bits = [layout.rate(0) for layout in found[:-1]]
            self.layouts[index] = _joined(found, dim)
        self.steps = len(sequences) + len(self.layouts)

    def _forward(self, ids: list[int]) -> None:
        """One sequence through the model's body: no logits are needed."""
        import torch

        self.cache.reset()
        with torch.no_grad():
            tokens = torch.tensor([ids], device=self.model.device)
            self.model.base_model(tokens, past_key_values=self.cache, use_cache=True)

    def run(self, advance: Callable[[], None] = lambda: None, name: str = "") -> SavedFrames:
        """Fit; ``advance`` is called after each of ``steps`` steps, ``name`` is the model's."""
        import torch

        from skv_compile.codec import saved

        tensors: dict[str, Tensor] = {}
        with _listening(self.states) as seen:
            for ids in self.sequences:
                self._forward(ids)
                advance()
        for index, layout in self.layouts.items():
            rows = seen.pop(index)
            if len(rows) != len(self.sequences):
                raise SkvError(
                    f"layer {index} went past scaled_dot_product_attention, so its queries were "
                    "not seen. Load the model with attn_implementation='sdpa'."
                )
            tensors |= self._fit(index, rows, layout)
            advance()
        weights = saved.sample_weights(self.model)
        samples = [weight[None] for weight in weights.values()]
        tensors["weights"] = torch.cat([torch.empty(0, saved.SAMPLES), *samples])
        return saved.SavedFrames(self._about(name, list(weights)), tensors)

    def _fit(self, index: int, rows: list[tuple[Tensor, ...]], layout: Layout) -> dict[str, Tensor]:
        """Named tensors of a layer's frames in all tiers."""
        import torch

        from skv_compile.codec import saved
        from skv_compile.codec.rotary import rotary_plan
        from skv_compile.lowering.reference.calibrate import fit_frames

        # Shorter sequences are padded on the left, as in any batch.
        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, self.longest - x.shape[2], 0))

        q, k, v = (torch.cat([*map(padded, side)]) for side in zip(*rows, strict=True))
        t = torch.arange(self.longest, device=k.device)
        lengths = torch.tensor([row[0].shape[2] for row in rows], device=k.device)
        mask = (t >= self.longest - lengths[:, None])[:, None, None]
        plan = rotary_plan(self.model.config, layout.head_dim)
        turn = torch.empty(0) if plan is None else plan
        *bases, loss = fit_frames(q, k, v, mask, t, turn.to(k.device), layout)
        found: dict[str, Tensor] = {}
        for n, (side, basis) in enumerate(zip(saved.SIDES, bases, strict=True)):
            found[saved.tensor_name(index, side, None, "into")] = basis.into
            found[saved.tensor_name(index, side, None, "back")] = basis.back
            for tier, digits in enumerate(layout.tiers):
                frame = basis.frame(tier, layout.digits_before(tier)[n], digits[n])
                for part, x in (
                    ("grid", frame.grid),
                    ("plan", frame.plan),
                    ("loss", loss[:, 2 * n : 2 * n + 2, tier]),
                ):
                    found[saved.tensor_name(index, side, digits[n], part)] = x
        return found

    def _about(self, name: str, weights: list[str]) -> dict[str, Any]:
        from skv_compile.codec import saved

        layers = {
            str(index): {
                "shape": [self.states[index].heads, layout.head_dim],
                "key": sorted({tier.key for tier in layout.tiers}),
                "value": sorted({tier.value for tier in layout.tiers}),
            }
            for index, layout in self.layouts.items()
        }
        first = next(iter(self.layouts.values()))
        return {
            "version": saved.VERSION,
            "name": name,
            "model": saved.identity(self.model.config),
            "layers": layers,
            "bits": self.bits,
            **{key: getattr(first, key) for key in ("block", "page_tokens")},
            "sequence_tokens": [len(ids) for ids in self.sequences],
            "weights": weights,
        }


def _layouts(configs: list[Config], every: bool, dim: int, turned: bool) -> list[Layout]:
    """Layouts whose tiers are to be fitted: uniform ones, coarse to fine, then those that
    retention policies choose among."""
    from skv_compile.codec.tiers import choose_layout, layouts, shared_layout

    shape = (dim, 0, "float32", turned)
    uniform = [choose_layout(config, *shape) for config in configs]
    if every:
        uniform = layouts(configs[0], *shape)
    uniform = sorted(dict.fromkeys(uniform), key=lambda layout: layout.rate(0))
    return [*uniform, shared_layout(configs[0], *shape)]


def _joined(found: list[Layout], dim: int) -> Layout:
    """One layout with the tiers of all of them, each once."""
    from dataclasses import replace

    digits = dict.fromkeys(tier for layout in found for tier in layout.tiers)
    tiers = tuple(sorted(digits, key=sum))
    unit = min(range(len(tiers)), key=lambda n: abs(sum(tiers[n]) - 2 * dim))
    return replace(found[0], tiers=tiers, unit=unit)


@contextlib.contextmanager
def _listening(states: dict[int, Any]) -> Iterator[dict[int, list[tuple[Tensor, ...]]]]:
    """{layer: [(queries, keys, values) [1, H, T, D] of every eager forward meanwhile]}.

    ``hold`` and, where that declines, ``begin_calibration`` are called with all three; of these
    states neither fits anything, so attributes of the same names may stand in front of the methods.
    """
    seen: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in states}

    def hear(index: int, *tensors: Any) -> Callable[[], None]:
        seen[index].append(tensors[:3])
        return lambda: None

    for index, state in states.items():
        state.__dict__["begin_calibration"] = functools.partial(hear, index)
        state.__dict__["hold"] = lambda *_: False
    try:
        yield seen
    finally:
        for state in states.values():
            del state.__dict__["begin_calibration"], state.__dict__["hold"]
