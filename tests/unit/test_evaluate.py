"""Fidelity on documents, end to end on a small random model."""

from __future__ import annotations

import pytest
import support
import torch

import skv_compile as skv
from skv_compile import evaluate

PREFIX, TOKENS = 300, 16


@pytest.fixture(scope="module")
def model():
    return support.tiny("llama", head_dim=16)


@pytest.fixture(scope="module")
def documents():
    def encode(text: str) -> list[int]:
        return [ord(c) % support.VOCAB for c in text]

    texts = {"one": "the quick brown fox " * 40, "two": "0123456789 abc" * 40}
    return evaluate.tokenize(texts, encode, PREFIX + TOKENS + 1, "cpu")


def test_identity_is_exact(model, documents):
    config = skv.Config(codec="identity", bits=64)
    result = evaluate.evaluate(model, documents, PREFIX, config)
    assert result["summary"]["kl_max"] < 1e-8
    assert result["summary"]["same_top1"] == 1.0
    assert result["scored_tokens"] == TOKENS


def test_coded_is_near_and_every_document_is_kept(model, documents):
    said: list[str] = []
    config = skv.Config(codec="grid", bits=8)
    result = evaluate.evaluate(model, documents, PREFIX, config, said.append)
    each = [row["kl_mean"] for row in result["documents"]]
    assert [row["name"] for row in result["documents"]] == ["one", "two"]
    assert all(0 < kl < 5 for kl in each)
    mean = result["summary"]
    assert mean["kl_mean"] == pytest.approx(sum(each) / 2)
    assert (mean["kl_min"], mean["kl_max"]) == (min(each), max(each))
    assert mean["kl_stderr"] == pytest.approx(abs(each[0] - each[1]) / 2)
    assert 0 < result["cost"]["frame_bytes"] < result["cost"]["resident_bytes"]
    assert "left" in said[1]


def test_a_replaced_past_is_read_and_the_exact_one_kept(model, documents):
    exact = evaluate.run_exact(model, documents[0], PREFIX)
    before = [k.clone() for k, _ in exact.past]
    same = evaluate.score(model, exact, evaluate.fork(exact.cache))
    torch.testing.assert_close(same, exact.logits)
    wrong = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in exact.past]
    assert (
        exact.compare(evaluate.score(model, exact, evaluate.fork(exact.cache, wrong))).kl_mean > 0
    )
    assert all(torch.equal(k, old) for (k, _), old in zip(exact.past, before, strict=True))


def test_layer_errors_follow_the_attention_formula(model, documents):
    exact = evaluate.run_exact(model, documents[0], PREFIX)
    assert evaluate.layer_errors(exact, exact.past) == [0.0, 0.0]
    past = [(k, 1.5 * v) for k, v in exact.past]
    got = evaluate.layer_errors(exact, past)
    layer, q = exact.full.layers[1], exact.asked.queries[1].double()
    repeat = q.shape[1] // layer.keys.shape[1]
    keys, values = (x.double().repeat_interleave(repeat, 1) for x in (layer.keys, layer.values))
    logits = q @ keys.mT * exact.asked.scales[1]
    hidden = ~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(PREFIX)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    moved = weights[..., :PREFIX] @ (0.5 * values[:, :, :PREFIX])
    expected = moved.square().sum() / (weights @ values).square().sum()
    assert got[1] == pytest.approx(float(expected), rel=1e-4)


def test_documents_are_read_and_refused(tmp_path, documents):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    assert evaluate.read_texts([str(tmp_path)]) == {"a": "first", "b": "second"}
    assert len(evaluate.read_texts([])["python-reference"]) >= 20_000
    (tmp_path / "empty").mkdir()
    with pytest.raises(evaluate.DocumentError, match=r"no \.txt"):
        evaluate.read_texts([str(tmp_path / "empty")])
    with pytest.raises(evaluate.DocumentError, match="cannot read"):
        evaluate.read_texts([str(tmp_path / "missing.txt")])
    with pytest.raises(evaluate.DocumentError, match="makes 2 tokens"):
        evaluate.tokenize({"short": "ab"}, lambda text: [1, 2], 10, "cpu")
