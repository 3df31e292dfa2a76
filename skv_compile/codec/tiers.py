"""Tiers: pairs of key and value layouts with a known rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import HEAD_DIMS, MOST_TOKENS, Config
from ..errors import ConfigError, UnsupportedError, shown
from ..lowering.codes import Basis, decode_radius, encode_radius, stored
from ..lowering.grid import grid_frame
from ..lowering.layout import EXACT_DTYPES, Digits, Layout
from ..lowering.reference.pages import encode_side, unit_codes
from ..lowering.rings import BOOKS, ring_frame
from ..retention.policies import POLICIES

#: (digits a coordinate of keys, of values), coarse to fine. Keys need more bits than values.
GRID_TIERS = ((1, 1), (2, 1), (2, 2))

#: Of the fitted frame, in eighths of a digit a coordinate. Keys and values alike is the best
#: split at every rate.
FRAME_TIERS = ((4, 4), (6, 6), (8, 8), (12, 12), (16, 16))

#: Where tiers share pages: tokens of a page in halves of those of the unit tier (8, 8), so that
#: all fill the same bytes.
SHARED_TIERS = (4, 3, 2, 1.5, 1)

CALIBRATE_TOKENS = 256  # a shorter first prompt is coded in the fixed rotation
#: Keys this close share one rotary turn, in caches of up to ``SMALL`` tokens and in larger ones: a
#: forward turns its queries for every block. 512 cost 8 % more KL than 128 at 2 bits.
BLOCK_TOKENS, LARGE_BLOCK_TOKENS, SMALL = 128, 512, 8192
STRIDE = 64  # tokens that leave the window together
#: How many times as many in caches of so many tokens, and in larger ones: to decide about all
#: tokens takes time with their number.
STRIDES = ((8192, 1), (32768, 2))
LARGE_STRIDES = 4
OBSERVED = 16  # queries kept of as many
#: Tokens of a page, by the tokens of the cache: every head has a page begun in every tier, which
#: must be little beside what it holds.
PAGE_TOKENS = ((8192, 16), (32768, 32))
LARGE_PAGE_TOKENS = 64


@dataclass(frozen=True)
class Tier:
    """One way to store a page. ``rate`` is in bits per coordinate with every stored bit counted."""

    name: str
    layout: Layout
    index: int = 0

    @property
    def rate(self) -> float:
        return self.layout.rate(self.index)

    @property
    def distortion(self) -> tuple[float, float]:
        """Squared error of coded keys and values over their energy, measured on unit normals.

        In a frame fitted to real keys the error lies where it matters least, and what counts is
        the KL in ``benchmarks/results/fidelity.json``.
        """
        layout = self.layout
        return _distortion(layout.kind, layout.head_dim, layout.tiers[self.index])[:2]


@lru_cache(maxsize=64)
def _distortion(kind: str, dim: int, digits: Digits) -> tuple[float, float, float, float]:
    """Squared errors of keys and values, and the means of their fitted squared radii."""
    if kind == "exact":
        return 0.0, 0.0, 1.0, 1.0
    layout = Layout(kind, dim, 0, 8, 0, 0, 8, (digits,))
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 2048, dim, generator=generator)
    errors, sizes = [], []
    for n, unbiased in ((digits.key, True), (digits.value, False)):
        frame = ring_frame(1, dim, device) if kind == "rings" else grid_frame(1, dim, n, device)
        packed, radius = encode_side(x, frame, layout, 0, unbiased)
        radius = decode_radius(encode_radius(radius))[..., None]
        decoded = (unit_codes(packed, layout, 0) @ frame.out[:, :-1]) * radius
        errors.append(float((decoded - x).square().sum() / x.square().sum()))
        sizes.append(float(radius.square().mean() / x.square().mean()))
    return errors[0], errors[1], sizes[0], sizes[1]


def frames_of(layout: Layout, heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """The nine frame tensors of a layer before anything is fitted; layers may share them."""
    if layout.kind == "exact":
        return (torch.empty(0, device=device),) * 9
    plain = _plain_frames(layout.kind, layout.head_dim, layout.tiers, heads, device)
    if not layout.calibrate:
        return plain
    *bases, loss = plain
    own = [stored(Basis(*side)) for side in (bases[:4], bases[4:])]
    return (*own[0], *own[1], loss.clone())


@lru_cache(maxsize=16)
def _plain_frames(
    kind: str, dim: int, tiers: tuple[Digits, ...], heads: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The frames of fixed rotations, shared by all layers."""
    bases = []
    for side in (0, 1):
        if kind == "rings":
            frames = [ring_frame(heads, dim, device)] * len(tiers)
        else:
            frames = [grid_frame(heads, dim, tier[side], device) for tier in tiers]
        bases.append(Basis.of(frames))
    errors = [_distortion(kind, dim, tier) for tier in tiers]
    key, value, key_size, value_size = zip(*errors, strict=True)
    scaled = [dim * x for x in value]
    loss = torch.tensor([key, key_size, scaled, value_size], device=device)
    return (*bases[0], *bases[1], loss.expand(heads, -1, -1).contiguous())


