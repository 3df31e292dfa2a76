"""Scores of tokens, and what is known of their heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lowering.reference.pages import frame_lengths
from ..lowering.state import State
from .evidence import Exact, Queries, Whole
from .heads import Heads
from .observe import Evidence, look, look_at_prompt
from .policies.base import Policy
from .tokens import Content, Tokens

SURPRISE_DECAY = 0.9  # of Heads.surprise at every refresh


class Judge:
    """Turns what queries see into scores, as the policy says, and keeps ``heads`` up to date."""

    def __init__(self, policy: Policy | None, heads: Heads) -> None:
        self.policy, self.heads = policy, heads
        self._known: set[int] = set()

    def forget(self, layer: int) -> None:
        """A layer begins anew."""
        self._known.discard(layer)

    def copy(self, other: Judge, layer: int, rows: Tensor) -> None:
        """Know of row n of a layer what another judge knows of row ``rows[n]``."""
        mine, theirs = self.heads, other.heads
        if layer in other._known:
            self._known.add(layer)
        for name in ("query_energy", "norm", "spread", "surprise"):
            old = getattr(theirs, name).view(theirs.layers, theirs.batch, theirs.heads)[layer]
            new = getattr(mine, name).view(mine.layers, mine.batch, mine.heads)[layer]
            new.copy_(old.index_select(0, rows))
        for name in ("key_loss", "key_size", "value_loss", "value_size", "value_energy"):
            getattr(mine, name).copy_(getattr(theirs, name))
        mine.scale = theirs.scale

    def judge(
        self,
        layers: Sequence[int],
        state: State,
        queries: Queries,
        exact: Exact | Whole,
        content: Content,
        moved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        prompt: bool,
    ) -> Tokens:
        """The tokens of a layer that are to be coded, in the order of [B, H, n], at level 0
        where not live; those of ``content`` get their new scores.

        ``moved``: k, v [B, H, n, D], i, live [B, n] of the former, and where [B, n] they stand
        in ``exact``. Several layers that begin a sequence are judged as the heads of one.
        """
        policy, heads = self.policy, self.heads
        assert policy is not None
        k, v, i, live, at = moved
        numbers = heads.numbers(layers)
        score = k.new_zeros(*k.shape[:3], dtype=torch.float32)
        if policy.queries:
            found = self._look(queries, exact, content, int(layers[0]), state, prompt)
            index = at.clamp(max=found.exact.shape[2] - 1)[:, None].expand(-1, k.shape[1], -1)
            score = found.exact.gather(2, index)
            if not self._known.issuperset(layers):
                self._learn(layers, numbers, state, found)
            else:
                for layer in layers:
                    self._surprise(layer, Tokens.cat(content.tokens), torch.cat(found.coded))
            for old, seen in zip(content.tokens, found.coded, strict=True):
                old.score = policy.update(old.score, seen)
        every = numbers[..., None].expand_as(score)
        row_live = live[:, None].expand_as(score)
        level = torch.where(row_live, heads.tiers, 0)
        key_radius, value_radius = _radii(k, v, i, state, heads)
        return Tokens(
            every.flatten(),
            i[:, None].expand_as(score).flatten(),
            level.flatten(),
            score.flatten(),
            key_radius.flatten(),
            value_radius.flatten(),
            torch.ones_like(row_live).flatten(),
        )

    def _look(
        self,
        queries: Queries,
        exact: Exact | Whole,
        content: Content,
        layer: int,
        state: State,
        prompt: bool,
    ) -> Evidence:
        policy, heads = self.policy, self.heads
        assert policy is not None
        last = (heads.layout, heads.scale)
        group = layer * heads.batch * heads.heads
        if isinstance(exact, Exact):
            return look(queries, exact, content, group, state, *last, prompt, policy.observe)
        with torch.cuda.device(exact.k.device):  # Triton launches on the current one
            return look_at_prompt(queries, exact, state, *last, policy.observe)

    def _learn(self, layers: Sequence[int], numbers: Tensor, state: State, found: Evidence) -> None:
        heads = self.heads
        self._known.update(layers)
        rows = slice(layers[0] * heads.heads, (layers[-1] + 1) * heads.heads)
        for name in ("query_energy", "norm", "spread"):
            getattr(heads, name)[numbers] = getattr(found, name)
        heads.surprise[numbers] = 0
        if state.loss.numel():
            for n, name in enumerate(("key_loss", "key_size", "value_loss", "value_size")):
                getattr(heads, name)[rows] = state.loss[:, n]
            heads.value_energy[rows] = state.value_back[:, :-1].float().square().sum((1, 2))

    def _surprise(self, layer: int, old: Tokens, seen: Tensor) -> None:
        """Attention that the scores did not expect, the mean over a group's tokens."""
        heads = self.heads
        size = heads.batch * heads.heads
        mine = slice(layer * size, (layer + 1) * size)
        local = old.group - layer * size
        rise = (seen - old.score).clamp(min=0)
        total = torch.zeros(size, device=rise.device).index_add_(0, local, rise)
        count = torch.bincount(local, minlength=size).clamp(min=1)
        heads.surprise[mine] = SURPRISE_DECAY * heads.surprise[mine] + total / count


def _radii(k: Tensor, v: Tensor, i: Tensor, state: State, heads: Heads) -> tuple[Tensor, Tensor]:
    """Root mean square [B, H, n] of keys and values in their frames."""
    if heads.layout.kind == "exact":
        one: Any = torch.ones(k.shape[:3], device=k.device)
        return one, one
    return frame_lengths(k, v, i[:, None], state, heads.layout)
