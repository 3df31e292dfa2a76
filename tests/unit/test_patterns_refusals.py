"""One model for every reason in the past and the writes not to touch an attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_patterns_capture import BATCH, DIM, KV_HEADS, SLOTS, match_step, tokens

from skv_compile.patterns import Refusal

HEADS = 4
MASK = torch.ones(1, SLOTS, dtype=torch.bool)


def sdpa(q, k, v, mask=None, **options):
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def write(keys, values, k, v, position):
    keys[:, :, position] = k
    values[:, :, position] = v


def refused(step, *arguments, dynamic: bool | None = None, **shapes) -> Refusal:
    """The only refusal, of the only attention, of a step."""
    found = match_step(step, *arguments, dynamic=dynamic, **shapes)
    assert (found.sites, found.plain) == ((), ())
    (refusal,) = found.refusals
    assert refusal.index == 0
    assert refusal.where.startswith("test_patterns_refusals")
    assert refusal.reason.endswith(".")
    assert "/" not in refusal.reason.replace("key/value", "")
    return refusal


def one_token(heads: int = KV_HEADS) -> tuple:
    return tokens(1, heads), tokens(), tokens(), torch.tensor([3]), MASK


def attend(read, heads: int = KV_HEADS, **options) -> Refusal:
    """Write both caches, then read them in some way."""

    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        keys, values = read(keys, values)
        return sdpa(q, keys, values, mask, **options)

    return refused(step, *one_token(heads))


# The past


def test_concatenated_past() -> None:
    def step(_keys, _values, q, k, v, past_k, past_v):
        keys, values = torch.cat([past_k, k], -2), torch.cat([past_v, v], dim=2)
        return sdpa(q, keys, values), keys, values

    refusal = refused(step, *(tokens(), tokens(), tokens()), *(tokens(4), tokens(4)))
    assert refusal.code == "dynamic-cat"
    assert "SphericalCache" in refusal.reason


def test_rolled_by_one() -> None:
    def step(keys, values, q, k, v, position, mask):
        for cache, new in ((keys, k), (values, v)):
            rolled = cache.roll(-1, dims=-2)
            rolled[:, :, position] = new
            cache.copy_(rolled)
        return sdpa(q, keys, values, mask)

    assert refused(step, *one_token()).code == "sliding"


def test_only_keys_cached() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, torch.cumsum(v.expand(-1, -1, SLOTS, -1), 2), mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "not-both-cached"
    assert "values are not" in refusal.reason


def test_stacked_layers() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, 0].index_copy_(2, position, k)
        values[:, 0].index_copy_(2, position, v)
        return sdpa(q, keys[:, 0], values[:, 0], mask)

    shape = (BATCH, 2, KV_HEADS, SLOTS, DIM)
    refusal = refused(step, *one_token(), key_shape=shape, value_shape=shape)
    assert refusal.code == "cache-rank"


def test_one_cache_for_both() -> None:
    def step(keys, _values, q, k, v, position, mask):
        keys[:, :, position] = k + v
        return sdpa(q, keys, keys, mask)

    assert refused(step, *one_token()).code == "shared-cache"


# The writes


def test_never_written() -> None:
    def step(keys, values, q, mask):
        return sdpa(q, keys, values, mask)

    assert refused(step, tokens(), MASK).code == "cache-not-written"


def test_written_twice() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        values[:, :, position] = v * 2
        return sdpa(q, keys, values, mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "written-twice"
    assert "setitem_1" in refusal.reason
    assert "setitem_2" in refusal.reason


def test_changed_by_an_operator() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        alias = keys
        alias += 1
        return sdpa(q, keys, values, mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "written-twice"
    assert "`alias`" in refusal.reason


def single_slot(cache, position, new):
    cache[:, :, 3] = new[:, :, 0]


def one_row(cache, position, new):
    cache[0, :, position] = new[0]


def other_axis(cache, position, new):
    cache.index_copy_(1, position - 3, new[:, :1].expand(-1, -1, SLOTS, -1))


def added(cache, position, new):
    cache.index_add_(2, position, new)


def through_a_transpose(cache, position, new):
    cache.transpose(1, 2)[:, position] = new.transpose(1, 2)


def every_slot(cache, position, new):
    cache[:, :, 2:6] = new


def from_the_end(cache, position, new):
    cache[:, :, -1:] = new


def two_slots_of_one_token(cache, position, new):
    cache[:, :, torch.cat([position, position + 1])] = new


@pytest.mark.parametrize(
    "write_one",
    [
        single_slot,
        one_row,
        other_axis,
        added,
        through_a_transpose,
        every_slot,
        from_the_end,
        two_slots_of_one_token,
    ],
)
def test_unknown_spelling_of_a_write(write_one) -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, :, position] = k
        write_one(values, position, v)
        return sdpa(q, keys, values, mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "unsupported-write"
    assert "index_copy_" in refusal.reason


def after(q, keys, values, k, v, position, mask):
    out = sdpa(q, keys, values, mask)
    write(keys, values, k, v, position)
    return out


def after_the_copy(q, keys, values, k, v, position, mask):
    repeated = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    write(keys, values, k, v, position)
    return sdpa(q, *repeated, mask)


@pytest.mark.parametrize(("late", "heads"), [(after, 2), (after_the_copy, 4)])
def test_written_after_the_read(late, heads: int) -> None:
    def step(keys, values, q, k, v, position, mask):
        return late(q, keys, values, k, v, position, mask)

    assert refused(step, *one_token(heads)).code == "written-after-read"


def test_other_index_for_values() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, :, position] = k
        values[:, :, position + 1] = v
        return sdpa(q, keys, values, mask)

    assert refused(step, *one_token()).code == "positions-differ"


def test_other_start_for_values() -> None:
    def step(keys, values, q, k, v, mask):
        keys[:, :, 3:4] = k
        values[:, :, 4:5] = v
        return sdpa(q, keys, values, mask)

    assert refused(step, tokens(), tokens(), tokens(), MASK).code == "positions-differ"


def test_index_changed_between_the_writes() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, :, position] = k
        position.add_(1)
        values[:, :, position] = v
        return sdpa(q, keys, values, mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "positions-differ"
    assert "add_" in refusal.reason


def test_read_by_something_else() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask) + keys.mean()

    refusal = refused(step, *one_token())
    assert refusal.code == "cache-escapes"
    assert "`mean`" in refusal.reason


def test_view_read_by_something_else() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        values = values.repeat_interleave(2, 1)
        return sdpa(q, keys.repeat_interleave(2, 1), values, mask) + values.sum()

    refusal = refused(step, *one_token(HEADS))
    assert refusal.code == "cache-escapes"
    assert "`sum_1`" in refusal.reason


def test_returned() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys = keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return sdpa(q, keys, values, mask), keys

    refusal = refused(step, *one_token())
    assert refusal.code == "cache-escapes"
    assert "returned" in refusal.reason


def test_shared_by_two_attentions() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(sdpa(q, keys, values, mask), keys, values, mask)

    found = match_step(step, *one_token())
    assert [refusal.code for refusal in found.refusals] == ["cache-escapes"] * 2


def test_an_attention_of_three_axes() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        weights = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT) * DIM**-0.5
        weights = weights.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.bmm(weights, values.flatten(0, 1))

    found = match_step(step, *one_token())
    assert not found.sites
    assert [refusal.code for refusal in found.refusals] == ["no-attention"] * 2
    assert "scaled_dot_product_attention" in found.refusals[0].reason
