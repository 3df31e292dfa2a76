"""The pool: pages of all layers in one allocation, and who owns which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CacheStateError
from ..lowering.codes import decode_radius, decode_score, encode_score
from ..lowering.layout import GAP_FILLER, Layout
from ..lowering.reference.pages import Records, page_bytes, page_records, page_tokens
from ..lowering.state import KIND, PER_TIER
from ..retention.tokens import Content, Tokens, in_order, runs
from .schedule import Schedule

#: Fields that say what a token is, not what its vectors are.
ABOUT = ("gap", "score", "key_radius", "value_radius")


class Pool:
    """Pages of ``layers`` layers that have the same shape, for chosen tokens.

    A group is one (layer, row, kv head); its pages hold its tokens tier by tier, in order.
    Where the layout is not tracked, every group has a fixed run of pages instead.

    Args:
        layers, batch, heads: what the groups are made of.
        layout: of every layer.
        pages: how many there are; None for all that ``layout.max_tokens`` can need.
        device: where. group: query heads of a kv head.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        layout: Layout,
        pages: int | None,
        device: torch.device,
        group: int = 1,
    ) -> None:
        self.layers, self.batch, self.heads = layers, batch, heads
        self.layout, self.device = layout, device
        groups = layers * batch * heads
        self.pages = groups * layout.max_pages if pages is None else pages
        self.memory = torch.empty(self.pages, layout.page_bytes, dtype=torch.uint8, device=device)
        self.info = torch.zeros(self.pages, 2, dtype=torch.int32, device=device)
        shape = (layers, batch, heads, layout.max_pages)
        self.table = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._free = torch.arange(self.pages - 1, -1, -1, dtype=torch.int32, device=device)
        self.free = self.pages
        if not layout.tracked:
            number = torch.arange(groups * layout.max_pages, device=device)
            self.table.copy_(number.view(shape))
            self.info[:, 0] = (number % max(1, layout.max_pages)) * layout.page_tokens
            self.info[:, 1] = layout.page_tokens
            self._free, self.free = self._free.new_empty(0), 0

        self.schedule = Schedule(layers, batch, heads, group, layout, self.pages, device)

    @property
    def bytes(self) -> int:
        """Bytes of the pages, of what describes them, and of the lists of them and of work."""
        own = sum(x.nbytes for x in (self.memory, self.info, self.table, self._free))
        return own + self.schedule.bytes

    @property
    def used(self) -> int:
        """Pages that belong to somebody."""
        return self.pages - self.free

    # ------------------------------------------------------------ who owns what

    def allocate(self, count: int) -> Tensor:
        """Take ``count`` free pages: their numbers [count]."""
        if count > self.free:
            raise CacheStateError(
                f"{count} pages are needed and {self.free} are free: what was decided does not "
                "fit the pool. This is a fault of the retention policy; please report it."
            )
        self.free -= count
        return self._free[self.free : self.free + count].long()

    def release(self, layers: Sequence[int]) -> None:
        """Take all pages of some layers back."""
        self.schedule.changed()
        if not self.layout.tracked:
            return
        index = torch.tensor(layers, dtype=torch.long, device=self.device)
        table = self.table[index]
        pages = table[table >= 0]
        self._free[self.free : self.free + len(pages)] = pages
        self.free += len(pages)
        self.table[index] = -1

    # ------------------------------------------------------------ tokens in and out

    def read(self, layers: Sequence[int], codes: bool = True) -> Content:
        """All tokens of some layers, with their codes unless ``codes`` is False.

        Of each tier: layer by layer, head by head, in order.
        """
        layout = self.layout
        index = torch.tensor(layers, dtype=torch.long, device=self.device)
        table = self.table[index]
        size = self.batch * self.heads
        owner = (index[:, None] * size + torch.arange(size, device=self.device)).flatten()
        owner = owner.repeat_interleave(layout.max_pages)
        flat = table.flatten()
        there = flat >= 0
        owner, flat = owner[there], flat[there].long()
        tier_of = self.info[flat, KIND] // PER_TIER
        tokens, records = [], []
        for tier in range(len(layout.tiers)):
            mine = (tier_of == tier).nonzero().squeeze(1)
            pages = flat[mine]
            found = page_records(self.memory, layout, tier)
            gaps = {"gap": found["gap"][pages]}
            i, live = page_tokens(gaps, self.info[pages], layout, tier)
            at, slot = live.nonzero(as_tuple=True)
            page = pages[at]
            part = {n: x[page, slot] for n, x in found.items() if codes or n in ABOUT}
            tokens.append(self._tokens(owner[mine][at], i[at, slot], tier, part))
            records.append(part)
        return Content(tokens, records)

    def _tokens(self, group: Tensor, i: Tensor, tier: int, records: Records) -> Tokens:
        n = len(group)
        key_radius = value_radius = torch.ones(n, device=self.device)
        if "key_radius" in records:
            key_radius = decode_radius(records["key_radius"]).squeeze(-1)
            value_radius = decode_radius(records["value_radius"]).squeeze(-1)
        score = decode_score(records["score"]).squeeze(-1)
        level = torch.full((n,), tier + 1, device=self.device)
        fresh = torch.zeros(n, dtype=torch.bool, device=self.device)
        return Tokens(group, i, level, score, key_radius, value_radius, fresh)

    def write(self, content: Content) -> None:
        """Make these the tokens of their groups, which must not have pages."""
        self.schedule.changed()
        layout, starts = self.layout, []
        for tier, (tokens, records) in enumerate(zip(content.tokens, content.records, strict=True)):
            if len(tokens) == 0:
                continue
            order = in_order(tokens)
            tokens = tokens[order]
            records = {name: x[order] for name, x in records.items() if name != "gap"}
            records["score"] = encode_score(tokens.score).unsqueeze(-1)
            starts.append(self._write_tier(tier, tokens, records))
        if not starts:
            return
        # The table of a group lists its pages tier by tier.
        group, page = (torch.cat(x) for x in zip(*starts, strict=True))
        order = group.argsort(stable=True)
        place = runs(group[order]).place
        flat = self.table.view(-1, layout.max_pages)
        flat[group[order], place] = page[order].int()

    def _write_tier(self, tier: int, tokens: Tokens, records: Records) -> tuple[Tensor, Tensor]:
        """Write the tokens of one tier, sorted: group and number of every page made."""
        layout, slots = self.layout, self.layout.capacity[tier]
        n = len(tokens)
        _, number, starts, counts = runs(tokens.group)
        ends = starts + counts
        # Slots: one for every token, and fillers where the gap to the token before is too long.
        gap = tokens.i.diff(prepend=tokens.i[:1])
        gap[starts] = 0
        fill = gap // GAP_FILLER
        slot = torch.arange(n, device=self.device) + fill.cumsum(0)
        slot = slot - (slot[starts] - fill[starts])[number]
        need = slot[ends - 1] + 1  # slots of each group
        pages_of = (need + slots - 1) // slots
        first_page = pages_of.cumsum(0) - pages_of
        total = int(pages_of.sum())
        pages = self.allocate(total)
        at = first_page[number] * slots + slot

        # Where each slot stands: tokens at their i, fillers on the way there.
        place = torch.full((total * slots,), -1, device=self.device)
        place[at] = tokens.i
        filled = fill.nonzero().squeeze(1)
        for back in range(1, int(fill.max()) + 1 if len(filled) else 1):
            some = filled[fill[filled] >= back]
            place[at[some] - back] = (
                tokens.i[some] - gap[some] % GAP_FILLER - (back - 1) * GAP_FILLER
            )
        place = place.view(total, slots)
        used = torch.full((total,), slots, device=self.device)
        last = first_page + pages_of - 1
        used[last] = need - (pages_of - 1) * slots
        is_token = torch.zeros(total * slots, dtype=torch.bool, device=self.device)
        is_token[at] = True
        is_token = is_token.view(total, slots)
        base = torch.where(is_token[:, 0], place[:, 0], place[:, 0] - GAP_FILLER)
        step = place.diff(dim=1, prepend=base[:, None])
        gaps = torch.where(is_token, step, GAP_FILLER).clamp(0, GAP_FILLER).to(torch.uint8)

        out = {"gap": gaps.unsqueeze(-1)}
        for name, field in layout.fields[tier].items():
            if name != "gap":
                width = field.size // slots
                full = torch.zeros(total * slots, width, dtype=torch.uint8, device=self.device)
                full[at] = records[name]
                out[name] = full.view(total, slots, width)
        self.memory[pages] = page_bytes(out, layout, tier)
        self.info[pages] = torch.stack([base, tier * PER_TIER + used], 1).int()
        owner = tokens.group[starts].repeat_interleave(pages_of, output_size=total)
        return owner, pages
