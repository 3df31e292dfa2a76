"""A needle whose question is unseen while the cache is compressed.

A prompt of text with one needle in it fills the cache. Only then comes the question, in a forward
of its own that reads the needle from the cache, and the answer is decoded token by token. Needles
that the exact model does not find say nothing about a cache and are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import baselines
import torch
from retention_lines import Record, Report, Setting, failed, record_of
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import evaluate
from skv_compile.codec.tiers import STRIDE

NEEDLE = " The pass key for the {what} is {key}. Remember it."
QUESTION = (
    "\n\nQuestion: What is the pass key for the {what}? Answer: The pass key for the {what} is"
)
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "purple", "orange", "grey")
ANIMALS = ("horse", "tiger", "eagle", "rabbit", "whale", "spider", "monkey")
DIGITS = 5
MOST = 8  # tokens of an answer

SETTINGS = (
    *(Setting(name, bits) for name in ("none", "rdr") for bits in (1.125, 1.625, 2.125)),
    *(Setting(name, 2.125) for name in ("snapkv", "streaming")),
)

Encode = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Needle:
    """One prompt and its question. ``position``: of the needle's first token in the prompt."""

    number: int
    length: int
    document: str
    position: int
    what: str
    key: str
    prompt: list[int]
    question: list[int]

    def about(self) -> dict[str, Any]:
        """What the JSON says of it."""
        depth = self.position / self.length
        own = ("number", "document", "position", "what", "key")
        return {"depth": round(depth, 4), **{name: getattr(self, name) for name in own}}


def make_needles(
    texts: dict[str, str], encode: Encode, length: int, count: int, sinks: int, recent: int
) -> list[Needle]:
    """``count`` prompts of exactly ``length`` tokens, with needles evenly spread over what a
    cache compresses; the same ones for the same arguments.

    Raises:
        evaluate.DocumentError: too little text, or a prompt too short to hide a needle in.
    """
    names = list(texts)
    return [_needle(n, names, texts, encode, length, count, sinks, recent) for n in range(count)]


def _needle(
    n: int,
    names: list[str],
    texts: dict[str, str],
    encode: Encode,
    length: int,
    count: int,
    sinks: int,
    recent: int,
) -> Needle:
    chance = random.Random(f"{length} {n}")
    what = f"{COLOURS[n % len(COLOURS)]} {ANIMALS[n % len(ANIMALS)]}"
    key = "".join(chance.choice("123456789") for _ in range(DIGITS))
    needle = list(encode(NEEDLE.format(what=what, key=key)))
    first = n % len(names)
    # A document that is too short goes on with the next one.
    text = "\n\n".join(texts[name] for name in names[first:] + names[:first])
    ids = list(encode(text[: 16 * length]))
    if len(ids) + len(needle) < length:
        raise evaluate.DocumentError(
            f"the documents make {len(ids)} tokens, a needle prompt needs {length}; "
            "give more documents, or shorter --lengths"
        )
    coded = baselines.coded_region(length, sinks, recent, STRIDE)
    room = coded.stop - coded.start - len(needle)
    if room < 0:
        raise evaluate.DocumentError(f"a prompt of {length} tokens has no room for a needle")
    at = int((coded.start + (n + 0.5) / count * room) * len(text[: 16 * length]) / len(ids))
    cut = _sentence_end(text, at)
    before = list(encode(text[:cut]))
    while len(before) > coded.start + room:  # more tokens to a character than in the whole
        cut = _sentence_end(text, cut - 1)
        before = list(encode(text[:cut]))
    while len(before) < coded.start:  # the first sentence is long
        cut = text.find(" ", max(cut, at) + 1)
        before = list(encode(text[:cut]))
    prompt = (before + needle + list(encode(text[cut : cut + 16 * length])))[:length]
    question = list(encode(QUESTION.format(what=what)))
    return Needle(n, length, names[first], len(before), what, key, prompt, question)


def _sentence_end(text: str, at: int) -> int:
    """Where the last sentence before ``at`` ends; 0 where none does."""
    return max(text.rfind(end, 0, max(0, at)) + 1 for end in (". ", "\n"))


def found_key(answer: str) -> str:
    """The first number in an answer."""
    found = re.search(r"\d+", answer)
    return found[0] if found else ""


@torch.no_grad()
def ask(model: Any, needle: Needle, cache: Any, decode: Callable[[list[int]], str]) -> str:
    """The model's answer, decoded greedily through a cache."""
    device = model.device
    evaluate.fill(model, torch.tensor(needle.prompt, device=device), cache)
    ids = torch.tensor([needle.question], device=device)
    answer: list[int] = []
    for _ in range(MOST):
        token = int(model(ids, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
        answer.append(token)
        ids = torch.tensor([[token]], device=device)
        if len(found_key(decode(answer))) > DIGITS or decode(answer).rstrip().endswith("."):
            break
    return decode(answer)


def measure(
    model: Any,
    tokenizer: Any,
    settings: list[Setting],
    texts: dict[str, str],
    args: argparse.Namespace,
    part: Record,
    report: Report,
    save: Callable[[], None],
) -> None:
    """The exact model on every needle, then every setting on those that it found; what ``part``
    has already is not measured again."""

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    if part.setdefault("documents", list(texts)) != list(texts):
        raise evaluate.DocumentError("the needles that are there lie in other documents")
    part |= {"needle": NEEDLE, "question": QUESTION}
    for length in args.lengths:
        needles = make_needles(texts, encode, length, args.needles, args.sinks, args.recent)
        own = _own(part.setdefault("lengths", []), length)
        for needle in needles[len(own["exact"]) :]:
            report(f"{length} tokens, exact model, needle {needle.number + 1} of {len(needles)}")
            answer = ask(model, needle, DynamicCache(config=model.config), tokenizer.decode)
            own["exact"].append(_row(needle, answer))
            save()
        counted = [needles[row["number"]] for row in own["exact"] if row["right"]]
        records = [record_of(own["lines"], setting, "needles") for setting in settings]
        todo = [
            (needle, setting, record)
            for needle in counted
            for setting, record in zip(settings, records, strict=True)
            if needle.number not in {row["number"] for row in record["needles"]}
        ]
        pace = evaluate.Pace(len(todo))
        for needle, setting, record in todo:
            report(f"{length} tokens, {pace.next()}: {setting.name}")
            if "error" in record:
                continue
            most = needle.length + len(needle.question) + MOST
            try:
                cache = skv.SphericalCache(model.config, most, setting.config(args))
                row = _row(needle, ask(model, needle, cache, tokenizer.decode))
                row["bits_per_coordinate"] = cache.bits_per_coordinate
            except Exception as error:  # the other settings of a long run are worth keeping
                record["error"] = failed(error)
                continue
            record["needles"].append(row)
            record |= count(record["needles"])
            save()


def _own(lengths: list[Record], length: int) -> Record:
    """What there is of a length, in the order of lengths."""
    for own in lengths:
        if own["length"] == length:
            return own
    lengths.append({"length": length, "exact": [], "lines": []})
    lengths.sort(key=lambda own: own["length"])
    return next(own for own in lengths if own["length"] == length)


def _row(needle: Needle, answer: str) -> Record:
    return {**needle.about(), "answer": answer, "right": found_key(answer) == needle.key}


def count(rows: list[Record]) -> Record:
    """Answered, of those that the exact model answered."""
    return {"answered": sum(row["right"] for row in rows), "of": len(rows)}
