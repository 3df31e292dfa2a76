"""What compressed attention may differ by: a bound from the codes, and none for another order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequences import Sequence, decoded, sequences
from support import max_error
from torch import Tensor

from skv_compile.cache.state import LayerState
from skv_compile.lowering.state import CODED

ROUNDING = 1e-5  # of float32 radii and sums


def bound(
    seq: Sequence, t: int, exact: tuple[Tensor, Tensor], coded: tuple[Tensor, Tensor]
) -> Tensor:
    """[B, Hq]: how far the output of token t may be from exact attention.

    No logit moves by more than d = scale |q| max |k' - k|. Weights whose logarithms move by at most
    d each differ by 2 tanh(d / 2) in sum: the worst is to raise a share 1 / (1 + e^d) of them by d
    and to lower the others by d. They weigh values that are within some radius of their mean, and
    values move by max |v' - v| themselves.
    """
    k, v, k_coded, v_coded = (x[:, :, : t + 1].double() for x in (*exact, *coded))
    real = torch.arange(t + 1) >= torch.tensor(seq.pads)[:, None, None]  # [B, 1, T]
    lost = ((k_coded - k).norm(dim=-1) * real).amax(-1)
    moved = ((v_coded - v).norm(dim=-1) * real).amax(-1)
    middle = (v * real[..., None]).sum(2, keepdim=True) / real.sum(-1)[..., None, None].clamp(1)
    radius = ((v - middle).norm(dim=-1) * real).amax(-1)
    lost, moved, radius = (x.repeat_interleave(seq.group, 1) for x in (lost, moved, radius))
    d = seq.scale * seq.q[:, :, t].double().norm(dim=-1) * lost
    return moved + 2 * torch.tanh(d / 2) * radius


@pytest.mark.parametrize("codec", ["grid", "frame"])
@given(seq=sequences(dtype=torch.float32), shrink=st.sampled_from((1.0, 0.25, 0.0)))
def test_the_error_is_within_what_the_codes_lose(codec: str, seq: Sequence, shrink: float) -> None:
    seq.q *= shrink  # of small logits the bound is tight: of none, what values lose
    state = seq.state(codec)
    for begin, end in seq.spans():
        state.keeper.tick(end - begin)  # as the step will, which then moves nothing more
        k, v = decoded(state)
        k[:, :, begin:end], v[:, :, begin:end] = seq.k[:, :, begin:end], seq.v[:, :, begin:end]
        out, want = seq.step(state, begin, end), seq.oracle(begin, end, seq.k, seq.v)
        for t in range(begin, end):
            error = (out[:, :, t - begin].double() - want[:, :, t - begin]).norm(dim=-1)
            allowed = bound(seq, t, (seq.k, seq.v), (k, v)) + ROUNDING
            real = t >= torch.tensor(seq.pads)[:, None]
            assert (error <= allowed)[real.expand_as(error)].all()


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(count=st.integers(1, 80), seed=st.integers(0, 99))
def test_the_order_of_what_is_seen_does_not_matter(codec: str, count: int, seed: int) -> None:
    def end(order: Tensor) -> tuple[Tensor, LayerState]:
        """What one more token sees of tokens stored in this order."""
        seq = Sequence([count, 1], [0, 0], 2, 2, 16, "bool", seed=seed)
        for x in (seq.k, seq.v):
            x[:, :, :count] = x[:, :, order]
        state = seq.state(codec)
        seq.step(state, 0, count)
        return seq.step(state, count, count + 1), state

    want, state = end(torch.arange(count))
    first, last = state.layout.sinks, state.layout.sinks + int(state.tensors.meta[0, CODED])
    if codec == "identity":
        first, last = 0, count
    order = torch.arange(count)  # of coded tokens alone: a token may not become an exact one
    mixed = torch.randperm(last - first, generator=torch.Generator().manual_seed(seed))
    order[first:last] = first + mixed
    assert max_error(end(order)[0], want) < (1e-12 if codec == "identity" else ROUNDING)
