"""The eager reference of ``attend`` and ``append``, which is their specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequences import SLOTS, Sequence, decoded, fp32_bound, sequences, settle
from support import max_error

from skv_compile.lowering.state import CODED, LENGTH, PAD

ROUNDING = 1e-12  # of float64 attention on values of order 1, with room for its ~100 terms


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


@pytest.mark.parametrize("codec", ["grid", "frame"])
@given(seq=sequences())
def test_coded_attention_is_attention_over_what_the_codes_decode_to(codec, seq: Sequence) -> None:
    state = seq.state(codec)
    for begin, end in seq.spans():
        state.keeper.tick(end - begin)  # as the step will, which then moves nothing more
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
        assert (
            max_error(seq.step(state, begin, end), seq.oracle(begin, end, seq.k, seq.v)) < ROUNDING
        )


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
    settle(chunked, stepped)
    assert torch.equal(chunked.tensors.meta, stepped.tensors.meta)
    pages = [s.tensors.pool[s.tensors.table.long()] for s in (chunked, stepped)]
    for row, coded in enumerate(chunked.tensors.meta[:, CODED].tolist()):
        count = coded // chunked.layout.page_tokens
        assert torch.equal(pages[0][row, :, :count], pages[1][row, :, :count])
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
    lazy, prompt = seq.state("grid"), seq.state("grid")
    layout = lazy.layout
    for begin, end in seq.spans():
        seq.step(lazy, begin, end)
        seq.step(prompt, begin, end)
        settle(prompt)
        length, coded = lazy.tensors.meta[:, LENGTH], lazy.tensors.meta[:, CODED]
        old = (length - layout.sinks - layout.recent).clamp(min=0)
        assert torch.equal(
            prompt.tensors.meta[:, CODED], old // layout.page_tokens * layout.page_tokens
        )
        # What is due waits no longer than there is room for it.
        assert (coded <= prompt.tensors.meta[:, CODED]).all()
        assert (length - layout.sinks - coded <= layout.ring).all()


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
    settle(state)
    layout, (_, length, coded, _) = state.layout, state.tensors.meta[0].tolist()
    oldest = coded + (layout.sinks if coded else 0)
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
