"""Random sequences for the reference: chunks, padding, masks, and a float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from support import layer_state
from torch import Tensor

from skv_compile.cache.state import LayerState
from skv_compile.lowering import codes
from skv_compile.lowering.layout import Layout
from skv_compile.lowering.reference.pages import Records, page_records
from skv_compile.lowering.state import CODED, LENGTH, PAD

SLOTS = 96
MASKS = ("bool", "broadcast", "float_inf", "float_min", "bias", "per_head")


@dataclass
class Sequence:
    """What to run: ``q`` [B, Hq, T, D], ``k`` and ``v`` [B, H, T, D], cut into ``chunks``."""

    chunks: list[int]
    pads: list[int]
    heads: int
    group: int
    head_dim: int
    mask_form: str
    settings: dict = field(default_factory=dict)
    seed: int = 0
    dtype: torch.dtype = torch.float64
    exact_inputs: bool = False

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, heads, self.tokens, self.head_dim)
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            if self.exact_inputs:  # every sum of a rotation is exact in float32
                x = (x * 8).round()
            return x.to(self.dtype)

        self.q, self.k, self.v = draw(self.heads * self.group), draw(self.heads), draw(self.heads)
        self.scale = self.head_dim**-0.5
        self.mask = self._mask(g)

    @property
    def batch(self) -> int:
        return len(self.pads)

    @property
    def tokens(self) -> int:
        return sum(self.chunks)

    def _mask(self, g: torch.Generator) -> Tensor | None:
        """[B or 1, Hq or 1, T, SLOTS]: causal, without padding, in the chosen form."""
        if self.mask_form == "none":
            return None
        slot, t = torch.arange(SLOTS), torch.arange(self.tokens)
        see = (slot <= t[:, None])[None, None]
        if self.mask_form == "broadcast":
            return see
        see = see & (slot >= torch.tensor(self.pads)[:, None])[:, None, None]
        if self.mask_form == "per_head":
            shape = (self.batch, self.heads * self.group, self.tokens, SLOTS)
            holes = torch.rand(shape, generator=g) < 0.3
            return see & (~holes | (slot == t[:, None]))  # every token sees itself
        if self.mask_form == "bool":
            return see
        bias = torch.zeros(see.shape, dtype=self.dtype)
        if self.mask_form == "bias":
            bias = torch.randn(see.shape, generator=g).to(self.dtype)
        low = torch.finfo(self.dtype).min if self.mask_form == "float_min" else -torch.inf
        return bias.masked_fill(~see, low)

    def state(self, codec: str, poison: bool = True) -> LayerState:
        return layer_state(
            codec,
            self.batch,
            self.heads,
            self.head_dim,
            SLOTS,
            self.dtype,
            poison,
            **self.settings,
        )

    def spans(self) -> list[tuple[int, int]]:
        ends = torch.tensor(self.chunks).cumsum(0).tolist()
        return [(end - n, end) for end, n in zip(ends, self.chunks, strict=True)]

    def step(self, state: LayerState, begin: int, end: int) -> Tensor:
        """attend, retain and append of tokens begin..end, as a model does it."""
        state.keeper.tick(end - begin)
        q, k, v = (x[:, :, begin:end] for x in (self.q, self.k, self.v))
        mask = None if self.mask is None else self.mask[:, :, begin:end]
        position = torch.arange(begin, end)
        causal = self.mask is None and end - begin > 1
        out = state.attend(q, k, v, mask, position, causal, self.scale)
        state.retain(q, k, v, mask, position, self.scale)
        state.append(k, v, mask, position)
        return out

    def oracle(self, begin: int, end: int, k: Tensor, v: Tensor) -> Tensor:
        """Float64 attention of tokens begin..end over dense k and v [B, H, >= end, D]."""
        q = self.q[:, :, begin:end].double()
        k, v = (x[:, :, :end].double().repeat_interleave(self.group, 1) for x in (k, v))
        logits = q @ k.transpose(-1, -2) * self.scale
        if self.mask is None:
            see = torch.arange(end) <= torch.arange(begin, end)[:, None]
            logits = logits.masked_fill(~see, -torch.inf)
        elif self.mask.dtype == torch.bool:
            logits = logits.masked_fill(~self.mask[:, :, begin:end, :end], -torch.inf)
        else:
            logits = logits + self.mask[:, :, begin:end, :end].double()
        out = torch.softmax(logits, -1) @ v
        real = torch.arange(begin, end) >= torch.tensor(self.pads)[:, None]
        return out.masked_fill(~real[:, None, :, None], 0)  # a padding query may see nothing


def settle(*states: LayerState) -> None:
    """Let everything leave the ring that may: steps of one token wait until there is no room."""
    for state in states:
        state.keeper.maintain()


def decoded(state: LayerState) -> tuple[Tensor, Tensor]:
    """Keys and values at their slots in float64, straight from the tensors' definition.

    Of pages of consecutive tokens: page n of a row and head is the one its table lists there.
    """
    layout, tensors = state.layout, state.tensors
    shape = (state.batch, state.heads, layout.max_tokens, layout.head_dim)
    out = []
    for side, exact, basis in (
        ("key", tensors.exact_keys, tensors.key_basis),
        ("value", tensors.exact_values, tensors.value_basis),
    ):
        dense = torch.zeros(shape, dtype=torch.float64)
        for b in range(state.batch):
            pad, length, coded = (int(tensors.meta[b, n]) for n in (PAD, LENGTH, CODED))
            assert coded % layout.page_tokens == 0
            for h in range(state.heads):
                ids = tensors.table[b, h, : coded // layout.page_tokens].long()
                records = page_records(tensors.pool[ids], layout, 0)
                x = vectors_of(records, side, basis, h, layout, state.dtype)
                for t in range(length):
                    i = t - layout.sinks
                    if i < 0:
                        row = exact[b, h, t]
                    elif i < coded:
                        row = x[i]
                    else:
                        row = exact[b, h, layout.sinks + i % layout.ring]
                    dense[b, h, pad + t] = row
        out.append(dense)
    return out[0], out[1]


def vectors_of(
    records: Records, side: str, basis: codes.Basis, h: int, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """[n, D] float64 of pages of head h in the only tier."""
    records = {name: x.flatten(0, 1) for name, x in records.items()}
    if layout.kind == "exact":
        return records[f"{side}s"].contiguous().view(dtype).double()
    digits = codes.unpack_digits(records[f"{side}_digits"]).double()
    # A radius is a float32 number by definition; the rest is exact here.
    radius = codes.decode_radius(records[f"{side}_radius"]).double()
    dims, shifts = basis.plan[h].long()
    weight = basis.grid[h, 0, 0].double()[dims] * 2.0**shifts
    back = basis.back[h].double()
    return (digits - 1.5) * weight @ back[:-1][dims] * radius + back[-1]


def fp32_bound(seq: Sequence) -> float:
    """How far float32 attention may be from float64: rounding of logits, exponentials and sums."""
    eps = torch.finfo(torch.float32).eps
    size = (seq.q.abs().double().amax((0, 1, 2)) @ seq.k.abs().double().amax((0, 1, 2))).item()
    logit_error = (seq.head_dim + 2) * eps * size * seq.scale
    return seq.v.abs().max().item() * (math.expm1(2 * logit_error) + (seq.tokens + 8) * eps)


@st.composite
def sequences(draw, masks: tuple[str, ...] = MASKS, padded: bool = True, **fixed) -> Sequence:
    """Chunks of any size, one-token steps likely, with padding that may span whole chunks."""
    chunks, room = [], SLOTS
    for _ in range(draw(st.integers(1, 8))):
        n = draw(st.one_of(st.just(1), st.integers(1, 40)))
        if n > room - 1:
            break
        chunks.append(n)
        room -= n
    chunks += [1] * draw(st.integers(0, room))
    form = draw(st.sampled_from(masks))
    batch = draw(st.integers(1, 3))
    may_pad = padded and form not in ("none", "broadcast")
    # No more padding than the first chunks together: a row that never starts is no sequence.
    most = min(30, sum(chunks) - 1) if may_pad else 0
    return Sequence(
        **{
            "chunks": chunks,
            "pads": draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch)),
            "heads": draw(st.integers(1, 2)),
            "group": draw(st.integers(1, 3)),
            "head_dim": 16,
            "mask_form": form,
            "settings": {
                "sinks": draw(st.integers(0, 5)),
                "recent": draw(st.integers(1, 20)),
                "page_tokens": draw(st.sampled_from([8, 16, 24])),
                "bits": draw(st.sampled_from([3.0, 4.0, 64.0])),
            },
            "seed": draw(st.integers(0, 1000)),
            **fixed,
        }
    )
