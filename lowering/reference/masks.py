"""Attention masks: bool, or additive float, [B or 1, Hq or 1, T, slots]."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(mask: Tensor) -> Tensor:
    """Where an attention mask (bool, or additive float) lets a query see a slot."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def mask_at(mask: Tensor, slot: Tensor, tokens: int, group: int) -> Tensor:
    """A mask [B or 1, Hq or 1, T or 1, S] at slots [B, H, n]: [B, Hq or 1, T, n].

    Where slots are the same for all heads (stride 0), so may the result be.
    """
    batch, heads, _ = slot.shape
    full = mask.expand(batch, -1, tokens, -1)
    if full.shape[1] == 1 and (heads == 1 or slot.stride(1) == 0):
        slot = slot[:, :1]
    else:
        full = full.expand(-1, heads * group, -1, -1)
        slot = slot.repeat_interleave(group, 1)
    return full.gather(-1, slot[:, :, None, :].expand(-1, -1, tokens, -1))


def apply_mask(logits: Tensor, mask: Tensor, heads: int, group: int) -> Tensor:
    """Mask [B or 1, Hq or 1, T, n] on logits [B, H, G * T, n]."""
    batch, _, rows, n = logits.shape
    shaped = logits.view(batch, heads, group, rows // group, n)
    if mask.shape[1] == 1:
        mask = mask.unsqueeze(2)
    else:
        mask = mask.unflatten(1, (heads, group))
    if mask.dtype == torch.bool:
        shaped = shaped.masked_fill(~mask, -torch.inf)
    else:
        shaped = shaped + mask.to(logits.dtype)
        shaped = shaped.masked_fill(~visible(mask), -torch.inf)
    return shaped.reshape(logits.shape)
