"""``SphericalCache`` as transformers uses it, between forwards."""

from __future__ import annotations

import pytest
import torch
from support import SMALL, generate, greedy, max_error, padded_batch, same_state, tiny

import skv_compile as skv

LENGTH = 128
TOLERANCE = 1e-4

CODECS = pytest.mark.parametrize("codec", ["identity", "grid"])


def cache_for(model, codec: str = "identity", length: int = LENGTH, **kw):
    return skv.SphericalCache(
        model.config, max_cache_len=length, codec=codec, **{"bits": 64.0, **SMALL, **kw}
    )


@torch.no_grad()
def forward(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def dense_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def ids():
    return padded_batch(1, 100)[0]


# ---------------------------------------------------------------- many tokens at once


@pytest.mark.parametrize("cuts", [(100,), (60, 40), (1, 7, 30, 62), (33, 33, 34)])
def test_chunked_prefill_with_identity_is_dense(model, ids, cuts) -> None:
    cache, parts = cache_for(model), []
    for part in ids.split(cuts, dim=1):
        parts.append(forward(model, cache, part))
    assert max_error(torch.cat(parts, 1), dense_logits(model, ids)) < TOLERANCE
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [16, 25])
def test_generate_with_chunked_prefill_is_dense(name: str, chunk: int) -> None:
    model = tiny(name)
    ids, mask = padded_batch(2, 60)
    want = generate(model, ids, mask, 16)
    got = generate(model, ids, mask, 16, past_key_values=cache_for(model), prefill_chunk_size=chunk)
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE


def test_scoring_a_continuation_reads_codes_for_the_past_and_itself_exactly(model, ids) -> None:
    want = dense_logits(model, ids)
    exact, coarse, fine = (
        cache_for(model, "identity"),
        cache_for(model, "grid", bits=3.0),
        cache_for(model, "grid", bits=5.0),
    )
    errors = []
    for cache in (exact, coarse, fine):
        forward(model, cache, ids[:, :70])
        errors.append((forward(model, cache, ids[:, 70:]) - want[:, 70:]).norm().item())
    assert errors[0] < TOLERANCE * want[:, 70:].numel() ** 0.5
    assert errors[0] < errors[2] < errors[1]


def test_prefill_of_an_empty_cache_is_exact_with_every_codec(model, ids) -> None:
    got = forward(model, cache_for(model, "grid", bits=3.0), ids)
    assert max_error(got, dense_logits(model, ids)) < TOLERANCE


# ---------------------------------------------------------------- reset, crop


@CODECS
def test_reset_makes_a_cache_as_new(model, ids, codec: str) -> None:
    cache, fresh = cache_for(model, codec), cache_for(model, codec)
    forward(model, cache, ids.flip(-1))
    address = cache.states[0].tensors.pool.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.summary()["stored_tokens"] == [0]
    assert not cache.states[0].dense()[0].any()
    for part in ids.split((60, 1, 39), dim=1):
        assert torch.equal(forward(model, cache, part), forward(model, fresh, part))
    assert cache.states[0].tensors.pool.data_ptr() == address


@pytest.mark.parametrize("keep", [1, 3, 20, 57, 90, 99])
@pytest.mark.parametrize("negative", [True, False])
def test_crop_with_identity_forgets_the_last_tokens_and_no_other(
    model, ids, keep, negative
) -> None:
    cache = cache_for(model)
    forward(model, cache, ids.flip(-1)[:, :100])
    cache.reset()
    forward(model, cache, ids)
    cache.crop(keep - 100 if negative else keep)
    assert cache.get_seq_length() == keep
    other = torch.cat([ids[:, :keep], ids.flip(-1)[:, keep:]], 1)
    got = forward(model, cache, other[:, keep:])
    assert max_error(got, dense_logits(model, other)[:, keep:]) < TOLERANCE


def test_crop_into_coded_pages_keeps_what_they_decode_to(model, ids) -> None:
    cache = cache_for(model, "grid")
    forward(model, cache, ids)
    before = cache.states[0].dense()
    cache.crop(-70)
    after = cache.states[0].dense()
    for one, other in zip(before, after, strict=True):
        # Decoding one page or ten sums float32 products in another order.
        eps = torch.finfo(torch.float32).eps * 4 * 16
        off = (one[:, :, :30] - other[:, :, :30]).norm(dim=-1)
        assert (off <= eps * one[:, :, :30].norm(dim=-1)).all()
        assert not other[:, :, 30:].any()


def test_crop_of_padded_rows_and_of_everything(model) -> None:
    ids, mask = padded_batch(3, 50)
    cache = cache_for(model)
    greedy(model, cache, ids, mask, 1)
    cache.crop(-50)
    assert cache.get_seq_length() == 0
    want = generate(model, ids, mask, 8)
    got = greedy(model, cache, ids, mask, 8)
    assert torch.equal(got[0], want[0])


def test_crop_by_more_than_was_seen_is_refused(model, ids) -> None:
    cache = cache_for(model)
    forward(model, cache, ids)
    unchanged = [same_state(state) for state in cache.states]
    with pytest.raises(skv.CacheStateError, match="100 tokens"):
        cache.crop(-101)
    assert all(check() for check in unchanged)
    assert cache.get_seq_length() == 100


