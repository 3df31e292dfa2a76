"""The allocator, against brute force, against the Lagrangian bound, and at its edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import skv_compile as skv
from skv_compile.codec.tiers import choose_layout
from skv_compile.lowering.codes import decode_score, encode_score
from skv_compile.lowering.layout import PAGE_HEADER
from skv_compile.retention.allocate import NEVER, levels_at, solve, steps_of
from skv_compile.retention.decide import SLACK, Arriving, decide
from skv_compile.retention.heads import Heads
from skv_compile.retention.policies.rdr import RDR
from skv_compile.retention.tokens import Tokens, pages_for

LAYERS, BATCH, HEADS = 4, 2, 2
UNLIMITED = 10**9


def heads_of(codec: str = "frame", layers: int = LAYERS) -> Heads:
    config = skv.Config(codec=codec, retention="rdr", page_tokens=16)
    layout = choose_layout(config, 64, 1 << 16, "float32")
    tiers = len(layout.tiers)
    heads = Heads.empty(layout, layers, BATCH, HEADS, tiers - 1, torch.device("cpu"))
    heads.key_loss[:] = 0.01 * 0.25 ** torch.arange(tiers)
    heads.value_loss[:] = 0.5 * 0.25 ** torch.arange(tiers)
    return heads


def tokens_of(heads: Heads, count: int, score: Tensor | None = None, seed: int = 0) -> Tokens:
    """``count`` fresh tokens, as many of every group, with log-normal scores and radii."""
    g = torch.Generator().manual_seed(seed)
    n = count // heads.groups
    group = torch.arange(heads.groups).repeat_interleave(n)
    i = torch.arange(n).repeat(heads.groups)
    if score is None:
        score = torch.exp(3 * torch.randn(len(i), generator=g)) * 1e-6
    radii = torch.exp(0.1 * torch.randn(2, len(i), generator=g))
    level = torch.full_like(i, heads.tiers)
    return Tokens(group, i, level, score, radii[0], radii[1], torch.ones(len(i), dtype=torch.bool))


def coded(tokens: Tokens, level: Tensor) -> Tokens:
    """The tokens that are kept, as they are after they have been coded at these levels."""
    after = tokens.at(level)[level > 0]
    after.fresh = torch.zeros(len(after), dtype=torch.bool)
    return after


def chosen(cost: Tensor, level: Tensor) -> Tensor:
    return cost.gather(-1, level[:, None]).squeeze(-1)


def total(tokens: Tokens, heads: Heads, level: Tensor) -> float:
    """Expected error of tokens at these levels."""
    return float(chosen(RDR().costs(tokens, heads).double(), level).sum())


# ---------------------------------------------------------------- against brute force


@st.composite
def problems(draw, sink: bool = True) -> tuple[Tensor, Tensor, int]:
    """Costs [J, L + 1], sizes [J, L + 1], bytes: integers so small that every quotient of two
    differs from every other by far more than float32 rounds."""
    tokens, levels = draw(st.integers(4, 6)), draw(st.integers(3, 4))
    small = st.integers(0, 100)
    cost = torch.tensor(
        [draw(st.lists(small, min_size=levels, max_size=levels)) for _ in range(tokens)]
    ).float()
    if sink:  # a larger code is better
        cost = cost.sort(-1, descending=True).values
    grow = [draw(st.lists(st.integers(1, 12), min_size=levels - 1, max_size=levels - 1))]
    if draw(st.booleans()):  # every token its own sizes
        grow = [draw(st.permutations(grow[0])) for _ in range(tokens)]
    size = torch.nn.functional.pad(torch.tensor(grow).cumsum(-1), (1, 0)).expand(tokens, -1)
    return cost, size.float(), draw(st.integers(0, int(size.amax(-1).sum()) + 1))


def brute(cost: Tensor, size: Tensor, most: float) -> float:
    """The least cost of any assignment of at most ``most`` bytes."""
    every = torch.tensor(list(itertools.product(range(cost.shape[1]), repeat=len(cost))))
    costs, sizes = (x.expand(len(every), -1, -1).gather(2, every[..., None]) for x in (cost, size))
    return float(costs.sum((1, 2))[sizes.sum((1, 2)) <= most].min())


def settle(cost: Tensor, size: Tensor, most: int) -> tuple[Tensor, float]:
    """Levels and multiplier under one budget of bytes."""
    steps = steps_of(cost, size)
    assert (steps.diff(dim=1) <= 0).all()
    found = solve(
        steps,
        torch.zeros(len(cost), dtype=torch.int64),
        1,
        lambda level: chosen(size, level).sum()[None],
        torch.tensor([most]),
    )
    if 0 < float(found) < torch.inf:  # no smaller one will do
        lower = levels_at(steps, torch.nextafter(found, torch.zeros(1)))
        assert chosen(size, lower).sum() > most
    return levels_at(steps, found), float(found)


@pytest.mark.parametrize("monotone", [True, False])
@given(data=st.data())
def test_no_assignment_of_as_many_bytes_costs_less(monotone: bool, data) -> None:
    cost, size, most = data.draw(problems(sink=monotone))
    level, multiplier = settle(cost, size, most)
    spent, price = float(chosen(size, level).sum()), float(chosen(cost, level).sum())
    assert spent <= most
    assert price == brute(cost, size, spent)
    # Weak duality: what the bytes left over could still have bought.
    assert price - brute(cost, size, most) <= max(0.0, multiplier) * (most - spent) + 1e-3


@given(problems())
def test_a_larger_budget_never_costs_more_and_the_largest_takes_the_best(problem) -> None:
    cost, size, _ = problem
    prices, last = [], None
    for most in (*range(0, int(size.amax(-1).sum()), 7), int(size.amax(-1).sum())):
        level, multiplier = settle(cost, size, most)
        prices.append(float(chosen(cost, level).sum()))
        assert last is None or multiplier <= last
        last = multiplier
    assert prices == sorted(prices, reverse=True)
    assert torch.equal(level, torch.full_like(level, cost.shape[1] - 1))


@given(problems(sink=False), st.integers(0, 400))
def test_steps_are_where_the_cheapest_level_of_a_token_changes(problem, quarter: int) -> None:
    cost, size, _ = problem
    multiplier = quarter / 4 + 1e-4  # no quotient of such integers
    level = levels_at(steps_of(cost, size), torch.tensor(multiplier))
    assert torch.equal(level, (cost.double() + multiplier * size.double()).argmin(-1))


def test_scopes_are_settled_each_for_itself() -> None:
    torch.manual_seed(0)
    cost = torch.randint(0, 100, (60, 4)).float().sort(-1, descending=True).values
    size = torch.tensor([0.0, 2, 3, 7]).expand(60, -1)
    scope, steps = torch.randint(0, 3, (60,)), steps_of(cost, size)
    most = torch.tensor([20, 55, 0])

    def spent(level: Tensor) -> Tensor:
        return torch.zeros(3).index_add_(0, scope, chosen(size, level))

    found = solve(steps, scope, 3, spent, most)
    level = levels_at(steps, found[scope])
    for n in range(3):
        mine = scope == n
        assert torch.equal(level[mine], settle(cost[mine], size[mine], int(most[n]))[0])
    assert (level[scope == 2] == 0).all()


# ---------------------------------------------------------------- against the Lagrangian bound


@pytest.mark.parametrize("codec", ["frame", "grid", "rings"])
@pytest.mark.parametrize("allowed", [320, 700, 1500, 2500])
@pytest.mark.parametrize("rounded", [False, True])
def test_many_tokens_cost_no_more_than_the_bound_and_a_page_a_list(
    codec: str, allowed: int, rounded: bool
) -> None:
    """With multiplier m, cost >= sum of min(cost + m bytes) - m * bytes allowed for every
    assignment that fits. What is found differs by m times the bytes it leaves: those of pages
    begun, less than one for every list of a group's tokens in a tier."""
    heads, policy = heads_of(codec), RDR()
    tokens = tokens_of(heads, 20_000)
    if rounded:  # as scores come from the pool
        tokens.score = decode_score(encode_score(tokens.score))
    level = decide(policy, tokens, heads, {}, allowed)
    pages = pages_for(tokens.at(level), heads.layout)
    demand = pages_for(tokens, heads.layout)
    assert 0.99 * min(allowed, demand) <= pages <= allowed

    cost, size = policy.costs(tokens, heads).double(), heads.sizes(torch.device("cpu")).double()
    steps = policy.steps(tokens, heads, {})
    # The multiplier lies above every step that was not taken.
    further = torch.nn.functional.pad(steps, (0, 1), value=NEVER).gather(1, level[:, None])
    multiplier = max(0.0, float(further.max()))
    page = heads.layout.page_bytes + PAGE_HEADER
    bound = (cost + multiplier * size).amin(-1).sum() - multiplier * allowed * page
    lists = len(torch.unique(tokens.group * 8 + level, dim=0))
    slack = multiplier * page * lists
    price = float(chosen(cost, level).sum())
    assert float(bound) * (1 - 1e-6) <= price <= float(bound) + slack
    # No other multiplier's bound is above the cost either.
    for factor in (0.5, 0.9, 1.1, 2.0):
        m = multiplier * factor
        assert (cost + m * size).amin(-1).sum() - m * allowed * page <= price