def block_tokens(config: Config, max_tokens: int) -> int:
    """Tokens whose keys share one rotary turn, in a cache of so many tokens. Saved frames are
    fitted in small blocks."""
    small = max_tokens <= SMALL or config.frame is not None
    return BLOCK_TOKENS if small else LARGE_BLOCK_TOKENS


def layouts(
    config: Config, head_dim: int, max_tokens: int, dtype: str, turned: bool = False
) -> list[Layout]:
    """Layouts of pages of consecutive tokens, one for each tier of a codec, coarse to fine.

    ``turned``: the model has a rotary plan.
    """
    size = config.page_tokens or LARGE_PAGE_TOKENS
    close = block_tokens(config, max_tokens)
    block = max(size, close // size * size) if turned else 0

    def layout(kind: str, digits: Digits, **more: Any) -> Layout:
        return Layout(
            kind,
            head_dim,
            max_tokens,
            size,
            config.sinks,
            config.recent,
            size,
            (digits,),
            dtype=dtype,
            **more,
        )

    if config.codec == "identity":
        return [layout("exact", Digits(0, 0))]
    if config.codec == "grid":
        pairs = [Digits(key * head_dim, value * head_dim) for key, value in GRID_TIERS]
        return [layout("digits", digits) for digits in pairs]
    if config.codec == "rings":
        sizes = [digits * head_dim // 2 for digits in BOOKS]
        return [layout("rings", Digits(n, n)) for n in sizes]
    # Whole words of eight digits; small head dims have fewer tiers.
    words = [Digits(*(max(8, n * head_dim // 64 * 8) for n in pair)) for pair in FRAME_TIERS]
    calibrate = 0 if config.frame is not None else CALIBRATE_TOKENS
    return [
        layout("digits", digits, block=block, calibrate=calibrate)
        for digits in dict.fromkeys(words)
    ]


def shared_layout(
    config: Config, head_dim: int, max_tokens: int, dtype: str, turned: bool = False
) -> Layout:
    """The layout of pages of chosen tokens in all tiers of a codec."""
    size = config.page_tokens
    if size is None:
        sizes = [n for most, n in PAGE_TOKENS if max_tokens <= most]
        size = sizes[0] if sizes else LARGE_PAGE_TOKENS
    plain = layouts(config, head_dim, max_tokens, dtype, turned)
    first = plain[0]
    digits, unit = [layout.tiers[0] for layout in plain], len(plain) // 2
    if config.codec == "frame":
        digits, unit = shared_digits(head_dim)
    strides = [n for most, n in STRIDES if max_tokens <= most]
    stride = max(STRIDE * (strides[0] if strides else LARGE_STRIDES), size)
    return replace(
        first,
        page_tokens=size,
        stride=stride,
        tiers=tuple(digits),
        unit=unit,
        tracked=True,
        block=block_tokens(config, max_tokens) if first.block else 0,
        observed=OBSERVED if POLICIES[config.retention].queries else 0,
    )


def shared_digits(head_dim: int) -> tuple[list[Digits], int]:
    """Digits of the frame's tiers that fill equal pages, and which of them is the unit."""
    overhead = 4  # bytes: two radii, gap and score
    unit_bytes = 2 * head_dim // 4 + overhead
    found: list[Digits] = []
    unit = 0
    if head_dim % 128 == 0:
        # Rows of whole 16 bytes, which a GPU copies at once, and few tiers: for each, it takes the
        # queries of every block through the frame.
        return [Digits(n, n) for n in (head_dim // 2, head_dim, 2 * head_dim)], 1
    for halves in SHARED_TIERS:
        words = int((unit_bytes * 2 / halves - overhead) // 2)  # of eight digits, both sides
        key = max(1, (words + 1) // 2)
        digits = Digits(8 * key, 8 * max(1, words - key))
        if not found or digits != found[-1]:
            found.append(digits)
        if halves == 2:
            unit = len(found) - 1
    return found, unit


def check_shape(head_dim: int, dtype: str) -> None:
    """Raise UnsupportedError for a head dim or dtype without tiers."""
    if head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"head_dim={head_dim} is not supported; supported are "
            f"{', '.join(map(str, HEAD_DIMS))}. Use a dense cache for this model."
        )
    if dtype not in EXACT_DTYPES:
        raise UnsupportedError(
            f"a cache of dtype {dtype} is not supported; supported are {', '.join(EXACT_DTYPES)}. "
            "Load the model in one of these."
        )


def choose_layout(
    config: Config, head_dim: int, max_tokens: int, dtype: str, turned: bool = False
) -> Layout:
    """All tiers of the codec where a policy chooses among them; else the finest tier whose rate
    fits ``config.bits``.

    Raises:
        UnsupportedError: the head dim or the dtype has no tier.
        ConfigError: not even the coarsest tier fits, or pages cannot number so many tokens.
    """
    check_shape(head_dim, dtype)
    if max_tokens > MOST_TOKENS:
        raise ConfigError(f"max_cache_len={shown(max_tokens)}: expected at most {MOST_TOKENS}.")
    if config.retention != "none":
        return shared_layout(config, head_dim, max_tokens, dtype, turned)
    available = layouts(config, head_dim, max_tokens, dtype, turned)
    if config.codec == "identity":
        return available[0]
    fitting = [layout for layout in available if layout.rate(0) <= config.bits + 1e-9]
    if not fitting:
        raise ConfigError(
            f"bits={config.bits} is below the coarsest tier for head_dim {head_dim}, "
            f"{available[0].rate(0):.4g} bits per coordinate. Ask for at least that, or for a "
            "retention policy."
        )
    return fitting[-1]


def tier_name(layout: Layout, tier: int) -> str:
    """Such as k2v2: bits a coordinate of keys and of values, without radius and header."""
    if layout.kind == "exact":
        return "exact"
    digits = layout.tiers[tier]
    if layout.kind == "rings":
        return f"rings{4 ** layout.cell_digits[tier]}"
    return f"k{2 * digits.key / layout.head_dim:g}v{2 * digits.value / layout.head_dim:g}"


def tier_names(layout: Layout) -> str:
    """All tiers of a layout in one word: ``k2v2``, or ``k1v1..k4v4``."""
    names = [tier_name(layout, n) for n in range(len(layout.tiers))]
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


def tiers(layout: Layout) -> list[Tier]:
    """The tiers of a layout, coarse to fine."""
    return [Tier(tier_name(layout, n), layout, n) for n in range(len(layout.tiers))]
