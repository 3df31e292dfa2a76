"""Tiers: what they store, and what that costs."""

from __future__ import annotations

import itertools

import pytest

import skv_compile as skv
from skv_compile.codec.tiers import Tier, layouts, shared_layout, tiers


@pytest.mark.parametrize("codec", ["grid", "frame", "rings"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_finer_tier_stores_more_and_errs_less(codec: str, head_dim: int) -> None:
    settings = skv.Config(codec=codec), head_dim, 4096, "float32"
    alone = [tier for layout in layouts(*settings) for tier in tiers(layout)]
    for found in (alone, tiers(shared_layout(*settings))):
        check_order(found)


def check_order(found: list[Tier]) -> None:
    assert len(found) >= 3
    for coarse, fine in itertools.pairwise(found):
        assert coarse.rate < fine.rate
        for low, high in zip(coarse.distortion, fine.distortion, strict=True):
            assert low >= high
        assert sum(coarse.distortion) > sum(fine.distortion)


def test_the_identity_tier_errs_nothing() -> None:
    (layout,) = layouts(skv.Config(codec="identity"), 64, 4096, "float32")
    (tier,) = tiers(layout)
    assert tier.distortion == (0.0, 0.0)
    assert tier.rate == 32
