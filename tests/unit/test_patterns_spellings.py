"""Every spelling of a cache write, of repeated heads and of a read, in hand-written models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_patterns_capture import SLOTS, Cached, capture, match_step, tokens

from skv_compile.patterns import Site, match

HEADS = 4


def index_copy(cache, position, new):
    cache.index_copy_(2, position, new)


def index_copy_by_keyword(cache, position, new):
    cache.index_copy_(dim=-2, index=position, source=new)


def assign(cache, position, new):
    cache[:, :, position] = new


def assign_full_index(cache, position, new):
    cache[:, :, position, :] = new


def assign_ellipsis(cache, position, new):
    cache[..., position, :] = new


def assign_slice(cache, start, new):
    cache[:, :, start : start + new.shape[2]] = new


def copy_slice(cache, start, new):
    cache[..., start : start + new.shape[2], :].copy_(new)


def copy_narrow(cache, start, new):
    cache.narrow(2, start, new.shape[2]).copy_(new)


def repeat_kv(x):
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, HEADS // h, s, d).reshape(b, HEADS, s, d)


def repeat_kv_unsqueeze(x):
    return x.unsqueeze(2).expand(-1, -1, HEADS // x.size(1), -1, -1).flatten(1, 2)


def interleave(x):
    return x.repeat_interleave(HEADS // x.size(1), dim=1)


def interleave_function(x):
    return torch.repeat_interleave(x, HEADS // x.size(1), 1)


def nothing(x):
    return x


INDEXED = {
    index_copy: "index_copy",
    index_copy_by_keyword: "index_copy",
    assign: "indexed_assignment",
    assign_full_index: "indexed_assignment",
    assign_ellipsis: "indexed_assignment",
}
SLICED = (assign_slice, copy_slice, copy_narrow)
GROUPED = {
    repeat_kv: "expand_reshape",
    repeat_kv_unsqueeze: "expand_reshape",
    interleave: "repeat_interleave",
    interleave_function: "repeat_interleave",
}
# Two new tokens. The second mask form has a head axis, the third adds instead of selecting.
MASKS = {
    "bool": torch.ones(2, 1, 2, SLOTS, dtype=torch.bool),
    "additive": torch.zeros(1, HEADS, 2, SLOTS),
    "two axes": torch.ones(2, SLOTS, dtype=torch.bool),
}


def masked_site(write, repeat, mask, dynamic=None, **options) -> Site:
    """The site of two tokens written at an index and attending with a mask."""

    def step(keys, values, q, k, v, position, mask):
        write(keys, position, k)
        write(values, position, v)
        return F.scaled_dot_product_attention(
            q, repeat(keys), repeat(values), attn_mask=mask, **options
        )

    heads = HEADS if repeat is not nothing or options.get("enable_gqa") else 2
    arguments = tokens(2, heads), tokens(2), tokens(2), torch.tensor([3, 4]), mask
    found = match_step(step, *arguments, dynamic=dynamic)
    assert found.refusals == ()
    (site,) = found.sites
    return site


@pytest.mark.parametrize("write", INDEXED)
def test_index_writes(write) -> None:
    site = masked_site(write, nothing, MASKS["bool"])
    for side, new in ((site.key, "l_args_1_"), (site.value, "l_args_2_")):
        assert side.spelling == INDEXED[write]
        assert side.erase == (side.node,)
        assert side.cache.op == "placeholder"
        assert side.cache in side.node.all_input_nodes
        assert side.source.name == new
        assert not side.position_is_start
    assert "keys" in site.key.cache.name
    assert "values" in site.value.cache.name
    assert site.key.position is site.value.position
    assert site.views == ()
    assert (site.gqa, site.group_size, site.read_end) == ("none", 1, None)


@pytest.mark.parametrize("repeat", GROUPED)
@pytest.mark.parametrize("write", [index_copy, assign])
@pytest.mark.parametrize("mask", MASKS)
def test_grouped_heads(write, repeat, mask) -> None:
    site = masked_site(write, repeat, MASKS[mask])
    assert (site.gqa, site.group_size) == (GROUPED[repeat], 2)
    assert site.masks
    assert not site.is_causal
    assert_erasable(site)


@pytest.mark.parametrize("mask", MASKS)
def test_enable_gqa(mask) -> None:
    site = masked_site(assign, nothing, MASKS[mask], enable_gqa=True)
    assert (site.gqa, site.group_size, site.views) == ("enable_gqa", 2, ())


def test_one_head_for_all_may_be_left_to_broadcasting() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys[:, :, position], values[:, :, position] = k, v
        return F.scaled_dot_product_attention(q, keys, values, mask)

    given = (tokens(1, HEADS), tokens(1, 1), tokens(1, 1), torch.tensor([3]), MASKS["two axes"][:1])
    shape = (2, 1, SLOTS, 8)
    (site,) = match_step(step, *given, key_shape=shape, value_shape=shape).sites
    assert (site.gqa, site.group_size) == ("broadcast", HEADS)


@pytest.mark.parametrize(("given", "expected"), [(None, None), (0.25, 0.25), (1, 1.0)])
def test_scale(given, expected) -> None:
    assert masked_site(assign, nothing, MASKS["bool"], scale=given).scale == expected


def test_positional_arguments() -> None:
    def step(keys, values, q, k, v, position, mask):
        assign(keys, position, k)
        assign(values, position, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, 0.0, False, scale=0.5)

    arguments = tokens(), tokens(), tokens(), torch.tensor([1]), MASKS["bool"][:, :, :1]
    (site,) = match_step(step, *arguments).sites
    assert site.masks
    assert site.scale == 0.5


def test_what_index_copy_returns_is_the_cache() -> None:
    def step(keys, values, q, k, v, position, mask):
        keys, values = keys.index_copy_(2, position, k), values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values), mask)

    arguments = tokens(2, HEADS), tokens(2), tokens(2), torch.tensor([1, 2]), MASKS["bool"]
    (site,) = match_step(step, *arguments).sites
    assert len(site.views) == 6
    assert_erasable(site)


def sliced_step(write, repeat=nothing, end=None, **options):
    def step(keys, values, q, k, v, start):
        write(keys, start, k)
        write(values, start, v)
        stop = start + k.shape[2] if end is None else end
        keys, values = keys[:, :, :stop], values.narrow(2, 0, stop)
        return F.scaled_dot_product_attention(q, repeat(keys), repeat(values), **options)

    return step


@pytest.mark.parametrize("write", SLICED)
@pytest.mark.parametrize("repeat", [nothing, repeat_kv, interleave])
def test_slice_writes_and_reads(write, repeat) -> None:
    heads = 2 if repeat is nothing else HEADS
    step = sliced_step(write, repeat)
    (site,) = match_step(step, tokens(1, heads), tokens(), tokens(), 3, dynamic=False).sites
    for side in (site.key, site.value):
        assert side.spelling == "slice_copy"
        assert (side.position, side.position_is_start) == (3, True)
        assert len(side.erase) == (1 if write is assign_slice else 2)
    assert site.read_end == 4
    assert_erasable(site)


@pytest.mark.parametrize("write", SLICED)
def test_slices_with_symbolic_bounds(write) -> None:
    arguments = tokens(), tokens(), tokens(), 3
    (site,) = match_step(sliced_step(write), *arguments, dynamic=True).sites
    start = site.key.position
    assert isinstance(start, torch.fx.Node)
    assert start.op == "placeholder"
    assert isinstance(start.meta["example_value"], torch.SymInt)
    assert isinstance(site.read_end, torch.fx.Node)


def test_symbolic_sizes_gain_no_guard() -> None:
    arguments = tokens(), tokens(), tokens(), 3
    graph = capture(Cached(sliced_step(assign_slice)), *arguments, dynamic=True)
    symbols = [n.meta["example_value"] for n in graph.nodes if "example_value" in n.meta]
    shape_env = next(s.node.shape_env for s in symbols if isinstance(s, torch.SymInt))
    before = len(shape_env.guards)
    assert len(match(graph).sites) == 1
    assert len(shape_env.guards) == before


def test_causal_prefill_from_the_first_slot() -> None:
    def step(keys, values, q, k, v):
        keys[:, :, : k.shape[2]] = k
        values[:, :, : k.shape[2]] = v
        keys, values = keys[:, :, : k.shape[2], :], values[:, :, : k.shape[2], :]
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)

    (site,) = match_step(step, tokens(5), tokens(5), tokens(5)).sites
    assert (site.key.position, site.key.position_is_start) == (0, True)
    assert site.is_causal
    assert site.masks == ()
    assert site.read_end == 5


def test_a_slice_of_everything_is_the_whole_cache() -> None:
    def read(x):
        return x[:, :, :SLOTS]

    site = masked_site(assign, read, MASKS["bool"], enable_gqa=True)
    assert site.read_end is None
    assert len(site.views) == 2


def test_copies_and_transposes_that_cancel_out() -> None:
    def there_and_back(x):
        x = x.transpose(1, 2).contiguous().permute(0, 2, 1, 3).to(torch.float32)
        return x.float().clone().to("cpu")

    site = masked_site(assign, there_and_back, MASKS["bool"], enable_gqa=True)
    assert site.gqa == "enable_gqa"
    assert_erasable(site)


def test_asking_a_cache_for_its_size_is_no_second_reader() -> None:
    def step(keys, values, q, k, v, position):
        assign(keys, position, k)
        assign(values, position, v)
        mask = torch.arange(keys.size(2), device=keys.device) <= position[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask)

    module = Cached(step)
    torch._dynamo.mark_dynamic(module.keys, 2)
    torch._dynamo.mark_dynamic(module.values, 2)
    found = match(capture(module, tokens(), tokens(), tokens(), torch.tensor([3])))
    assert len(found.sites) == 1


def assert_erasable(site: Site) -> None:
    """Erase in the order the site promises: views, then each write; fx refuses a used node."""
    graph = site.attention.graph
    with graph.inserting_before(site.attention):
        stand_in = graph.call_function(torch.zeros_like, (site.query,))
    site.attention.replace_all_uses_with(stand_in)
    for node in (site.attention, *site.views, *site.key.erase, *site.value.erase):
        graph.erase_node(node)
    assert not site.key.cache.users
    assert not site.value.cache.users


def test_an_einsum_of_another_kind_is_no_attention() -> None:
    """Its operands have two letters that the result has not, or the result has two new ones."""

    def step(keys, values, q, k, v, position, mask):
        one = torch.einsum("abcd,efgh->abgh", q, k)
        return torch.einsum("bhij,bhkl->bikl", one, v)

    found = match_step(step, *(tokens(), tokens(), tokens()), torch.tensor([3]), MASKS["bool"])
    assert (found.sites, found.refusals, found.plain) == ((), (), ())