def test_crop_to_more_than_was_seen_changes_nothing(model, ids) -> None:
    cache = cache_for(model)
    forward(model, cache, ids[:, :50])
    cache.crop(80)
    assert cache.get_seq_length() == 50


# ---------------------------------------------------------------- rows


def test_beam_search_with_identity_is_dense(model) -> None:
    ids, mask = padded_batch(2)
    arguments = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 24, "do_sample": False}
    want = model.generate(ids, **arguments)
    got = model.generate(ids, **arguments, past_key_values=cache_for(model))
    assert torch.equal(got, want)


def test_beam_search_after_skv_compile_is_dense(eager_inner: None) -> None:
    ids, mask = padded_batch(2)
    arguments = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 24, "do_sample": False}
    want = tiny("llama").generate(ids, **arguments)
    model = skv.compile(tiny("llama"), codec="identity", **SMALL)
    assert torch.equal(model.generate(ids, **arguments), want)


@CODECS
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0], [2, 2, 1, 0]])
def test_selected_rows_take_everything_with_them(model, codec: str, rows: list[int]) -> None:
    ids, mask = padded_batch(3, 60)
    cache = cache_for(model, codec)
    greedy(model, cache, ids, mask, 1)
    before = [state.dense() for state in cache.states]
    meta = [state.tensors.meta.clone() for state in cache.states]
    cache.batch_select_indices(torch.tensor(rows))
    for state, dense, old in zip(cache.states, before, meta, strict=True):
        assert state.batch == len(rows)
        assert torch.equal(state.tensors.meta, old[rows])
        for one, other in zip(state.dense(), dense, strict=True):
            assert torch.equal(one, other[rows])
    # and go on as these rows would have
    step = padded_batch(3, 1)[0][rows]
    full = torch.ones(len(rows), LENGTH, dtype=torch.int64)
    full[:, :60] = mask[rows]
    place = mask[rows].sum(1, keepdim=True)
    with torch.no_grad():
        got = model(step, attention_mask=full, position_ids=place, past_key_values=cache).logits
    if codec == "identity":
        joined, seen = torch.cat([ids[rows], step], 1), full[:, :61]
        position = (seen.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            want = model(joined, attention_mask=seen, position_ids=position, use_cache=False).logits
        assert max_error(got, want[:, -1:]) < TOLERANCE


def test_repeated_rows_are_next_to_each_other(model) -> None:
    ids, mask = padded_batch(2, 60)
    cache = cache_for(model)
    greedy(model, cache, ids, mask, 1)
    before = cache.states[0].dense()[0]
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.states[0].dense()[0], before[[0, 0, 0, 1, 1, 1]])


def test_a_mask_selects_rows_too(model) -> None:
    ids, mask = padded_batch(3, 60)
    cache = cache_for(model)
    greedy(model, cache, ids, mask, 1)
    before = cache.states[0].dense()[0]
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(cache.states[0].dense()[0], before[[0, 2]])


# ---------------------------------------------------------------- what it costs


def test_resident_bytes_are_those_of_every_tensor_held(model, ids) -> None:
    cache = cache_for(model, "grid", bits=3.0)
    assert cache.resident_bytes == 0
    forward(model, cache, ids)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for state in cache.states
        for x in state.tensors
    }
    assert cache.resident_bytes == sum(storages.values())
    assert cache.dense_bytes == 2 * 2 * 1 * 2 * LENGTH * 16 * 4


def test_resident_bytes_do_not_change_while_a_cache_fills(model, ids) -> None:
    cache, sizes = cache_for(model, "grid"), set()
    for part in ids.split(10, dim=1):
        forward(model, cache, part)
        sizes.add(cache.resident_bytes)
    assert len(sizes) == 1


def test_bits_and_summary_say_what_is_stored(model) -> None:
    ids, mask = padded_batch(3, 60)
    cache = cache_for(model, "grid", bits=3.0)
    with pytest.raises(skv.CacheStateError, match="run the model first"):
        _ = cache.bits_per_coordinate
    assert cache.summary()["tier"] is None
    greedy(model, cache, ids, mask, 5)
    layout = cache.states[0].layout
    assert cache.bits_per_coordinate == layout.page_bytes * 8 / (2 * 8 * 16) == 2.5
    summary = cache.summary()
    assert summary["seen_tokens"] == 64
    assert summary["stored_tokens"] == [64 - int(n) for n in (1 - mask).sum(1)]
    assert summary["resident_bytes"] == cache.resident_bytes
    assert summary["compressed_layers"] == 2
    assert summary["dense_layers"] == 0


def test_sliding_layers_stay_dense_and_are_counted() -> None:
    model = tiny("gemma3")
    cache = cache_for(model, "grid")
    forward(model, cache, padded_batch(1, 60)[0])
    assert cache.summary()["compressed_layers"] == 1
    assert cache.summary()["dense_layers"] == 1
    sliding = cache.layers[0]
    assert cache.resident_bytes >= sliding.keys.nbytes + sliding.values.nbytes
