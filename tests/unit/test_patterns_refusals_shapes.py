"""Reasons in the call and the shapes not to touch an attention."""

from __future__ import annotations

import torch
from test_patterns_capture import BATCH, DIM, KV_HEADS, SLOTS, tokens
from test_patterns_refusals import MASK, attend, one_token, refused, sdpa, write

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
