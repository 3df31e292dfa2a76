"""The pool under any sequence of forwards, crops, new starts and row selections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pools import LAYERS, SLOTS, TRACKED, Run, budget_of, config_of, same, shorten
from support import NATIVE, layer_state, max_error

from skv_compile.lowering.reference.pages import decode_records
from skv_compile.lowering.state import CODED
from skv_compile.retention.recode import encode_tokens
from skv_compile.retention.tokens import Tokens, pages_for

CODECS = ("identity", "grid", "frame")
PHASES = (Phase.explicit, Phase.generate)  # an example takes a second: shrinking takes minutes

ops = st.one_of(
    st.tuples(st.just("prompt"), st.integers(1, 70), st.integers(0, 9)),
    st.tuples(st.just("chunk"), st.integers(2, 30)),
    st.tuples(st.just("steps"), st.integers(1, 20)),
    st.tuples(st.just("steps"), st.integers(1, 20)),
    st.tuples(st.just("crop"), st.integers(1, 30)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


class Machine:
    """Applies operations to a run and its twin, and looks at them after each."""

    def __init__(self, config, twin: bool) -> None:
        self.runs = [Run(config, fill=fill) for fill in ((0xFF, 0) if twin else (0xFF,))]
        self.run = self.runs[0]
        self.bytes = self.run.cache.resident_bytes
        self.levels = self.run.tiers_of()
        self.strict = True  # nothing has been taken away since it was last decided

    def apply(self, op: tuple) -> None:
        name, *args = op
        run = self.run
        if name == "prompt":
            tokens, pad = args
            for each in self.runs:
                each.reset()
            self.levels, self.strict = {}, True
            pads = [min(tokens - 1, pad * (row % 2)) for row in range(run.batch)]
            self.forward(tokens, pads)
        elif name == "reset":
            for each in self.runs:
                each.reset()
            self.levels, self.strict = {}, True
        elif name == "chunk":
            if 0 < run.seen < SLOTS - args[0]:
                self.forward(args[0])
        elif name == "steps":
            for _ in range(min(args[0], SLOTS - run.seen)):
                self.forward(1)
        elif name == "crop":
            if run.seen:
                remove = min(args[0], run.seen)
                for each in self.runs:
                    each.crop(remove)
                self.strict = False
        elif name == "rows":
            rows = [n % run.batch for n in args[0]]
            for each in self.runs:
                each.select(rows)
            self.bytes = run.cache.resident_bytes
            self.levels = {
                (n, new, h, i): tier
                for (n, b, h, i), tier in self.levels.items()
                for new, old in enumerate(rows)
                if old == b
            }
            self.strict = False
        self.look()

    def forward(self, tokens: int, pads: list[int] | None = None) -> None:
        before = self._coded()
        look = tokens > 1 or self.run.seen % 4 == 0
        found = [each.forward(tokens, pads, look=look and each is self.run) for each in self.runs]
        exact = self.run.layout.kind == "exact"
        for out, want in found[0] if look else ():
            assert max_error(out, want) < (2e-5 if exact else NATIVE)
        for one in found[1:]:
            for (a, _), (b, _) in zip(found[0], one, strict=True):
                assert torch.equal(a, b)
        self.strict |= self._coded() != before
        self.look(quick=tokens == 1 and self._coded() == before)

    def _coded(self) -> list:
        return [s.tensors.meta[:, CODED].tolist() for s in self.run.cache.states]

    def look(self, quick: bool = False) -> None:
        run, keeper = self.run, self.run.keeper
        for other in self.runs[1:]:
            same(run, other)
        if quick:
            return
        run.check()
        levels = run.tiers_of()
        # Nothing that was in the pool comes back, or rises.
        coded, batch = [torch.tensor(x) for x in self.coded_before()], run.batch
        for (n, b, h, i), tier in levels.items():
            if b < batch and i < coded[n][b]:
                assert tier <= self.levels.get((n, b, h, i), -1)
        self.levels, self.last = levels, self._coded()
        assert run.cache.resident_bytes == self.bytes
        total = sum(sum(x) for x in self.last) * keeper.pool.heads
        if self.strict:
            assert keeper.pool.used <= keeper.rule.pages(total, keeper.pool.pages)
            least = keeper.rule.pages(0, keeper.pool.pages)
            if keeper.rule.bits is not None and keeper.pool.used > least:
                assert 8 * keeper.used_bytes <= keeper.rule.bits * keeper.coordinates
        held = keeper.summary()
        assert held["tokens_dropped"] == total - len(levels)
        assert sum(held["tokens_by_tier"]) == len(levels)
        budget = run.cache.config.budget_bytes
        assert budget is None or run.cache.resident_bytes <= budget

    def coded_before(self) -> list:
        """Tokens of every layer and row that the last look knew to have left the window."""
        if not self.levels:
            return [[0] * self.run.batch for _ in range(LAYERS)]
        most: dict[tuple[int, int], int] = {}
        for n, b, _, i in self.levels:
            most[n, b] = max(most.get((n, b), 0), i + 1)
        return [[most.get((n, b), 0) for b in range(self.run.batch)] for n in range(LAYERS)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("policy", TRACKED)
@given(
    sequence=st.lists(ops, min_size=1, max_size=8),
    bits=st.sampled_from([0.7, 2.0, 4.0, 16.0]),
    twin=st.booleans(),
)
@settings(max_examples=3, phases=PHASES)
def test_whatever_is_done_pages_hold_what_they_should(codec, policy, sequence, bits, twin) -> None:
    machine = Machine(config_of(codec, policy, bits=bits), twin)
    for op in [("prompt", 40, 3), *sequence]:
        machine.apply(op)
    machine.run.check_codes()


@pytest.mark.parametrize("codec", CODECS)
@given(
    sequence=st.lists(ops, min_size=1, max_size=8),
    policy=st.sampled_from(TRACKED),
    pages=st.sampled_from([8, 9, 16, 40, 100]),
)
@settings(max_examples=6, phases=PHASES)
def test_a_budget_of_bytes_is_never_exceeded(codec, policy, sequence, pages) -> None:
    config = config_of(codec, policy, budget=budget_of(codec, policy, pages))
    machine = Machine(config, False)
    assert machine.run.keeper.pool.pages <= pages
    for op in [("prompt", 40, 3), *sequence]:
        if op[0] == "rows" and len(op[1]) > machine.run.batch:
            continue
        machine.apply(op)
    machine.run.check_codes()


@pytest.mark.parametrize("codec", ["identity", "grid"])
@given(
    gaps=st.lists(st.sampled_from([1, 2, 9, 254, 255, 256, 509, 510, 700]), max_size=30),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_tokens_far_apart_are_found_where_they_stand(codec, gaps, seed) -> None:
    """A gap of 255 or more takes slots of its own, which hold no token."""
    state = layer_state(codec, 1, 2, 16, 1 << 15, retention="rdr")
    pool, layout = state.keeper.pool, state.layout
    g = torch.Generator().manual_seed(seed)
    at = torch.tensor([0, *gaps]).cumsum(0)
    k, v = torch.randn(2, 1, 2, len(at), 16, generator=g)
    group = torch.arange(2).repeat_interleave(len(at))
    level = torch.randint(0, len(layout.tiers) + 1, (2 * len(at),), generator=g)
    one, i = torch.ones(2 * len(at)), at.repeat(2)
    tokens = Tokens(group, i, level, one, one, one, one.bool())
    content = encode_tokens(tokens, k, v, state.tensors, layout)
    want = [dict(x) for x in content.records]
    pool.write(content)
    assert pool.used == pages_for(tokens, layout)
    found, dense = pool.read([0]), torch.zeros(2, 2, len(at), 16)
    for tier, (mine, records) in enumerate(zip(found.tokens, found.records, strict=True)):
        here = (level == tier + 1).nonzero().squeeze(1)
        assert torch.equal(mine.i, i[here])
        assert torch.equal(mine.group, group[here])
        assert all(torch.equal(records[name], x) for name, x in want[tier].items())
        for n in here.tolist() if len(here) else ():
            h, j = divmod(n, len(at))
            one_record = {name: x[(here == n)][None] for name, x in records.items()}
            one_record = {name: x.expand(1, 2, 1, -1) for name, x in one_record.items()}
            pair = decode_records(one_record, i[n].view(1, 1, 1), state.tensors, layout, tier)
            dense[0, h, j], dense[1, h, j] = pair[0][0, h, 0], pair[1][0, h, 0]

    # Attention of one more token to sinks and these.
    end = layout.sinks + int(at[-1]) + 1
    state.tensors.meta[0, 1:3] = torch.tensor([end, end - layout.sinks])
    state.tensors.exact_keys.zero_()
    state.tensors.exact_values.zero_()
    q, own = torch.randn(2, 1, 2, 1, 16, generator=g)
    out = state.attend(q, own, own, None, torch.tensor([end]), False, 0.25)
    zero = torch.zeros(2, layout.sinks, 16)
    keys, values = (torch.cat([x, zero, own[0]], 1).double() for x in dense)
    logits = q[0].double() @ keys.mT * 0.25
    gone = torch.nn.functional.pad((level == 0).view(2, 1, -1), (0, layout.sinks + 1))
    want_out = logits.masked_fill(gone, -torch.inf).softmax(-1) @ values
    assert max_error(out[0], want_out) < NATIVE
