"""The benchmark's needles: where they lie, and in which order a model is asked."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCAB

from skv_compile import evaluate

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)
passkey = importlib.import_module("passkey")

TEXTS = {
    "one": "The quick brown fox jumps over the lazy dog. It does so again and again. " * 60,
    "two": "Alaska is large and cold. Its bears eat fish; its people, too. " * 60,
}


def encode(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_needles_are_the_same_every_time_and_lie_in_what_is_compressed() -> None:
    needles = passkey.make_needles(TEXTS, encode, 700, 10, 4, 64)
    assert needles == passkey.make_needles(TEXTS, encode, 700, 10, 4, 64)
    last = 4 + (700 - 68) // 64 * 64
    for needle in needles:
        assert len(needle.prompt) == 700
        hidden = decode(needle.prompt)
        assert hidden.startswith(TEXTS[needle.document][:3])
        planted = passkey.NEEDLE.format(what=needle.what, key=needle.key)
        assert hidden.count(needle.key) == 1
        assert hidden[needle.position :].startswith(planted)
        if needle.position > TEXTS[needle.document].index("."):
            assert hidden[: needle.position].endswith((".", "\n"))
        assert needle.position >= 4
        assert needle.position + len(planted) <= last
        assert needle.key not in decode(needle.question)
        assert needle.what in decode(needle.question)
    assert len({needle.key for needle in needles}) == 10
    assert len({needle.what for needle in needles}) == 10
    assert [needle.document for needle in needles] == ["one", "two"] * 5
    places = [needle.position for needle in needles]
    assert places == sorted(places)
    assert places[0] < 100
    assert places[-1] > 450
    other = passkey.make_needles(TEXTS, encode, 600, 10, 4, 64)
    assert {n.key for n in other} != {n.key for n in needles}


def test_a_long_first_sentence_and_a_short_document_are_no_obstacle() -> None:
    texts = {"a": "word " * 100 + "end. ", "b": "Some more text of another kind. " * 30}
    for needle in passkey.make_needles(texts, encode, 600, 5, 4, 64):
        assert len(needle.prompt) == 600
        assert needle.position >= 4


def test_a_dense_beginning_does_not_push_needles_into_the_exact_window() -> None:
    """Three tokens to a character at first, one later."""

    def uneven(text: str) -> list[int]:
        return [n for c in text for n in [ord(c) % VOCAB] * (3 if c in "XYZ. " else 1)]

    texts = {"a": "XYZ XYZ XYZ. " * 60 + "plainlettersinonewordthatgoesonandon." * 60}
    last = 4 + (900 - 68) // 64 * 64
    for needle in passkey.make_needles(texts, uneven, 900, 6, 4, 64):
        words = uneven(passkey.NEEDLE.format(what=needle.what, key=needle.key))
        assert needle.prompt[needle.position :][: len(words)] == words
        assert needle.position + len(words) <= last


def test_needles_need_text_and_room() -> None:
    with pytest.raises(evaluate.DocumentError, match="a needle prompt needs 2000"):
        passkey.make_needles({"a": "Short. " * 30}, encode, 2000, 3, 4, 64)
    with pytest.raises(evaluate.DocumentError, match="no room"):
        passkey.make_needles(TEXTS, encode, 120, 3, 4, 64)


@pytest.mark.parametrize(
    ("answer", "key"), [(" 12345.", "12345"), ("it is 123", "123"), ("none", ""), ("1 2", "1")]
)
def test_the_first_number_is_the_answer(answer: str, key: str) -> None:
    assert passkey.found_key(answer) == key


class Scripted:
    """A model that says ``words``, and remembers what it was given."""

    device = torch.device("cpu")

    def __init__(self, words: str) -> None:
        self.words, self.given = list(words), []

    def forward(self) -> None: ...

    def __call__(self, ids: torch.Tensor, **kw: Any) -> Any:
        self.given.append(ids[0].tolist())
        logits = torch.zeros(1, ids.shape[1], VOCAB)
        if len(self.given) > 1:
            logits[0, -1, ord(self.words.pop(0))] = 1
        return argparse.Namespace(logits=logits)


@pytest.mark.parametrize(
    ("words", "answer"), [(" 12345.xx", " 12345."), ("abcdefghij", "abcdefgh")]
)
def test_the_question_comes_after_the_prompt(words: str, answer: str) -> None:
    needle = passkey.make_needles(TEXTS, encode, 700, 1, 4, 64)[0]
    model = Scripted(words)
    assert passkey.ask(model, needle, None, decode) == answer
    assert model.given[:2] == [needle.prompt, needle.question]
    assert model.given[2:] == [[ord(c)] for c in answer[:-1]]
