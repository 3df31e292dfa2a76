"""One model with a compressed cache and without: what happens, as a row of docs/models.md."""

from __future__ import annotations

import inspect
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from support import SMALL
from torch import Tensor
from transformers import StaticCache

import skv_compile as skv
from skv_compile.backend import SkvBackend
from skv_compile.errors import SkvError
from skv_compile.integrations.hf import attention_of
from skv_compile.report import listening

from .tiny import architectures, build

PROMPT, NEW, PADS, SECONDS = 60, 12, 7, 40
TOLERANCE = 1e-3  # of logits, in their standard deviations; rounding alone makes 1e-5

REWRITTEN = "rewritten"
REFUSED = "refused"
NOT_COMPILED = "not compiled"
NO_CACHE = "no KV cache"
NOT_STATIC = "no static cache"
NOT_BUILT = "does not build tiny"
FAILED = "FAILED"


@dataclass(frozen=True)
class Row:
    """What happens to one architecture."""

    architecture: str
    model: str
    result: str
    """One of the constants above."""
    reason: str = ""
    rewritten: int = 0
    layers: int = 0
    """Full-attention layers whose cache is compressed, of which so many were rewritten."""
    dense: int = 0
    """Attention layers with a bounded cache, dense by design."""
    attention: str = ""
    """The model's attention implementation."""
    rows: int = 0
    """Rows of the prompt: 2, one of them padded, if the model takes that."""
    warned: bool = False
    """Whether anything was logged as a warning."""
    error: float = 0.0
    """The largest difference of logits, in their standard deviations."""
    past: float = 0.0
    """The same between two prompts that differ in 8 old tokens: what a lost past would change."""
    seconds: float = 0.0


class Said(NamedTuple):
    """What a model generated: tokens [B, n], their logits [B, n, V], and its cache."""

    tokens: Tensor
    logits: Tensor
    cache: Any

    def error(self, want: Said) -> float:
        return ((self.logits - want.logits).abs().max() / want.logits.std()).item()

    def agrees(self, want: Said) -> bool:
        return torch.equal(self.tokens, want.tokens) and self.error(want) < TOLERANCE


class Overtime(BaseException):
    """A model took longer than it may."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise :class:`Overtime` inside the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise Overtime(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def trial(kind: str, inner: str = "eager", seconds: int = SECONDS) -> Row:
    """Build an architecture tiny, generate with and without a compressed cache, and compare."""
    begin = time.perf_counter()
    blank = Row(kind, architectures()[kind], NOT_BUILT)
    try:
        with limit(seconds):
            row = _trial(blank, inner)
    except Overtime as error:
        row = replace(blank, reason=str(error))
    return replace(row, seconds=round(time.perf_counter() - begin, 2))


def _trial(row: Row, inner: str) -> Row:
    try:
        model = build(row.model)
    except Exception as error:
        return replace(row, reason=_words(error))
    row = replace(row, attention=attention_of(model))
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" not in parameters and "cache_params" not in parameters:
        return replace(row, result=NO_CACHE, reason="forward() takes no past_key_values")
    ids, mask, want = None, None, None
    for rows in (2, 1):
        ids, mask = _prompt(rows)
        try:
            want = _say(model, ids, mask)
            break
        except Exception as error:
            row = replace(row, reason=f"generate() without us: {_words(error)}")
    if ids is None or mask is None or want is None:
        return row
    row = replace(row, reason="", rows=len(ids), past=_past(model, ids, mask, want))
    if want.cache is None:
        return replace(row, result=NO_CACHE, reason="generate() returns no cache")
    return _compressed(row, model, ids, mask, want, inner)


def _compressed(row: Row, model: Any, ids: Tensor, mask: Tensor, want: Said, inner: str) -> Row:
    warnings = _Warnings()
    try:
        with warnings, listening() as graphs:
            skv.compile(model, codec="identity", **SMALL)
            _use(model, inner)
            got = _say(model, ids, mask)
    except SkvError as error:
        return _refused(row, model, error)
    except Exception as error:
        return _failed(row, _words(error), ids, mask)
    if not isinstance(got.cache, skv.SphericalCache):
        return replace(row, result=FAILED, reason=f"used a {type(got.cache).__name__}")
    counts = [sum(site.rewritten for site in graph.sites) for graph in graphs]
    kept = [layer for layer in got.cache.layers if "Sliding" in type(layer).__name__]
    row = replace(
        row,
        rewritten=min(counts, default=0),
        layers=len(got.cache.states),
        dense=len(kept),
        warned=bool(warnings.last),
        error=got.error(want),
    )
    if not got.agrees(want):
        return _failed(row, "other tokens than with a dense cache", ids, mask)
    if row.rewritten == row.layers:
        return replace(row, result=REWRITTEN)
    if not warnings.last:
        return replace(row, result=FAILED, reason="left dense, and no warning says so")
    return replace(row, result=NOT_COMPILED, reason=_explained(model, ids) or warnings.last)


def _use(model: Any, inner: str) -> None:
    """Let the attachment's graphs be compiled by ``inner``."""
    own = model._skv
    backend = SkvBackend(config=own.config, options={"inner": inner})
    own._compiled = torch.compile(own._forward, backend=backend, fullgraph=True)


