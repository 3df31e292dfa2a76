"""The eager reference of ``attend`` and ``append``, which is their specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequences import SLOTS, Sequence, decoded, sequences
from support import max_error, same_state

from skv_compile.errors import CacheStateError, CapacityError, NonFiniteError, SkvError
from skv_compile.lowering import reference
from skv_compile.lowering.state import (
    FLAG_FULL,
    FLAG_NONFINITE,
    FLAG_POSITION,
    FLAGS,
    LENGTH,
    PAD,
    PAGES,
)

ROUNDING = 1e-12  # of float64 attention on values of order 1, with room for its ~100 terms


def fp32_bound(seq: Sequence) -> float:
    """How far float32 attention may be from float64: rounding of logits, exponentials and sums."""
    eps = torch.finfo(torch.float32).eps
    size = (seq.q.abs().double().amax((0, 1, 2)) @ seq.k.abs().double().amax((0, 1, 2))).item()
    logit_error = (seq.head_dim + 2) * eps * size * seq.scale
    return seq.v.abs().max().item() * (math.expm1(2 * logit_error) + (seq.tokens + 8) * eps)


def code_bound(seq: Sequence, k: torch.Tensor, v: torch.Tensor) -> float:
    """How far float64 attention may be when each radius may be off by float32's last bit."""
    eps = torch.finfo(torch.float32).eps
    logits = (seq.q.double().norm(dim=-1).max() * k.norm(dim=-1).max() * seq.scale).item()
    return v.abs().max().item() * (math.expm1(2 * eps * logits) + eps) + ROUNDING


@given(sequences())
def test_identity_is_float64_attention_over_every_chunking(seq: Sequence) -> None:
    state = seq.state("identity")
    for begin, end in seq.spans():
        out = seq.step(state, begin, end)
        assert max_error(out, seq.oracle(begin, end, seq.k, seq.v)) < ROUNDING


@given(sequences(dtype=torch.float32))
def test_identity_in_float32_is_float64_attention_up_to_rounding(seq: Sequence) -> None:
    state, bound = seq.state("identity"), fp32_bound(seq)
    for begin, end in seq.spans():
        out = seq.step(state, begin, end)
        assert out.dtype == torch.float32
        assert max_error(out, seq.oracle(begin, end, seq.k, seq.v)) < bound


@given(sequences())
def test_grid_is_attention_over_what_its_codes_decode_to(seq: Sequence) -> None:
    state = seq.state("grid")
    for begin, end in seq.spans():
        k, v = decoded(state)
        # The forward's own tokens are exact.
        k[:, :, begin:end], v[:, :, begin:end] = seq.k[:, :, begin:end], seq.v[:, :, begin:end]
        out = seq.step(state, begin, end)
        assert max_error(out, seq.oracle(begin, end, k, v)) < code_bound(seq, k, v)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences())
def test_dense_gives_what_is_stored_at_its_slots(codec: str, seq: Sequence) -> None:
    state = seq.state(codec)
    for begin, end in seq.spans():
        seq.step(state, begin, end)
    for got, want, source in zip(state.dense(), decoded(state), (seq.k, seq.v), strict=True):
        # Decoding sums float32 products: each vector is off by less than its own length.
        eps = torch.finfo(torch.float32).eps * 4 * seq.head_dim
        assert ((got - want).norm(dim=-1) <= eps * want.norm(dim=-1)).all()
        if codec == "identity":
            for row, pad in enumerate(seq.pads):
                assert torch.equal(got[row, :, pad : seq.tokens], source[row, :, pad:])


