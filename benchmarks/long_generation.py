"""A long generation, teacher-forced: what the cache has become after thousands of tokens.

All settings go through a document in lock step with one exact cache, so that the logits of no
more than :data:`BLOCK` tokens are held at once. A block is one forward, or several of ``--step``
tokens. The prompt ends where a stride of tokens leaves the exact window, so that at every forward
of ``BLOCK`` tokens the same tokens are exact, and the same are coded, as in single steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from retention_lines import Record, Report, Setting, clock, failed, left_to_measure, stored
from torch import Tensor
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import evaluate, metrics
from skv_compile.codec.tiers import STRIDE
from skv_compile.retention.map import levels_of

BLOCK = STRIDE  # tokens between two refreshes
QUARTERS = 4
SETTINGS = tuple(
    Setting(name, bits)
    for bits in (1.125, 2.125)
    for name in ("rdr", "none", "snapkv", "streaming")
)


def aligned(prompt: int, sinks: int, recent: int) -> int:
    """The next length at which a full stride has just left the exact window."""
    return sinks + recent + -(-max(1, prompt - sinks - recent) // STRIDE) * STRIDE


def quarters(values: list[float]) -> list[float]:
    """Means of the four parts of a list whose length is a multiple of four."""
    size, rest = divmod(len(values), QUARTERS)
    if rest or not size:
        raise ValueError(f"{len(values)} blocks do not make {QUARTERS} quarters")
    return [statistics.fmean(values[n * size : (n + 1) * size]) for n in range(QUARTERS)]


@dataclasses.dataclass
class Run:
    """One setting on its way through a document."""

    setting: Setting
    record: Record
    cache: Any
    levels: list[Tensor]
    row: Record
    coordinates: int  # that have left the exact window
    there: int = 0  # coded tokens before every refresh, all refreshes together
    recoded: int = 0  # of those, how many went to another tier
    dropped: int = 0

    @staticmethod
    def start(
        model: Any, document: evaluate.Document, setting: Setting, args: Any, record: Record
    ) -> Run:
        """Fill a cache with the prompt."""
        ids = document.ids
        cache = skv.SphericalCache(model.config, len(ids) - 1, setting.config(args))
        begin = clock(ids.device)
        evaluate.fill(model, ids[: len(ids) - 1 - args.long_tokens], cache)
        row: Record = {
            "name": document.name,
            "prefill_seconds": clock(ids.device) - begin,
            "seconds": 0.0,
            "blocks": [],
            "stored": [stored(cache)],
        }
        for home in _counters(cache):
            home.refreshes = home.recoded = home.coded = 0
        return Run(setting, record, cache, _levels(cache), row, _coordinates(cache))

    def block(self, model: Any, ids: Tensor, targets: Tensor, exact: Tensor, step: int) -> None:
        """One more block, whose exact logits [tokens, vocabulary] are known."""
        begin = clock(ids.device)
        logits = forward(model, ids, self.cache, step)
        self.row["seconds"] += clock(ids.device) - begin
        self.row["blocks"].append(metrics.compare(exact, logits, targets).to_dict())
        coordinates = _coordinates(self.cache)
        if coordinates == self.coordinates:
            return  # nothing left the window, and so nothing was decided
        after = _levels(self.cache)
        for old, new in zip(self.levels, after, strict=True):
            self.there += int((old > 0).sum())
            self.recoded += int(((old > 0) & (new > 0) & (old != new)).sum())
            self.dropped += int(((new == 0) & (old > 0)).sum())
        self.levels, self.coordinates = after, coordinates

    def quarter_ends(self) -> None:
        """Note what is stored now."""
        self.row["stored"].append(stored(self.cache))

    def finish(self) -> None:
        """Add the document to the record."""
        row = self.row
        blocks = row["blocks"]
        row |= {
            "kl_mean": statistics.fmean(b["kl_mean"] for b in blocks),
            "kl_max": max(b["kl_max"] for b in blocks),
            "quarters": quarters([b["kl_mean"] for b in blocks]),
            "same_top1": statistics.fmean(b["same_top1"] for b in blocks),
            "delta_ppl": 100
            * math.expm1(statistics.fmean(math.log1p(b["delta_ppl"] / 100) for b in blocks)),
            "recoded": self.recoded / self.there if self.there else None,
            "dropped": self.dropped / self.there if self.there else None,
            "counters": {
                name: sum(getattr(home, name) for home in _counters(self.cache))
                for name in ("refreshes", "recoded", "coded")
            },
        }
        self.record["documents"].append(row)
        self.record["summary"] = summarise(self.record["documents"])


def _counters(cache: Any) -> list[Any]:
    """Who counts what has been coded anew."""
    return [keeper.shelf for keeper in cache.keepers]


def _levels(cache: Any) -> list[Tensor]:
    """Of every pool with a policy, the level of every coded token of its groups."""
    return [levels_of(keeper) for keeper in cache.keepers if keeper.layout.tracked]


def _coordinates(cache: Any) -> int:
    """Coordinates of all tokens that have left the exact window."""
    return sum(keeper.coordinates for keeper in cache.keepers)


@torch.no_grad()
def forward(model: Any, ids: Tensor, cache: Any, step: int) -> Tensor:
    """Logits [tokens, vocabulary] of tokens that go through a cache ``step`` at a time."""
    parts = [
        model(some[None], past_key_values=cache, use_cache=True).logits[0]
        for some in ids.split(step)
    ]
    return torch.cat(parts)


def summarise(rows: list[Record]) -> Record:
    """Means over documents."""
    tracked = [row for row in rows if row["recoded"] is not None]
    each = zip(*(row["quarters"] for row in rows), strict=True)
    return {
        "documents": len(rows),
        **{
            key: statistics.fmean(row[key] for row in rows)
            for key in ("kl_mean", "same_top1", "delta_ppl")
        },
        "kl_max": max(row["kl_max"] for row in rows),
        "quarters": [statistics.fmean(values) for values in each],
        **{
            key: statistics.fmean(row[key] for row in tracked) if tracked else None
            for key in ("recoded", "dropped")
        },
        "bits": [
            max(x["bits_per_coordinate"] for x in s)
            for s in zip(*(r["stored"] for r in rows), strict=True)
        ],
    }


def measure(
    model: Any,
    settings: list[Setting],
    documents: list[evaluate.Document],
    args: argparse.Namespace,
    part: Record,
    report: Report,
    save: Callable[[], None],
) -> None:
    """Every setting on every document that ``part`` does not have yet."""
    blocks = args.long_tokens // BLOCK
    for document, todo in left_to_measure(part, settings, documents):
        report(f"{document.name}: the prompt in {len(todo)} caches")
        ids = document.ids
        prompt = len(ids) - 1 - args.long_tokens
        exact = DynamicCache(config=model.config)
        evaluate.fill(model, ids[:prompt], exact)
        runs: list[Run] = []
        for setting, record in todo:
            try:
                runs.append(Run.start(model, document, setting, args, record))
            except Exception as error:  # the other settings of a long run are worth keeping
                record["error"] = failed(error)
        pace = evaluate.Pace(blocks)
        for block in range(blocks):
            report(f"{document.name}: block {pace.next()}")
            own = slice(prompt + block * BLOCK, prompt + (block + 1) * BLOCK)
            targets = ids[own.start + 1 : own.stop + 1]
            logits = forward(model, ids[own], exact, BLOCK)
            for run in list(runs):
                try:
                    run.block(model, ids[own], targets, logits, args.step)
                    if (block + 1) % (blocks // QUARTERS) == 0:
                        run.quarter_ends()
                except Exception as error:
                    run.record["error"] = failed(error)
                    runs.remove(run)
        for run in runs:
            run.finish()
        save()
