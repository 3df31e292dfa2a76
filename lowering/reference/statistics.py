"""What attention says of a prompt's tokens: how much an error of each, in each direction, hurts."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Layout
from ..turn import turn
from .fit import Side, sampled

QUERIES = 256  # sampled from the prompt
BLOCKS = 64  # blocks that the query moment looks at
BLOCKS_AT_ONCE = 16
#: Token weights are flattened by a power, and no token counts for nothing. A prompt of fewer
#: than LONG tokens says little about which values will matter: milder weights, and values keep
#: the plain rotation (fitted to 256 tokens and used on 3,072, they cost four times its KL).
LONG = 512
POWER, FLOOR = {True: 0.7, False: 0.5}, {True: 0.1, False: 0.3}
QUERY_CHUNKS = 4
CHUNK_BYTES = 1 << 24  # of attention weights at once: more leave the cache of a processor


class Prompt(NamedTuple):
    """A forward that begins a sequence: k and v [B, H, T, D], and of its queries those of
    :func:`sample_queries`, q [B, H, G, n, D].

    Token t of row b stands at ``lead[b] + t``: rows are aligned at their first token. ``plan``:
    the rotary turn, [2, D], or empty. ``long``: whether there are ``LONG`` tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lead: Tensor
    plan: Tensor
    long: bool
    layout: Layout

    @property
    def tokens(self) -> Tensor:
        """[B, 1] tokens of each row."""
        return self.k.shape[2] - self.lead[:, None]

    @property
    def counts(self) -> Tensor:
        """[B * T] bool: tokens that will be coded or may be."""
        t = torch.arange(self.k.shape[2], device=self.k.device)
        return ((t < self.tokens) & (t >= self.layout.sinks)).flatten()

    @property
    def numbers(self) -> Tensor:
        """[n] tokens that the sampled queries are of."""
        return query_numbers(self.k.shape[2], self.k.device)

    def vectors(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Keys or values [B, h, T, D] of tokens t [n] or all, float32; 0 where there is none."""
        t = torch.arange(x.shape[2], device=x.device) if t is None else t
        at = (t + self.lead[:, None]).clamp(max=x.shape[2] - 1)
        index = at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        found = torch.nan_to_num(x.gather(2, index), posinf=0.0, neginf=0.0)
        return found.float().masked_fill(~(t < self.tokens)[:, None, :, None], 0)


@lru_cache(maxsize=64)
def query_numbers(tokens: int, device: torch.device) -> Tensor:
    """Of so many tokens those whose queries are sampled, the same in all rows."""
    first = min(128, tokens // 2)
    return torch.linspace(first, tokens - 1, min(QUERIES, tokens - first)).long().to(device)


def sample_queries(q: Tensor, lead: Tensor, heads: int) -> Tensor:
    """Some of the queries [B, Hq, T, D] of prompts that begin at ``lead`` [B], finite:
    [B, heads, G, n, D]."""
    tokens = q.shape[2]
    at = (query_numbers(tokens, q.device) + lead[:, None]).clamp(max=tokens - 1)
    index = at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    found = q.gather(2, index).unflatten(1, (heads, -1))
    return torch.nan_to_num(found, posinf=0.0, neginf=0.0)


class Attention(NamedTuple):
    """Sums over sampled queries of pairs that count: those beyond the recent window, since only
    they read codes. With attention weights a, values v and outputs o, w = a^2 |v - o|^2.

    ``weight`` [H, B * T]: of w for each token. ``square``: of a^2. ``moment`` [H, D, D]: of
    w q q' in the coordinates of the block that each token is of, in any unit.
    """

    weight: Tensor
    square: Tensor
    moment: Tensor


def attention(prompt: Prompt) -> Attention:
    """The sums of all heads, some at once."""
    q, number = prompt.q, prompt.numbers
    batch, heads, group, n, _ = q.shape
    size = max(1, CHUNK_BYTES // max(1, 4 * batch * group * n * prompt.k.shape[2]))
    parts = []
    for first in range(0, heads, size):
        some = slice(first, first + size)
        k, v = (prompt.vectors(x[:, some]) for x in (prompt.k, prompt.v))
        parts.append(_attention(q[:, some].float(), k, v, number, prompt))
    return Attention(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _attention(q: Tensor, k: Tensor, v: Tensor, number: Tensor, prompt: Prompt) -> Attention:
    """Of some heads: q [B, H, G, n, D] and vectors [B, H, T, D]. Queries see half of the tokens on
    average: some of them are taken at a time, with the tokens that they may see."""
    layout = prompt.layout
    weight = k.new_zeros(*k.shape[:3])
    total = torch.zeros_like(weight)
    mass = []
    for some in torch.arange(len(number)).chunk(QUERY_CHUNKS):
        n = slice(int(some[0]), int(some[-1]) + 1)
        end = int(number[some[-1]]) + 1
        w, square = _pairs(q[:, :, :, n], k[:, :, :end], v[:, :, :end], number[n], prompt)
        mass.append(block_mass(w, layout))
        weight[..., :end] += w.sum((2, 3))
        total[..., :end] += square.sum((2, 3))
    blocks = mass[-1].shape[-1]
    every = torch.cat([F.pad(x, (0, blocks - x.shape[-1])) for x in mass], 3)
    moment = query_moment(q, every, prompt.plan, layout)
    return Attention(_rows(weight), _rows(total), moment)


def _rows(x: Tensor) -> Tensor:
    """[B, H, T] -> [H, B * T]."""
    return x.transpose(0, 1).flatten(1)


def _pairs(
    q: Tensor, k: Tensor, v: Tensor, number: Tensor, prompt: Prompt
) -> tuple[Tensor, Tensor]:
    """Of every pair of a query and a token w and a^2 (``Attention``): [B, H, G, n, T]."""
    layout, dim = prompt.layout, q.shape[-1]
    t = torch.arange(k.shape[2], device=k.device)
    seen = (t <= number[:, None]) & (t < prompt.tokens)[:, None]  # [B, n, T]
    logits = (q @ k.mT[:, :, None]).mul_(dim**-0.5)
    a = logits.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1)
    o = a @ v[:, :, None]
    coded = (t >= layout.sinks) & (t <= number[:, None] - layout.recent) & seen
    coded = coded & (number < prompt.tokens)[:, :, None]
    square = a.square_().mul_(coded[:, None, None])
    distance = (o @ v.mT[:, :, None]).mul_(-2).add_(o.square().sum(-1, keepdim=True))
    distance = distance.add_(v.square().sum(-1)[:, :, None, None]).clamp_(min=0)
    # Rows of padding alone have no attention.
    return distance.mul_(square).nan_to_num_(), square.nan_to_num_()


def block_mass(w: Tensor, layout: Layout) -> Tensor:
    """Sums of w [..., T] over the tokens of every block: [..., blocks]."""
    w = w[..., layout.sinks :]
    if layout.block == 0:
        return w.sum(-1, keepdim=True)
    w = F.pad(w, (0, -w.shape[-1] % layout.block))
    return w.unflatten(-1, (-1, layout.block)).sum(-1)


def query_moment(q: Tensor, mass: Tensor, plan: Tensor, layout: Layout) -> Tensor:
    """The sum of w q q' [H, D, D] of queries [B, H, G, n, D], turned by the blocks whose tokens
    ``mass`` [B, H, G, n, blocks] weighs.

    Of many blocks some are looked at.
    """
    q, mass = (x.transpose(0, 1).flatten(1, 3) for x in (q, mass))  # [H, rows, ...]
    if layout.block == 0:
        return (q * mass).mT @ q
    moment = q.new_zeros(q.shape[0], q.shape[2], q.shape[2])
    for some in chosen_blocks(mass.shape[-1], q.device).split(BLOCKS_AT_ONCE):
        by = -(some * layout.block + layout.sinks)[:, None, None]
        turned = turn(q, by, plan)  # [blocks, H, rows, D]
        weighed = turned * mass[..., some].permute(2, 0, 1)[..., None]
        moment += (weighed.mT @ turned).sum(0)
    return moment


def chosen_blocks(blocks: int, device: torch.device) -> Tensor:
    """Which of so many blocks the query moment looks at."""
    return torch.linspace(0, blocks - 1, min(BLOCKS, blocks)).long().unique().to(device)


# ------------------------------------------------------------ the two sides


def sides(prompt: Prompt) -> tuple[Side, Side]:
    """Keys, turned back by their blocks, and values, with the weights that attention gives them."""
    key_weight, value_weight, metric = weigh(attention(prompt), prompt)
    # The centre of keys is their plain mean: it is there to lower the energy, and a weighted one
    # follows few tokens. Values are summed, and the weighted mean is what sums read.
    uniform = prompt.counts.float().expand_as(key_weight)
    keys = _side(_block_keys(prompt), uniform, key_weight, metric)
    return keys, _side(_flat(prompt.vectors(prompt.v)), value_weight, value_weight, None)


def weigh(found: Attention, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [H, B * T] of keys and of values, and the metric [H, D, D] of keys."""
    trace = found.moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    both = torch.cat([found.weight, found.square])
    weights = _flatten(both, prompt.counts, prompt.long).chunk(2)
    return *weights, found.moment / trace.clamp(min=1e-30)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1, 2)


