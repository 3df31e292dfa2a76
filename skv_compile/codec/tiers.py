"""Tiers: pairs of key and value layouts with a known rate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import HEAD_DIMS, Config
from ..errors import ConfigError, UnsupportedError
from ..lowering.codes import decode_radius, encode_radius
from ..lowering.grid import grid_frame
from ..lowering.layout import EXACT_DTYPES, Layout
from ..lowering.reference.pages import encode_side, unit_codes
from ..lowering.rings import BOOKS, ring_frame

#: (digits a coordinate of keys, of values), coarse to fine. Keys need more bits than values.
GRID_TIERS = ((1, 1), (2, 1), (2, 2))

#: Of the fitted frame, in eighths of a digit a coordinate. Keys and values alike is the best
#: split at every rate.
FRAME_TIERS = ((4, 4), (6, 6), (8, 8), (12, 12), (16, 16))

CALIBRATE_TOKENS = 256  # a shorter first prompt is coded in the fixed rotation
BLOCK_TOKENS = 128  # keys this close share one rotary turn


@dataclass(frozen=True)
class Tier:
    """One way to store a page. ``rate`` is in bits per coordinate with every stored bit counted."""

    name: str
    layout: Layout

    @property
    def rate(self) -> float:
        return self.layout.bits_per_coordinate

    @property
    def distortion(self) -> tuple[float, float]:
        """Squared error of coded keys and values over their energy, measured on unit normals.

        In a frame fitted to real keys the error lies where it matters least, and what counts is
        the KL in ``benchmarks/results/fidelity.json``.
        """
        return _distortion(self.layout)


@lru_cache(maxsize=64)
def _distortion(layout: Layout) -> tuple[float, float]:
    if layout.kind == "exact":
        return 0.0, 0.0
    dim, device = layout.head_dim, torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 2048, dim, generator=generator)
    found = []
    for digits, unbiased in ((layout.key_digits, True), (layout.value_digits, False)):
        if layout.kind == "rings":
            frame = ring_frame(1, dim, device)
        else:
            frame = grid_frame(1, dim, digits, device)
        packed, radius = encode_side(x, frame, layout, unbiased)
        radius = decode_radius(encode_radius(radius))[..., None]
        decoded = (unit_codes(packed, layout) @ frame.out[:, :-1]) * radius
        found.append(float((decoded - x).square().sum() / x.square().sum()))
    return found[0], found[1]


def tiers(
    config: Config, head_dim: int, max_tokens: int, dtype: str, turned: bool = False
) -> list[Tier]:
    """All tiers of a codec for a head dim, coarse to fine.

    ``turned``: the model has a rotary plan.
    """
    common = (head_dim, max_tokens, config.page_tokens, config.sinks, config.recent)
    if config.codec == "identity":
        return [Tier("exact", Layout("exact", *common, dtype=dtype))]
    if config.codec == "grid":
        return [
            Tier(
                f"k{2 * key}v{2 * value}",
                Layout("digits", *common, key * head_dim, value * head_dim, dtype=dtype),
            )
            for key, value in GRID_TIERS
        ]
    if config.codec == "rings":
        return [
            Tier(
                f"rings{4**digits}",
                Layout("rings", *common, *(2 * (digits * head_dim // 2,)), dtype=dtype),
            )
            for digits in BOOKS
        ]
    block = max(config.page_tokens, BLOCK_TOKENS // config.page_tokens * config.page_tokens)
    found: dict[tuple[int, int], Tier] = {}
    for key, value in FRAME_TIERS:
        # Whole words of eight digits; small head dims have fewer tiers.
        digits = max(8, key * head_dim // 64 * 8), max(8, value * head_dim // 64 * 8)
        layout = Layout(
            "digits",
            *common,
            key_digits=digits[0],
            value_digits=digits[1],
            block=block if turned else 0,
            calibrate=CALIBRATE_TOKENS,
            dtype=dtype,
        )
        found.setdefault(digits, Tier(f"k{key / 4:g}v{value / 4:g}", layout))
    return list(found.values())


def choose_tier(
    config: Config, head_dim: int, max_tokens: int, dtype: str, turned: bool = False
) -> Tier:
    """The finest tier whose rate fits ``config.bits``.

    Raises:
        UnsupportedError: the head dim or the dtype has no tier.
        ConfigError: not even the coarsest tier fits.
    """
    if head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"head_dim={head_dim} is not supported; supported are "
            f"{', '.join(map(str, HEAD_DIMS))}. Use a dense cache for this model."
        )
    if dtype not in EXACT_DTYPES:
        raise UnsupportedError(
            f"a cache of dtype {dtype} is not supported; supported are {', '.join(EXACT_DTYPES)}."
        )
    available = tiers(config, head_dim, max_tokens, dtype, turned)
    if config.codec == "identity":
        return available[0]
    fitting = [tier for tier in available if tier.rate <= config.bits + 1e-9]
    if not fitting:
        raise ConfigError(
            f"bits={config.bits} is below the coarsest tier for head_dim {head_dim}, "
            f"{available[0].rate:.4g} bits per coordinate. Ask for at least that."
        )
    return fitting[-1]
