"""Rotary turns of a head's coordinates.

Keys that a model has rotated by their positions are turned back by the position of the
block of pages they sit in, so that what is left is nearly free of position. Queries are
turned alike, once per block, and logits do not change: a turn is orthogonal. Nothing
depends on the model really having rotated its keys; the turn only decides how well they code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout


def turn(x: Tensor, by: Tensor, plan: Tensor) -> Tensor:
    """Rotate coordinates by ``by`` tokens.

    Args:
        x: [..., D].
        by: [...] tokens, broadcast against x without its last dimension.
        plan: [2, D] float: radians a token of each coordinate, and the coordinate it is paired
            with, counted from 1, negative on the side whose partner enters with a minus. A
            coordinate that does not turn has speed 0 and itself as partner.
    """
    speed, partner = plan.unbind(0)
    angle = by.to(torch.float32).unsqueeze(-1) * speed
    other = x.index_select(-1, partner.abs().long() - 1) * partner.sign().to(x.dtype)
    return x * angle.cos().to(x.dtype) + other * angle.sin().to(x.dtype)


def half_split_plan(speeds: Tensor, dim: int) -> Tensor:
    """The plan of the usual rotary embedding: coordinate i is paired with i + len(speeds)."""
    n = len(speeds)
    return _plan(speeds, torch.arange(n), torch.arange(n) + n, dim)


def interleaved_plan(speeds: Tensor, dim: int) -> Tensor:
    """The plan of GPT-J's rotary embedding: coordinates 2i and 2i + 1 are a pair."""
    n = len(speeds)
    return _plan(speeds, 2 * torch.arange(n), 2 * torch.arange(n) + 1, dim)


def _plan(speeds: Tensor, first: Tensor, second: Tensor, dim: int) -> Tensor:
    plan = torch.stack([torch.zeros(dim), torch.arange(1, dim + 1).float()])
    for here, there, sign in ((first, second, -1), (second, first, 1)):
        plan[0, here] = speeds.float()
        plan[1, here] = sign * (there + 1).float()
    return plan


def block_start(i: Tensor, layout: Layout) -> Tensor:
    """Token at which the block of each coded token i begins, 0 where keys are not turned."""
    if layout.block == 0:
        return torch.zeros_like(i)
    return i // layout.block * layout.block + layout.sinks


def turn_back_table(blocks: int, plan: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """For kernels, the turn back by the start of each block, in the angles of :func:`turn`.

    Returns [2, blocks, D] float32, what a coordinate and its partner are multiplied by, and the
    partners [D] int32.
    """
    speed, partner = plan.unbind(0)
    start = torch.arange(blocks, device=plan.device) * layout.block + layout.sinks
    angle = -start.to(torch.float32)[:, None] * speed
    return torch.stack([angle.cos(), angle.sin() * partner.sign()]), (partner.abs() - 1).int()
