"""Tiers: what they store, and what that costs."""

from __future__ import annotations

import itertools

import pytest

import skv_compile as skv
from skv_compile.codec.tiers import tiers


@pytest.mark.parametrize("codec", ["grid", "frame", "rings"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_finer_tier_stores_more_and_errs_less(codec: str, head_dim: int) -> None:
    found = tiers(skv.Config(codec=codec), head_dim, 4096, "float32")
    assert len(found) >= 3
    for coarse, fine in itertools.pairwise(found):
        assert coarse.rate < fine.rate
        for low, high in zip(coarse.distortion, fine.distortion, strict=True):
            assert low >= high
        assert sum(coarse.distortion) > sum(fine.distortion)


def test_the_identity_tier_errs_nothing() -> None:
    (tier,) = tiers(skv.Config(codec="identity"), 64, 4096, "float32")
    assert tier.distortion == (0.0, 0.0)
    assert tier.rate == 32
