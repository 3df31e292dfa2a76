"""lm-eval's log-likelihoods through a compressed cache, where lm-eval is installed."""

from __future__ import annotations

from typing import Any

import pytest
from support import spelling_tokenizer, tiny

import skv_compile as skv

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from skv_compile.integrations.lm_eval import SkvLM

CONTEXT = "the quick brown fox jumps over the lazy dog, " * 8
PAIRS = [(CONTEXT, "and then it sleeps"), (CONTEXT[:90], "so it goes"), ("", "no context")]
LENGTH = 600  # tokens that lm-eval lets through


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)
    ]


def made(cls: type, **settings: Any) -> Any:
    tokenizer = spelling_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = ">"
    more = {"tokenizer": tokenizer, "max_length": LENGTH, "device": "cpu"}
    return cls(tiny("llama"), **more, **settings)


def test_identity_gives_the_log_likelihoods_of_hf() -> None:
    dense, exact = made(HFLM), made(SkvLM, codec="identity", chunk=7)
    asked = requests("loglikelihood", *PAIRS)
    want = dense.loglikelihood(asked, disable_tqdm=True)
    for (got, greedy), (value, first) in zip(exact.loglikelihood(asked), want, strict=True):
        assert got == pytest.approx(value, abs=1e-3)
        assert greedy == first
    rolling = requests("loglikelihood_rolling", (CONTEXT * 3,))  # more than one window
    found = exact.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(dense.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-2)


def test_log_likelihoods_change_with_the_bits() -> None:
    asked = requests("loglikelihood", *PAIRS)
    settings = {"sinks": 4, "recent": 16, "page_tokens": 16, "retention": "none", "codec": "grid"}
    found = {
        bits: [x for x, _ in made(SkvLM, bits=bits, **settings).loglikelihood(asked)]
        for bits in (2.5, 4.5)
    }
    exact = [x for x, _ in made(SkvLM, codec="identity").loglikelihood(asked)]
    coarse, fine = (abs(found[bits][0] - exact[0]) for bits in (2.5, 4.5))
    assert coarse > fine > 1e-4
    assert found[2.5][2] == pytest.approx(exact[2], abs=1e-4)  # nothing of it is compressed


def test_a_setting_that_cannot_be_is_refused_before_anything_is_loaded() -> None:
    for wrong in ({"bits": -1.0}, {"chunk": 0}):
        with pytest.raises(skv.ConfigError):
            SkvLM("no/such-model", **wrong)
