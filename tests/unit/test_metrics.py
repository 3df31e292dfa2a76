"""metrics.compare against the plain float64 formula, metrics.score_continuation on tiny models."""

import math

import pytest
import torch
from support import tiny as model_of
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import skv_compile as skv
from skv_compile import metrics


def formula(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The definition, in float64 and in one piece."""
    p = exact.double().softmax(-1)
    q = other.double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    rows = torch.arange(len(targets))
    ppl_exact = math.exp(-p[rows, targets].log().mean())
    ppl_other = math.exp(-q[rows, targets].log().mean())
    return {
        "tokens": len(targets),
        "kl_mean": kl.mean().item(),
        "kl_stderr": (kl.var(correction=1) / len(targets)).sqrt().item(),
        "kl_max": kl.max().item(),
        "same_top1": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "delta_ppl": 100 * (ppl_other / ppl_exact - 1),
    }


@pytest.mark.parametrize("rows", [2, metrics.CHUNK, metrics.CHUNK + 1, 3 * metrics.CHUNK - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compare_is_the_formula(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    exact = (3 * torch.randn(rows, 101)).to(dtype)
    other = (exact.float() + 0.3 * torch.randn(rows, 101)).to(dtype)
    targets = torch.randint(0, 101, (rows,))
    got = metrics.compare(exact, other, targets).to_dict()
    assert got == pytest.approx(formula(exact, other, targets), rel=1e-9, abs=1e-12)


def test_equal_logits_have_no_distance() -> None:
    logits = 50 * torch.randn(7, 33)
    got = metrics.compare(logits, logits.clone(), torch.arange(7))
    assert (got.kl_mean, got.kl_max, got.same_top1, got.delta_ppl) == (0.0, 0.0, 1.0, 0.0)


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    exact, other = torch.randn(9, 21).double(), torch.randn(9, 21).double()
    targets = torch.arange(9)
    a = metrics.compare(exact, other, targets).to_dict()
    b = metrics.compare(exact + 5, other - torch.arange(9)[:, None], targets).to_dict()
    assert a == pytest.approx(b, rel=1e-9)


def test_far_logits_stay_finite() -> None:
    exact, other = torch.zeros(2, 4), torch.zeros(2, 4)
    exact[:, 0], other[:, 1] = 1e4, 1e4
    got = metrics.compare(exact, other, torch.tensor([2, 3]))
    assert got.kl_mean == pytest.approx(1e4)
    assert got.same_top1 == 0.0


def test_one_token_has_no_spread() -> None:
    got = metrics.compare(torch.randn(1, 5), torch.randn(1, 5), torch.tensor([3]))
    assert got.kl_stderr == 0.0
    assert got.kl_mean == got.kl_max


def test_inputs_are_left_alone() -> None:
    exact, other = torch.randn(5, 8).double(), torch.randn(5, 8).double()
    before = exact.clone(), other.clone()
    metrics.compare(exact, other, torch.arange(5))
    assert torch.equal(exact, before[0])
    assert torch.equal(other, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["exact", "other"])
def test_logits_that_are_not_finite_raise(value: float, side: str) -> None:
    row = metrics.CHUNK + 3
    logits = {"exact": torch.randn(row + 2, 6), "other": torch.randn(row + 2, 6)}
    logits[side][row, 2] = value
    with pytest.raises(FloatingPointError, match=f"the {side} logits .* position {row}"):
        metrics.compare(logits["exact"], logits["other"], torch.zeros(row + 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("exact", "other", "targets"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, dtype=torch.long)),
        (torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 4])),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, -1])),
    ],
)
def test_wrong_shapes_raise(
    exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"compare|targets"):
        metrics.compare(exact, other, targets)


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("flat", [True, False])
def test_score_continuation_is_the_plain_forward(tiny: LlamaForCausalLM, flat: bool) -> None:
    ids = torch.randint(0, 67, (1, 30))
    cache = DynamicCache(config=tiny.config)
    got = metrics.score_continuation(tiny, ids[0] if flat else ids, 19, cache)
    with torch.no_grad():
        want = tiny(ids).logits[0, 19:]
    assert cache.get_seq_length() == 30
    assert got.shape == (11, 67)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 30, 31, -1])
def test_prefix_outside_the_sequence_raises(tiny: LlamaForCausalLM, prefix: int) -> None:
    with pytest.raises(ValueError, match="prefix"):
        metrics.score_continuation(tiny, torch.zeros(30, dtype=torch.long), prefix, None)


def test_several_sequences_raise(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="one sequence"):
        metrics.score_continuation(tiny, torch.zeros(2, 30, dtype=torch.long), 5, None)


@pytest.mark.parametrize("before", [1, 40, 300])
@pytest.mark.parametrize("chunk", [1000, 16, 1])
def test_loglikelihood_is_that_of_one_forward(before: int, chunk: int) -> None:
    model = model_of("llama")
    ids = torch.randint(1, 128, (1, before + 37))
    with torch.no_grad():
        found = model(ids[:, :-1]).logits[0, before - 1 :].double().log_softmax(-1)
    want = found.gather(1, ids[0, before:, None]).sum().item()
    cache = skv.SphericalCache(model.config, 512, codec="identity")
    got, greedy = metrics.loglikelihood(model, ids[0].tolist(), 37, cache, chunk)
    assert got == pytest.approx(want, abs=1e-3)
    assert greedy == bool((found.argmax(-1) == ids[0, before:]).all())
    first = model(ids[:, :-1]).logits[0, -1].argmax().item()
    cache.reset()
    assert metrics.loglikelihood(model, [*ids[0, :-1].tolist(), first], 1, cache, chunk)[1]


def test_loglikelihood_reads_the_codes() -> None:
    model = model_of("llama")
    ids = torch.randint(1, 128, (340,)).tolist()
    settings = {"codec": "grid", "retention": "none", "recent": 16, "page_tokens": 16}
    caches = [skv.SphericalCache(model.config, 512, bits=b, **settings) for b in (2.5, 4.5)]
    exact = skv.SphericalCache(model.config, 512, codec="identity")
    want, _ = metrics.loglikelihood(model, ids, 40, exact, 8)
    coarse, fine = (abs(metrics.loglikelihood(model, ids, 40, c, 8)[0] - want) for c in caches)
    assert coarse > fine > 1e-3


@pytest.mark.parametrize(("scored", "chunk"), [(0, 8), (5, 8), (2, 0)])
def test_loglikelihood_refuses(scored: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="tokens to score and one before them"):
        metrics.loglikelihood(model_of("llama"), [1, 2, 3, 4, 5], scored, None, chunk)
