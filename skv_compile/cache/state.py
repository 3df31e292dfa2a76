"""One layer's compressed cache: tensors, their sizes, and what is done to them between steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec.tiers import frames_of
from ..config import Config
from ..errors import CacheStateError, ConfigError, UnsupportedError
from ..lowering import ops, reference
from ..lowering.layout import Layout
from ..lowering.reference.intake import intake
from ..lowering.reference.pages import decode_records, page_records
from ..lowering.state import (
    CODED,
    FIRST_FRAME,
    FLAGS,
    State,
    raise_flags,
    ring_tokens,
)
from ..lowering.work import Work
from ..retention.arrival import Arrival
from ..retention.keeper import Keeper
from .home import make_keeper


class Undo(NamedTuple):
    """What a forward may have changed, as it was before."""

    meta: Tensor
    exact: tuple[Tensor, ...]
    frames: tuple[Tensor, ...]
    pages: tuple[Tensor, ...]


class LayerState:
    """The state of one attention layer: [B, H] lists of pages beside sinks and a ring.

    Args:
        config: codec and sizes.
        batch, heads, head_dim: of the keys and values.
        max_tokens: slots of the dense cache this stands for.
        dtype, device: of the model's keys and values.
        budget: most bytes of this layer, or None.
        turn: [2, D] plan of the model's rotary embedding (``lowering.turn``), if it has one.
        saved: with ``config.frame``: (heads, layout) -> this layer's nine frame tensors.
        group: query heads of a kv head.
        keeper: of the layers that share a pool; this one is the next. None: a pool of its own.
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
        group: int = 1,
        keeper: Keeper | None = None,
    ) -> None:
        self.config = config
        self.batch, self.heads, self.group = batch, heads, group
        self.dtype, self.device = dtype, device
        if keeper is None:
            shape = (batch, heads, head_dim, max_tokens, dtype, device)
            keeper = make_keeper(config, 1, *shape, group, budget, turn is not None)
        self.keeper, self.index = keeper, len(keeper.states)
        self.layout: Layout = keeper.layout
        self._saved = saved
        self.adopted = False  # stands in the place of a module's own buffer
        # A Cache layer's cumulative_length, undone with the rest.
        self.counter: Tensor | None = None
        layout, pool = self.layout, keeper.pool
        empty = torch.empty(0, device=device)
        slots = (batch, heads, layout.exact_slots, head_dim)
        queries = (batch, heads * group, layout.observed, head_dim)
        self.tensors = State(
            torch.zeros(slots, dtype=dtype, device=device),
            torch.zeros(slots, dtype=dtype, device=device),
            torch.zeros(queries, dtype=dtype, device=device),
            torch.zeros(batch, 4, dtype=torch.int64, device=device),
            pool.memory,
            pool.info,
            pool.table[self.index],
            *pool.schedule.of(self.index),
            turn.to(device) if layout.block and turn is not None else empty,
            *self._frames(),
        )
        keeper.states.append(self.tensors)

    def _frames(self) -> tuple[Tensor, ...]:
        if self.config.frame is None or self.layout.kind == "exact":
            return frames_of(self.layout, self.heads, self.device)
        if self._saved is None:
            raise ConfigError(
                f"frame={self.config.frame!r}: a saved frame belongs to a transformers model "
                "with a SphericalCache. Leave it out for other modules."
            )
        parts = self._saved(self.heads, self.layout)
        return tuple(x.to(self.device, copy=True) for x in parts)

    # ------------------------------------------------------------ what it is

    @property
    def signature(self) -> str:
        """Everything a compiled graph has baked in about this state."""
        pages = self.tensors.pool.shape[0]  # a budget changes nothing else
        heads = f"{self.batch}x{self.heads}x{self.group}"
        return f"{self.layout.key}|{heads}|{self.dtype}|{self.device}|{pages} pages"

    @property
    def own_bytes(self) -> int:
        """Bytes of this layer beside the pool: sinks, window, kept queries, frames."""
        own = [x for n, x in enumerate(self.tensors) if n not in SHARED and x.numel()]
        return sum({x.data_ptr(): x.nbytes for x in own}.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes held for this layer, and its part of the pool."""
        return self.own_bytes + self.keeper.pool.bytes // self.keeper.pool.layers

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense cache that this one replaces."""
        tokens = self.batch * self.heads * self.layout.max_tokens
        return 2 * tokens * self.layout.head_dim * self.dtype.itemsize

    # ------------------------------------------------------------ what it does

    def check_group(self, group: int, where: str) -> None:
        """Refuse an attention of another number of query heads a kv head than was made room for."""
        if group != self.group:
            raise UnsupportedError(
                f"{where}: {group} query heads attend to each kv head, and this cache was made for "
                f"{self.group}, as the model's config says. Correct num_attention_heads and "
                "num_key_value_heads of the config, or use a dense cache for this model."
            )

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
        layout, frames = self.layout, self.tensors[FIRST_FRAME:]
        if 0 < layout.calibrate <= k.shape[2]:
            turn = self.tensors.turn
            ops.calibrate(q, k, v, mask, position, turn, *frames, layout.key)

    def begin_calibration(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor
    ) -> Callable[[], None]:
        """:meth:`calibrate`, but frames are only written when the result is called."""
        form = (self.tensors.turn, self.layout)
        finish = reference.begin_calibration(q, k, v, mask, position, *form)
        return partial(finish, self.tensors[FIRST_FRAME:])

    def arrival(
        self, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor
    ) -> Arrival | None:
        """What a forward of several tokens brings, read on an accelerator before attention, which
        it would otherwise wait for; None where ``retain`` reads it."""
        if not k.is_cuda or k.shape[2] == 1:
            return None
        found = intake(k, v, mask, position, self.tensors.meta, self.layout)
        return Arrival(k, v, found, self.tensors, self.layout)

    def hold(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        scale: float,
    ) -> bool:
        """:meth:`calibrate` and :meth:`retain` of a forward that begins a sequence, later and
        together with other layers; False where this layer does not wait. ``Keeper.settle`` does
        what has been put off."""
        return self.keeper.hold(self.index, q, k, v, mask, position, scale)

    def retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        scale: float,
        state: State | None = None,
        arrival: Arrival | None = None,
    ) -> None:
        """What ``skv::retain`` does: keep a query of one token; of more tokens, take what the
        exact window will not hold. ``state``: the tensors as a graph has them. ``arrival``: of
        this forward, if it has been read."""
        state = self.tensors if state is None else state
        if k.shape[2] > 1:
            self.keeper.take(self.index, q, k, v, mask, position, state, scale, arrival)
        elif self.layout.observed:
            ops.retain(q, position, state.queries, state.meta, self.layout.key)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor) -> None:
        state = self.tensors
        ops.append(k, v, mask, position, *state[:4], self.layout.key)

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
        self.keeper.forget(self.index)
        if self.layout.calibrate:
            for tensor, plain in zip(self.tensors[FIRST_FRAME:], self._frames(), strict=True):
                tensor.copy_(plain)

    def snapshot(self, tokens: int) -> Undo:
        """What :meth:`restore` needs to undo a forward of ``tokens`` tokens.

        One token that follows the others overwrites only a ring slot whose token has long been
        in a page. Where no counter says that it follows (a module's own buffers), everything
        that a new start would overwrite is kept.
        """
        state = self.tensors
        exact: tuple[Tensor, ...] = ()
        if tokens > 1 or self.counter is None:
            exact = (state.exact_keys.clone(), state.exact_values.clone(), state.queries.clone())
        fits = 0 < self.layout.calibrate <= tokens
        frames = tuple(x.clone() for x in state[FIRST_FRAME:]) if fits else ()
        pages: tuple[Tensor, ...] = ()
        if tokens > 1 and self.counter is None and not self.layout.tracked:
            pages = (state.pool.clone(),)
        return Undo(state.meta.clone(), exact, frames, pages)

    def restore(self, undo: Undo) -> None:
        """Undo a forward. Coded tokens that it has moved to a lower tier stay there."""
        state = self.tensors
        self.keeper.drop_held()
        state.meta.copy_(undo.meta)
        self.keeper.drop_after(self.index, undo.meta[:, CODED])
        for tensor, old in zip(state[:3], undo.exact, strict=False):
            tensor.copy_(old)
        for tensor, old in zip(state[FIRST_FRAME:], undo.frames, strict=False):
            tensor.copy_(old)
        if undo.pages:
            state.pool.copy_(undo.pages[0])

    def crop(self, remove: int) -> None:
        """Drop the last ``remove`` tokens of every row.

        Where pages hold consecutive tokens, those of a page that is cut return to the ring as
        they were decoded.
        """
        self.keeper.settle()
        meta, layout = self.tensors.meta, self.layout
        for row, (pad, length, coded, _) in enumerate(meta.tolist()):
            if remove > pad + length:
                raise CacheStateError(f"crop({-remove}): the cache has seen {pad + length} tokens.")
            left = max(0, length - remove)
            i = max(0, left - layout.sinks)
            if i < coded:
                coded = i
                if not layout.tracked:
                    coded = i // layout.page_tokens * layout.page_tokens
                    self._reopen(row, coded, i - coded)
            pad = min(pad, pad + length - remove)
            meta[row, :FLAGS] = torch.tensor([pad, left, coded], device=meta.device)
        self.keeper.drop_after(self.index, meta[:, CODED])

    def _coded(self, row: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values [1, H, n, D] of pages of consecutive tokens of a row."""
        state, layout = self.tensors, self.layout
        size = layout.page_tokens
        ids = state.table[row, :, first // size : first // size + count].long()
        records = page_records(state.pool[ids][None], layout, 0)
        fields = {name: x.flatten(2, 3) for name, x in records.items()}
        i = first + torch.arange(count * size, device=self.device)
        return decode_records(fields, i[None, None], state, layout, 0)

    def _reopen(self, row: int, first: int, tokens: int) -> None:
        """Decode the ``tokens`` tokens of a row from ``first`` on back into the ring."""
        if tokens == 0:
            return
        layout, state = self.layout, self.tensors
        k, v = self._coded(row, first, 1)
        i = first + torch.arange(tokens, device=self.device)
        slots = layout.sinks + i % layout.ring
        state.exact_keys[row, :, slots] = k[0, :, :tokens].to(self.dtype)
        state.exact_values[row, :, slots] = v[0, :, :tokens].to(self.dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] at their slots, zeros elsewhere. Allocates a dense layer.

        Raises:
            CacheStateError: tokens have been dropped, and zeros would not do in their place.
        """
        self.keeper.settle()
        layout, state = self.layout, self.tensors
        if layout.tracked and bool(state.meta[:, CODED].any()):
            raise CacheStateError(
                f"retention={self.config.retention!r} has dropped tokens, so there are no dense "
                "keys and values to give. Use scaled_dot_product_attention, or retention='none'."
            )
        shape = (self.batch, self.heads, layout.max_tokens, layout.head_dim)
        out = tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        ring_i, ring_live = ring_tokens(state.meta, layout)
        for row, (pad, length, coded, _) in enumerate(state.meta.tolist()):
            pages = self._coded(row, 0, coded // layout.page_tokens)
            sinks = min(layout.sinks, length)
            where = pad + layout.sinks + ring_i[row][ring_live[row]]
            for dense, exact, page in zip(out, state[:2], pages, strict=True):
                dense[row, :, pad : pad + sinks] = exact[row, :, :sinks]
                start = pad + layout.sinks
                dense[row, :, start : start + coded] = page[0].to(self.dtype)
                dense[row, :, where] = exact[row, :, layout.sinks :][:, ring_live[row]]
        return out[0], out[1]

    def with_rows(self, keeper: Keeper, rows: Tensor) -> LayerState:
        """A state of the layers of ``keeper`` whose row n is row ``rows[n]`` of this one, pages
        apart; the frames stay."""
        shape = (len(rows), self.heads, self.layout.head_dim, self.layout.max_tokens)
        state = LayerState(
            self.config,
            *shape,
            self.dtype,
            self.device,
            saved=self._saved,
            group=self.group,
            keeper=keeper,
        )
        turn = State._fields.index("turn")
        state.tensors = State(*state.tensors[:turn], *self.tensors[turn:])
        keeper.states[state.index] = state.tensors
        state.take_rows(self, rows)
        return state

    def take_rows(self, source: LayerState, rows: Tensor) -> None:
        """Let row n be row ``rows[n]`` of another state, or of itself, pages apart."""
        for old, new in zip(self.tensors[:4], source.tensors[:4], strict=True):
            old.copy_(new.index_select(0, rows))


#: Places in ``State`` of what all layers share, or have a part of.
SHARED = {State._fields.index(name) for name in (*Work._fields, "pool", "info", "table")}

__all__ = ["SHARED", "LayerState", "Undo"]
