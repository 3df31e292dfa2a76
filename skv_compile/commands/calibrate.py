"""``skv calibrate``: frames fitted once to a model, from text, and kept in a file."""

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
    from skv_compile.codec.tiers import Tier
    from skv_compile.config import Config
    from skv_compile.lowering.layout import Layout

HELP = "fit the frames of a model to text once, and save them for Config(frame=FILE)"

#: Queries, keys and values held at a time; more of them means reading the text again.
CAPTURE_BYTES = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text, and where the frames go."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face id, local folder, GGUF file, or 'demo'"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8 text, a sequence or more each",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--bits", type=float, nargs="+", metavar="B", help="only for these rates (default: for all)"
    )
    parser.add_argument(
        "--tokens", type=common.positive, default=3072, help="of a sequence at most"
    )
    parser.add_argument("--sequences", type=common.positive, default=4, help="at most")
    parser.add_argument(
        "--page-tokens", type=common.positive, metavar="N", help="as in Config(page_tokens=N)"
    )


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Read the text through the model, fit, save."""
    import skv_compile as skv
    from skv_compile import models

    pages = {} if args.page_tokens is None else {"page_tokens": args.page_tokens}
    configs = [skv.Config(codec="frame", bits=b, **pages) for b in args.bits or (64.0,)]
    folder = Path(args.out).expanduser().absolute().parent
    if Path(args.out).expanduser().is_dir() or not os.access(folder, os.W_OK):
        raise common.UsageError(
            f"--out {args.out}: this is a folder, or its folder is not writable"
        )
    texts = [_read(file) for file in args.text]
    with screen.step("Model") as update:
        loaded = models.load(args.model, report=update)
    model = loaded.model
    found = cut([encode(loaded.tokenizer, text) for text in texts], args.tokens)
    sequences = found[: args.sequences]
    if len(found) > len(sequences):
        screen.note(f"Using {len(sequences)} of the text's {len(found)} sequences")
    fit = Calibration(model, sequences, configs, every_tier=not args.bits)
    with screen.bar("Calibrating", fit.steps) as advance:
        frames = fit.run(advance, name=Path(args.model).name)
    frames.save(args.out)
    written = os.path.getsize(Path(args.out).expanduser())
    tiers = frames.about["tiers"]
    screen.write(
        f"{args.out}: frames of {len(fit.states)} layers for "
        f"{', '.join(format(tier['bits'], 'g') for tier in tiers)} bits per coordinate, fitted on "
        f"{sum(map(len, sequences))} tokens ({common.size(written)}).\n"
        f"Use it with skv.compile(model, bits={tiers[-1]['bits']:g}, frame={args.out!r})."
    )
    return {
        "model": args.model,
        "device": common.device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "file": args.out,
        "bytes": written,
        "layers": len(fit.states),
        "tiers": [{"name": tier["name"], "bits": tier["bits"]} for tier in tiers],
        "sequence_tokens": [len(ids) for ids in sequences],
    }


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise common.UsageError(f"--text {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise common.UsageError(f"--text {file} is not UTF-8") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text of any length."""
    return tokenizer(text, verbose=False)["input_ids"]


