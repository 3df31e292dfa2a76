"""Pages to and from vectors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codes
from ..layout import EXACT_DTYPES, Layout
from ..state import State
from ..turn import block_start, turn


def encode_pages(k: Tensor, v: Tensor, page: Tensor, state: State, layout: Layout) -> Tensor:
    """[B, H, n * P, D] keys and values of pages number [B, n] -> [B, H, n, page_bytes]."""
    batch, heads, tokens, _ = k.shape
    n = tokens // layout.page_tokens
    if layout.kind == "exact":
        parts = [x.contiguous().view(torch.uint8) for x in (k, v)]
    else:
        kd, kr = codes.encode(
            turn_pages(k, page, state, layout, -1), state.key_frame, unbiased=True
        )
        vd, vr = codes.encode(v, state.value_frame, unbiased=False)
        parts = [codes.pack_digits(kd), codes.pack_digits(vd)]
        parts += [codes.encode_radius(r).unsqueeze(-1) for r in (kr, vr)]
    pages = [x.reshape(batch, heads, n, -1) for x in parts]
    return torch.cat(pages, dim=-1)


def page_field(pages: Tensor, layout: Layout, name: str) -> Tensor:
    """[..., n, page_bytes] -> [..., n * P, bytes a token] of one field."""
    field = layout.fields[name]
    tokens = pages.shape[-2] * layout.page_tokens
    width = field.size // layout.page_tokens
    return pages[..., field.slice].reshape(*pages.shape[:-2], tokens, width)


def turn_pages(k: Tensor, page: Tensor, state: State, layout: Layout, way: int) -> Tensor:
    """Keys [B, H, n * P, D] of pages number [B or 1, n], turned with (1) or back by their block."""
    if layout.block == 0:
        return k
    by = way * block_start(page, layout).repeat_interleave(layout.page_tokens, -1)
    return turn(k.float(), by[:, None], state.turn)


def decode_pages(
    pages: Tensor, page: Tensor, state: State, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Pages [B, H, n, page_bytes] number [B or 1, n] -> dense keys and values [B, H, n * P, D]."""
    if layout.kind == "exact":
        dtype = EXACT_DTYPES[layout.dtype]
        k, v = (
            page_field(pages, layout, name).contiguous().view(dtype) for name in ("keys", "values")
        )
        return k, v
    out = []
    for side, frame in (("key", state.key_frame), ("value", state.value_frame)):
        digits = codes.centred_digits(page_field(pages, layout, f"{side}_digits"))
        radius = codes.decode_radius(page_field(pages, layout, f"{side}_radius"))
        out.append(torch.matmul(digits, frame.out[:, :-1]) * radius + frame.out[:, -1:])
    return turn_pages(out[0], page, state, layout, 1), out[1]
