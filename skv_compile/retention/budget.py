"""How many pages tokens may take."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..lowering.layout import PAGE_HEADER, Layout

#: While a sequence is short, every head may take what this many tokens need at the unit tier:
#: pages cannot be shared, and a budget by the token would round to none.
LEAST_TOKENS = 128


@dataclass(frozen=True)
class Rule:
    """``bits`` per coordinate of all tokens that have left the exact region, dropped ones too;
    None: all the pages there are.

    ``groups``: layers * rows * kv heads. ``table_bytes``: of the lists of pages, charged by the
    part of ``layout.max_coded`` that is in use.
    """

    layout: Layout
    groups: int
    bits: float | None

    @property
    def table_bytes(self) -> int:
        return 4 * self.groups * self.layout.max_pages

    def pages(self, tokens: int, there: int) -> int:
        """Pages that ``tokens`` tokens (the sum over all groups) may take, of ``there``."""
        if self.bits is None:
            return there
        layout = self.layout
        table = self.table_bytes * tokens / max(1, self.groups * layout.max_coded)
        room = self.bits / 8 * 2 * layout.head_dim * tokens - table
        least = self.groups * -(-LEAST_TOKENS // layout.page_tokens)
        return min(there, max(least, int(room / (layout.page_bytes + PAGE_HEADER))))

    def pool_pages(self, budget: int | None, beside: int = 0, taken: int = 0) -> int:
        """Pages of a pool: for the longest sequence at ``bits``, or in ``budget`` bytes, of which
        ``taken`` are for other things and every page takes ``beside`` more than its own.

        Raises:
            ConfigError: less than one page for every head.
        """
        layout, groups = self.layout, self.groups
        page = layout.page_bytes + PAGE_HEADER
        most = groups * layout.max_pages
        if budget is not None:
            page += beside
            pages = (budget - taken - self.table_bytes) // page
        else:
            pages = self.pages(groups * layout.max_coded, most)
        least = groups if layout.max_coded else 0
        if pages < least:
            need = least * page + self.table_bytes
            raise ConfigError(
                f"a budget of {budget} bytes is too small: one page for each of the {groups} "
                f"(layer, row, kv head) takes {need} bytes, and frames, sinks and recent window "
                f"take {taken}, {need + taken} in all. Raise the budget, or lower max_cache_len, "
                "page_tokens, sinks or recent."
            )
        return int(min(pages, most))