@given(seed=st.integers(0, 99), allowed=st.integers(0, 500))
def test_a_larger_budget_never_costs_more(seed: int, allowed: int) -> None:
    heads, prices = heads_of(), []
    tokens = tokens_of(heads, 3200, seed=seed)
    for pages in (allowed, allowed + 1, allowed + 7, allowed + 100, UNLIMITED):
        prices.append(total(tokens, heads, decide(RDR(), tokens, heads, {}, pages)))
    assert prices == sorted(prices, reverse=True)


# ---------------------------------------------------------------- what it promises


@given(seed=st.integers(0, 99), allowed=st.integers(0, 250))
def test_nothing_but_the_tokens_decides(seed: int, allowed: int) -> None:
    heads = heads_of()
    tokens = tokens_of(heads, 1600, seed=seed)
    level = decide(RDR(), tokens, heads, {}, allowed)
    assert torch.equal(decide(RDR(), tokens, heads, {}, allowed), level)
    mixed = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decide(RDR(), tokens[mixed], heads, {}, allowed), level[mixed])


@pytest.mark.parametrize("codec", ["frame", "grid", "rings", "identity"])
def test_a_budget_for_everything_keeps_everything_at_its_best(codec: str) -> None:
    heads = heads_of(codec)
    tokens = tokens_of(heads, 3200)
    tokens.score[::3] = 0.0
    top = torch.full_like(tokens.level, heads.tiers)
    exactly = pages_for(tokens.at(top), heads.layout)
    for allowed in (exactly, UNLIMITED):
        assert torch.equal(decide(RDR(), tokens, heads, {}, allowed), top)
    tokens.level[::7] = 0  # padding
    level = decide(RDR(), tokens, heads, {}, UNLIMITED)
    assert torch.equal(level, torch.where(tokens.level == 0, 0, top))


