"""Retention at work: tokens leave the exact window, and the pool makes room for them.

Decisions are made between the steps of a model, once every ``stride`` tokens, for all layers
together; or, while a long forward passes, for the layers that have come so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowering.layout import PAGE_HEADER, Layout
from ..lowering.prompt import on_kernels
from ..lowering.reference.intake import Intake, intake
from ..lowering.state import CODED, FIRST_FRAME, FLAG_LOST, FLAGS, LENGTH, State
from .arrival import Arrival
from .budget import Rule
from .bundle import Bundle, joined
from .decide import Arriving, decide, steps_for
from .evidence import Queries, forward_queries, kept_queries, ring_queries, waiting
from .heads import Heads
from .judge import Judge
from .policies.base import ARRIVING, Policy
from .recode import measured, store_whole
from .shelf import Fresh, Shelf
from .tokens import Content, Tokens, pages_for

if TYPE_CHECKING:
    from ..cache.pool import Pool


class Keeper:
    """Keeps the tokens of a pool's layers.

    ``states``: tensors of the layers, in order. ``policy``: None keeps every token in the only
    tier.
    """

    def __init__(self, pool: Pool, policy: Policy | None, heads: Heads, rule: Rule) -> None:
        self.pool, self.policy, self.heads, self.rule = pool, policy, heads, rule
        self.layout: Layout = pool.layout
        self.states: list[State] = []
        self.judge = Judge(policy, heads)
        self._ahead = 0  # tokens that may wait in the ring beyond the recent window
        self._memo: dict[Any, Any] = {ARRIVING: True}
        self._arriving = Arriving(heads)
        self._last_layer = -1  # that the forward in progress has gone through
        #: Bytes that all of this may take, where a budget says so.
        self.budget: int | None = None
        #: How many compiled graphs have run on these layers.
        self.graphs = 0
        self._bundle: Bundle | None = None
        self._apart = False  # layers of this forward do not go together: their masks differ
        self._way = "" if policy is None else policy.queries
        self.shelf = Shelf(pool, policy, heads, self.states)

    # ------------------------------------------------------------ between steps

    def tick(self, tokens: int) -> None:
        """Before a forward of ``tokens`` tokens: make room for them in the ring.

        It is counted here, so that the device is asked only when a stride may be full.
        """
        self.settle()
        stride = self.layout.stride
        if self._ahead + tokens > stride:
            self._ahead = self.maintain()
        self._ahead = min(stride, self._ahead + tokens)
        if tokens == 1 and self.pool.schedule.stale:
            coded = torch.stack([s.meta[:, CODED] for s in self.states])
            pool = self.pool
            pool.schedule.refresh(pool.table[: len(coded)], pool.memory, pool.info, coded)

    def full(self) -> None:
        """Look before the next forward whether strides wait: what rings hold was not counted."""
        self._ahead = self.layout.stride

    def forget(self, layer: int) -> None:
        """Drop every token of a layer."""
        self.settle()
        self._forget([layer])

    def _forget(self, layers: Sequence[int]) -> None:
        self.pool.release(layers)
        for layer in layers:
            self.judge.forget(layer)
        self.full()

    def maintain(self) -> int:
        """Move the strides that are full into pages. Returns the most tokens that still wait."""
        self.settle()
        layout = self.layout
        metas = torch.stack([s.meta for s in self.states]).cpu()
        coded, end = metas[..., CODED], self._end(metas)
        for layer in (coded == 0).all(1).nonzero().flatten().tolist():
            self.pool.release([layer])  # a sequence that began anew
            self.judge.forget(layer)
        due = (end > coded).any(1).nonzero().flatten().tolist()
        waits = max(0, int((metas[..., LENGTH] - layout.sinks - layout.recent - end).max()))
        if due:
            with torch.no_grad():
                self._move(due)
        return waits

    def _move(self, due: list[int]) -> None:
        """Take what waits in the rings of some layers into pages."""
        old: list[list[Tokens]] = []
        fresh: list[Fresh] = []
        for layer, state in enumerate(self.states):
            if layer in due:
                k, v, i, live = waiting(state, self._end(state.meta), self.layout)
                if not self.layout.tracked:
                    rows = torch.stack([state.meta[:, CODED], self._end(state.meta)]).tolist()
                    store_whole(self.pool, [layer], state, k, v, i, *rows)
                    continue
                content = self.pool.read([layer])
                queries, exact = ring_queries(state, self.layout)
                at = self.layout.sinks + i % self.layout.ring
                tokens = self.judge.judge(
                    [layer], state, queries, exact, content, (k, v, i, live, at), prompt=False
                )
                fresh.append(Fresh([layer], tokens, k, v, state))
                old.append(content.tokens)
            elif self.layout.tracked:
                old.append(self.pool.read([layer], codes=False).tokens)
        if self.layout.tracked:
            total = sum(self._coded(s.meta, layer in due) for layer, s in enumerate(self.states))
            allowed = self.rule.pages(total * self.pool.heads, self.pool.pages)
            by_tier = [Tokens.cat(list(parts)) for parts in zip(*old, strict=True)]
            self._memo = {}
            self.shelf.rewrite(self._every, by_tier, fresh, self._memo, allowed)
        for layer in due:
            meta = self.states[layer].meta
            meta[:, CODED] = self._end(meta)
        self.pool.schedule.changed()

    def _coded(self, meta: Tensor, due: bool) -> int:
        return int((self._end(meta) if due else meta[:, CODED]).sum())

    def _end(self, meta: Tensor) -> Tensor:
        """Of meta [..., 4]: where the coded tokens end once every full stride has been moved."""
        layout = self.layout
        beyond = (meta[..., LENGTH] - layout.sinks - layout.recent).clamp(min=0)
        return torch.maximum(meta[..., CODED], beyond // layout.stride * layout.stride)

    # ------------------------------------------------------------ while a forward passes

    def take(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        state: State,
        scale: float,
        arrival: Arrival | None = None,
    ) -> None:
        """Of a forward of several tokens, store what the exact window will not keep.

        Called between ``attend`` and ``append``. ``state``: the tensors of the layer. ``arrival``:
        of this forward, if it has been read.

        Raises:
            NonFiniteError, CapacityError, CacheStateError: as ``append``, before it.
        """
        self.settle()
        layout = self.layout
        if arrival is None:
            found = intake(k, v, mask, position, state.meta, layout)
            arrival = Arrival(k, v, found, state, layout)
        queries = forward_queries(q, arrival.found, layout, self._way)
        self._take([layer], queries, state, scale, arrival)
        if layout.observed and not arrival.bad:
            kept_queries(q, arrival.found, state, layout)

    def hold(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        scale: float,
    ) -> bool:
        """:meth:`take` of a forward that begins a sequence, and the fit of its frames, later and
        together with those of the layers after it (``Bundle``); ``append`` may then come at once.
        False where there is nothing to do together.

        Raises:
            NonFiniteError, CapacityError, CacheStateError: as ``append`` does.
        """
        layout, state, tokens = self.layout, self.states[layer], k.shape[2]
        bundle = self._bundle
        if layer <= self._last_layer:
            self._apart = False
        if bundle is None or not bundle.takes(layer, k, mask, scale):
            self._apart |= bundle is not None and bundle.count == 1
            self.settle()
            most = Bundle.size(q, k, self.pool.layers - layer)
            fits = 0 < layout.calibrate <= tokens
            if most == 1 or self._apart or not (fits or tokens > layout.exact_slots):
                return False
            found = intake(k, v, mask, position, state.meta, layout)
            form = (self._way, scale, layout)
            bundle = self._bundle = Bundle(layer, most, k, mask, position, found, *form)
        bundle.add(q, k, v)
        if layout.observed:
            kept_queries(q, bundle.found, state, layout)
        return True

    def settle(self, complete: bool = False) -> None:
        """Do now what :meth:`hold` has put off; ``complete``: if no layer can join any more."""
        bundle = self._bundle
        if bundle is None or (complete and not bundle.full):
            return
        self._bundle = None
        states = [self.states[n] for n in bundle.layers]
        try:
            with torch.no_grad():
                self._work_on(bundle, states)
        except BaseException:  # an interruption too: these layers count tokens that no page has
            for state in states:
                state.meta[:, FLAGS] |= FLAG_LOST
            raise

    def _work_on(self, bundle: Bundle, states: list[State]) -> None:
        for state, frames in zip(states, bundle.fit(states[0].turn), strict=False):
            for old, new in zip(state[FIRST_FRAME:], frames, strict=True):
                old.copy_(new)
        state = joined(states)
        failed = torch.stack([s.meta[:, FLAGS] for s in states]).any()
        arrival = Arrival(bundle.k, bundle.v, bundle.found, state, self.layout, failed)
        self._take(bundle.layers, bundle.queries(), state, bundle.scale, arrival)

    def drop_held(self) -> None:
        """Forget what :meth:`hold` has put off: the forward is undone."""
        self._bundle = None

    def _take(
        self,
        layers: Sequence[int],
        queries: Queries,
        state: State,
        scale: float,
        arrival: Arrival,
    ) -> None:
        """Store what leaves the exact window of a layer, or of several as the heads of one."""
        layout = self.layout
        if arrival.bad:
            return  # append says so
        if arrival.first:
            self._forget(layers)
        if layers[0] <= self._last_layer:  # a new forward
            self._memo, self._arriving = {ARRIVING: True}, Arriving(self.heads)
        self._last_layer, self._ahead = layers[-1], layout.stride
        self.pool.schedule.changed()
        if arrival.count > 0:
            if layout.tracked:
                self.heads.scale = scale
                self._judge_new(layers, state, queries, arrival)
            else:
                ends = arrival.begin, arrival.end
                store_whole(self.pool, layers, state, *arrival.leaving(), *ends)

    def _judge_new(
        self, layers: Sequence[int], state: State, queries: Queries, arrival: Arrival
    ) -> None:
        """Judge and store the tokens that leave the exact window."""
        layout, found, whole = self.layout, arrival.found, arrival.whole
        k, v, i = arrival.leaving()
        if arrival.first:
            content = Content.none(len(layout.tiers), k.device)
        else:
            content = self.pool.read(layers)
        kernels = layout.kind == "digits" and on_kernels(k)
        exact = whole if whole is not None and kernels else arrival.exact()
        place = (k, v, i, i < found.new_coded[:, None], layout.sinks + i)
        tokens = self.judge.judge(layers, state, queries, exact, content, place, arrival.first)
        self._admit(content.tokens, Fresh(layers, tokens, k, v, state), found)

    def _admit(self, old: list[Tokens], fresh: Fresh, found: Intake) -> None:
        """Store the tokens of some layers, and once all are known, settle between them."""
        pool, heads, policy, layers = self.pool, self.heads, self.policy, fresh.layers
        assert policy is not None
        # Every layer comes to as many tokens as these.
        total = int(found.new_coded.sum()) * pool.heads * heads.layers
        allowed = self.rule.pages(total, pool.pages)
        first, last = layers[0], layers[-1]
        both = Tokens.cat([*old, fresh.tokens])
        if policy.scope == "all":
            steps = steps_for(policy, both, heads, self._memo)
            level = self._arriving.levels(steps, heads.layer(both.group), layers, allowed)
            if last == heads.layers - 1:  # every layer is known
                most = level[len(level) - len(fresh.tokens) :]
                coded = measured(fresh.tokens, fresh.k, fresh.v, most, fresh.state, self.layout)
                fresh = fresh._replace(tokens=coded)
                before = self._tokens(self._every[:first])
                every = [Tokens.cat([*pair]) for pair in zip(before, old, strict=True)]
                self.shelf.rewrite(self._every, every, [fresh], self._memo, allowed)
                return
        else:
            level = decide(policy, both, heads, self._memo, allowed)
        own = int((pool.table[first : last + 1] >= 0).sum())
        need = pages_for(both.at(level), self.layout)
        if need > pool.free + own and policy.scope == "all":
            # The other layers give way, to more than these need, so that it is seldom.
            others = [n for n in self._every if n not in layers]
            short = need - pool.free - own + pool.pages // 16
            room = pool.used - own - short
            if not bool((found.coded > 0).any()):  # of a prompt, the layers to come count too
                room = min(room, self._arriving.part(first, pool.pages))
            room = max(0, room)
            self.shelf.rewrite(others, self._tokens(others), [], self._memo, room)
        if need > pool.free + own:
            part = len(layers) / heads.layers
            level = decide(policy, both, heads, self._memo, pool.free + own, part)
        sizes = [len(x) for x in old]
        *levels, new = level.split([*sizes, len(fresh.tokens)])
        self.shelf.store(layers, old, list(levels), [(fresh, new)])

    @property
    def _every(self) -> list[int]:
        return list(range(len(self.states)))

    def _tokens(self, layers: list[int]) -> list[Tokens]:
        return self.pool.read(layers, codes=False).tokens

    # ------------------------------------------------------------ pages

    def drop_after(self, layer: int, end: Tensor) -> None:
        """Drop a layer's coded tokens i >= end [B]."""
        self.settle()
        self.pool.schedule.changed()
        if not self.layout.tracked:
            return
        tokens = self._tokens([layer])
        end = end.to(self.pool.device)
        levels = [
            torch.where(t.i < end[t.group // self.pool.heads % self.pool.batch], t.level, 0)
            for t in tokens
        ]
        if any(bool((lv == 0).any()) for lv in levels):
            self.shelf.store([layer], tokens, levels, [])

    # ------------------------------------------------------------ what it costs

    @property
    def bytes(self) -> int:
        """Bytes of the pool and of what is known of the heads."""
        return self.pool.bytes + (self.heads.bytes if self.layout.tracked else 0)

    @property
    def coordinates(self) -> int:
        """Coordinates of all tokens that have left the exact window."""
        tokens = sum(int(state.meta[:, CODED].sum()) for state in self.states)
        return 2 * self.layout.head_dim * self.pool.heads * tokens

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use, of what describes them, and that part of the page lists."""
        layout = self.layout
        if not layout.tracked:
            tokens = sum(int(state.meta[:, CODED].sum()) for state in self.states)
            return tokens * self.pool.heads // layout.page_tokens * layout.page_bytes
        self.settle()
        pages = self.pool.used * (layout.page_bytes + PAGE_HEADER)
        most = 2 * layout.head_dim * self.heads.groups * layout.max_coded
        return pages + int(self.rule.table_bytes * self.coordinates / max(1, most))

    def summary(self) -> dict[str, Any]:
        """What the pool holds, as plain numbers."""
        if not self.layout.tracked:
            return {}
        self.settle()
        tokens = Tokens.cat(self.pool.read(range(self.pool.layers), codes=False).tokens)
        counts = torch.bincount(tokens.level, minlength=self.heads.tiers + 1)[1:].tolist()
        seen = self.coordinates // (2 * self.layout.head_dim)
        stored = sum(n * size for n, size in zip(counts, self.layout.record_bytes, strict=True))
        room = self.pool.used * self.layout.page_bytes
        return {
            "pages": self.pool.pages,
            "pages_used": self.pool.used,
            "fragmentation": 1 - stored / room if room else 0.0,
            "tokens_by_tier": counts,
            "tokens_dropped": seen - sum(counts),
        }
