"""Pages to and from vectors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codes
from ..layout import EXACT_DTYPES, Layout
from ..state import State


def encode_pages(k: Tensor, v: Tensor, state: State, layout: Layout) -> Tensor:
    """[B, H, n * P, D] keys and values -> [B, H, n, page_bytes] pages."""
    batch, heads, tokens, _ = k.shape
    n = tokens // layout.page_tokens
    if layout.kind == "exact":
        parts = [x.contiguous().view(torch.uint8) for x in (k, v)]
    else:
        kd, kr = codes.encode(k, state.key_frame, unbiased=True)
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


def decode_pages(pages: Tensor, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
    """[B, H, n, page_bytes] -> dense keys and values [B, H, n * P, D] (never on the fast path)."""
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
        out.append(torch.matmul(digits, frame.out) * radius)
    return out[0], out[1]
