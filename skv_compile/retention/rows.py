"""Rows of a pool repeated, reordered or left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.state import CODED
from .decide import decide
from .keeper import Keeper
from .recode import join, relevel
from .tokens import Content, Tokens, pages_for

if TYPE_CHECKING:
    from ..cache.pool import Pool


def select(keeper: Keeper, source: Keeper, rows: Tensor) -> None:
    """Let the pages of row n be those of row ``rows[n]`` of another keeper, or of itself."""
    pool, theirs, layout = keeper.pool, source.pool, keeper.layout
    keeper.settle()
    source.settle()
    keeper.full()
    pool.schedule.changed()
    for n in range(source.heads.groups // (source.heads.batch * source.heads.heads)):
        keeper.judge.copy(source.judge, n, rows)
    if not layout.tracked:
        shape = (theirs.layers, theirs.batch, -1, layout.page_bytes)
        chosen = theirs.memory.view(shape).index_select(1, rows)
        pool.memory.copy_(chosen.reshape(pool.memory.shape))
        return
    contents = []
    for layer in range(len(source.states)):
        contents.append(_select(theirs.read([layer]), layer, rows, theirs, layout))
    pool.release(list(range(pool.layers)))
    whole = join(contents, layout)
    tokens = Tokens.cat(whole.tokens)
    seen = sum(int(s.meta[:, CODED].index_select(0, rows).sum()) for s in source.states)
    room = min(pool.free, keeper.rule.pages(seen * pool.heads, pool.pages))
    if pages_for(tokens, layout) > room:
        assert keeper.policy is not None
        level = decide(keeper.policy, tokens, keeper.heads, {}, room)
        parts = level.split([len(x) for x in whole.tokens])
        whole = relevel(whole, parts, source.states, keeper.heads)
    pool.write(whole)


def _select(content: Content, layer: int, rows: Tensor, pool: Pool, layout: Layout) -> Content:
    """A layer's content with rows repeated and renumbered for as many rows as ``rows``."""
    batch, heads = pool.batch, pool.heads
    copies = []
    for new, old in enumerate(rows.tolist()):
        parts, fields = [], []
        for tokens, records in zip(content.tokens, content.records, strict=True):
            mine = (tokens.group // heads % batch == old).nonzero().squeeze(1)
            part = tokens[mine]
            part.group = (layer * len(rows) + new) * heads + part.group % heads
            parts.append(part)
            fields.append({name: x[mine] for name, x in records.items()})
        copies.append(Content(parts, fields))
    return join(copies, layout)