@given(seed=st.integers(0, 99), first=st.integers(0, 220), then=st.integers(0, 220))
def test_a_coded_token_never_rises(seed: int, first: int, then: int) -> None:
    heads = heads_of()
    tokens = tokens_of(heads, 1600, seed=seed)
    old = coded(tokens, decide(RDR(), tokens, heads, {}, first))
    old.score = tokens_of(heads, 1600, seed=seed + 1).score[: len(old)]
    for allowed in (then, UNLIMITED):
        level = decide(RDR(), old, heads, {}, allowed)
        assert (level <= old.level).all()
        assert pages_for(old.at(level), heads.layout) <= allowed
    assert torch.equal(level, old.level)


def test_a_change_of_tier_must_save_more_than_the_penalty() -> None:
    heads = heads_of()
    tokens = tokens_of(heads, 3200)
    level = decide(RDR(), tokens, heads, {}, 200)
    old = coded(tokens, level)
    fewer = {}
    for switch in (0.0, 0.5):
        after = decide(RDR(switch=switch), old, heads, {}, 170)
        assert pages_for(old.at(after), heads.layout) <= 170
        fewer[switch] = int(((after != old.level) & (after > 0)).sum())
    assert fewer[0.5] < 0.7 * fewer[0.0]

    # One token by itself: the next tier below is never worth it if it saves less than that.
    size = heads.sizes(torch.device("cpu"))
    one = old[(old.level == 3).nonzero()[:1].squeeze(1)]
    saved = 8 * float(size[3] - size[2]) / (2 * heads.layout.head_dim)  # bits a coordinate
    for switch, stays in ((0.0, False), (1.01 * saved, True)):
        steps = RDR(switch=switch).steps(one, heads, {})[0]
        assert bool(steps[2] == steps[1]) == stays
        assert steps[2] > 0


