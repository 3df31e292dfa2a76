"""What the reference refuses, and how, where it can raise and where it cannot."""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from sequences import SLOTS, Sequence, decoded, fp32_bound, sequences
from support import same_state, store

from skv_compile.errors import CacheStateError, CapacityError, NonFiniteError, SkvError
from skv_compile.lowering import kernels, reference
from skv_compile.lowering.layout import Layout
from skv_compile.lowering.state import (
    FLAG_FULL,
    FLAG_NONFINITE,
    FLAG_POSITION,
    FLAGS,
    LENGTH,
    State,
)

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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompt_that_no_frame_fits_is_refused_in_a_graph_too(compiled: bool) -> None:
    state, random = kernel_cases.filled(torch.device("cpu"), **kernel_cases.UNIFORM)
    q, k, v = random(4, 300), random(2, 300), random(2, 300)
    begin = state.calibrate if compiled else state.begin_calibration
    fails = mock.Mock(side_effect=torch.linalg.LinAlgError("did not converge"))
    with (
        mock.patch.object(torch.linalg, "eigh", fails),
        pytest.raises(NonFiniteError, match=r"no frames can be fitted .* \(did not converge\)"),
    ):
        begin(q, k, v, None, torch.arange(300))


def test_a_value_that_is_not_finite_in_padding_is_no_error() -> None:
    seq = Sequence([20], [5, 0], 2, 2, 16, "bool")
    seq.k[0, :, :5] = torch.nan
    state = seq.state("grid")
    mask = seq.mask[:, :, :20]
    store(state, seq.k, seq.v, mask, torch.arange(20))
    assert state.tensors.meta[:, LENGTH].tolist() == [15, 20]


@pytest.mark.parametrize("tokens", [1, SLOTS - 50 + 1])
def test_more_tokens_than_the_cache_was_made_for_are_refused(tokens: int) -> None:
    _, state = filled("grid", SLOTS if tokens == 1 else 50)
    start = SLOTS if tokens == 1 else 50
    x = torch.zeros(2, 2, tokens, 16, dtype=torch.float64)
    position = torch.arange(start, start + tokens)
    for store_them in (partial(store, state), state.append):
        unchanged = same_state(state)
        with pytest.raises(CapacityError, match=f"made for {SLOTS} tokens.*larger max_cache_len"):
            store_them(x, x, None, position)
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


class Foreign(torch.Tensor):
    """A CPU tensor that says it is on an accelerator."""

    @property
    def is_cuda(self) -> bool:
        return True


class Elsewhere(Foreign):
    """The same, where no value may be read."""

    def __bool__(self) -> bool:
        raise AssertionError("a value was read")

    __int__ = __float__ = __index__ = item = tolist = __bool__


def append(k, v, mask, position, tensors: State, layout: Layout) -> None:
    exact_keys, exact_values, _, meta = tensors[:4]
    reference.append(k, v, mask, position, exact_keys, exact_values, meta, layout)


def elsewhere(state, seq: Sequence, begin: int, end: int) -> torch.Tensor:
    """``Sequence.step`` on tensors of which a forward of one token must read no value."""
    state.keeper.tick(end - begin)
    kind = Elsewhere if end - begin == 1 else Foreign
    own = tuple(x[:, :, begin:end] for x in (seq.q, seq.k, seq.v))
    mask, place = seq.mask[:, :, begin:end], torch.arange(begin, end)
    q, k, v, position = (x.as_subclass(kind) for x in (*own, place))
    tensors = state.tensors._replace(meta=state.tensors.meta.as_subclass(kind))
    # These tensors say that they are on a GPU, and are not: no kernel may take them.
    with mock.patch.dict(os.environ, {kernels.SWITCH: "reference"}):
        out = reference.attend(q, k, v, mask, position, tensors, False, seq.scale, state.layout)
    if end - begin > 1:
        state.retain(*own, mask, place, seq.scale)
    q, k, v, position = (x.as_subclass(Elsewhere) for x in (*own, place))
    tensors = state.tensors._replace(meta=state.tensors.meta.as_subclass(Elsewhere))
    append(k, v, mask, position, tensors, state.layout)
    return out.as_subclass(torch.Tensor)


@pytest.mark.parametrize("codec", ["identity", "grid"])
@settings(max_examples=12)
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
    _, state = filled(codec)
    k, v = torch.randn(2, 2, 2, tokens, 16, dtype=torch.float64).unbind()
    if flag == FLAG_NONFINITE:
        v[1, 1, -1, -1] = torch.nan
    position = torch.arange(start, start + tokens).as_subclass(Elsewhere)
    k, v = k.as_subclass(Elsewhere), v.as_subclass(Elsewhere)
    tensors = state.tensors._replace(meta=state.tensors.meta.as_subclass(Elsewhere))
    unchanged = same_state(state)
    append(k, v, None, position, tensors, state.layout)
    meta = state.tensors.meta
    assert (meta[:, FLAGS] == flag).all()
    meta[:, FLAGS] = 0
    assert unchanged()
    meta[0, FLAGS] = flag
    with pytest.raises(CacheStateError, match=r"somewhere: .*cache\.reset\(\)"):
        state.raise_flags("somewhere")
    assert unchanged()
