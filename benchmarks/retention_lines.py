"""Retention policies at equal stored bytes: exact prefill, then a continuation read from the cache.

The protocol is that of ``fidelity.py``. One exact run of a document serves all lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import skv_compile as skv
from skv_compile import evaluate, metrics
from skv_compile.retention.policies import POLICIES

RATES = (1.125, 1.625, 2.125, 3.125)  # of every policy
TABLED = "retrieval"  # the policy that needs a table measured on the model
LEAST, FINEST = 0.75, 4.125  # of rdr alone, where no tier keeps all tokens; of none alone

Record = dict[str, Any]
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy and the bits per coordinate that it may store."""

    retention: str
    bits: float

    @property
    def name(self) -> str:
        return f"{self.retention} {self.bits:.4g}"

    def config(self, args: argparse.Namespace) -> skv.Config:
        """The cache's settings."""
        own: dict[str, Any] = {"retention": self.retention, "bits": self.bits}
        if self.retention == TABLED:
            own["retention_table"] = args.retention_table
        return skv.Config(codec=args.codec, sinks=args.sinks, recent=args.recent, **own)


#: What a prompt costs without retention.
PLAIN = Setting("none", 2.125)


def policy_settings() -> list[Setting]:
    """Every policy of the registry at every rate."""
    tracked = [name for name, kind in POLICIES.items() if kind.tracked]
    lines = [Setting("rdr", LEAST)]
    for bits in RATES:
        lines += [Setting(name, bits) for name in (*tracked, "none")]
    return [*lines, Setting("none", FINEST)]


def select(
    part: str, settings: Iterable[Setting], args: argparse.Namespace, notes: list[str]
) -> list[Setting]:
    """Those settings that exist and were asked for."""
    found = []
    for setting in settings:
        words = args.only or [""]
        if not any(word in f"{part}/{setting.name}" for word in words):
            continue
        if args.bits and setting.bits not in args.bits:
            continue
        if setting.retention not in POLICIES:
            notes.append(f"{part}/{setting.name} left out: there is no such policy")
        elif setting.retention != TABLED or args.retention_table is not None:
            found.append(setting)
    return found


def record_of(lines: list[Record], setting: Setting, rows: str = "documents") -> Record:
    """The record of a setting among others; made where there is none. An old error is forgotten.

    ``rows``: what its measurements are listed under.
    """
    for record in lines:
        if record["name"] == setting.name:
            record.pop("error", None)
            return record
    lines.append({"name": setting.name, **dataclasses.asdict(setting), rows: []})
    return lines[-1]


def measured(record: Record) -> set[str]:
    """Names of the documents that a record has."""
    return {row["name"] for row in record["documents"]}


def left_to_measure(
    part: Record, settings: list[Setting], documents: list[evaluate.Document]
) -> list[tuple[evaluate.Document, list[tuple[Setting, Record]]]]:
    """Documents that some settings have not measured yet, with these and their records."""
    lines = part.setdefault("lines", [])
    pairs = [(setting, record_of(lines, setting)) for setting in settings]
    found = []
    for document in documents:
        todo = [(s, record) for s, record in pairs if document.name not in measured(record)]
        if todo:
            found.append((document, todo))
    return found


def failed(error: Exception) -> str:
    """An error in a record."""
    return f"{type(error).__name__}: {error}"


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stored(cache: Any) -> Record:
    """What a cache keeps, and at what price. Raises what an accelerator flagged."""
    cache.raise_flags()
    found: Record = {"bits_per_coordinate": cache.bits_per_coordinate}
    parts = [part for keeper in cache.keepers if (part := keeper.summary())]
    if parts:
        pages = [part["pages_used"] for part in parts]
        lost = [part["fragmentation"] for part in parts]
        tiers = zip(*(part["tokens_by_tier"] for part in parts), strict=True)
        found |= {
            "fragmentation": sum(map(float.__mul__, lost, map(float, pages))) / max(1, sum(pages)),
            "tokens_by_tier": [sum(counts) for counts in tiers],
            "tokens_dropped": sum(part["tokens_dropped"] for part in parts),
        }
    return found


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
    left = left_to_measure(part, settings, documents)
    pace = evaluate.Pace(sum(len(todo) for _, todo in left))
    for document, todo in left:
        report(f"exact model on {document.name}")
        exact = evaluate.run_exact(model, document, args.prefix)
        seconds: list[float | None] = [None]
        if args.timing:
            seconds = [_prefill(model, exact, PLAIN, args)[1] for _ in range(2)]  # one warms up
        for setting, record in todo:
            report(f"{pace.next()}: {setting.name} on {document.name}")
            if "error" in record:
                continue
            try:
                row = _row(model, exact, setting, args, record)
            except Exception as error:  # the other lines of a long run are worth keeping
                record["error"] = failed(error)
                continue
            row["prefill_seconds_without"] = seconds[-1]
            record["documents"].append(row)
            record["summary"] = summarise(record["documents"])
        save()


def _prefill(
    model: Any, exact: evaluate.Exact, setting: Setting, args: argparse.Namespace
) -> tuple[Any, float]:
    """A cache with the prompt in it, and the seconds that took."""
    ids = exact.document.ids
    cache = skv.SphericalCache(model.config, len(ids) - 1, setting.config(args))
    start = clock(ids.device)
    evaluate.fill(model, ids[: exact.prefix], cache)
    return cache, clock(ids.device) - start


def _row(
    model: Any,
    exact: evaluate.Exact,
    setting: Setting,
    args: argparse.Namespace,
    record: Record,
) -> Record:
    """One setting on one document. As ``evaluate.run_spherical``, with a look in between."""
    cache, prefill = _prefill(model, exact, setting, args)
    after_prompt = stored(cache)
    start = clock(model.device)
    logits = evaluate.score(model, exact, cache)
    seconds = clock(model.device) - start
    record["cost"] = evaluate.sizes(cache)
    return {
        "name": exact.document.name,
        **exact.compare(logits).to_dict(),
        "prefill_seconds": prefill,
        "score_seconds": seconds,
        "after_prompt": after_prompt,
        "after": stored(cache),
    }


def summarise(rows: list[Record]) -> Record:
    """Means over documents, from their records."""
    names = [field.name for field in dataclasses.fields(metrics.Comparison)]
    parts = [metrics.Comparison(**{name: row[name] for name in names}) for row in rows]
    timed = [row for row in rows if row["prefill_seconds_without"]]
    ratios = [row["prefill_seconds"] / row["prefill_seconds_without"] for row in timed]
    bits = {
        f"bits_{end}": max(row[end]["bits_per_coordinate"] for row in rows)
        for end in ("after_prompt", "after")
    }
    found: Record = {**evaluate.summarise(parts), **bits}
    if ratios:
        found["prefill_ratio"] = statistics.median(ratios)
    ends = [row["after"] for row in rows if "tokens_by_tier" in row["after"]]
    if ends:
        lost = [end["tokens_dropped"] for end in ends]
        kept = [sum(end["tokens_by_tier"]) for end in ends]
        found["fragmentation"] = statistics.fmean(end["fragmentation"] for end in ends)
        found["dropped"] = sum(lost) / max(1, sum(lost) + sum(kept))
    return found
