"""``calibrate`` in plain PyTorch: from a prompt's queries, keys and values to its frames.

For each kv head: in which directions does an error of a key change the attention output,
how are the keys spread there, and which of them deserve how many digits.

1. A sample of queries gives attention weights a, outputs o, and w = a^2 |v - o|^2: how much
   an error in the logit of a token moves the output (only pairs beyond the recent window
   count, since only they read codes).
2. Query moment Q = E[w q q'], key moment C = E[w x x'] of the centred keys x, both in the
   coordinates of the block (``turn``). A = Q^(1/2) lightly regularised; A C A = U W U';
   z = x A U W^(-1/2) is white, and W says what an error in each dimension costs.
3. Digits go where they lower W x (measured error) most; steps are fitted on the data.

Values: the same with Q = 1 and weights a^2. Their directions matter by who attends to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..codes import STORED, Basis, Frame, decode, encode, stored
from ..grid import STEP, grid_frame
from ..layout import Layout
from ..turn import turn
from .intake import own_validity

QUERIES = 256  # sampled from the prompt
FIT_TOKENS = 1024  # tokens on which steps are fitted, and as many on which the frame is judged
LOSS_TOKENS = 256  # on which the loss of every tier is measured
BLOCKS = 64  # blocks that the query moment looks at
MAX_DIGITS = 4  # of one dimension
REGULARISE = 0.1  # share of the isotropic part in the query moment
#: Token weights are flattened by a power, and no token counts for nothing. A prompt of fewer
#: than LONG tokens says little about which values will matter: milder weights, and values keep
#: the plain rotation (fitted to 256 tokens and used on 3,072, they cost four times its KL).
LONG = 512
POWER, FLOOR = {True: 0.7, False: 0.5}, {True: 0.1, False: 0.3}
STEP_FACTORS = (0.55, 0.65, 0.75, 0.85, 0.92, 1.0, 1.08, 1.18, 1.3, 1.45, 1.6)


def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    plan: Tensor,
    frames: list[Tensor],
    layout: Layout,
) -> None:
    """Overwrite the frames of a layer if this forward begins a sequence with enough tokens.

    ``frames``: the eight tensors of the key and the value basis, and the loss. Keys or values
    that are not finite leave them alone; ``append`` reports those.
    """
    if k.shape[2] < layout.calibrate or layout.calibrate == 0:
        return
    valid = own_validity(mask, position, k.shape[0])[:, None, :, None]
    if int(valid.sum(2).max()) < layout.calibrate:  # padding is no prompt
        return
    finite = [(torch.isfinite(x) | ~valid).all() for x in (k, v)]  # padding may hold anything
    good = (position[0] == 0) & finite[0] & finite[1]
    if not bool(good):
        return
    q, k, v = (torch.nan_to_num(x, posinf=0.0, neginf=0.0) for x in (q, k, v))
    keys, values, loss = fit_frames(q, k, v, mask, position, plan, layout)
    for old, new in zip(frames, (*keys, *values, loss), strict=True):
        old.copy_(new)


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
    batch, heads, tokens, _ = k.shape
    valid = own_validity(mask, position, batch)
    lead = torch.where(valid.any(1), valid.to(torch.int8).argmax(1), tokens)
    t = torch.arange(tokens, device=k.device)
    at = (t + lead[:, None]).clamp(max=tokens - 1)  # rows aligned at their first token
    alive = t < tokens - lead[:, None]
    stats = [_head_statistics(q, k, v, at, alive, h, plan, layout) for h in range(heads)]
    keys, values, moment, key_weight, value_weight = (
        torch.stack(x) for x in zip(*stats, strict=True)
    )
    key_digits, value_digits = zip(*layout.tiers, strict=True)
    plain = not _is_long(alive)
    unit = layout.unit
    key_basis, key_loss = _fit(keys, key_weight, moment, key_digits, unit, True, False)
    value_basis, value_loss = _fit(values, value_weight, None, value_digits, unit, False, plain)
    return key_basis, value_basis, torch.cat([key_loss, value_loss], 1)


def _head_statistics(q, k, v, at, alive, h, plan, layout):
    """Of kv head h, all rows in one list: keys in block coordinates and values [B * T, D], query
    moment [D, D], weights of keys and values [B * T]."""
    batch, tokens = at.shape
    group, dim = q.shape[1] // k.shape[1], k.shape[3]
    row = at[:, :, None].expand(-1, -1, dim)
    kh, vh = (x[:, h].float().gather(1, row) for x in (k, v))
    first = min(128, tokens // 2)
    sample = torch.linspace(first, tokens - 1, min(QUERIES, tokens - first), device=k.device).long()
    qh = q[:, h * group : (h + 1) * group].float()
    qh = qh.gather(2, row[:, None, sample].expand(-1, group, -1, -1))

    t = torch.arange(tokens, device=k.device)
    seen = (t <= sample[:, None]) & alive[:, None, :]  # [B, n, T]
    logits = (qh @ kh.mT[:, None]) * dim**-0.5
    a = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    o = a @ vh[:, None]
    distance = o.square().sum(-1, keepdim=True) + vh.square().sum(-1)[:, None, None]
    distance = (distance - 2 * o @ vh.mT[:, None]).clamp(min=0)
    coded = (t >= layout.sinks) & (t <= sample[:, None] - layout.recent) & seen
    coded = coded & alive.gather(1, sample.expand(batch, -1))[:, :, None]
    square = a.square() * coded[:, None]
    w = torch.nan_to_num(square * distance)  # rows of padding alone have no attention
    square = torch.nan_to_num(square)

    if layout.block:
        block = (t - layout.sinks).clamp(min=0) // layout.block
        start = block * layout.block + layout.sinks
        kh = turn(kh, -start.expand(batch, -1), plan)
    moment = _query_moment(qh, w, plan, layout)
    weight = [
        _flatten(x, (alive & (t >= layout.sinks)).flatten(), _is_long(alive))
        for x in (w.sum((1, 2)).flatten(), square.sum((1, 2)).flatten())
    ]
    return kh.flatten(0, 1), vh.flatten(0, 1), moment, *weight


def _query_moment(q: Tensor, w: Tensor, plan: Tensor, layout: Layout) -> Tensor:
    """E[w q q'] of queries [B, G, n, D], turned by the blocks that w [B, G, n, T] weighs."""
    if layout.block == 0:
        flat, mass = q.flatten(0, 2), w.sum(-1).flatten()
        return (flat * mass[:, None]).T @ flat / mass.sum().clamp(min=1e-30)
    w = torch.nn.functional.pad(
        w[..., layout.sinks :], (0, -(w.shape[-1] - layout.sinks) % layout.block)
    )
    mass = w.unflatten(-1, (-1, layout.block)).sum(-1)  # [B, G, n, blocks]
    blocks = mass.shape[-1]
    moment = q.new_zeros(q.shape[-1], q.shape[-1])
    for block in torch.linspace(0, blocks - 1, min(BLOCKS, blocks)).long().unique().tolist():
        by = q.new_full((1,), -(block * layout.block + layout.sinks))
        turned = turn(q, by, plan).flatten(0, 2)
        moment += (turned * mass[..., block].reshape(-1, 1)).T @ turned
    return moment / mass.sum().clamp(min=1e-30)


def _is_long(alive: Tensor) -> bool:
    return int(alive.sum(1).max()) >= LONG


def _flatten(w: Tensor, counts: Tensor, long: bool) -> Tensor:
    """Token weights with mean 1 over the tokens that count, flattened and with a floor."""
    for power in (1.0, POWER[long]):
        w = w**power
        w = w / ((w * counts).sum() / counts.sum().clamp(min=1)).clamp(min=1e-30)
    return ((1 - FLOOR[long]) * w + FLOOR[long]) * counts


def _fit(
    x: Tensor,
    weight: Tensor,
    metric: Tensor | None,
    tiers: Sequence[int],
    unit: int,
    unbiased: bool,
    plain_only: bool,
) -> tuple[Basis, Tensor]:
    """Frames of vectors [H, n, D] with weights [H, n]; errors count by ``metric`` [H, D, D].

    ``tiers``: digits of each; a head whose tier ``unit`` a plain rotation about the same centre
    serves better gets that. Also two rows [H, 2, tiers] of the loss of
    :func:`fit_frames`.
    """
    heads, n, dim = x.shape
    # The centre of keys is their plain mean: it is there to lower the energy, and a weighted
    # one follows few tokens. Values are summed, and the weighted mean is what sums read.
    uniform = (weight > 0).to(x.dtype)
    by = uniform if metric is not None else weight
    # Squares of huge or tiny vectors leave float32: everything is done at unit size.
    size = (x * uniform[..., None]).abs().amax((1, 2), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    x = x / size
    centre = (by[..., None] * x).sum(1, keepdim=True) / by.sum(1).clamp(min=1e-30)[:, None, None]
    x = (x - centre) * uniform[..., None]
    if metric is None:
        metric = torch.eye(dim, device=x.device).expand(heads, -1, -1)
    else:  # the loss is a share of the queries' energy
        metric = metric / metric.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)[:, None, None]
    into, back, cost = _whiten(x, weight, metric)

    # Steps are fitted on some tokens, and the frame judged on others.
    stride = max(1, n // FIT_TOKENS)
    fit, judge = slice(0, None, 2 * stride), slice(stride, None, 2 * stride)
    z = x[:, fit] @ into.float()
    energy = z.square().mean(-1)
    z = z / energy.clamp(min=1e-30).sqrt()[..., None]
    steps, errors = _fit_steps(z, weight[:, fit] * energy)
    back = torch.cat([back, centre], 1).to(STORED)
    candidates = []
    for digits in tiers:
        grid, plan = _allocate(cost, steps, errors, digits)
        plain = grid_frame(heads, dim, digits, x.device)
        moved = torch.cat([plain.back[:, :-1], centre], 1)
        candidates.append((Frame(into, back, grid, plan), plain._replace(back=moved)))
    fitted, rotated = (stored(Basis.of(frames)) for frames in zip(*candidates, strict=True))
    whole = x + centre

    def losses(basis: Basis, some: slice, only: int | None = None) -> Tensor:
        chosen = (f for t, f in enumerate(_split(basis, tiers)) if only in (None, t))
        at = whole[:, some], weight[:, some], metric
        return torch.stack([_loss(*at, frame, unbiased) for frame in chosen], 1)

    basis = rotated
    if not plain_only:
        both = [losses(b, judge, unit)[:, 0, 0] for b in (fitted, rotated)]
        better = both[0] <= both[1]
        choose = (better.view(-1, *(1,) * (f.dim() - 1)) for f in fitted)
        pairs = zip(choose, fitted, rotated, strict=True)
        basis = Basis(*(torch.where(mask, f, p) for mask, f, p in pairs))
    # What a tier loses needs no more than some hundred tokens.
    loss = losses(basis, slice(stride, None, max(1, n // LOSS_TOKENS)))
    into, back, grid, plan = basis
    # The radius is that of vectors at their own size, through ``into``: the same number.
    error, fitted_size, own_size = loss.unbind(-1)
    own_size = own_size.clamp(min=1e-30)
    loss = torch.stack([error / own_size * size[:, 0].square(), fitted_size / own_size], 1)
    return Basis((into / size).to(into.dtype), (back * size).to(back.dtype), grid, plan), loss


def _split(basis: Basis, tiers: Sequence[int]) -> Iterator[Frame]:
    """The frame of each tier."""
    for t, digits in enumerate(tiers):
        yield basis.frame(t, sum(tiers[:t]), digits)


def _whiten(x: Tensor, weight: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``into``, its inverse, and the cost W of an error in each dimension."""
    dim = x.shape[-1]
    metric = metric.double()
    trace = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    eye = torch.eye(dim, dtype=torch.float64, device=x.device)
    values, vectors = _eigh((1 - REGULARISE) * metric + REGULARISE * trace * eye)
    root = values.clamp(min=1e-30)
    a = (vectors * root.sqrt()[:, None]) @ vectors.mT
    mass = weight.sum(1).clamp(min=1e-30)[:, None, None]
    spread = ((x * weight[..., None]).mT @ x).double() / mass
    cost, u = _eigh(a @ spread @ a)
    cost = torch.maximum(cost, cost.amax(-1, keepdim=True) * 1e-7).clamp(min=1e-30)
    into = a @ u / cost.sqrt()[:, None]
    into = into.to(STORED)
    # A singular one gives NaN, and the plain rotation wins.
    return into, torch.linalg.inv_ex(into.double())[0].float(), cost.float()


def _eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of small symmetric matrices, on the host: on a GPU a decomposition
    of one such matrix takes longer than all of them here, and the way there."""
    values, vectors = torch.linalg.eigh(x.cpu())
    return values.to(x.device), vectors.to(x.device)


def _fit_steps(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Best step and its weighted squared error for 0..MAX_DIGITS digits: [H, D, MAX_DIGITS + 1]."""
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=1e-30))[..., None]
    steps = [torch.ones_like(z[:, 0])]
    errors = [(weight * z.square()).sum(1)]
    for digits in range(1, MAX_DIGITS + 1):
        half = 4**digits / 2
        tried = []
        for factor in STEP_FACTORS:
            step = factor * STEP[digits]
            zh = (torch.floor(z / step).clamp(-half, half - 1) + 0.5) * step
            tried.append((weight * (z - zh).square()).sum(1))
        error, best = torch.stack(tried).min(0)
        steps.append(STEP[digits] * z.new_tensor(STEP_FACTORS)[best])
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


def _loss(x: Tensor, weight: Tensor, metric: Tensor, frame: Frame, unbiased: bool) -> Tensor:
    """Of vectors [H, n, D] coded in a frame, weighted sums [H, 3]: of the squared error, of the
    squared radii that were fitted, and of those of the vectors."""
    digits, radius = encode(x[None], frame, unbiased=unbiased)
    delta = decode(digits, radius, frame)[0] - x
    own = ((x - frame.centre) @ frame.into.float()).square().mean(-1)
    sums = (((delta @ metric.float()) * delta).sum(-1), radius[0].square(), own)
    return torch.stack([(weight * part).sum(1) for part in sums], 1)
