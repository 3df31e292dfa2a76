"""Fidelity on real text: an exact prefill, then a continuation scored through a cache.

Of every document, ``prefix`` tokens fill the cache with exact attention among themselves. The
``tokens`` after them go through the model in one forward, teacher-forced, and read the prefix
from the cache. The logits of that forward, against those of the same model with an exact
cache, are what a :class:`~skv_compile.metrics.Comparison` measures.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import metrics, text
from skv_compile.errors import SkvError

#: The protocol's lengths, in tokens.
PREFIX, TOKENS = 3072, 512

Past = list[tuple[Tensor, Tensor]]


class DocumentError(SkvError):
    """A document could not be read, or is too short."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its first tokens, ``ids`` [prefix + tokens + 1]: the last is only a target."""

    name: str
    ids: Tensor


def read_texts(paths: Sequence[str]) -> dict[str, str]:
    """Name -> text of files, and of the .txt files of folders; without paths, the built-in text."""
    if not paths:
        return {"python-reference": text.document()}
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise DocumentError(f"the folder {path} holds no .txt file")
        files += found
    try:
        return {file.stem: file.read_text(encoding="utf-8") for file in files}
    except OSError as error:
        raise DocumentError(f"cannot read {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DocumentError(f"a document is not UTF-8: {error}") from error


def tokenize(
    texts: dict[str, str], encode: Callable[[str], Sequence[int]], length: int, device: Any
) -> list[Document]:
    """The first ``length`` tokens of every text, on ``device``."""
    documents = []
    for name, content in texts.items():
        ids = torch.tensor(list(encode(content))[:length], device=device)
        if len(ids) < length:
            raise DocumentError(
                f"document {name} makes {len(ids)} tokens, {length} are needed; "
                "give longer documents, or lower --prefix or --tokens"
            )
        documents.append(Document(name, ids))
    return documents


class Queries(TorchFunctionMode):
    """Collects the queries [B, Hq, T, D] and scales of the attentions that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.scales: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            scale = kwargs.get("scale")
            self.queries.append(query)
            self.scales.append(query.shape[-1] ** -0.5 if scale is None else scale)
        return func(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Exact:
    """What the exact model makes of a document.

    ``cache`` holds the prefix and is never written to; ``full`` also holds the continuation.
    ``logits`` [tokens, vocabulary] of the continuation, ``targets`` [tokens].
    ``prompt`` and ``asked``: queries of the prefix and of the continuation, a layer each.
    """

    document: Document
    prefix: int
    cache: DynamicCache
    full: DynamicCache
    logits: Tensor
    targets: Tensor
    prompt: Queries
    asked: Queries

    @property
    def past(self) -> Past:
        """Keys and values [1, H, prefix, D] of every layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def compare(self, logits: Tensor) -> metrics.Comparison:
        """Distance of the continuation's ``logits`` from the exact ones."""
        return metrics.compare(self.logits, logits, self.targets)


def fork(cache: DynamicCache, past: Past | None = None) -> DynamicCache:
    """A cache that continues from ``cache``, or from ``past`` in its place, and leaves it alone."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, (keys, values) in zip(twin.layers, past or [], strict=False):
        layer.keys, layer.values = keys.to(layer.keys.dtype), values.to(layer.values.dtype)
    return twin


@torch.no_grad()
def fill(model: Any, ids: Tensor, cache: Any) -> None:
    """Run the prefix ``ids`` [prefix] into an empty cache."""
    more: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1
    model(ids[None], **more)


@torch.no_grad()
def score(model: Any, exact: Exact, cache: Any) -> Tensor:
    """Logits [tokens, vocabulary] of a document's continuation through a filled cache."""
    ids = exact.document.ids[exact.prefix : -1]
    return model(ids[None], past_key_values=cache, use_cache=True).logits[0]


@torch.no_grad()
def run_exact(model: Any, document: Document, prefix: int) -> Exact:
    """Prefill and continuation of a document with the model's own dynamic cache."""
    cache = DynamicCache(config=model.config)
    with Queries() as prompt:
        fill(model, document.ids[:prefix], cache)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        # Their past is bounded and stays exact; layer by layer measures would not line up.
        prompt = Queries()
    full = fork(cache)
    with Queries() as asked:
        out = model(document.ids[None, prefix:-1], past_key_values=full, use_cache=True)
    targets = document.ids[prefix + 1 :]
    return Exact(document, prefix, cache, full, out.logits[0], targets, prompt, asked)


def run_spherical(model: Any, exact: Exact, config: skv.Config) -> tuple[Tensor, Any]:
    """Logits [tokens, vocabulary] of the continuation through a spherical cache, and the cache."""
    ids = exact.document.ids[:-1]
    cache = skv.SphericalCache(model.config, max_cache_len=len(ids), config=config)
    return metrics.score_continuation(model, ids, exact.prefix, cache), cache


def layer_errors(exact: Exact, past: Past) -> list[float]:
    """Relative squared error of every layer's attention output, with exact queries.

    ``past``: what stands for keys and values [1, H, prefix, D]; the continuation's own are
    exact. Empty for models whose attention is not seen by :class:`Queries`.
    """
    if not len(exact.asked.queries) == len(exact.full.layers) == len(exact.prompt.queries):
        return []
    errors = []
    rows = zip(exact.asked.queries, exact.asked.scales, exact.full.layers, past, strict=True)
    for q, scale, layer, (keys, values) in rows:
        own = slice(exact.prefix, None)
        see = torch.ones(q.shape[2], layer.keys.shape[2], dtype=torch.bool, device=q.device)
        see = see.tril(exact.prefix)
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=see, scale=scale, enable_gqa=True)
            for k, v in (
                (layer.keys, layer.values),
                (
                    torch.cat([keys.to(q.dtype), layer.keys[:, :, own]], 2),
                    torch.cat([values.to(q.dtype), layer.values[:, :, own]], 2),
                ),
            )
        ]
        wrong = (outputs[1] - outputs[0]).double().square().sum()
        errors.append(float(wrong / outputs[0].double().square().sum()))
    return errors