def cut(texts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Texts in sequences of at most ``tokens`` tokens: the first of every text, then the second.

    What is shorter than an automatic calibration takes is left out.
    """
    from skv_compile.codec.tiers import CALIBRATE_TOKENS

    starts = range(0, max(map(len, texts), default=0), tokens)
    pieces = [ids[start : start + tokens] for start in starts for ids in texts]
    found = [piece for piece in pieces if len(piece) >= CALIBRATE_TOKENS]
    if not found:
        raise common.UsageError(
            f"the text makes {sum(map(len, texts))} tokens in {len(texts)} files, and no sequence "
            f"of {CALIBRATE_TOKENS}, which frames need at least. Give more text, or a larger --tokens."
        )
    return found


class Calibration:
    """Frames of every compressed layer of a model, from sequences of tokens.

    Args:
        model: a transformers model.
        sequences: lists of token ids.
        configs: the tiers they choose are fitted; with ``every_tier``, all of the first one's.
    """

    def __init__(
        self, model: Any, sequences: list[list[int]], configs: list[Config], every_tier: bool
    ) -> None:
        import torch

        from skv_compile.cache.spherical import SphericalCache, SphericalLayer
        from skv_compile.codec.rotary import rotary_plan

        self.model, self.sequences = model, sequences
        self.longest = max(map(len, sequences))
        config = configs[0]
        self.cache = SphericalCache(
            model.config, self.longest, config.replace(codec="identity", bits=64.0)
        )
        self._forward([0])  # allocates every layer
        self.states = {
            layer.index: layer.state
            for layer in self.cache.layers
            if isinstance(layer, SphericalLayer) and layer.state is not None
        }
        self.tiers: dict[int, list[Tier]] = {}
        self.plans: dict[int, Tensor | None] = {}
        for index, state in self.states.items():
            dim = state.layout.head_dim
            self.plans[index] = plan = rotary_plan(model.config, dim)
            self.tiers[index] = _tiers(configs, every_tier, dim, self.longest, plan is not None)
        self.empty = torch.empty(0, device=model.device)
        self.groups = self._groups()
        self.steps = len(self.groups) * len(sequences) + sum(map(len, self.tiers.values()))

    def _groups(self) -> list[list[int]]:
        """Layers that are captured together, so that what is held stays small."""
        text = self.model.config.get_text_config(decoder=True)
        tokens = self.longest * len(self.sequences)
        groups: list[list[int]] = [[]]
        held = 0
        for index, state in self.states.items():
            heads = text.num_attention_heads + 2 * state.heads
            size = tokens * heads * state.layout.head_dim * state.dtype.itemsize
            if groups[-1] and held + size > CAPTURE_BYTES:
                groups, held = [*groups, []], 0
            groups[-1].append(index)
            held += size
        return groups

    def _forward(self, ids: list[int]) -> None:
        """One sequence through the model's body: no logits are needed."""
        import torch

        body = getattr(self.model, "base_model", self.model)
        self.cache.reset()
        with torch.no_grad():
            tokens = torch.tensor([ids], device=self.model.device)
            body(input_ids=tokens, past_key_values=self.cache, use_cache=True)

    def run(self, advance: Callable[[], None] = lambda: None, name: str = "") -> SavedFrames:
        """Fit; ``advance`` is called after each of ``steps`` steps."""
        import torch

        from skv_compile.codec import saved

        tensors: dict[str, Tensor] = {}
        for group in self.groups:
            seen: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in group}
            with _listening({n: self.states[n] for n in group}, seen):
                for ids in self.sequences:
                    self._forward(ids)
                    advance()
            for index in group:
                rows = seen.pop(index)
                for tier in self.tiers[index]:
                    tensors |= self._fit(index, rows, tier.layout)
                    advance()
        weights = saved.sample_weights(self.model)
        none = torch.empty(0, saved.SAMPLES)
        tensors["weights"] = torch.stack([*weights.values()]) if weights else none
        return saved.SavedFrames(self._about(name, list(weights)), tensors)

    def _fit(self, index: int, rows: list[tuple[Tensor, ...]], layout: Layout) -> dict[str, Tensor]:
        """Named tensors of a layer's two frames for one tier."""
        import torch

        from skv_compile.codec import saved
        from skv_compile.lowering.codes import Frame
        from skv_compile.lowering.reference.calibrate import fit_frames

        if len(rows) != len(self.sequences):
            raise SkvError(
                f"layer {index} was read {len(rows)} times in {len(self.sequences)} forwards, past "
                "scaled_dot_product_attention. Load the model with attn_implementation='sdpa'."
            )
        # Shorter sequences are padded on the left, as in any batch.
        q, k, v = (
            torch.cat(
                [torch.nn.functional.pad(x, (0, 0, self.longest - x.shape[2], 0)) for x in side]
            )
            for side in zip(*rows, strict=True)
        )
        t = torch.arange(self.longest, device=k.device)
        lengths = torch.tensor([row[0].shape[2] for row in rows], device=k.device)
        mask = (t >= self.longest - lengths[:, None])[:, None, None]
        plan = self.plans[index]
        turn = self.empty if plan is None else plan.to(k.device)
        found: dict[str, Tensor] = {}
        for side, frame in zip(
            saved.SIDES, fit_frames(q, k, v, mask, t, turn, layout), strict=True
        ):
            digits = getattr(layout, f"{side}_digits")
            for part, x in zip(Frame._fields, frame, strict=True):
                found[saved.tensor_name(index, side, digits, part)] = x.to(saved.DTYPES[part])
        return found

    def _about(self, name: str, weights: list[str]) -> dict[str, Any]:
        from skv_compile.codec import saved

        first = next(iter(self.tiers))
        return {
            "version": saved.VERSION,
            "name": name,
            "model": saved.identity(self.model.config),
            "layers": {str(n): [s.heads, s.layout.head_dim] for n, s in self.states.items()},
            "tiers": [
                {"name": tier.name, "bits": tier.rate}
                | {
                    f"{side}_digits": {
                        str(n): getattr(self.tiers[n][i].layout, f"{side}_digits")
                        for n in self.tiers
                    }
                    for side in saved.SIDES
                }
                for i, tier in enumerate(self.tiers[first])
            ],
            "block": self.tiers[first][0].layout.block,
            "page_tokens": self.tiers[first][0].layout.page_tokens,
            "sequence_tokens": [len(ids) for ids in self.sequences],
            "weights": weights,
        }


def _tiers(configs: list[Config], every: bool, dim: int, tokens: int, turned: bool) -> list[Tier]:
    """The tiers to fit, coarse to fine, each once."""
    from skv_compile.codec.tiers import choose_tier, tiers

    chosen = [choose_tier(config, dim, tokens, "float32", turned) for config in configs]
    if every:
        chosen = tiers(configs[0], dim, tokens, "float32", turned)
    return sorted(dict.fromkeys(chosen), key=lambda tier: tier.rate)


@contextlib.contextmanager
def _listening(states: dict[int, Any], seen: dict[int, list[tuple[Tensor, ...]]]) -> Iterator[None]:
    """Append queries, keys and values [1, H, T, D] of every eager forward to ``seen``.

    ``calibrate`` is what every attention calls with all three; of these states it does not fit
    anything, so an attribute of the same name may stand in front of the method.
    """

    def hear(index: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, position: Any) -> None:
        seen[index].append((q, k, v))

    for index, state in states.items():
        state.__dict__["calibrate"] = functools.partial(hear, index)
    try:
        yield
    finally:
        for state in states.values():
            del state.__dict__["calibrate"]
