"""From the spread of a prompt's keys or values to the frame that they are coded in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import (
    STORED,
    Basis,
    Frame,
    centred_digits,
    decode,
    decode_radius,
    encode,
    stored,
)
from ..cpu import kernels as cpu
from ..errors import NonFiniteError
from ..grid import STEP, grid_frame
from ..layout import Layout
from ..prompt import on_kernels

FIT_TOKENS = 1024  # tokens on which steps are fitted, and as many on which the frame is judged
LOSS_TOKENS = 256  # on which the loss of every tier is measured
MAX_DIGITS = 4  # of one dimension
REGULARISE = 0.1  # share of the isotropic part in the query moment
STEPS_BYTES = 1 << 26  # of numbers rounded to the steps that are tried, at once
STEP_FACTORS = (0.55, 0.65, 0.75, 0.85, 0.92, 1.0, 1.08, 1.18, 1.3, 1.45, 1.6)


class Side(NamedTuple):
    """Keys or values of H heads, at unit size: the largest number of each head is 1.

    ``tokens`` [H, m, D] and ``weight`` [H, m]: those of :func:`sampled`. ``centre`` [H, 1, D],
    ``spread`` [H, D, D]: weighted second moment about it. ``size`` [H, 1, 1]: what they were
    divided by. ``metric`` [H, D, D]: how errors count, of trace 1; None for all directions alike.
    """

    tokens: Tensor
    weight: Tensor
    centre: Tensor
    spread: Tensor
    size: Tensor
    metric: Tensor | None


class Sample(NamedTuple):
    """Which of n tokens are looked at, and where in that list are those that steps are fitted on,
    that frames are judged on, and that losses are measured on."""

    index: Tensor
    fit: slice
    judge: slice
    loss: slice


@lru_cache(maxsize=64)
def sampled(n: int, device: torch.device) -> Sample:
    """The sample of ``n`` tokens."""
    stride = max(1, n // FIT_TOKENS)
    steps = (0, 2 * stride), (stride, 2 * stride), (stride, max(1, n // LOSS_TOKENS))
    parts = [torch.arange(first, n, step) for first, step in steps]
    a, b, c = (len(part) for part in parts)
    places = slice(0, a), slice(a, a + b), slice(a + b, a + b + c)
    return Sample(torch.cat(parts).to(device), *places)


# ------------------------------------------------------------ the transform


class White(NamedTuple):
    """``into`` [H, D, D] that makes vectors white, its inverse, and the cost [H, D] of an error in
    each dimension."""

    into: Tensor
    back: Tensor
    cost: Tensor


def whiten(keys: Side, values: Side) -> White:
    """The transforms of keys and values, one after the other: [2 H, ...].

    With the keys' metric Q = L L' and L' C L = U W U', ``into`` is L U W^(-1/2).

    Raises:
        NonFiniteError: on the CPU, where there are no eigenvectors.
    """
    assert keys.metric is not None
    heads, dim = len(keys.spread), keys.spread.shape[-1]
    metric = keys.metric.double()
    trace = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    eye = torch.eye(dim, dtype=torch.float64, device=metric.device)
    root = torch.linalg.cholesky_ex((1 - REGULARISE) * metric + REGULARISE * trace * eye)[0]
    solve = _eigh_on_kernels if on_kernels(keys.spread) else torch.linalg.eigh
    try:
        cost, u = solve(torch.cat([root.mT @ keys.spread.double() @ root, values.spread.double()]))
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(
            f"no frames can be fitted to this prompt ({error}): its queries, keys or values are "
            "NaN, Inf or too large. Nothing was stored. Try bfloat16 or float32, or check the "
            "weights."
        ) from error
    cost = torch.maximum(cost, cost.amax(-1, keepdim=True) * 1e-7).clamp(min=1e-30)
    u = torch.cat([root @ u[:heads], u[heads:]])
    into = (u / cost.sqrt()[:, None]).to(STORED)
    # A singular one gives NaN, and the plain rotation wins.
    return White(into, torch.linalg.inv_ex(into.double())[0].float(), cost.float())


def _eigh_on_kernels(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of float64 matrices, to the precision of float32."""
    from .. import eigen

    if x.shape[-1] > eigen.LARGEST:
        return torch.linalg.eigh(x)
    # At unit size: squares of small numbers leave float32.
    size = x.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None].clamp(min=1e-300)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        values, vectors = eigen.eigh((x / size).float())
    return values.double() * size[..., 0], vectors.double()


# ------------------------------------------------------------ digits and steps