def frame_bytes(cache: Any) -> int:
    """Bytes of the frames of a spherical cache: a fixed cost of a head, whatever its length."""
    found: dict[int, int] = {}
    for state in cache.states:
        for name, x in zip(state.tensors._fields, state.tensors, strict=True):
            if name.startswith(("key_", "value_")) and x.numel():
                found[x.data_ptr()] = x.nbytes
    return sum(found.values())


def sizes(cache: Any) -> dict[str, Any]:
    """What a spherical cache costs. Raises what an accelerator flagged while it was filled."""
    summary = cache.summary()
    kept = ("tokens_by_tier", "tokens_dropped", "fragmentation")  # where a policy chooses
    return {
        "tier": summary["tier"],
        "bits_per_coordinate": cache.bits_per_coordinate,
        "resident_bytes": cache.resident_bytes,
        "dense_bytes": cache.dense_bytes,
        "frame_bytes": frame_bytes(cache),
        **{name: summary[name] for name in kept if name in summary},
    }


def summarise(parts: Sequence[metrics.Comparison]) -> dict[str, float | int]:
    """Mean over documents, with the spread of the KL: every document counts the same."""
    kl = [part.kl_mean for part in parts]
    n = len(parts)
    return {
        "documents": n,
        "kl_mean": statistics.fmean(kl),
        "kl_min": min(kl),
        "kl_max": max(kl),
        "kl_stderr": statistics.stdev(kl) / math.sqrt(n) if n > 1 else 0.0,
        "delta_ppl": statistics.fmean(part.delta_ppl for part in parts),
        "same_top1": statistics.fmean(part.same_top1 for part in parts),
    }


class Pace:
    """Says how much of the work is done and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._start = time.perf_counter()

    def next(self) -> str:
        """Words for the part that begins now, such as '3 of 12, about 2 min left'."""
        self.done += 1
        words = f"{self.done} of {self.total}"
        if self.done > 1:
            each = (time.perf_counter() - self._start) / (self.done - 1)
            left = each * (self.total - self.done + 1)
            words += (
                f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} min left"
            )
        return words


def evaluate(
    model: Any,
    documents: Sequence[Document],
    prefix: int,
    config: skv.Config,
    report: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """One setting against the exact model: every document, the summary, and what it costs."""
    if not documents:
        raise DocumentError("no documents")
    pace, seconds = Pace(len(documents)), time.perf_counter()
    parts: list[metrics.Comparison] = []
    cost: dict[str, Any] = {}
    for document in documents:
        report(f"document {pace.next()}: {document.name}")
        exact = run_exact(model, document, prefix)
        logits, cache = run_spherical(model, exact, config)
        parts.append(exact.compare(logits))
        cost = sizes(cache)
    rows = zip(documents, parts, strict=True)
    return {
        "config": dataclasses.asdict(config),
        "prefix_tokens": prefix,
        "scored_tokens": parts[0].tokens,
        "documents": [{"name": d.name, **part.to_dict()} for d, part in rows],
        "summary": summarise(parts),
        "cost": cost,
        "seconds": time.perf_counter() - seconds,
    }
