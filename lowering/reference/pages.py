"""Pages to and from vectors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codes
from ..codes import Frame
from ..cpu import kernels as cpu
from ..layout import EXACT_DTYPES, GAP_FILLER, Layout
from ..prompt import on_kernels
from ..rings import encode_rings, ring_values
from ..state import BASE, KIND, PER_TIER, State
from ..turn import block_start, turn

Records = dict[str, Tensor]  # field of a page -> [..., bytes a token]


def encode_records(
    k: Tensor, v: Tensor, i: Tensor, state: State, layout: Layout, tier: int
) -> Records:
    """Keys and values [B, H, n, D] of coded tokens i [B or 1, H or 1, n] -> fields [B, H, n, w]."""
    if layout.kind == "exact":
        return {name: x.contiguous().view(torch.uint8) for name, x in (("keys", k), ("values", v))}
    if layout.kind == "digits" and on_kernels(k):
        return _encode_on_kernels(k, v, i, state, layout, tier)
    key_frame, value_frame = state.frames(layout, tier)
    k = turn_keys(k, i, state, layout, -1)
    records = {}
    for side, x, frame in (("key", k, key_frame), ("value", v, value_frame)):
        if layout.kind == "digits" and cpu.encodes(x):
            found = cpu.encode_side(x, frame, side == "key")
            records[f"{side}_digits"], records[f"{side}_radius"] = found
            continue
        packed, radius = encode_side(x, frame, layout, tier, unbiased=side == "key")
        records[f"{side}_digits"] = packed
        records[f"{side}_radius"] = codes.encode_radius(radius).unsqueeze(-1)
    return records


def _encode_on_kernels(
    k: Tensor, v: Tensor, i: Tensor, state: State, layout: Layout, tier: int
) -> Records:
    from .. import encode

    records = {}
    sides = zip(("key", "value"), (k, v), (i, None), state.frames(layout, tier), strict=True)
    with torch.cuda.device(k.device):  # Triton launches on the current one
        for side, x, at, frame in sides:
            found = encode.encode_side(x, at, frame, state.turn, layout, side == "key")
            records[f"{side}_digits"], records[f"{side}_radius"] = found
    return records


def frame_lengths(
    k: Tensor, v: Tensor, i: Tensor, state: State, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Root mean square [B, H, n] of keys and values [B, H, n, D] of coded tokens i in their
    frames."""
    frames = state.frames(layout, 0)
    if layout.kind == "digits" and on_kernels(k):
        from .. import encode

        with torch.cuda.device(k.device):
            at = zip((k, v), (i, None), frames, strict=True)
            keys, values = (encode.lengths(*x, state.turn, layout) for x in at)
        return keys, values
    pairs = zip((turn_keys(k, i, state, layout, -1), v), frames, strict=True)
    keys, values = (
        ((x.float() - frame.centre) @ frame.into.float()).square().mean(-1).sqrt()
        for x, frame in pairs
    )
    return keys, values


def encode_side(
    x: Tensor, frame: Frame, layout: Layout, tier: int, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Vectors [B, H, n, D] -> bytes [B, H, n, w] and radii [B, H, n] in the layout's code."""
    if layout.kind == "rings":
        return encode_rings(x, frame, layout.cell_digits[tier], unbiased=unbiased)
    digits, radius = codes.encode(x, frame, unbiased=unbiased)
    return codes.pack_digits(digits), radius


def decode_records(
    records: Records, i: Tensor, state: State, layout: Layout, tier: int
) -> tuple[Tensor, Tensor]:
    """Fields [B, H, n, w] of coded tokens i [B or 1, H or 1, n] -> keys and values [B, H, n, D]."""
    if layout.kind == "exact":
        dtype = EXACT_DTYPES[layout.dtype]
        k, v = (records[name].contiguous().view(dtype) for name in ("keys", "values"))
        return k, v
    if layout.kind == "digits" and on_kernels(records["key_digits"]):
        return _decode_on_kernels(records, i, state, layout, tier)
    out = []
    for side, frame in zip(("key", "value"), state.frames(layout, tier), strict=True):
        unit = unit_codes(records[f"{side}_digits"], layout, tier)
        vectors = frame.out
        moved = torch.matmul(unit, vectors[:, :-1])
        out.append(moved * codes.decode_radius(records[f"{side}_radius"]) + vectors[:, -1:])
    return turn_keys(out[0], i, state, layout, 1), out[1]


def _decode_on_kernels(
    records: Records, i: Tensor, state: State, layout: Layout, tier: int
) -> tuple[Tensor, Tensor]:
    from .. import decode

    sides = zip(("key", "value"), (i, None), state.frames(layout, tier), strict=True)
    with torch.cuda.device(i.device):  # Triton launches on the current one
        k, v = (
            decode.decode_side(
                records[f"{side}_digits"], records[f"{side}_radius"], at, frame, state.turn, layout
            )
            for side, at, frame in sides
        )
    return k, v


def unit_codes(packed: Tensor, layout: Layout, tier: int) -> Tensor:
    """Bytes [..., w] -> what ``frame.out`` (less its last row) takes to vectors, [..., N]."""
    if layout.kind == "rings":
        return ring_values(packed, layout.cell_digits[tier])
    return codes.centred_digits(packed)


def turn_keys(k: Tensor, i: Tensor, state: State, layout: Layout, way: int) -> Tensor:
    """Keys [B, H, n, D] of coded tokens i, turned with (1) or back (-1) by their block."""
    if layout.block == 0:
        return k
    return turn(k.float(), way * block_start(i, layout), state.turn)


# ------------------------------------------------------------ the bytes of pages


def page_records(pages: Tensor, layout: Layout, tier: int) -> Records:
    """Pages [..., page_bytes] of one tier -> fields [..., slots, w]."""
    slots = layout.capacity[tier]
    return {
        name: pages[..., field.slice].unflatten(-1, (slots, -1))
        for name, field in layout.fields[tier].items()
    }


def page_bytes(records: Records, layout: Layout, tier: int) -> Tensor:
    """Inverse of :func:`page_records`; bytes that no field covers are 0."""
    fields = layout.fields[tier]
    parts = [records[name].flatten(-2) for name in fields]
    used = sum(field.size for field in fields.values())
    return torch.nn.functional.pad(torch.cat(parts, -1), (0, layout.page_bytes - used))


def page_tokens(records: Records, info: Tensor, layout: Layout, tier: int) -> tuple[Tensor, Tensor]:
    """Which coded token i sits in each slot of pages with ``info`` [..., 2], and whether one does.

    Returns [..., slots] int64 and bool.
    """
    slot = torch.arange(layout.capacity[tier], device=info.device)
    base = info[..., BASE, None].long()
    live = slot < (info[..., KIND, None] % PER_TIER)
    if not layout.tracked:
        return base + slot, live
    gap = records["gap"].squeeze(-1)
    return base + gap.long().cumsum(-1), live & (gap != GAP_FILLER)
