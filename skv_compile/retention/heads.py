"""What is known of every head: how much its queries and values weigh, what coding loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowering.layout import PAGE_HEADER, Layout


@dataclass
class Heads:
    """Constants of the groups of a pool.

    ``key_loss``, ``key_size``, ``value_loss``, ``value_size`` [layers * heads, tiers]: the rows of
    ``State.loss``. ``value_energy`` [layers * heads]: |v - centre|^2 over the mean square of v in
    the frame. Of every group: ``query_energy``
    E|q|^2, ``norm`` E|o|^2 and ``spread`` E|o - centre|^2 of attention outputs o, and
    ``surprise``: how much unexpected attention its tokens get. ``scale``: of the logits.
    ``tier``: of policies that keep tokens in one tier or not at all.
    """

    layout: Layout
    layers: int
    batch: int
    heads: int
    key_loss: Tensor
    key_size: Tensor
    value_loss: Tensor
    value_size: Tensor
    value_energy: Tensor
    query_energy: Tensor
    norm: Tensor
    spread: Tensor
    surprise: Tensor
    scale: float
    tier: int

    @staticmethod
    def empty(
        layout: Layout, layers: int, batch: int, heads: int, tier: int, device: torch.device
    ) -> Heads:
        """Nothing known yet."""
        per_head = torch.zeros(layers * heads, len(layout.tiers), device=device)
        one = torch.ones(layers * heads, device=device)
        group = torch.ones(layers * batch * heads, device=device)
        return Heads(
            layout,
            layers,
            batch,
            heads,
            key_loss=per_head,
            key_size=torch.ones_like(per_head),
            value_loss=per_head.clone(),
            value_size=torch.ones_like(per_head),
            value_energy=one,
            query_energy=group,
            norm=group.clone(),
            spread=group.clone(),
            surprise=torch.zeros_like(group),
            scale=layout.head_dim**-0.5,
            tier=tier,
        )

    @property
    def tiers(self) -> int:
        return len(self.layout.tiers)

    @property
    def groups(self) -> int:
        return self.layers * self.batch * self.heads

    @property
    def bytes(self) -> int:
        """Of all these constants."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def numbers(self, layers: Sequence[int]) -> Tensor:
        """Groups [B, n * H] of n layers that follow one another: of every row, layer by layer."""
        size = self.batch * self.heads
        every = torch.arange(layers[0] * size, (layers[-1] + 1) * size, device=self.norm.device)
        return every.view(-1, self.batch, self.heads).transpose(0, 1).flatten(1)

    def layer(self, group: Tensor) -> Tensor:
        """The layer of every group."""
        return group // (self.batch * self.heads)

    def head(self, group: Tensor) -> Tensor:
        """The row of every group in tensors [layers * heads]."""
        return self.layer(group) * self.heads + group % self.heads

    def sizes(self, device: torch.device) -> Tensor:
        """Bytes of a token at every level, its share of the page's header included: [tiers + 1]."""
        page = self.layout.page_bytes + PAGE_HEADER
        return torch.tensor([0.0, *(page / slots for slots in self.layout.capacity)], device=device)