def _block_keys(prompt: Prompt) -> Tensor:
    """[H, B * T, D] keys, turned back by the block they sit in."""
    k, layout = prompt.vectors(prompt.k), prompt.layout
    if layout.block:
        i = (torch.arange(k.shape[2], device=k.device) - layout.sinks).clamp(min=0)
        k = turn(k, -(i // layout.block * layout.block + layout.sinks), prompt.plan)
    return _flat(k)


def _side(x: Tensor, centring: Tensor, weight: Tensor, metric: Tensor | None) -> Side:
    """Of vectors [H, n, D], which are overwritten, with weights [H, n] of their centre and of
    their spread."""
    counts = (weight > 0)[..., None]
    x = x.mul_(counts)
    # Squares of huge or tiny vectors leave float32: everything is done at unit size.
    size = torch.linalg.vector_norm(x, torch.inf, (1, 2), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    x = x.div_(size)
    mass = centring.sum(1).clamp(min=1e-30)[:, None, None]
    centre = centring[:, None] @ x / mass
    sample = sampled(x.shape[1], x.device)
    tokens = torch.where(counts[:, sample.index], x[:, sample.index], centre)
    x = x.sub_(centre)
    spread = (x * weight[..., None]).mT @ x / weight.sum(1).clamp(min=1e-30)[:, None, None]
    return Side(tokens, weight[:, sample.index], centre, spread, size, metric)


def _flatten(w: Tensor, counts: Tensor, long: bool) -> Tensor:
    """Token weights [H, n] with mean 1 over the tokens that count, flattened and with a floor."""
    number = counts.sum().clamp(min=1)
    for power in (1.0, POWER[long]):
        w = w**power
        w = w / ((w * counts).sum(1, keepdim=True) / number).clamp(min=1e-30)
    return ((1 - FLOOR[long]) * w + FLOOR[long]) * counts
