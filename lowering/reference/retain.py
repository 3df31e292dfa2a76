"""``retain`` of one token in plain PyTorch: evidence for the decisions between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout
from ..state import PAD


def retain(q: Tensor, position: Tensor, queries: Tensor, meta: Tensor, layout: Layout) -> None:
    """Keep a forward's query if its turn has come, in the slot of its token.

    Of every ``stride`` tokens in the ring the queries of ``observed`` are kept, evenly spread;
    those say what older tokens are worth when the oldest of the ring leave it.

    Args:
        q: [B, Hq, 1, D].
        position: [1] int64, its slot.
        queries: [B, Hq, observed, D], mutated.
        meta: [B, 4], as before this forward's ``append``.
    """
    i = position[0] - torch.where(position[0] == 0, 0, meta[:, PAD]) - layout.sinks
    every = layout.stride // layout.observed
    slot = i // every % layout.observed
    due = (i >= 0) & (i % every == every - 1)
    wanted = torch.arange(layout.observed, device=q.device) == slot[:, None]
    take = (wanted & due[:, None])[:, None, :, None]
    queries.copy_(torch.where(take, q, queries))
