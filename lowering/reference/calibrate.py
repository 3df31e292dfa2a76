"""``calibrate`` in plain PyTorch: from a prompt's queries, keys and values to its frames.

For each kv head: in which directions does an error of a key change the attention output,
how are the keys spread there, and which of them deserve how many digits.

1. A sample of queries gives attention weights a, outputs o, and w = a^2 |v - o|^2: how much
   an error in the logit of a token moves the output (``statistics``).
2. Query moment Q = E[w q q'], key moment C = E[w x x'] of the centred keys x, both in the
   coordinates of the block (``turn``). Q = L L' lightly regularised; L' C L = U W U';
   z = x L U W^(-1/2) is white, and W says what an error in each dimension costs.
3. Digits go where they lower W x (measured error) most; steps are fitted on the data (``fit``).

Values: the same with Q = 1 and weights a^2. Their directions matter by who attends to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codes import Basis
from ..layout import Layout
from ..prompt import on_kernels
from .fit import Fit, Side, fit_side, fit_steps, sampled, whiten
from .intake import finite_tokens, leading, own_validity
from .statistics import LONG, Prompt, sample_queries, sides


def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    plan: Tensor,
    frames: Sequence[Tensor],
    layout: Layout,
) -> None:
    """Overwrite the frames of a layer if this forward begins a sequence with enough tokens.

    ``frames``: the eight tensors of the key and the value basis, and the loss. Keys or values
    that are not finite leave them alone; ``append`` reports those.
    """
    begin_calibration(q, k, v, mask, position, plan, layout)(frames)


def begin_calibration(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    plan: Tensor,
    layout: Layout,
) -> Callable[[Sequence[Tensor]], None]:
    """:func:`calibrate` but for writing the frames, which the result does: what waits for the
    device can do so before attention, and frames change after it."""
    if k.shape[2] < layout.calibrate or layout.calibrate == 0:
        return _leave
    valid = own_validity(mask, position, k.shape[0])
    queries = sample_queries(q, leading(valid), k.shape[1])
    found = fit_beginning(queries, k, v, valid, position, plan, layout)
    if found is None:
        return _leave

    def finish(frames: Sequence[Tensor]) -> None:
        for old, new in zip(frames, found, strict=True):
            old.copy_(new)

    return finish


def fit_beginning(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    position: Tensor,
    plan: Tensor,
    layout: Layout,
) -> tuple[Tensor, ...] | None:
    """The eight tensors of the key and the value basis, and the loss, of every head; None if this
    forward begins no sequence, has too few tokens or some that are not finite.

    ``queries``: of ``sample_queries``. ``valid`` [B, T]: of ``own_validity``. Heads do not know of
    each other, so they may be of several layers. Waits for the device, once.
    """
    finite = finite_tokens(k) & finite_tokens(v) | ~valid  # padding may hold anything
    good = (position[0] == 0) & finite.all()
    lead = leading(valid)
    most = k.shape[2] - lead.amin()
    enough, good_here, long = torch.stack(  # padding is no prompt
        [valid.sum(1).amax() >= layout.calibrate, good, most >= LONG]
    ).tolist()
    if not (enough and good_here):
        return None
    keys, values, loss = _fit(Prompt(queries, k, v, lead, plan, bool(long), layout))
    return *keys, *values, loss


def _leave(frames: Sequence[Tensor]) -> None:
    """There is nothing to fit frames to."""


def fit_frames(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    plan: Tensor,
    layout: Layout,
) -> tuple[Basis, Basis, Tensor]:
    """Frames of one layer's keys and values from a prompt, and what coding in them loses.

    The loss [H, 4, tiers] is, for keys, the expected squared error of a logit (before its scale)
    over E|q|^2 times the key's mean square in the frame, and the mean of fitted squared radii over
    that; for values, the squared error over the value's mean square, and the same.

    Args:
        q: [B, Hq, T, D]; k, v: [B, H, T, D]: the forward that begins a sequence.
        mask, position: as for ``append``; padding is left out.
        plan: the rotary turn, [2, D], or empty.
    """
    lead = leading(own_validity(mask, position, k.shape[0]))
    long = k.shape[2] - int(lead.amin()) >= LONG
    return _fit(Prompt(sample_queries(q, lead, k.shape[1]), k, v, lead, plan, long, layout))


def _sides(prompt: Prompt) -> tuple[Side, Side]:
    if not on_kernels(prompt.k):
        return sides(prompt)
    from .. import statistics

    with torch.cuda.device(prompt.k.device):  # Triton launches on the current one
        return statistics.sides(prompt)


def _fit(prompt: Prompt) -> tuple[Basis, Basis, Tensor]:
    layout, shape = prompt.layout, prompt.k.shape
    keys, values = _sides(prompt)
    sample = sampled(shape[0] * shape[2], prompt.k.device)
    white = whiten(keys, values)
    x, weight = (torch.cat([getattr(s, n) for s in (keys, values)]) for n in ("tokens", "weight"))
    centre = torch.cat([keys.centre, values.centre])
    z = (x[:, sample.fit] - centre) @ white.into.float()
    energy = z.square().mean(-1)
    z = z / energy.clamp(min=1e-30).sqrt()[..., None]
    steps, errors = fit_steps(z, weight[:, sample.fit] * energy)
    parts = (x.chunk(2) for x in (*white, steps, errors))
    fits = [Fit(*part) for part in zip(*parts, strict=True)]
    found = []
    for n, side in enumerate((keys, values)):
        tiers = [digits[n] for digits in layout.tiers]
        plain = n == 1 and not prompt.long
        found.append(fit_side(side, fits[n], sample, tiers, layout.unit, n == 0, plain, layout))
    (key_basis, key_loss), (value_basis, value_loss) = found
    return key_basis, value_basis, torch.cat([key_loss, value_loss], 1)