@pytest.mark.parametrize("mask_form", ["none", "bool"])
@given(first=st.integers(1, 60), steps=st.integers(0, 30), seed=st.integers(0, 99))
def test_a_causal_prompt_and_steps_without_mask_are_attention(
    mask_form: str, first: int, steps: int, seed: int
) -> None:
    seq = Sequence([first] + [1] * steps, [0, 0], 2, 2, 16, mask_form, seed=seed)
    state = seq.state("identity")
    for begin, end in seq.spans():
        assert max_error(
            seq.step(state, begin, end), seq.oracle(begin, end, seq.k, seq.v)
        ) < ROUNDING


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(data=st.data())
def test_stepping_and_chunking_store_the_same_codes(codec: str, head_dim: int, data) -> None:
    seq = data.draw(sequences(head_dim=head_dim, exact_inputs=True, dtype=torch.float32))
    chunked, stepped = seq.state(codec), seq.state(codec)
    for begin, end in seq.spans():
        seq.step(chunked, begin, end)
    for t in range(seq.tokens):
        seq.step(stepped, t, t + 1)
    assert torch.equal(chunked.tensors.meta, stepped.tensors.meta)
    most = chunked.layout.max_pages
    pools = [s.tensors.pool[:-1].view(seq.batch, seq.heads, most, -1) for s in (chunked, stepped)]
    for row, pages in enumerate(chunked.tensors.meta[:, PAGES].tolist()):
        assert torch.equal(pools[0][row, :, :pages], pools[1][row, :, :pages])
    for one, other in zip(chunked.dense(), stepped.dense(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences(masks=("bool", "float_inf", "float_min", "bias", "per_head")))
def test_padding_is_never_stored(codec: str, seq: Sequence) -> None:
    marker = 1000.0
    for row, pad in enumerate(seq.pads):
        seq.k[row, :, :pad] = marker
        seq.v[row, :, :pad] = marker
    state = seq.state(codec)
    for begin, end in seq.spans():
        seq.step(state, begin, end)
    meta = state.tensors.meta
    assert meta[:, PAD].tolist() == seq.pads
    assert meta[:, LENGTH].tolist() == [seq.tokens - pad for pad in seq.pads]
    assert not (state.tensors.exact_keys == marker).any()
    assert not (state.tensors.exact_values == marker).any()
    for dense in decoded(state):
        assert dense.abs().max() < 100
        for row, pad in enumerate(seq.pads):
            assert not dense[row, :, :pad].any()


@given(sequences())
def test_pages_take_only_what_is_older_than_the_recent_window(seq: Sequence) -> None:
    state = seq.state("grid")
    for begin, end in seq.spans():
        seq.step(state, begin, end)
        length, pages = state.tensors.meta[:, LENGTH], state.tensors.meta[:, PAGES]
        layout = state.layout
        old = (length - layout.sinks - layout.recent).clamp(min=0)
        assert torch.equal(pages, old // layout.page_tokens)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences(dtype=torch.float32))
def test_garbage_in_unused_memory_never_reaches_an_output(codec: str, seq: Sequence) -> None:
    poisoned, clean = seq.state(codec), seq.state(codec, poison=False)
    clean.tensors.pool.zero_()
    for begin, end in seq.spans():
        assert torch.equal(seq.step(poisoned, begin, end), seq.step(clean, begin, end))


# ---------------------------------------------------------------- going back


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences(masks=("bool",), padded=False), data=st.data())
def test_a_rewind_within_the_ring_replaces_the_last_tokens(codec, seq: Sequence, data) -> None:
    state = seq.state(codec)
    for begin, end in seq.spans():
        seq.step(state, begin, end)
    layout, (_, length, pages, _) = state.layout, state.tensors.meta[0].tolist()
    oldest = pages * layout.page_tokens + (layout.sinks if pages else 0)
    start = data.draw(st.integers(max(oldest, 1), length))
    if start >= seq.tokens:
        return
    other = Sequence(
        [seq.tokens], seq.pads, seq.heads, seq.group, 16, "bool", seq.settings, seq.seed + 1
    )
    k, v = decoded(state)
    k[:, :, start:], v[:, :, start:] = 0, 0
    k[:, :, start : seq.tokens] = other.k[:, :, start:]
    v[:, :, start : seq.tokens] = other.v[:, :, start:]
    out = other.step(state, start, seq.tokens)
    assert max_error(out, other.oracle(start, seq.tokens, k, v)) < code_bound(other, k, v)
    if codec == "identity":
        for got, want in zip(decoded(state), (k, v), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences(), data=st.data())
def test_slot_zero_starts_a_new_sequence(codec: str, seq: Sequence, data) -> None:
    used, fresh = seq.state(codec), seq.state(codec)
    before = Sequence(
        [data.draw(st.integers(1, SLOTS))],
        [0] * seq.batch,
        seq.heads,
        seq.group,
        16,
        "bool",
        seq.settings,
        seq.seed + 1,
        seq.dtype,
    )
    before.step(used, 0, before.tokens)
    for begin, end in seq.spans():
        assert torch.equal(seq.step(used, begin, end), seq.step(fresh, begin, end))
    assert torch.equal(used.tensors.meta, fresh.tensors.meta)
    for one, other in zip(decoded(used), decoded(fresh), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- errors store nothing


def filled(codec: str, tokens: int = 50, pads: tuple[int, ...] = (0, 3)):
    seq = Sequence([tokens] + [1] * (SLOTS - tokens), list(pads), 2, 2, 16, "bool")
    state = seq.state(codec)
    seq.step(state, 0, tokens)
    return seq, state


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("codec", ["identity", "grid"])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_stored(codec, side, bad) -> None:
    seq, state = filled(codec)
    getattr(seq, side)[1, 0, 57, 3] = bad
    unchanged = same_state(state)
    name = {"k": "keys", "v": "values"}[side]
    with pytest.raises(NonFiniteError, match=rf"{name} \(row 1, kv head 0, token 7 .*") as error:
        seq.step(state, 50, 60)
    assert "Nothing was stored" in str(error.value)
    assert "try bfloat16 or float32" in str(error.value)
    assert unchanged()


def test_a_value_that_is_not_finite_in_padding_is_no_error() -> None:
    seq = Sequence([20], [5, 0], 2, 2, 16, "bool")
    seq.k[0, :, :5] = torch.nan
    state = seq.state("grid")
    mask = seq.mask[:, :, :20]
    state.append(seq.k, seq.v, mask, torch.arange(20))
    assert state.tensors.meta[:, LENGTH].tolist() == [15, 20]


@pytest.mark.parametrize("tokens", [1, SLOTS - 50 + 1])
def test_more_tokens_than_the_cache_was_made_for_are_refused(tokens: int) -> None:
    seq, state = filled("grid", SLOTS if tokens == 1 else 50)
    start = SLOTS if tokens == 1 else 50
    x = torch.zeros(2, 2, tokens, 16, dtype=torch.float64)
    unchanged = same_state(state)
    with pytest.raises(CapacityError, match=f"made for {SLOTS} tokens.*larger max_cache_len"):
        state.append(x, x, None, torch.arange(start, start + tokens))
    assert unchanged()


@pytest.mark.parametrize("start", [51, 5, 60])
def test_a_position_that_does_not_follow_is_refused(start: int) -> None:
    seq, state = filled("grid")
    unchanged = same_state(state)
    with pytest.raises(CacheStateError, match=rf"slot {start}.*seen 50.*crop\(\)"):
        seq.step(state, start, start + 1)
    assert unchanged()


def test_is_causal_in_the_middle_of_a_sequence_is_refused() -> None:
    seq, state = filled("grid")
    q, k, v = (x[:, :, 50:55] for x in (seq.q, seq.k, seq.v))
    with pytest.raises(SkvError, match="Pass a mask"):
        state.attend(q, k, v, None, torch.arange(50, 55), True, 1.0)


def test_a_query_that_may_see_nothing_gets_zeros() -> None:
    seq, state = filled("grid")
    hidden = torch.zeros(2, 1, 1, SLOTS, dtype=torch.bool)
    q, k, v = (x[:, :, 50:51] for x in (seq.q, seq.k, seq.v))
    assert not state.attend(q, k, v, hidden, torch.tensor([50]), False, 1.0).any()


# ---------------------------------------------------------------- where nothing can be raised


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on an accelerator, where no value may be read."""

    @property
    def is_cuda(self) -> bool:
        return True

    def __bool__(self) -> bool:
        raise AssertionError("a value was read")

    __int__ = __float__ = __index__ = item = tolist = __bool__


def elsewhere(state, seq: Sequence, begin: int, end: int) -> torch.Tensor:
    """``Sequence.step`` on tensors that must not be read."""
    q, k, v = (x[:, :, begin:end].as_subclass(Elsewhere) for x in (seq.q, seq.k, seq.v))
    mask, position = seq.mask[:, :, begin:end], torch.arange(begin, end).as_subclass(Elsewhere)
    tensors = state.tensors._replace(meta=state.tensors.meta.as_subclass(Elsewhere))
    out = reference.attend(q, k, v, mask, position, tensors, False, seq.scale, state.layout)
    reference.append(k, v, mask, position, tensors, state.layout)
    return out.as_subclass(torch.Tensor)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(seq=sequences(dtype=torch.float32, exact_inputs=True))
def test_reading_no_value_gives_the_same_outputs_and_codes(codec: str, seq: Sequence) -> None:
    there, here = seq.state(codec), seq.state(codec)
    for begin, end in seq.spans():
        one, other = elsewhere(there, seq, begin, end), seq.step(here, begin, end)
        real = torch.arange(begin, end) >= torch.tensor(seq.pads)[:, None]
        off = (one - other).masked_fill(~real[:, None, :, None], 0)
        assert off.abs().max() <= 2 * fp32_bound(seq)
    assert torch.equal(there.tensors.meta, here.tensors.meta)
    for one, other in zip(decoded(there), decoded(here), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@pytest.mark.parametrize(
    ("flag", "start", "tokens"),
    [(FLAG_NONFINITE, 50, 10), (FLAG_POSITION, 51, 1), (FLAG_FULL, 50, SLOTS - 50 + 1)],
)
def test_what_cannot_be_raised_is_flagged_and_nothing_is_stored(codec, flag, start, tokens) -> None:
    seq, state = filled(codec)
    k, v = torch.randn(2, 2, 2, tokens, 16, dtype=torch.float64).unbind()
    if flag == FLAG_NONFINITE:
        v[1, 1, -1, -1] = torch.nan
    position = torch.arange(start, start + tokens).as_subclass(Elsewhere)
    k, v = k.as_subclass(Elsewhere), v.as_subclass(Elsewhere)
    tensors = state.tensors._replace(meta=state.tensors.meta.as_subclass(Elsewhere))
    unchanged = same_state(state)
    reference.append(k, v, None, position, tensors, state.layout)
    meta = state.tensors.meta
    assert (meta[:, FLAGS] == flag).all()
    meta[:, FLAGS] = 0
    assert unchanged()
    meta[0, FLAGS] = flag
    with pytest.raises(CacheStateError, match=r"somewhere: .*cache\.reset\(\)"):
        state.raise_flags("somewhere")
    assert unchanged()
