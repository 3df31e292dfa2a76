"""Retention at work: tokens leave the exact window, and the pool makes room for them.

Decisions are made between the steps of a model, once every ``stride`` tokens, for all layers
together; or, while a long forward passes, layer by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowering.layout import PAGE_HEADER, Layout
from ..lowering.reference.intake import Intake, Sources, intake
from ..lowering.reference.pages import encode_records, page_bytes
from ..lowering.state import CODED, LENGTH, State
from .budget import Rule
from .decide import Arriving, decide, steps_for
from .evidence import Exact, forward_queries, kept_queries, ring_queries
from .heads import Heads
from .judge import Judge
from .policies.base import Policy
from .recode import encode_tokens, join, relevel
from .tokens import Content, Tokens, pages_for

if TYPE_CHECKING:
    from ..cache.pool import Pool

CHUNK_BYTES = 1 << 25  # of codes rewritten at once


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
        self._memo: dict[Any, Any] = {}
        self._arriving = Arriving(heads)
        self._last_layer = -1  # that the forward in progress has gone through
        self.refreshes = self.recoded = self.coded = 0  # tokens coded anew, and there, so far

    # ------------------------------------------------------------ between steps

    def tick(self, tokens: int) -> None:
        """Before a forward of ``tokens`` tokens: make room for them in the ring.

        It is counted here, so that the device is asked only when a stride may be full.
        """
        stride = self.layout.stride
        if self._ahead + tokens > stride:
            self._ahead = self.maintain()
        self._ahead = min(stride, self._ahead + tokens)

    def forget(self, layer: int) -> None:
        """Drop every token of a layer."""
        self.pool.release(slice(layer, layer + 1))
        self.judge.forget(layer)
        self._ahead = self.layout.stride

    def maintain(self) -> int:
        """Move the strides that are full into pages. Returns the most tokens that still wait."""
        layout = self.layout
        table = torch.stack([s.meta for s in self.states]).tolist()
        waits, due = 0, []
        for layer, rows in enumerate(table):
            moved = 0
            for row in rows:
                beyond = max(0, row[LENGTH] - layout.sinks - layout.recent)
                end = max(row[CODED], beyond // layout.stride * layout.stride)
                moved = max(moved, end - row[CODED])
                waits = max(waits, beyond - end)
            if layout.tracked and not any(row[CODED] for row in rows):
                self.pool.release(slice(layer, layer + 1))  # a sequence that began anew
            if moved:
                due.append(layer)
        if due:
            with torch.no_grad():
                self._move(due)
        return waits

    def _move(self, due: list[int]) -> None:
        """Take what waits in the rings of some layers into pages."""
        old: dict[int, Tokens] = {}
        fresh: dict[int, tuple[Tokens, Tensor, Tensor]] = {}
        for layer in range(len(self.states)):
            state = self.states[layer]
            if layer in due:
                k, v, i, live = self._waiting(state)
                if not self.layout.tracked:
                    self._encode_whole(layer, state, k, v, i, live)
                    continue
            content = self.pool.read(slice(layer, layer + 1))
            if layer in due:
                queries, exact = ring_queries(state, self.layout)
                at = self.layout.sinks + i % self.layout.ring
                old[layer], tokens = self.judge.judge(
                    layer, state, queries, exact, content, (k, v, i, live, at), prompt=False
                )
                fresh[layer] = (tokens, k, v)
            else:
                old[layer] = Tokens.cat(content.tokens)
        if self.layout.tracked:
            total = sum(self._coded(s.meta, layer in due) for layer, s in enumerate(self.states))
            self._rewrite(old, fresh, self.rule.pages(total * self.pool.heads, self.pool.pages))
        for layer in due:
            meta = self.states[layer].meta
            meta[:, CODED] = self._end(meta)

    def _coded(self, meta: Tensor, due: bool) -> int:
        return int((self._end(meta) if due else meta[:, CODED]).sum())

    def _end(self, meta: Tensor) -> Tensor:
        """[B]: where the coded tokens end once every full stride has been moved."""
        layout = self.layout
        beyond = (meta[:, LENGTH] - layout.sinks - layout.recent).clamp(min=0)
        return torch.maximum(meta[:, CODED], beyond // layout.stride * layout.stride)

    def _waiting(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of a ring that are due: k, v [B, H, n, D], i [B, n], live [B, n]."""
        layout, meta = self.layout, state.meta
        end = self._end(meta)
        n = int((end - meta[:, CODED]).max())
        i = meta[:, CODED, None] + torch.arange(n, device=meta.device)
        slots = layout.sinks + i % layout.ring
        at = slots[:, None, :, None].expand(-1, self.pool.heads, -1, layout.head_dim)
        k, v = state.exact_keys.gather(2, at), state.exact_values.gather(2, at)
        return k, v, i, i < end[:, None]

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
    ) -> None:
        """Of a forward of several tokens, store what the exact window will not keep.

        Called between ``attend`` and ``append``. ``state``: the tensors of the layer.

        Raises:
            NonFiniteError, CapacityError, CacheStateError: as ``append``, before it.
        """
        layout = self.layout
        found = intake(k, v, mask, position, state.meta, layout)
        if k.is_cuda and bool(found.bad):
            return  # append says so
        empty = not bool(found.coded.any())
        if empty:
            self.forget(layer)
        if layer <= self._last_layer:  # a new forward
            self._memo, self._arriving = {}, Arriving(self.heads)
        self._last_layer, self._ahead = layer, layout.stride
        n = int((found.new_coded - found.coded).max())
        if n > 0:
            sources = Sources(k, v, state.exact_keys, state.exact_values, found, layout)
            i = found.coded[:, None] + torch.arange(n, device=k.device)
            live = i < found.new_coded[:, None]
            moved = sources.pick(torch.where(live, i, found.new_coded[:, None] - 1).clamp(min=0))
            if not layout.tracked:
                self._encode_whole(layer, state, *moved, i, live)
            else:
                policy = self.policy
                assert policy is not None
                self.heads.scale = scale
                way = policy.queries if empty else "last"
                queries = forward_queries(q, found, layout, way if policy.queries else "")
                exact = Exact.of_forward(k, v, found, sources, state, layout)
                content = self.pool.read(slice(layer, layer + 1))
                old, fresh = self.judge.judge(
                    layer,
                    state,
                    queries,
                    exact,
                    content,
                    (*moved, i, live, layout.sinks + i),
                    empty,
                )
                self._admit(layer, old, (fresh, *moved), found)
        if layout.observed:
            kept_queries(q, found, state, layout)

    def _admit(
        self, layer: int, old: Tokens, fresh: tuple[Tokens, Tensor, Tensor], found: Intake
    ) -> None:
        """Store the tokens of one layer, and once all are known, settle between them."""
        pool, heads, policy = self.pool, self.heads, self.policy
        assert policy is not None
        # Every layer comes to as many tokens as this one.
        total = int(found.new_coded.sum()) * pool.heads * heads.layers
        allowed = self.rule.pages(total, pool.pages)
        both = Tokens.cat([old, fresh[0]])
        if policy.scope == "all":
            level = self._arriving.levels(steps_for(policy, both, heads, self._memo), allowed)
        else:
            level = decide(policy, both, heads, self._memo, allowed)
        own = int((pool.table[layer] >= 0).sum())
        need = pages_for(both.at(level), self.layout)
        if need > pool.free + own and policy.scope == "all":
            # The layers before this one give way, to more than it needs, so that it is seldom.
            before = {n: self._tokens(n) for n in range(len(self.states)) if n != layer}
            room = max(0, pool.pages - max(2 * need, pool.pages // 8))
            self._rewrite(before, {}, room)
        if need > pool.free + own:
            level = decide(policy, both, heads, self._memo, pool.free + own, 1 / heads.layers)
        n = len(old)
        self._store({layer: (old, level[:n])}, {layer: (*fresh, level[n:])})
        if layer == len(self.states) - 1 and policy.scope == "all":
            self._rewrite({n: self._tokens(n) for n in range(len(self.states))}, {}, allowed)

    def _tokens(self, layer: int) -> Tokens:
        return Tokens.cat(self.pool.read(slice(layer, layer + 1), codes=False).tokens)

    # ------------------------------------------------------------ pages

    def _rewrite(
        self,
        old: dict[int, Tokens],
        fresh: dict[int, tuple[Tokens, Tensor, Tensor]],
        allowed: int,
    ) -> None:
        """Decide for all these tokens together, and bring the pages to it."""
        policy, pool, layout = self.policy, self.pool, self.layout
        assert policy is not None
        tokens = Tokens.cat([*old.values(), *(f[0] for f in fresh.values())])
        memo = self._memo = {}
        level = decide(policy, tokens, self.heads, memo, allowed)
        parts = iter(
            level.split([len(x) for x in old.values()] + [len(f[0]) for f in fresh.values()])
        )
        levels = {n: (x, next(parts)) for n, x in old.items()}
        added = {n: (*f, next(parts)) for n, f in fresh.items()}
        self.refreshes += 1
        self.coded += sum(len(x) for x in old.values())
        self.recoded += sum(int((new != x.level).sum()) for x, new in levels.values())
        size = max(1, CHUNK_BYTES // max(1, pool.memory.nbytes // max(1, pool.layers)))
        chunks = []
        for first in range(0, len(self.states), size):
            part = range(first, min(first + size, len(self.states)))
            mine = {n: levels[n] for n in part if n in levels}
            new = {n: added[n] for n in part if n in added}
            unchanged = all(bool((x.level == lv).all()) for x, lv in mine.values())
            if not new and unchanged:
                continue
            after = [x.at(lv) for x, lv in mine.values()] + [f[0].at(f[3]) for f in new.values()]
            have = int((pool.table[list(mine)] >= 0).sum())
            growth = pages_for(Tokens.cat(after), layout) - have
            chunks.append((growth, first, mine, new))
        # Who gives pages back goes first.
        for _, _, mine, new in sorted(chunks, key=lambda c: c[:2]):
            self._store(mine, new)

    def _store(
        self,
        old: dict[int, tuple[Tokens, Tensor]],
        fresh: dict[int, tuple[Tokens, Tensor, Tensor, Tensor]],
    ) -> None:
        """Rewrite the pages of some layers: old tokens with their new scores at new levels,
        and fresh ones. All coded tokens of these layers are among ``old``, as they are read."""
        pool, layout = self.pool, self.layout
        contents: list[Content] = []
        layers = sorted(old.keys() | fresh.keys())
        for layer in layers:
            if layer in old:
                content = pool.read(slice(layer, layer + 1))
                tokens, level = old[layer]
                sizes = [len(x) for x in content.tokens]
                order = torch.arange(len(tokens), device=level.device).split(sizes)
                content.tokens = [tokens[index] for index in order]
                contents.append(relevel(content, level.split(sizes), self.states, self.heads))
            if layer in fresh:
                tokens, k, v, level = fresh[layer]
                state = self.states[layer]
                contents.append(encode_tokens(tokens.at(level), k, v, state, layout))
        for layer in layers:
            pool.release(slice(layer, layer + 1))
        pool.write(join(contents, layout))

    def _encode_whole(
        self, layer: int, state: State, k: Tensor, v: Tensor, i: Tensor, live: Tensor
    ) -> None:
        """Code whole pages of consecutive tokens where they have always had their place."""
        layout, pool = self.layout, self.pool
        size = layout.page_tokens
        records = encode_records(k, v, i[:, None], state, layout, 0)
        paged = {name: x.unflatten(2, (-1, size)) for name, x in records.items()}
        pages = page_bytes(paged, layout, 0)
        there = live[:, ::size]
        number = (i[:, ::size] // size).clamp(max=layout.max_pages - 1)
        at = pool.table[layer].gather(2, number[:, None].expand(-1, pool.heads, -1)).long()
        chosen = there[:, None].expand_as(at)
        pool.memory[at[chosen]] = pages[chosen]

    def drop_after(self, layer: int, end: Tensor) -> None:
        """Drop a layer's coded tokens i >= end [B]."""
        if not self.layout.tracked:
            return
        tokens = self._tokens(layer)
        row = tokens.group // self.pool.heads % self.pool.batch
        level = torch.where(tokens.i < end.to(row.device)[row], tokens.level, 0)
        self._store({layer: (tokens, level)}, {})

    # ------------------------------------------------------------ rows, and what it costs

    def select(self, source: Keeper, rows: Tensor) -> None:
        """Let the pages of row n be those of row ``rows[n]`` of another keeper, or of itself."""
        pool, theirs = self.pool, source.pool
        self._ahead = self.layout.stride
        for n in range(source.heads.groups // (source.heads.batch * source.heads.heads)):
            self.judge.copy(source.judge, n, rows)
        if not self.layout.tracked:
            shape = (theirs.layers, theirs.batch, -1, self.layout.page_bytes)
            chosen = theirs.memory.view(shape).index_select(1, rows)
            pool.memory.copy_(chosen.reshape(pool.memory.shape))
            return
        contents = []
        for layer in range(len(source.states)):
            content = theirs.read(slice(layer, layer + 1))
            contents.append(_select(content, layer, rows, theirs, self.layout))
        pool.release(slice(0, pool.layers))
        whole = join(contents, self.layout)
        tokens = Tokens.cat(whole.tokens)
        if pages_for(tokens, self.layout) > pool.free:
            policy = self.policy
            assert policy is not None
            level = decide(policy, tokens, self.heads, {}, pool.free)
            whole = relevel(
                whole, level.split([len(x) for x in whole.tokens]), source.states, self.heads
            )
        pool.write(whole)

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
        pages = self.pool.used * (layout.page_bytes + PAGE_HEADER)
        most = 2 * layout.head_dim * self.heads.groups * layout.max_coded
        return pages + int(self.rule.table_bytes * self.coordinates / max(1, most))

    def summary(self) -> dict[str, Any]:
        """What the pool holds, as plain numbers."""
        if not self.layout.tracked:
            return {}
        tokens = Tokens.cat(self.pool.read(slice(0, self.pool.layers), codes=False).tokens)
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


def _select(content: Content, layer: int, rows: Tensor, pool: Pool, layout: Layout) -> Content:
    """A layer's content with rows repeated and renumbered for as many rows as ``rows``."""
    batch, heads = pool.batch, pool.heads
    copies = []
    for new, old in enumerate(rows.tolist()):
        parts, fields = [], []
        for tokens, records in zip(content.tokens, content.records, strict=True):
            mine = (tokens.group // heads % batch == old).nonzero().squeeze(1)
            part = tokens[mine]
            part.group = (layer * len(rows) + new) * heads + part.group % heads
            parts.append(part)
            fields.append({name: x[mine] for name, x in records.items()})
        copies.append(Content(parts, fields))
    return join(copies, layout)
