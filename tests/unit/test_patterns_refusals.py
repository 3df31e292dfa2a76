"""One model for every reason not to touch an attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_patterns_capture import BATCH, DIM, KV_HEADS, SLOTS, Cached, capture, match_step, tokens

from skv_compile.patterns import Refusal, match

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
    assert refusal.where.startswith("test_patterns_refusals.py:")
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


# The call


def test_dropout() -> None:
    assert attend(lambda k, v: (k, v), dropout_p=0.1).code == "dropout"


def test_computed_scale() -> None:
    def step(keys, values, q, k, v, position, mask, scale):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask, scale=scale * 1.5)

    assert refused(step, *one_token(), 3, dynamic=True).code == "scale"


# The shapes


def test_dtype_of_the_cache() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, :, 3:4], values[:, :, 3:4] = k.double(), v.double()  # the assignment rounds
        return sdpa(q, keys, values, mask)

    refusal = refused(step, *one_token())
    assert refusal.code == "dtype"
    assert "float64" in refusal.reason


def test_one_row_for_all() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k[:1], v[:1], position)
        return sdpa(q, keys, values, mask)

    assert refused(step, *one_token()).code == "batch"


def test_batch_smaller_than_the_cache() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:1, :, position] = k
        values[:1, :, position] = v
        return sdpa(q, keys[:1], values[:1], mask)

    arguments = (tokens(batch=1), tokens(batch=1), tokens(batch=1), torch.tensor([3]), MASK)
    assert refused(step, *arguments).code == "batch"


def test_read_of_fewer_rows() -> None:
    assert attend(lambda k, v: (k[:1], v[:1])).code == "batch"


def test_one_head_for_all() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k[:, :1], v, position)
        return sdpa(q, keys, values, mask)

    assert refused(step, *one_token()).code == "source-shape"


def test_head_dims() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, torch.cat([v, v], -1), position)
        return sdpa(q, keys, values, mask)

    shape = (BATCH, KV_HEADS, SLOTS, 2 * DIM)
    assert refused(step, *one_token(), value_shape=shape).code == "head-dim"


def test_caches_of_other_lengths() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values[:, :, :SLOTS], mask)

    shape = (BATCH, KV_HEADS, 2 * SLOTS, DIM)
    assert refused(step, *one_token(), value_shape=shape).code == "caches-differ"


def test_query_rows() -> None:
    _, *rest = one_token()

    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask)

    assert refused(step, tokens(batch=1), *rest).code == "query-batch"


def test_fewer_queries_than_tokens() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q[:, :, -1:], keys, values, mask)

    arguments = (tokens(3), tokens(3), tokens(3), torch.tensor([3, 4, 5]), MASK)
    assert refused(step, *arguments).code == "query-length"


# The read


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("mul", lambda x: x * 2),
        ("flip", lambda x: x.flip(2)),
        ("relu", lambda x: (x.flip(2) + 1).relu()),
        ("getitem", lambda x: x[:, :, 1:]),
        ("getitem", lambda x: x[:, :, :-1]),
        ("getitem", lambda x: x[:, :1]),
        ("repeat_interleave", lambda x: x.repeat_interleave(2, dim=2)),
        ("reshape", lambda x: x.reshape(BATCH, KV_HEADS, 2, SLOTS // 2, DIM).reshape(x.shape)),
    ],
)
def test_read_through_an_operation_the_pass_does_not_follow(name: str, read) -> None:
    def step(keys, values, q, k, v, position):
        write(keys, values, k, v, position)
        return sdpa(q, read(keys), read(values), None)

    refusal = refused(step, *one_token()[:-1])
    assert refusal.code == "read-view"
    assert f"({name})" in refusal.reason


def test_read_in_another_dtype() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q.double(), keys.double(), values.to(torch.float64), mask)

    assert refused(step, *one_token()).code == "read-view"


def test_axes_in_another_order() -> None:
    def step(keys, values, q, k, v, position):
        write(keys, values, k, v, position)
        return sdpa(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))

    shape = (BATCH, 1, SLOTS, DIM)
    arguments = (tokens(1, 1), tokens(1, 1), tokens(1, 1), torch.tensor([3]))
    refusal = refused(step, *arguments, key_shape=shape, value_shape=shape)
    assert refusal.code == "read-view"
    assert "slot, head" in refusal.reason


def tiled(x):
    return x.repeat(1, HEADS // KV_HEADS, 1, 1)


def tiled_by_expand(x):
    b, h, s, d = x.shape
    return x[:, None].expand(b, HEADS // h, h, s, d).reshape(b, HEADS, s, d)


@pytest.mark.parametrize("tile", [tiled, tiled_by_expand])
def test_tiled_heads(tile) -> None:
    assert attend(lambda k, v: (tile(k), tile(v)), HEADS).code == "gqa"


def test_keys_and_values_repeated_in_different_ways() -> None:
    refusal = attend(lambda k, v: (tiled_by_expand(k), v.repeat_interleave(2, 1)), HEADS)
    assert refusal.code == "gqa"


def test_heads_left_to_broadcasting() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask)

    shape = (BATCH, 1, SLOTS, DIM)
    arguments = (tokens(1, HEADS), tokens(1, 1), tokens(1, 1), torch.tensor([3]), MASK)
    refusal = refused(step, *arguments, key_shape=shape, value_shape=shape)
    assert refusal.code == "gqa"
    assert "enable_gqa" in refusal.reason


def test_symbolic_heads() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask, enable_gqa=True)

    refusal = refused(step, *one_token(HEADS), dynamic=True)
    assert refusal.code == "gqa"
    assert "symbolic" in refusal.reason


def test_heads_that_do_not_divide() -> None:
    # SDPA itself refuses three heads over two; so does the matcher, on a graph changed by hand.
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask)

    graph = capture(Cached(step), *one_token())
    query = next(node for node in graph.nodes if node.name == "l_args_0_")
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        query.meta["example_value"] = tokens(1, 3)
    (refusal,) = match(graph).refusals
    assert refusal.code == "gqa"
    assert "divide" in refusal.reason


def test_read_to_different_ends() -> None:
    def step(keys, values, q, k, v, position, end, other):
        write(keys, values, k, v, position)
        return sdpa(k + v, keys[:, :, :end], values[:, :, :other])

    # Equal when traced, and free to differ afterwards.
    found = refused(step, *one_token()[:-1], 4, 4, dynamic=True)
    assert found.code == "read-ends-differ"


def test_sliced_twice() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys[:, :, :4], values[:, :, :5][:, :, :4], mask[:, :4])

    assert refused(step, *one_token()).code == "read-view"


# The mask


def test_no_mask_over_empty_slots() -> None:
    def step(keys, values, q, k, v, position):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values)

    refusal = refused(step, *one_token()[:-1])
    assert refusal.code == "no-mask"
    assert "mask" in refusal.reason


def test_tokens_that_see_the_ones_after_them() -> None:
    def step(keys, values, q, k, v):
        keys[:, :, 3:6], values[:, :, 3:6] = k, v
        return sdpa(q, keys[:, :, :6], values[:, :, :6])

    assert refused(step, tokens(3), tokens(3), tokens(3)).code == "not-causal"


@pytest.mark.parametrize("end", [3, 5])
def test_read_that_does_not_end_with_the_new_token(end: int) -> None:
    def step(keys, values, q, k, v):
        keys[:, :, 3:4], values[:, :, 3:4] = k, v
        return sdpa(q, keys[:, :, :end], values[:, :, :end])

    assert refused(step, tokens(), tokens(), tokens()).code == "read-end"


def test_causal_or_not_is_computed() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask)

    # Dynamo traces no such call today, so the graph is changed by hand.
    graph = capture(Cached(step), *one_token())
    (attention,) = (node for node in graph.nodes if "scaled_dot_product" in node.name)
    attention.update_kwarg("is_causal", attention.args[0])
    assert match(graph).refusals[0].code == "causal-symbolic"


@pytest.mark.parametrize(("start", "count", "end"), [(3, 1, 4), (3, 2, 5), (3, 2, SLOTS)])
def test_causal_alignment_to_the_first_slot(start: int, count: int, end: int) -> None:
    def step(keys, values, q, k, v):
        keys[:, :, start : start + count], values[:, :, start : start + count] = k, v
        return sdpa(q, keys[:, :, :end], values[:, :, :end], is_causal=True)

    refusal = refused(step, tokens(count), tokens(count), tokens(count))
    assert refusal.code == "causal-alignment"


def test_mask_broadcast_over_slots() -> None:
    def step(keys, values, q, k, v, position, mask):
        write(keys, values, k, v, position)
        return sdpa(q, keys, values, mask)

    *rest, _ = one_token()
    assert refused(step, *rest, torch.ones(1, 1, dtype=torch.bool)).code == "mask-shape"
