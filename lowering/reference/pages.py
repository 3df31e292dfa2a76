"""Pages to and from vectors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codes
from ..codes import Frame
from ..layout import EXACT_DTYPES, Layout
from ..rings import encode_rings, ring_values
from ..state import State
from ..turn import block_start, turn


def encode_pages(k: Tensor, v: Tensor, page: Tensor, state: State, layout: Layout) -> Tensor:
    """[B, H, n * P, D] keys and values of pages number [B, n] -> [B, H, n, page_bytes]."""
    batch, heads, tokens, _ = k.shape
    n = tokens // layout.page_tokens
    if layout.kind == "exact":
        parts = [x.contiguous().view(torch.uint8) for x in (k, v)]
    else:
        k = turn_pages(k, page, state, layout, -1)
        coded = [
            encode_side(k, state.key_frame, layout, unbiased=True),
            encode_side(v, state.value_frame, layout, unbiased=False),
        ]
        parts = [packed for packed, _ in coded]
        parts += [codes.encode_radius(r).unsqueeze(-1) for _, r in coded]
    pages = [x.reshape(batch, heads, n, -1) for x in parts]
    return torch.cat(pages, dim=-1)


def encode_side(x: Tensor, frame: Frame, layout: Layout, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Vectors [B, H, n, D] -> bytes [B, H, n, w] and radii [B, H, n] in the layout's code."""
    if layout.kind == "rings":
        return encode_rings(x, frame, layout.cell_digits, unbiased=unbiased)
    digits, radius = codes.encode(x, frame, unbiased=unbiased)
    return codes.pack_digits(digits), radius


def unit_codes(packed: Tensor, layout: Layout) -> Tensor:
    """Bytes [..., w] -> what ``frame.out`` (less its last row) takes to vectors, [..., N]."""
    if layout.kind == "rings":
        return ring_values(packed, layout.cell_digits)
    return codes.centred_digits(packed)


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
        digits = unit_codes(page_field(pages, layout, f"{side}_digits"), layout)
        radius = codes.decode_radius(page_field(pages, layout, f"{side}_radius"))
        vectors = frame.out.float()
        out.append(torch.matmul(digits, vectors[:, :-1]) * radius + vectors[:, -1:])
    return turn_pages(out[0], page, state, layout, 1), out[1]
