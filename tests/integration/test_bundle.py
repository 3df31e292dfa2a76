"""Layers of a prompt that are fitted, judged and coded together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import NATIVE, max_error, padded_batch, tiny

import skv_compile as skv
from skv_compile.lowering.state import CODED, PAD
from skv_compile.retention import bundle
from skv_compile.retention.bundle import Bundle

PROMPT = 700
LAYERS = 4


@pytest.fixture(autouse=True)
def together(monkeypatch) -> None:
    """On a CPU too, where layers would gain nothing by waiting."""
    monkeypatch.setattr(bundle, "CPU_BYTES", 5 << 27)


def wait_for(monkeypatch, layers: int) -> None:
    """Let as many layers wait for one another."""
    q, k = torch.empty(1, 4, PROMPT, 16), torch.empty(1, 2, PROMPT, 16)
    low, high = 0, 5 << 27
    while low < high:  # the least room for them
        monkeypatch.setattr(bundle, "CPU_BYTES", (low + high) // 2)
        enough = Bundle.size(q, k, LAYERS) >= layers
        low, high = (low, (low + high) // 2) if enough else ((low + high) // 2 + 1, high)
    monkeypatch.setattr(bundle, "CPU_BYTES", low)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=LAYERS)


@torch.no_grad()
def run(model, batch: int = 1, pad: bool = False, **kw: Any) -> tuple[Any, torch.Tensor]:
    """A prompt and 24 more tokens: the cache, and logits of those."""
    ids, mask = padded_batch(batch, PROMPT)
    cache = skv.SphericalCache(model.config, PROMPT + 64, **kw)
    mask = mask if pad else None
    ids = torch.cat([ids, ids[:, :24]], 1)
    model(ids[:, :PROMPT], attention_mask=mask, past_key_values=cache)
    found = []
    for t in range(PROMPT, PROMPT + 24):
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=1)
        own = {"attention_mask": mask, "past_key_values": cache}
        found.append(model(ids[:, t : t + 1], **own).logits)
    return cache, torch.cat(found, 1)


@pytest.mark.parametrize("codec", ["frame", "identity", "rings"])
@pytest.mark.parametrize(("batch", "pad"), [(1, False), (3, True)])
def test_layers_together_hold_what_each_alone_would(
    model, monkeypatch, codec: str, batch: int, pad: bool
) -> None:
    settings = {"bits": 64.0 if codec == "identity" else 4.2, "retention": "none", "codec": codec}
    together, got = run(model, batch, pad, **settings)
    monkeypatch.setattr(bundle, "CPU_BYTES", 0)
    alone, want = run(model, batch, pad, **settings)
    for a, b in zip(together.states, alone.states, strict=True):
        assert torch.equal(a.tensors.meta, b.tensors.meta)
        for mine, other in zip(a.dense(), b.dense(), strict=True):
            # Sums in another order may round a number to the other side of an edge.
            assert (mine - other).abs().gt(1e-4).float().mean() < 1e-3
    assert max_error(got, want) < 0.05 * float(want.abs().max())


@pytest.mark.parametrize(("wait", "takes"), [(LAYERS, [4]), (3, [3, 1]), (2, [2, 2]), (1, [])])
def test_as_many_wait_as_memory_is_meant_for(model, monkeypatch, wait: int, takes) -> None:
    sizes = []
    fit = Bundle.fit

    def counted(self: Bundle, plan: torch.Tensor) -> Any:
        sizes.append(self.count)
        return fit(self, plan)

    wait_for(monkeypatch, wait)
    monkeypatch.setattr(Bundle, "fit", counted)
    run(model, bits=2.2)
    # A single layer at the end waits for nobody.
    assert sizes == [n for n in takes if n > 1]


@pytest.mark.parametrize("policy", ["rdr", "snapkv", "h2o", "prefix"])
@pytest.mark.parametrize(("wait", "batch"), [(LAYERS, 1), (2, 3)])
def test_one_budget_is_kept_between_layers_that_come_together(
    model, monkeypatch, policy: str, wait: int, batch: int
) -> None:
    wait_for(monkeypatch, wait)
    settings = {"bits": 1.5, "recent": 64, "sinks": 4, "retention": policy}
    cache, logits = run(model, batch, batch > 1, **settings)
    assert logits.isfinite().all()
    state = cache.states[0]
    keeper = state.keeper
    coded = sum(int(s.tensors.meta[:, CODED].sum()) for s in cache.states) * keeper.pool.heads
    assert coded > 0
    assert keeper.pool.used <= keeper.rule.pages(coded, keeper.pool.pages)
    stored = [int((keeper.pool.table[n] >= 0).sum()) for n in range(LAYERS)]
    assert all(stored), stored


def test_a_forward_that_fails_leaves_nothing_waiting(model) -> None:
    ids, _ = padded_batch(1, PROMPT)
    cache = skv.SphericalCache(model.config, PROMPT + 64, bits=2.2)
    layer = model.model.layers[2].self_attn.k_proj
    hook = layer.register_forward_hook(lambda *_: torch.full((1, PROMPT, 32), torch.nan))
    with torch.no_grad(), pytest.raises(skv.SkvError, match="cache layer 2: NaN"):
        model(ids, past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 0
    keeper = cache.states[0].keeper
    keeper.settle()
    assert keeper.pool.used == 0
    want, _ = run(model, bits=2.2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for a, b in zip(cache.states, want.states, strict=True):
        for mine, other in zip(a.tensors[-9:], b.tensors[-9:], strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_cannot_be_stored_is_not_counted(model, monkeypatch, error) -> None:
    ids, _ = padded_batch(1, PROMPT)
    cache = skv.SphericalCache(model.config, PROMPT + 64, bits=2.2)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Bundle, "fit", lambda *_: (_ for _ in ()).throw(error("no memory")))
        with pytest.raises(error, match="no memory"):
            model(ids, past_key_values=cache)
    assert all(int(x.cumulative_length) == 0 for x in cache.layers)
    assert not any(bool(state.tensors.meta.any()) for state in cache.states)
    with torch.no_grad():
        again = model(ids, past_key_values=cache).logits
        want = model(ids, use_cache=False).logits
    assert max_error(again, want) < NATIVE


def test_what_cannot_be_stored_later_is_flagged(model, monkeypatch) -> None:
    states = attend(model, layers=2)
    monkeypatch.setattr(Bundle, "fit", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        states[0].keeper.settle()
    for state in states[:2]:
        with pytest.raises(skv.CacheStateError, match="interrupted"):
            state.raise_flags("layer")


def test_layers_with_masks_of_their_own_do_not_wait(model) -> None:
    cache = skv.SphericalCache(model.config, PROMPT + 64, bits=4.2, retention="none")
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    outs = []
    for n, layer in enumerate(cache.layers):
        q, k, v = (torch.randn(1, heads, PROMPT, 16) for heads in (4, 2, 2))
        mask = torch.ones(1, 1, PROMPT, PROMPT + 64, dtype=torch.bool).tril()
        mask[..., : 7 * n] = False
        keys, values = layer.update(k, v)
        outs.append(F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True))
        assert cache.states[0].keeper._bundle is None or n == 0
    lead = [int(state.tensors.meta[0, PAD]) for state in cache.states]
    assert lead == [0, 7, 14, 21]
    assert all(out.isfinite().all() for out in outs)


def test_a_second_chunk_sees_the_first_wherever_a_forward_begins(model) -> None:
    """The first layer never runs: it has read no counter for the others."""
    cache = skv.SphericalCache(model.config, PROMPT + 64, codec="identity", bits=64.0)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    layer = cache.layers[1]
    q, k, v = (torch.randn(1, heads, PROMPT, 16) for heads in (4, 2, 2))
    full = torch.ones(1, 1, PROMPT, PROMPT + 64, dtype=torch.bool).tril()
    outs = []
    for some in (slice(0, 400), slice(400, PROMPT)):
        keys, values = layer.update(k[:, :, some], v[:, :, some])
        own = (q[:, :, some], keys, values, full[:, :, some])
        outs.append(F.scaled_dot_product_attention(*own, enable_gqa=True))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert max_error(torch.cat(outs, 2), want) < NATIVE


def test_what_waits_is_done_before_it_is_read(model) -> None:
    """A model that stops after two of four layers, and reads what they hold."""
    state = attend(model, layers=2)[0]
    keys, _ = state.dense()
    assert keys[:, :, 100:300].abs().sum() > 0


def attend(model, layers: int) -> list[Any]:
    """States of the first layers after a prompt of random tokens through those alone."""
    cache = skv.SphericalCache(model.config, PROMPT + 64, bits=4.2, retention="none")
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    for layer in cache.layers[:layers]:
        q, k, v = (torch.randn(1, n, PROMPT, 16) for n in (4, 2, 2))
        keys, values = layer.update(k, v)
        F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    assert cache.states[0].keeper._bundle is not None
    return cache.states