EDGES = {
    "zero": lambda n: torch.zeros(n),
    "one hot": lambda n: (torch.arange(n) == n // 2).float(),
    "equal": lambda n: torch.full((n,), 0.25),
    "tiny": lambda n: torch.full((n,), 1e-38),
    "wide": lambda n: torch.logspace(-38, 0, n),
    "wider": lambda n: torch.logspace(-44, 3, n, dtype=torch.float64).float(),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("silent", [False, True])
def test_scores_of_any_kind_have_levels(name: str, silent: bool) -> None:
    """``silent``: attention that gave nothing but zeros."""
    heads = heads_of()
    tokens = tokens_of(heads, 3200)
    tokens.score = EDGES[name](len(tokens))
    if silent:
        heads.norm[:], heads.spread[:], heads.query_energy[:] = 0, 0, 0
    steps = RDR().steps(tokens, heads, {})
    assert torch.isfinite(steps).all()
    for allowed in (0, 1, 40, 200, UNLIMITED):
        level = decide(RDR(), tokens, heads, {}, allowed)
        assert pages_for(tokens.at(level), heads.layout) <= allowed
        if name == "one hot" and allowed and not silent:
            assert level[len(tokens) // 2] == level.max() > 0
    assert (level == heads.tiers).all()


def test_tokens_far_apart_take_the_slots_between_them() -> None:
    heads = heads_of()
    tokens = tokens_of(heads, 320)
    tokens.i = tokens.i * 1000
    for allowed in (0, 3, 16, 50, 150):
        level = decide(RDR(), tokens, heads, {}, allowed)
        assert pages_for(tokens.at(level), heads.layout) <= allowed
    assert level.any()


# ---------------------------------------------------------------- layers that come one by one


@given(
    layers=st.sampled_from([1, 2, 5, 16]),
    allowed=st.integers(1, 3000),
    rising=st.sampled_from([0.0, 1.0, -1.0]),
    seed=st.integers(0, 99),
)
def test_layers_that_arrive_stay_within_their_share(
    layers: int, allowed: int, rising: float, seed: int
) -> None:
    heads, policy = heads_of(layers=layers), RDR()
    arriving, seen, shares = Arriving(heads), [], []
    tokens = tokens_of(heads, 400 * layers, seed=seed)
    size = heads.sizes(torch.device("cpu")).double()
    page = heads.layout.page_bytes + PAGE_HEADER
    for number in range(layers):
        mine = tokens[heads.layer(tokens.group) == number]
        mine.score = mine.score * math.exp(rising * number)
        steps = policy.steps(mine, heads, {})
        level = arriving.levels(steps, heads.layer(mine.group), [number], allowed)
        seen.append(steps)
        shares.append(arriving.share)
        room = allowed * arriving.share * page
        taken = float(size[level].sum())
        assert taken <= room + 1e-3
        # One multiplier holds for all layers so far: they fit, and one bin less would not.
        lowest = steps.gather(1, (level - 1).clamp(min=0)[:, None])[level > 0]
        every = torch.cat(seen)
        if len(lowest):
            cut = torch.nextafter(lowest.min(), torch.tensor(0.0))
            assert float(size[levels_at(every, cut)].sum()) <= room + 1e-3
        left = steps[:, 0][level == 0]
        if len(left) and float(left.max()) > 0:
            more = levels_at(every, left.max() * (1 - 2.0**-5))
            assert float(size[more].sum()) > room
        assert arriving.part(number + 1, allowed) == int(allowed * arriving.share)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[0] <= SLACK / layers or layers == 1


@pytest.mark.parametrize("codec", ["frame", "grid", "rings", "identity"])
def test_layers_with_room_for_all_lose_nothing_as_they_arrive(codec: str) -> None:
    heads, policy = heads_of(codec), RDR()
    # Keys that no tier codes well, and tokens nobody has looked at.
    heads.query_energy[:] = torch.logspace(-3, 6, heads.groups)
    arriving, tokens = Arriving(heads), tokens_of(heads, 1600)
    tokens.score[::3] = 0.0
    for number in range(LAYERS):
        mine = tokens[heads.layer(tokens.group) == number]
        layer = heads.layer(mine.group)
        level = arriving.levels(policy.steps(mine, heads, {}), layer, [number], UNLIMITED)
        assert (level == heads.tiers).all()


def test_layers_that_arrive_together_get_what_they_would_one_by_one() -> None:
    heads, policy = heads_of(layers=5), RDR()
    tokens = tokens_of(heads, 2000)
    steps, layer = policy.steps(tokens, heads, {}), heads.layer(tokens.group)
    one, all_at_once = Arriving(heads), Arriving(heads)
    want = torch.zeros_like(layer)
    for number in range(5):
        mine = layer == number
        want[mine] = one.levels(steps[mine], layer[mine], [number], 30)
    got = torch.zeros_like(layer)
    for some in (range(2), range(2, 5)):
        mine = (layer >= some[0]) & (layer <= some[-1])
        got[mine] = all_at_once.levels(steps[mine], layer[mine], some, 30)
    assert torch.equal(got, want)
    assert 0 < int((got == 0).sum()) < len(got)
