"""Tiers: pairs of key and value layouts with a known rate."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import HEAD_DIMS, Config
from ..errors import ConfigError, UnsupportedError
from ..lowering.layout import EXACT_DTYPES, Layout

#: (digits a coordinate of keys, of values), coarse to fine. Keys need more bits than values.
GRID_TIERS = ((1, 1), (2, 1), (2, 2))


@dataclass(frozen=True)
class Tier:
    """One way to store a page. ``rate`` is in bits per coordinate with every stored bit counted."""

    name: str
    layout: Layout

    @property
    def rate(self) -> float:
        return self.layout.bits_per_coordinate


def tiers(config: Config, head_dim: int, max_tokens: int, dtype: str) -> list[Tier]:
    """All tiers of a codec for a head dim, coarse to fine."""
    common = (head_dim, max_tokens, config.page_tokens, config.sinks, config.recent)
    if config.codec == "identity":
        return [Tier("exact", Layout("exact", *common, dtype=dtype))]
    return [
        Tier(
            f"k{2 * key}v{2 * value}",
            Layout("digits", *common, key * head_dim, value * head_dim, dtype),
        )
        for key, value in GRID_TIERS
    ]


def choose_tier(config: Config, head_dim: int, max_tokens: int, dtype: str) -> Tier:
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
    available = tiers(config, head_dim, max_tokens, dtype)
    if config.codec == "identity":
        return available[0]
    fitting = [tier for tier in available if tier.rate <= config.bits + 1e-9]
    if not fitting:
        raise ConfigError(
            f"bits={config.bits} is below the coarsest tier for head_dim {head_dim}, "
            f"{available[0].rate:.4g} bits per coordinate. Ask for at least that."
        )
    return fitting[-1]