def _refused(row: Row, model: Any, error: SkvError) -> Row:
    """An error of ours; with nothing but states of linear attention there is no KV cache."""
    with suppress(Exception):
        layers = StaticCache(config=model.config, max_cache_len=PROMPT + NEW).layers
        names = sorted({type(layer).__name__ for layer in layers})
        if names == ["LinearAttentionLayer"]:
            return replace(row, result=NO_CACHE, reason="linear attention only")
    return replace(row, result=REFUSED, reason=_words(error))


def _failed(row: Row, what: str, ids: Tensor, mask: Tensor) -> Row:
    """Whose fault it is: ours only if the same model works with transformers' own StaticCache."""
    try:
        model = build(row.model)
        want = _say(model, ids, mask)
        got = _say(model, ids, mask, cache_implementation="static", disable_compile=True)
        if not got.agrees(want):
            return replace(row, result=NOT_STATIC, reason="gives other tokens with a StaticCache")
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
        more = torch.cat([mask, mask[:, :1]], 1)
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            step(ids[:, :1], attention_mask=more, past_key_values=cache)
    except Exception as error:
        return replace(row, result=NOT_STATIC, reason=f"with a StaticCache: {_words(error)}")
    return replace(row, result=FAILED, reason=what)


def _explained(model: Any, ids: Tensor) -> str:
    """Why not every attention is rewritten, in the words of ``skv.explain``."""
    try:
        report = skv.explain(model, ids[:, :1])
    except Exception as error:
        return _words(error)
    reasons = [s.reason for s in report.sites if not s.rewritten and s.code != "sliding"]
    return "; ".join(dict.fromkeys(reasons))


def _prompt(rows: int) -> tuple[Tensor, Tensor]:
    """Random ids [rows, PROMPT]; the second row begins with padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 100, (rows, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :PADS] = 0
    return ids * mask, mask


def _say(model: Any, ids: Tensor, mask: Tensor, **kw: Any) -> Said:
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kw,
    )
    logits = torch.stack(out.logits, 1)
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    cache = out.get("past_key_values", out.get("cache_params"))
    return Said(out.sequences[:, ids.shape[1] :], logits, cache)


@torch.no_grad()
def _past(model: Any, ids: Tensor, mask: Tensor, want: Said) -> float:
    """How much the first token's logits depend on old tokens."""
    if model.config.is_encoder_decoder:
        return 0.0
    other = ids.clone()
    other[:, 12:20] = ids[:, 30:38]
    logits = model(other, attention_mask=mask).logits[:, -1]
    return ((logits - want.logits[:, 0]).abs().max() / want.logits.std()).item()


class _Warnings(logging.Handler):
    """Keeps the last warning of ours while its block runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()

    def __enter__(self) -> None:
        logging.getLogger("skv_compile").addHandler(self)

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("skv_compile").removeHandler(self)


def _words(error: BaseException) -> str:
    """The first line of an error, and the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"
