"""A report as text, as a page and as tables."""

from __future__ import annotations

import dataclasses
import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console
from torch.fx import Graph

from skv_compile.commands import sites
from skv_compile.commands.screen import Screen
from skv_compile.patterns import Match, Refusal
from skv_compile.report import GraphReport, Report, SiteReport

DONE = SiteReport(
    rewritten=True,
    reason="",
    where="transformers/models/llama/modeling_llama.py:245 in forward",
    write="index_copy",
    gqa="expand_reshape",
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_tokens=4096,
    tier="k1v1..k4v4",
    tiers={"k1v1": 1.375, "k2v2": 2.25, "k4v4": 4.25},
    bits_per_coordinate=2.125,
    retention="rdr",
    dense_bytes=16_777_216,
    resident_bytes=3_000_000,
    kernel="native avx2",
    kernel_reason="the best that this CPU runs of vnni, avx512, avx2, portable",
)
LEFT = SiteReport(
    rewritten=False,
    reason="Attention dropout is 0.5 [sic] & the cache is <dense>; call model.eval().",
    where="odd<script>alert(1)</script>.py:7 in step[bold]",
    code="dropout",
)
#: Layers 0, 1 and 3 are alike; 2 is left dense.
SITES = (DONE, DONE, LEFT, DONE)
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture
def report() -> Report:
    return Report((GraphReport(SITES, 1),), {"bits": 2.125, "frame": None})


class Page(HTMLParser):
    """The text of every row of a page; what is not closed, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_the_page_has_every_site_with_all_that_is_known(report: Report) -> None:
    rows = Page(report.to_html("tiny")).rows
    for number, site in enumerate(SITES):
        (row,) = (row for row in rows if row[0] == str(number))
        text = " ".join(row)
        assert site.where in text
        assert site.reason in text
        if site.rewritten:
            for word in ("k1v1..k4v4", "k4v4 4.25", "2.125", "16,777,216", "3,000,000"):
                assert word in text
            assert site.kernel in text
            assert site.kernel_reason in text
    assert ["bits", "2.125"] in rows
    assert ["torch", report.versions["torch"]] in rows


def test_the_page_sums_up(report: Report) -> None:
    text = report.to_html()
    for word in ("3 of 4", "50,331,648", "9,000,000", "5.59"):
        assert f"<dd>{word}</dd>" in text
    empty = Page(Report((), {}).to_html())
    assert empty.rows[0] == ["setting", "value"]


def test_the_page_needs_nothing_else_and_runs_nothing(report: Report) -> None:
    text = report.to_html("<script>a model</script>")
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.links == []
    assert "@import" not in text
    assert "url(" not in text
    assert "<script>" not in text
    assert "odd&lt;script&gt;alert(1)" in text
    assert "prefers-color-scheme: dark" in text


def test_json_has_the_kernel_the_settings_and_the_sums(report: Report) -> None:
    found = json.loads(report.to_json())
    assert found["sites"] == [dataclasses.asdict(site) for site in SITES]
    assert (found["rewritten"], found["refused"], found["without_cache"]) == (3, 1, 1)
    assert (found["dense_bytes"], found["resident_bytes"]) == (50_331_648, 9_000_000)
    assert found["settings"]["bits"] == 2.125
    assert found["versions"]["torch"]


def test_the_text_is_plain_and_names_the_kernel(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[0].startswith("3 of 4 attentions with a cache rewritten, 1 without a cache")
    assert len(lines) == 2 + len(SITES)
    assert "on native avx2 (the best that this CPU runs" in lines[2]
    assert "dropout" in lines[4]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_say_what_is_alike_once(
    report: Report, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, file = Screen(), io.StringIO()
    screen.out = Console(width=width, file=file, highlight=False)
    sites.show(report, screen)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join(file.getvalue().split())
    assert text.count("k1v1..k4v4") == 1
    for word in (
        "0-1,3",
        "native",
        "retentionrdr",
        "dropout",
        "step[bold]",
        "[sic]",
        "model.eval().",
    ):
        assert word in text
    assert "\x1b" not in text
    assert "3 of 4 attentions" in capsys.readouterr().out


def test_caches_that_no_attention_reads_are_all_listed() -> None:
    node = Graph().placeholder("keys")
    found = tuple(Refusal(1, node, "no-attention", text, "") for text in ("one", "two"))
    dropout = Refusal(0, node, "dropout", "three", "")
    graph = GraphReport.of(Match((), (*found, dropout), ()), [])
    assert [site.reason for site in graph.sites] == ["three", "one", "two"]


def test_numbers_in_short() -> None:
    assert sites.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert sites.ranges([3]) == "3"


def test_a_report_can_be_a_key(report: Report) -> None:
    assert len({report, Report(report.graphs, report.settings)}) == 1