def fit_steps(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Best step and its weighted squared error for 0..MAX_DIGITS digits: [H, D, MAX_DIGITS + 1].

    ``z`` [H, n, D] has unit mean square, ``weight`` is [H, n].
    """
    some = max(1, STEPS_BYTES // (4 * len(STEP_FACTORS) * z[0].numel()))
    if len(z) > some:
        pairs = zip(z.split(some), weight.split(some), strict=True)
        parts = zip(*(fit_steps(*pair) for pair in pairs), strict=True)
        return tuple(torch.cat(part) for part in parts)
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=1e-30))[:, None]
    factors = torch.tensor(STEP_FACTORS, device=z.device)
    steps = [torch.ones_like(z[:, 0])]
    errors = [(weight @ z.square())[:, 0]]
    for digits in range(1, MAX_DIGITS + 1):
        half = 4**digits / 2
        step = (factors * STEP[digits])[:, None, None, None]
        off = (z / step).floor_().clamp_(-half, half - 1).add_(0.5).mul_(step).sub_(z)
        error, best = (weight @ off.square_())[:, :, 0].min(0)
        steps.append(STEP[digits] * factors[best])
        errors.append(error)
    return torch.stack(steps, -1), torch.stack(errors, -1)


def _allocate(cost: Tensor, steps: Tensor, errors: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """Grid and plan that give ``digits`` digits to where they lower the cost most, most valuable
    first."""
    heads, dim = cost.shape
    gain = cost[..., None] * (errors[..., :-1] - errors[..., 1:])
    gain = gain.cummin(-1).values  # a digit cannot come before the one above it
    order = gain.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :digits]
    dims, place = order // MAX_DIGITS, order % MAX_DIGITS
    width = torch.zeros(heads, dim, dtype=torch.long, device=cost.device)
    width.scatter_add_(1, dims, torch.ones_like(dims))
    step = steps.gather(-1, width[..., None])[..., 0]
    shift = 2 * (width.gather(1, dims) - 1 - place)
    return torch.stack([step, 4.0**width, cost], 1), torch.stack([dims, shift], 1).to(torch.uint8)


# ------------------------------------------------------------ the frame


class Fit(NamedTuple):
    """Of a side: its transform (``White``), and the steps and errors of :func:`fit_steps`."""

    into: Tensor
    back: Tensor
    cost: Tensor
    steps: Tensor
    errors: Tensor


def fit_side(
    side: Side,
    fit: Fit,
    sample: Sample,
    tiers: Sequence[int],
    unit: int,
    unbiased: bool,
    plain_only: bool,
    layout: Layout,
) -> tuple[Basis, Tensor]:
    """The frames of a side and two rows [H, 2, tiers] of the loss of ``calibrate.fit_frames``.

    ``tiers``: digits of each; a head whose tier ``unit`` a plain rotation about the same centre
    serves better gets that.
    """
    heads, _, dim = side.tokens.shape
    back = torch.cat([fit.back, side.centre], 1).to(STORED)
    fitted, rotated = [], []
    for digits in tiers:
        grid, plan = _allocate(fit.cost, fit.steps, fit.errors, digits)
        plain = grid_frame(heads, dim, digits, side.tokens.device)
        moved = torch.cat([plain.back[:, :-1], side.centre], 1)
        fitted.append(Frame(fit.into, back, grid, plan))
        rotated.append(plain._replace(back=moved))
    basis = stored(Basis.of(rotated))
    if not plain_only:
        own = stored(Basis.of(fitted))
        first = sum(tiers[:unit])
        frames = [b.frame(unit, first, tiers[unit]) for b in (own, basis)]
        both = _loss(_twice(side), sample.judge, _join(frames), unbiased, layout)[:, 0]
        better = both[:heads] <= both[heads:]
        choices = (better.view(-1, *(1,) * (part.dim() - 1)) for part in own)
        pairs = zip(choices, own, basis, strict=True)
        basis = Basis(*(torch.where(choice, f, p) for choice, f, p in pairs))
    # What a tier loses needs no more than some hundred tokens.
    found = [
        _loss(side, sample.loss, basis.frame(t, sum(tiers[:t]), digits), unbiased, layout)
        for t, digits in enumerate(tiers)
    ]
    error, fitted_size, own_size = torch.stack(found, 1).unbind(-1)
    own_size = own_size.clamp(min=1e-30)
    # The radius is that of vectors at their own size, through ``into``: the same number.
    size = side.size
    loss = torch.stack([error / own_size * size[:, 0].square(), fitted_size / own_size], 1)
    into, back, grid, plan = basis
    return Basis((into / size).to(into.dtype), (back * size).to(back.dtype), grid, plan), loss


def _twice(side: Side) -> Side:
    """A side with its heads once more."""
    return Side(*(x if x is None else torch.cat([x, x]) for x in side))


def _join(frames: Sequence[Frame]) -> Frame:
    """The frames of the heads of both, one after the other."""
    return Frame(*(torch.cat(x) for x in zip(*frames, strict=True)))


def _loss(side: Side, some: slice, frame: Frame, unbiased: bool, layout: Layout) -> Tensor:
    """Of some tokens coded in a frame, weighted sums [H, 3]: of the squared error, of the squared
    radii that were fitted, and of those of the vectors."""
    x, weight = side.tokens[:, some], side.weight[:, some]
    coded = _coded_on_kernels if on_kernels(x) or cpu.encodes(x) else _coded
    decoded, radius, own = coded(x, frame, unbiased, layout)
    delta = decoded - x
    moved = delta if side.metric is None else delta @ side.metric
    sums = torch.stack([(moved * delta).sum(-1), radius.square(), own], 1)
    return (sums @ weight[..., None])[..., 0]


def _coded(
    x: Tensor, frame: Frame, unbiased: bool, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [H, n, D] coded and decoded, the radii [H, n] of the codes, and the vectors' own mean
    square in the frame."""
    digits, radius = encode(x[None], frame, unbiased=unbiased)
    own = ((x - frame.centre) @ frame.into.float()).square().mean(-1)
    return decode(digits, radius, frame)[0], radius[0], own


def _coded_on_kernels(
    x: Tensor, frame: Frame, unbiased: bool, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of radii as they are stored."""
    if x.is_cuda:
        from .. import encode

        with torch.cuda.device(x.device):  # Triton launches on the current one
            packed, code = encode.encode_side(x[None], None, frame, x, layout, unbiased)
            own = encode.lengths(x[None], None, frame, x, layout)[0].square()
    else:
        packed, code = cpu.encode_side(x[None], frame, unbiased)
        own = ((x - frame.centre) @ frame.into.float()).square().mean(-1)
    radius, out = decode_radius(code)[0], frame.out
    decoded = torch.baddbmm(out[:, -1:], centred_digits(packed)[0] * radius, out[:, :-1])
    return decoded, radius[..., 0], own
