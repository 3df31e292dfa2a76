"""Pages brought to what has been decided: tokens at new levels, new tokens among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..lowering.state import State
from .decide import decide
from .heads import Heads
from .policies.base import Policy
from .recode import encode_tokens, join, relevel
from .tokens import Tokens, pages_for

if TYPE_CHECKING:
    from ..cache.pool import Pool

CHUNK_BYTES = 1 << 26  # of pages rewritten at once: what is needed twice for a moment


class Fresh(NamedTuple):
    """Tokens of a layer, or of several as the heads of one, that are to be coded: their vectors
    ``k``, ``v`` [B, H, n, D], ``tokens`` in the order of [B, H, n], and the ``state`` whose frames
    they are coded in."""

    layers: Sequence[int]
    tokens: Tokens
    k: Tensor
    v: Tensor
    state: State


class Shelf:
    """Rewrites the pages of a pool. ``states``: of all layers."""

    def __init__(
        self, pool: Pool, policy: Policy | None, heads: Heads, states: list[State]
    ) -> None:
        self.pool, self.policy, self.heads, self.states = pool, policy, heads, states
        #: How often it was decided anew, tokens then coded, and those of them coded anew.
        self.refreshes = self.coded = self.recoded = 0

    def rewrite(
        self,
        layers: Sequence[int],
        old: list[Tokens],
        fresh: list[Fresh],
        memo: dict[Any, Any],
        allowed: int,
    ) -> None:
        """Decide for all tokens of some layers together, and bring the pages to it.

        ``old``: of every tier, as the pool reads them, with their scores of now.
        """
        policy, heads = self.policy, self.heads
        assert policy is not None
        tokens = Tokens.cat([*old, *(f.tokens for f in fresh)])
        level = decide(policy, tokens, heads, memo, allowed)
        sizes = [len(x) for x in old] + [len(f.tokens) for f in fresh]
        parts = level.split(sizes)
        levels, added = parts[: len(old)], parts[len(old) :]
        self.refreshes += 1
        self.coded += sum(sizes[: len(old)])
        changed = torch.cat([x.level != lv for x, lv in zip(old, levels, strict=True)])
        self.recoded += int((changed & (torch.cat(levels) > 0)).sum())
        chunks = []
        for first, last in self._chunks(layers, fresh):
            masks = [self._within(x, first, last) for x in old]
            mine = [x[m] for x, m in zip(old, masks, strict=True)]
            own = [lv[m] for lv, m in zip(levels, masks, strict=True)]
            new = [x for x in zip(fresh, added, strict=True) if first <= x[0].layers[0] <= last]
            if not new and all(
                bool((x.level == lv).all()) for x, lv in zip(mine, own, strict=True)
            ):
                continue
            after = [x.at(lv) for x, lv in zip(mine, own, strict=True)]
            after += [f.tokens.at(lv) for f, lv in new]
            some = [n for n in layers if first <= n <= last]
            have = int((self.pool.table[some] >= 0).sum())
            growth = pages_for(Tokens.cat(after), heads.layout) - have
            chunks.append((growth, first, some, mine, own, new))
        # Who gives pages back goes first.
        for _, _, some, mine, own, new in sorted(chunks, key=lambda c: c[:2]):
            self.store(some, mine, own, new)

    def _chunks(self, layers: Sequence[int], fresh: Sequence[Fresh]) -> list[tuple[int, int]]:
        """Runs of layers, first and last, whose pages are rewritten together; of those whose fresh
        tokens are together, all or none."""
        pool = self.pool
        size = max(1, CHUNK_BYTES // max(1, pool.memory.nbytes // pool.layers))
        tied = {n: f.layers[0] for f in fresh if len(f.layers) > 1 for n in f.layers}
        chunks: list[list[int]] = []
        for layer in layers:
            last = chunks[-1] if chunks else []
            same = bool(last) and tied.get(last[-1]) == tied.get(layer)
            if same and (layer in tied or len(last) < size):
                last.append(layer)
            else:
                chunks.append([layer])
        return [(chunk[0], chunk[-1]) for chunk in chunks]

    def _within(self, tokens: Tokens, first: int, last: int) -> Tensor:
        layer = self.heads.layer(tokens.group)
        return (layer >= first) & (layer <= last)

    def store(
        self,
        layers: Sequence[int],
        old: list[Tokens],
        levels: list[Tensor],
        fresh: list[tuple[Fresh, Tensor]],
    ) -> None:
        """Rewrite the pages of some layers.

        ``old``, ``levels``: of every tier, all that the pool reads of these layers, and the
        levels they go to. ``fresh``: with theirs.
        """
        pool, layout = self.pool, self.heads.layout
        contents = []
        if any(len(x) for x in old):
            content = pool.read(layers)
            content.tokens = old
            contents.append(relevel(content, levels, self.states, self.heads))
        for part, level in fresh:
            tokens = part.tokens.at(level)
            contents.append(encode_tokens(tokens, part.k, part.v, part.state, layout))
        pool.release(layers)
        pool.write(join(contents, layout))
