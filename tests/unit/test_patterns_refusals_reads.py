"""Reasons in the read and the mask not to touch an attention."""

from __future__ import annotations

import pytest
import torch
from test_patterns_capture import BATCH, DIM, KV_HEADS, SLOTS, Cached, capture, tokens
from test_patterns_refusals import HEADS, attend, one_token, refused, sdpa, write

from skv_compile.patterns import match

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
