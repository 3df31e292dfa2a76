"""From a tier to a lower one without the vectors: by cutting codes off, or by coding anew.

The digits of a fitted frame are ordered by value, so the first n of them are a code of their
own, read by the first n rows of ``out``; a digit that is missing stands at its centre. Cutting
costs no arithmetic but a new radius, and no second frame. It costs accuracy: one step per
dimension serves several widths. Squared error against coding anew in the lower tier's own
frame, SmolLM2-135M, least and most of its layers (digits a vector, head dim 64):

====== =========== =========== =========== ===========
side   64 to 48    64 to 32    96 to 64    128 to 96
====== =========== =========== =========== ===========
keys   1.03 - 1.20 1.10 - 1.33 1.08 - 1.23 1.16 - 1.19
values 1.04 - 1.09 1.04 - 1.12 1.14 - 1.25 1.20 - 1.26
====== =========== =========== =========== ===========

Keys of one block share their rotary turn in every tier, so they need not be turned here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowering.codes import (
    Frame,
    centred_digits,
    decode_radius,
    encode,
    encode_radius,
    pack_digits,
    radius_of,
)
from ..lowering.layout import DIGITS_PER_WORD

SIDES = ("key", "value")
DIGITS_PER_BYTE = 4


def _check(have: int, want: int) -> None:
    if want <= 0 or want % DIGITS_PER_WORD:
        raise ValueError(
            f"{want} digits do not fill words of {DIGITS_PER_WORD}: ask for a positive multiple."
        )
    if want > have:
        raise ValueError(
            f"a code of {have} digits has no {want} of them: demotion only goes down. "
            "Encode the vectors again for a finer tier."
        )


def truncates(side: str, have: int, want: int, head_dim: int) -> bool:
    """Whether a code of ``have`` digits a vector becomes one of ``want`` by cutting it off.

    The rule is where cutting costs under 15 % in squared error: values from one digit a
    coordinate down, keys from one digit a coordinate to no less than three quarters.

    Args:
        side: ``"key"`` or ``"value"``.

    Raises:
        ValueError: an unknown side, or a ``want`` that is no tier below ``have``.
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; it is one of {', '.join(map(repr, SIDES))}")
    _check(have, want)
    if want == have:
        return True
    return have <= head_dim and (side == "value" or 4 * want >= 3 * head_dim)


def truncate(packed: Tensor, digits: int) -> Tensor:
    """The first ``digits`` digits of codes: bytes [..., N / 4] -> [..., digits / 4].

    Raises ValueError if there are fewer, or they fill no words.
    """
    _check(packed.shape[-1] * DIGITS_PER_BYTE, digits)
    return packed[..., : digits // DIGITS_PER_BYTE].contiguous()


def truncate_frame(frame: Frame, digits: int) -> Frame:
    """The frame of the first ``digits`` digits of a frame's codes.

    It reads truncated codes, and it also encodes: a dimension that lost n digits has a step
    4**n times as wide, one that lost all is not coded. ``into`` is shared, not copied.

    Raises ValueError if there are fewer, or they fill no words.
    """
    _check(frame.plan.shape[-1], digits)
    lost = torch.zeros_like(frame.grid[:, 0])
    gone = frame.plan[:, 0, digits:].long()
    lost.scatter_add_(1, gone, torch.ones_like(gone, dtype=lost.dtype))
    wider = torch.exp2(2 * lost)
    step, levels, weight = frame.grid.unbind(1)
    dims, shifts = frame.plan[..., :digits].unbind(1)
    shifts = shifts - 2 * lost.gather(1, dims.long()).int()
    return Frame(
        frame.into,
        torch.stack([step * wider, levels / wider, weight], 1),
        torch.stack([dims, shifts], 1),
        torch.cat([frame.out[:, :digits], frame.out[:, -1:]], 1),
    )


def demote(
    packed: Tensor, radius: Tensor, side: str, high: Frame, low: Frame
) -> tuple[Tensor, Tensor, Frame]:
    """Codes of a tier as codes of a lower one, cut off or coded anew as ``truncates`` says.

    Both ways the radius is fitted to the vectors that the codes stood for, as ``encode`` fits
    it: keys without bias, values by least squares. A zero vector stays one.

    Args:
        packed: [B, H, n, N / 4] uint8, codes in ``high``.
        radius: [B, H, n] uint8, their radii (``codes.encode_radius``).
        side: ``"key"`` or ``"value"``.
        high: the frame that reads ``packed``, of N digits; a truncated one will do.
        low: the lower tier's own frame, of n digits.

    Returns:
        [B, H, n, n / 4] uint8, [B, H, n] uint8, and the frame that reads them: ``low``, or the
        first rows of ``high``.

    Raises:
        ValueError: codes that are not of ``high``, or as for ``truncates``.
    """
    have, want = high.plan.shape[-1], low.plan.shape[-1]
    if packed.shape[-1] * DIGITS_PER_BYTE != have:
        raise ValueError(
            f"codes of {packed.shape[-1] * DIGITS_PER_BYTE} digits in a frame of {have}: "
            "pass the frame that they were coded in."
        )
    cut = truncates(side, have, want, high.into.shape[-1])
    if want == have:
        return packed, radius, high
    moved = _from_centre(packed, high) * decode_radius(radius).unsqueeze(-1)
    if not cut:
        vectors = moved + high.out[:, -1:].float()
        digits, fitted = encode(vectors, low, unbiased=side == "key")
        return pack_digits(digits), encode_radius(fitted), low
    packed, frame = truncate(packed, want), truncate_frame(high, want)
    into = high.into.float()
    z, zh = torch.matmul(moved, into), torch.matmul(_from_centre(packed, frame), into)
    fitted = radius_of(z, zh, high.grid[:, 2].unsqueeze(-2), side == "key")
    return packed, encode_radius(fitted), frame


def _from_centre(packed: Tensor, frame: Frame) -> Tensor:
    """Codes [B, H, n, N / 4] at radius 1, less the centre: [B, H, n, D] float32."""
    return torch.matmul(centred_digits(packed), frame.out[:, :-1].float())
