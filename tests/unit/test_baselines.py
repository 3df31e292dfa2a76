"""The benchmark's baselines against their definitions in float64."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from skv_compile.lowering.hadamard import rotation
from skv_compile.lowering.layout import Digits, Layout

_FILE = Path(__file__).parents[2] / "benchmarks" / "baselines.py"
_SPEC = importlib.util.spec_from_file_location("benchmark_baselines", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
baselines = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = baselines
_SPEC.loader.exec_module(baselines)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("bits", "known"), [(2, 0.1146), (3, 0.0335), (4, 0.00915)])
def test_lloyd_levels_have_the_known_error_on_directions(bits, known):
    z = normal(40_000, 64)
    unit = z / z.norm(dim=-1, keepdim=True) * 8
    levels = baselines.lloyd_levels(64, bits)
    coded = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    assert (unit - coded).square().mean().item() == pytest.approx(known, rel=0.015)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("unbiased", [True, False])
def test_lloyd_max_follows_its_formula(bits, unbiased):
    x = normal(1, 2, 50, 64) * normal(1, 2, 50, 1).exp()
    got = baselines.lloyd_max(x, bits, unbiased=unbiased)
    levels, turned = baselines.lloyd_levels(64, bits), rotation(64)
    for vector, decoded in zip(x.view(-1, 64), got.view(-1, 64), strict=True):
        z = vector @ turned
        unit = z / z.norm() * 8
        zh = levels[(unit[:, None] - levels).abs().argmin(-1)]
        radius = z @ z / (z @ zh) if unbiased else z @ zh / (zh @ zh)
        error = (decoded @ turned - radius * zh).norm() / (radius * zh).norm()
        assert error < 2 ** (1 / 32) - 1 + 1e-6  # the 8-bit log radius, nothing else


def test_lloyd_max_keeps_zero_vectors():
    assert not baselines.lloyd_max(torch.zeros(1, 1, 3, 64), 2, unbiased=True).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [64, 70])
def test_kivi_quantises_groups_of_channels_and_of_tokens(bits, tokens):
    x = normal(1, 2, tokens, 64)
    for got, source in (
        (baselines.kivi_values(x, bits, 32), x),
        (baselines.kivi_keys(x, bits, 32).mT, x.mT),
    ):
        for row, decoded in zip(
            source.reshape(-1, source.shape[-1]), got.reshape(-1, source.shape[-1]), strict=True
        ):
            for part, seen in zip(row.split(32), decoded.split(32), strict=True):
                step = (part.max() - part.min()) / (2**bits - 1)
                assert (part - seen).abs().max() <= step / 2 + 2e-3 * part.abs().max()
                assert len(seen.unique()) <= 2**bits


def test_bits_count_every_scale():
    assert baselines.lloyd_bits(64, 2) == 2.125
    assert baselines.kivi_bits(2944, 64, 2, 32) == 3.0
    assert baselines.kivi_bits(2944, 64, 2, 64) == 2.5
    assert baselines.kivi_bits(70, 64, 2, 32) > 3.0  # the short last group pays in full
    assert baselines.frame_digits(64, 1.625) == 48
    with pytest.raises(ValueError, match="whole number"):
        baselines.frame_digits(64, 2.13)


def test_only_the_region_changes():
    region = baselines.coded_region(200, 4, 64, 64)
    assert region == slice(4, 132)
    assert baselines.coded_region(50, 4, 64) == slice(4, 4)
    x = normal(1, 1, 200, 64)
    out = baselines.replace_region(x, region, torch.zeros_like)
    assert not out[:, :, region].any()
    assert torch.equal(out[:, :, :4], x[:, :, :4])
    assert torch.equal(out[:, :, 132:], x[:, :, 132:])


def test_frame_keys_code_their_pages_closer_with_more_digits():
    q, k, v = (normal(1, heads, 300, 16).float() for heads in (4, 2, 2))
    layout = Layout("digits", 16, 300, 64, 4, 64, 64, (Digits(16, 16),), calibrate=256)
    region = baselines.coded_region(300, 4, 64, 64)
    errors = []
    for digits in (8, 16, 32):
        got = baselines.frame_keys(q, k, v, torch.empty(0), layout, digits)
        assert torch.equal(got[:, :, region.stop :], k[:, :, region.stop :])
        errors.append(float((got - k)[:, :, region].square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0
