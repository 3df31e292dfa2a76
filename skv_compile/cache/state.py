"""One layer's compressed cache: tensors, their sizes, and what is done to them between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec.tiers import Tier, choose_tier, tiers
from ..config import Config
from ..errors import CacheStateError, ConfigError
from ..lowering import ops, reference
from ..lowering.codes import stored
from ..lowering.grid import grid_frame
from ..lowering.layout import Layout
from ..lowering.rings import ring_frame
from ..lowering.state import FLAGS, LENGTH, PAD, PAGES, State, page_ids, raise_flags, ring_tokens


class Undo(NamedTuple):
    """What a forward may have changed, as it was before."""

    meta: Tensor
    exact: tuple[Tensor, Tensor] | None
    frames: tuple[Tensor, ...]
    pool: Tensor | None


class LayerState:
    """The state of one attention layer: [B, H] lists of pages beside sinks and a ring.

    Args:
        config: codec and sizes.
        batch, heads, head_dim: of the keys and values.
        max_tokens: slots of the dense cache this stands for.
        dtype, device: of the model's keys and values.
        budget: most bytes of this layer, or None.
        turn: [2, D] plan of the model's rotary embedding (``lowering.turn``), if it has one.
        saved: with ``config.frame``: (heads, layout) -> this layer's eight frame tensors.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: int | None = None,
        turn: Tensor | None = None,
        saved: Callable[[int, Layout], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.config = config
        self.batch, self.heads = batch, heads
        self.dtype, self.device, self.budget = dtype, device, budget
        self.tier = self._choose(head_dim, max_tokens, budget, turn is not None)
        self._saved = saved
        if config.frame is not None:  # the frames are there: prompts fit none
            self.tier = replace(self.tier, layout=replace(self.tier.layout, calibrate=0))
        self.layout: Layout = self.tier.layout
        self.adopted = False  # stands in the place of a module's own buffer
        # A Cache layer's cumulative_length, undone with the rest.
        self.counter: Tensor | None = None
        empty = torch.empty(0, device=device)
        slots = (batch, heads, self.layout.exact_slots, head_dim)
        pages = batch * heads * self.layout.max_pages + 1  # the last is scratch
        self.tensors = State(
            torch.zeros(slots, dtype=dtype, device=device),
            torch.zeros(slots, dtype=dtype, device=device),
            torch.empty(pages, self.layout.page_bytes, dtype=torch.uint8, device=device),
            torch.zeros(batch, 4, dtype=torch.int64, device=device),
            turn.to(device) if self.layout.block and turn is not None else empty,
            *self._frames(),
        )

    def _choose(self, head_dim: int, max_tokens: int, budget: int | None, turned: bool) -> Tier:
        name = str(self.dtype).removeprefix("torch.")
        best = choose_tier(self.config, head_dim, max_tokens, name, turned)
        if budget is None:
            return best
        chosen, sizes = None, []
        for tier in tiers(self.config, head_dim, max_tokens, name, turned):
            sizes.append(self._bytes(tier.layout))
            if tier.rate <= best.rate and sizes[-1] <= budget:
                chosen = tier
        if chosen is None:
            window = 2 * best.layout.exact_slots * head_dim * self.dtype.itemsize
            raise ConfigError(
                f"budget of {budget} bytes a layer is too small: sinks and recent window alone "
                f"take {self.batch * self.heads * window}, the coarsest tier {min(sizes)} for "
                f"{max_tokens} tokens. Raise the budget, or lower max_cache_len, sinks or recent."
            )
        return chosen

    def _bytes(self, layout: Layout) -> int:
        """Bytes of a state with this layout, its own frames included."""
        dim, digits = layout.head_dim, layout.key_digits + layout.value_digits
        exact = 2 * layout.exact_slots * dim * self.dtype.itemsize
        frames = 0
        if layout.calibrate:
            frames = 2 * (2 * dim * dim + 2 * dim + digits * dim) + 4 * (6 * dim + 2 * digits)
        pages = self.batch * self.heads * layout.max_pages + 1
        return self.heads * (self.batch * exact + frames) + pages * layout.page_bytes

    def _frames(self) -> tuple[Tensor, ...]:
        if self.layout.kind == "exact":
            empty = torch.empty(0, device=self.device)
            return (empty,) * 8
        if self.config.frame is not None:
            if self._saved is None:
                raise ConfigError(
                    f"frame={self.config.frame!r}: a saved frame belongs to a transformers model "
                    "with a SphericalCache. Leave it out for other modules."
                )
            parts = self._saved(self.heads, self.layout)
            return tuple(x.to(self.device, copy=True) for x in parts)
        sides = (self.layout.key_digits, self.layout.value_digits)
        dim, own = self.layout.head_dim, self.layout.calibrate > 0
        if self.layout.kind == "rings":
            frames = [ring_frame(self.heads, dim, self.device)] * 2
        else:
            frames = [grid_frame(self.heads, dim, n, self.device) for n in sides]
        if own:
            frames = [stored(frame) for frame in frames]
        return tuple(x for frame in frames for x in frame)

    # ------------------------------------------------------------ what it is

    @property
    def signature(self) -> str:
        """Everything a compiled graph has baked in about this state."""
        return f"{self.layout.key}|{self.batch}x{self.heads}|{self.dtype}|{self.device}"

    @property
    def resident_bytes(self) -> int:
        """Bytes of every tensor held for this layer."""
        seen = {x.data_ptr(): x.numel() * x.element_size() for x in self.tensors if x.numel()}
        return sum(seen.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense cache that this one replaces."""
        tokens = self.batch * self.heads * self.layout.max_tokens
        return 2 * tokens * self.layout.head_dim * self.dtype.itemsize

    # ------------------------------------------------------------ what it does

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        causal: bool,
        scale: float,
    ) -> Tensor:
        return ops.attend(q, k, v, mask, position, *self.tensors, causal, scale, self.layout.key)

    def calibrate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor
    ) -> None:
        layout, frames = self.layout, self.tensors[5:]
        if 0 < layout.calibrate <= k.shape[2]:
            turn = self.tensors.turn
            ops.calibrate(q, k, v, mask, position, turn, *frames, layout.key)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor) -> None:
        ops.append(k, v, mask, position, *self.tensors, self.layout.key)

    def raise_flags(self, where: str) -> None:
        """Raise what the device flagged since the last check, and clear it."""
        flags = 0
        for value in self.tensors.meta[:, FLAGS].tolist():
            flags |= value
        if flags:
            self.tensors.meta[:, FLAGS] = 0
        raise_flags(flags, where)

    def reset(self) -> None:
        """Forget every token, and the frames fitted to them; memory and addresses stay."""
        self.tensors.meta.zero_()
        if self.layout.calibrate:
            for tensor, plain in zip(self.tensors[5:], self._frames(), strict=True):
                tensor.copy_(plain)

    def snapshot(self, tokens: int) -> Undo:
        """What :meth:`restore` needs to undo a forward of ``tokens`` tokens.

        One token that follows the others overwrites only a ring slot whose token has long been
        in a page. Where no counter says that it follows (a module's own buffers), everything
        that a new start would overwrite is kept.
        """
        exact = None
        if tokens > 1 or self.counter is None:
            exact = (self.tensors.exact_keys.clone(), self.tensors.exact_values.clone())
        fits = 0 < self.layout.calibrate <= tokens
        frames = tuple(x.clone() for x in self.tensors[5:]) if fits else ()
        pool = self.tensors.pool.clone() if tokens > 1 and self.counter is None else None
        return Undo(self.tensors.meta.clone(), exact, frames, pool)

    def restore(self, undo: Undo) -> None:
        self.tensors.meta.copy_(undo.meta)
        if undo.exact is not None:
            self.tensors.exact_keys.copy_(undo.exact[0])
            self.tensors.exact_values.copy_(undo.exact[1])
        for tensor, old in zip(self.tensors[5:], undo.frames, strict=False):
            tensor.copy_(old)
        if undo.pool is not None:
            self.tensors.pool.copy_(undo.pool)

    def crop(self, remove: int) -> None:
        """Drop the last ``remove`` tokens of every row.

        A page that is cut loses its dropped tokens; those that stay return to the ring as
        they were decoded.
        """
        meta, layout = self.tensors.meta, self.layout
        for row, (pad, length, pages, _) in enumerate(meta.tolist()):
            if remove > pad + length:
                raise CacheStateError(f"crop({-remove}): the cache has seen {pad + length} tokens.")
            left = max(0, length - remove)
            i = max(0, left - layout.sinks)
            if i < pages * layout.page_tokens:
                cut = i // layout.page_tokens
                self._reopen(row, cut, i - cut * layout.page_tokens)
                pages = cut
            pad = min(pad, pad + length - remove)
            meta[row, :FLAGS] = torch.tensor([pad, left, pages], device=meta.device)

    def _reopen(self, row: int, page: int, tokens: int) -> None:
        """Decode the first ``tokens`` tokens of a page of a row back into the ring."""
        if tokens == 0:
            return
        layout, state = self.layout, self.tensors
        first = torch.tensor([page], device=self.device)
        ids = page_ids(self.batch, self.heads, layout.max_pages, first, 1)[row]
        k, v = reference.decode_pages(state.pool[ids][None], first[None], state, layout)
        i = page * layout.page_tokens + torch.arange(tokens, device=self.device)
        slots = layout.sinks + i % layout.ring
        state.exact_keys[row, :, slots] = k[0, :, :tokens].to(self.dtype)
        state.exact_values[row, :, slots] = v[0, :, :tokens].to(self.dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] at their slots, zeros elsewhere. Allocates a dense layer."""
        layout, state = self.layout, self.tensors
        shape = (self.batch, self.heads, layout.max_tokens, layout.head_dim)
        out = tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        ring_i, ring_live = ring_tokens(state.meta, layout)
        for row, (pad, length, pages, _) in enumerate(state.meta.tolist()):
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            ids = page_ids(self.batch, self.heads, layout.max_pages, first, pages)[row]
            numbers = torch.arange(pages, device=self.device)[None]
            coded = reference.decode_pages(state.pool[ids][None], numbers, state, layout)
            sinks = min(layout.sinks, length)
            where = pad + layout.sinks + ring_i[row][ring_live[row]]
            for dense, exact, page in zip(out, state[:2], coded, strict=True):
                dense[row, :, pad : pad + sinks] = exact[row, :, :sinks]
                start = pad + layout.sinks
                dense[row, :, start : start + pages * layout.page_tokens] = page[0].to(self.dtype)
                dense[row, :, where] = exact[row, :, layout.sinks :][:, ring_live[row]]
        return out[0], out[1]

    def select(self, rows: Tensor) -> LayerState:
        """A state whose row n is row ``rows[n]`` of this one; itself if the batch stays."""
        if len(rows) == self.batch:
            target = self
        else:
            target = LayerState.__new__(LayerState)
            target.__dict__.update(self.__dict__, batch=len(rows))
            if self.budget is not None and target._bytes(self.layout) > self.budget:
                raise ConfigError(
                    f"{len(rows)} rows need {target._bytes(self.layout)} bytes a layer, and the "
                    f"budget leaves {self.budget}. Nothing was changed; raise the budget."
                )
        state, layout = self.tensors, self.layout
        per_row = state.pool[:-1].view(self.batch, -1, layout.page_bytes)
        exact = [x.index_select(0, rows) for x in (*state[:2], state.meta)]
        pool = torch.cat([per_row.index_select(0, rows).flatten(0, 1), state.pool[-1:]])
        if target is self:
            for old, new in zip((*state[:2], state.meta, state.pool), (*exact, pool), strict=True):
                old.copy_(new)
        else:
            target.tensors = State(exact[0], exact[1], pool, exact[2], *state[4:])
        return target


__all__ = ["LENGTH", "PAD", "PAGES", "LayerState", "Undo"]
