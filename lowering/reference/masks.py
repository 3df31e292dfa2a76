"""Attention masks: bool, or additive float, [B or 1, Hq or 1, T, slots]."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(mask: Tensor) -> Tensor:
    """Where an attention mask (bool, or additive float) lets a query see a slot."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


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
