"""Layers of a prompt that are fitted, judged and coded together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import max_error, padded_batch, tiny

import skv_compile as skv
from skv_compile.lowering.state import CODED
from skv_compile.retention import bundle
from skv_compile.retention.bundle import Bundle

PROMPT = 700
LAYERS = 4
LAYER = 2 * 4 * 2 * 16 * PROMPT  # bytes of the keys and values of a layer and row


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
    monkeypatch.setattr(bundle, "BYTES", 0)
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

    monkeypatch.setattr(bundle, "BYTES", wait * LAYER)
    monkeypatch.setattr(Bundle, "fit", counted)
    run(model, bits=2.2)
    # A single layer at the end waits for nobody.
    assert sizes == [n for n in takes if n > 1]


@pytest.mark.parametrize("policy", ["rdr", "snapkv", "h2o", "prefix"])
@pytest.mark.parametrize("wait", [LAYERS, 2])
def test_one_budget_is_kept_between_layers_that_come_together(
    model, monkeypatch, policy: str, wait: int
) -> None:
    monkeypatch.setattr(bundle, "BYTES", wait * LAYER)
    cache, logits = run(model, bits=1.5, recent=64, sinks=4, retention=policy)
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
