"""How far every head looks back: measured once on a model, kept in a JSON file.

A head retrieves if, where a text repeats itself, it finds the earlier occurrence: the same token
(an echo head) or the one after it (an induction head). RazorAttention (Hanlin Tang et al., 2024)
sees that in random tokens, so no text is needed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, UnsupportedError
from ..files import replacing

#: Scores [layers][kv heads] of the compressed layers of a model, from 0 to 1 where measured.
Table = tuple[tuple[float, ...], ...]

FORMAT, VERSION = "skv retrieval heads", 1
TOKENS = 2048  # of the sequence: half of them random, then the same again
LEAST_TOKENS = 256  # so that half of them is more than the usual recent window
SKIPPED = 4  # queries whose earlier occurrence is a sink, which gets attention for itself

_AGAIN = "Make it with: skv calibrate MODEL --retrieval-heads"


# ---------------------------------------------------------------- the file


def load_table(path: str | os.PathLike[str]) -> Table:
    """The scores in a file.

    Raises:
        ConfigError: it is missing, or does not hold a table of finite numbers.
    """
    name = os.fspath(path)
    try:
        with open(os.path.expanduser(name), encoding="utf-8") as file:
            found = json.loads(file.read(), parse_int=float)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"retention_table={name!r}: {reason}. {_AGAIN} {name}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {error}. {_AGAIN} {name}") from error
    problem = _problem(found)
    if problem:
        raise ConfigError(f"{name} {problem}. {_AGAIN} {name}")
    return tuple(map(tuple, found["scores"]))


def _problem(found: Any) -> str:
    """What is wrong with the content of a file, in words that follow its name."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return "is not a table of retrieval heads"
    if found.get("version") != VERSION:
        return f"has version {found.get('version')!r}, and this program reads {VERSION}"
    rows = found.get("scores")
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and r for r in rows):
        return "is damaged: scores is not a list of layers, each a list of kv heads"
    if len({len(row) for row in rows}) > 1:
        return "is damaged: its layers have different numbers of kv heads"
    for layer, row in enumerate(rows):
        for head, x in enumerate(row):
            if not isinstance(x, float) or not math.isfinite(x):
                return f"is damaged: the score of layer {layer}, head {head} is {x!r}, not a number"
    return ""


def check_shape(table: Table, layers: int, heads: int) -> None:
    """Refuse a table of another model.

    Raises:
        ConfigError: it has not one score for each of ``heads`` kv heads of ``layers`` layers.
    """
    found = (len(table), len(table[0]) if table else 0)
    if found != (layers, heads):
        raise ConfigError(
            f"retention_table has scores of {found[0]} layers with {found[1]} kv heads, and the "
            f"cache has {layers} with {heads}: it was made for another model. {_AGAIN} FILE"
        )


def save_table(path: str | os.PathLike[str], table: Table, **about: Any) -> None:
    """Write a file, whole or not at all; ``about``: what else is to be known of it."""
    record = {"format": FORMAT, "version": VERSION, **about, "scores": [list(r) for r in table]}
    target = Path(path).expanduser().absolute()
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(target) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- measuring


def measure_heads(model: Any, tokens: int = TOKENS, seed: int = 0) -> Table:
    """The retrieval score of every kv head of a transformers model's full-attention layers.

    Random tokens are followed by the same once more. The score is the attention that a token of
    the repetition gives to its earlier occurrence and to the token after that, half a sequence
    back and so beyond the recent window: the mean over the repetition, the largest of the query
    heads of a kv head.

    Args:
        tokens: of the sequence; as many as the model has positions, if that is less.
        seed: of the random tokens.

    Raises:
        UnsupportedError: attention does not go through scaled_dot_product_attention, or the model
            has too few positions.
    """
    text = model.config.get_text_config(decoder=True)
    half = min(tokens, getattr(text, "max_position_embeddings", None) or tokens) // 2
    if 2 * half < LEAST_TOKENS:
        raise UnsupportedError(
            f"retrieval heads are measured on at least {LEAST_TOKENS} tokens, and "
            f"{2 * half} were asked for or fit the model."
        )
    ids = _random_ids(model, half, seed)
    listener = _Listener(half, getattr(text, "num_key_value_heads", None))
    with torch.no_grad(), listener:
        model.base_model(torch.cat([ids, ids])[None].to(model.device), use_cache=False)
    kinds = _layer_kinds(model.config)
    if len(listener.scores) != len(kinds):
        raise UnsupportedError(
            f"{len(listener.scores)} of the {len(kinds)} layers of {type(model).__name__} went "
            "through scaled_dot_product_attention, so their queries were not seen. Load the model "
            "with attn_implementation='sdpa'."
        )
    rows = [x for x, full in zip(listener.scores, kinds, strict=True) if full]
    return tuple(tuple(row.tolist()) for row in rows)


def _random_ids(model: Any, count: int, seed: int) -> Tensor:
    """Tokens [count] of the vocabulary, each once if it is large enough, none of them special."""
    text = model.config.get_text_config(decoder=True)
    special: set[int | None] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        special |= set(value) if isinstance(value, (list, tuple)) else {value}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(int(text.vocab_size), generator=generator)
    ids = ids[~torch.isin(ids, torch.tensor([x for x in special if x is not None] or [-1]))]
    return ids.repeat(-(-count // len(ids)))[:count]


def _layer_kinds(config: Any) -> list[bool]:
    """Of every layer with a cache, whether it is one of full attention."""
    from transformers.cache_utils import StaticCache, StaticLayer

    return [type(x) is StaticLayer for x in StaticCache(config=config, max_cache_len=8).layers]


class _Listener(TorchFunctionMode):
    """Scores [kv heads] of the attentions that run inside it, one after another."""

    def __init__(self, half: int, heads: int | None) -> None:
        super().__init__()
        self.half, self.heads = half, heads
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            scale = kwargs.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            self.scores.append(self._score(query[0], key[0], scale))
        return func(*args, **kwargs)

    def _score(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Of q [Hq, 2 n, D] and k [Hq or H, 2 n, D]: [H]."""
        half = self.half
        skip = min(SKIPPED, half // 2)
        t = torch.arange(skip, half, device=query.device)
        future = torch.arange(2 * half, device=query.device) > (half + t)[:, None]
        found = []
        for number, q in enumerate(query):  # one at a time: the weights are [n, 2 n]
            k = key[number * len(key) // len(query)]
            logits = q[half + skip :].float() @ k.float().mT * scale
            weights = logits.masked_fill(future, -torch.inf).softmax(-1)
            both = weights.gather(1, torch.stack([t, t + 1], 1))
            found.append(both.sum(1).mean())
        heads = self.heads or len(key)
        return torch.stack(found).view(heads, -1).amax(1).cpu()
