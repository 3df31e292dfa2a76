"""A report as tables for a terminal, where what is said of many layers is said once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from skv_compile.commands.common import size

if TYPE_CHECKING:
    from skv_compile.commands.screen import Screen
    from skv_compile.report import Report, SiteReport


def show(report: Report, screen: Screen) -> None:
    """Print what was rewritten and what was not."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a name with brackets is no markup.
    def cell(text: str, style: str = "") -> Text:
        return Text(text, style=style, overflow="fold")

    done = [pair for pair in alike(report.sites) if pair[1].rewritten]
    left = [pair for pair in alike(report.sites) if not pair[1].rewritten]
    if done:
        view = Table("site", "rewritten attention", "cache", "kernel", box=box.SIMPLE_HEAD)
        for numbers, site in done:
            what = [
                site.where or "unknown line",
                f"written by {site.write}, gqa {site.gqa}",
                f"{site.heads}/{site.kv_heads} heads of {site.head_dim}",
            ]
            stored = [
                f"{size(site.dense_bytes)} dense",
                f"{size(site.resident_bytes)} now, of {site.max_tokens:,} tokens",
                f"{site.tier} at {site.bits_per_coordinate:.4g} bits",
                f"retention {site.retention}",
            ]
            kernel = Text.assemble(cell(site.kernel, "bold"), f"\n{site.kernel_reason}")
            view.add_row(cell(ranges(numbers)), *map(cell, map("\n".join, (what, stored))), kernel)
        screen.print(view)
    if left:
        view = Table("site", "attention left dense", "why", box=box.SIMPLE_HEAD)
        for numbers, site in left:
            where = Text.assemble(cell(site.where or "unknown line"), f"\n{site.code}")
            view.add_row(cell(ranges(numbers)), where, cell(site.reason))
        screen.print(view)
    for line in report.summary():
        screen.write(line)


def alike(sites: Iterable[SiteReport]) -> list[tuple[list[int], SiteReport]]:
    """Sites of which the same is to be said, with their numbers, in the order of the first."""
    found: list[tuple[dict[str, Any], list[int], SiteReport]] = []
    for number, site in enumerate(sites):
        said = asdict(site)
        for other, numbers, _ in found:
            if other == said:
                numbers.append(number)
                break
        else:
            found.append((said, [number], site))
    return [(numbers, site) for _, numbers, site in found]


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in short: ``0-3, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)
