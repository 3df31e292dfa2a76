"""A report as one HTML page: text and style in one file, so that it can be sent and kept."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report, SiteReport

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --paper: #ffffff; --soft: #5b6570;
  --line: #d9dee4; --box: #f4f6f8; --good: #17693a; --bad: #a3341f; --bar: #3d78c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #15181c; --soft: #9aa5b1;
  --line: #323a43; --box: #1e2329; --good: #6cc490; --bad: #f0907c; --bar: #6ea3e4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h1, td { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
dl div { background: var(--box); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.2rem; }
.bar { background: var(--line); height: .6rem; border-radius: .3rem; overflow: hidden; }
.bar div { background: var(--bar); height: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; }
small { color: var(--soft); } .yes { color: var(--good); } .no { color: var(--bad); }
"""

_COLUMNS = ("site", "", "attention", "heads", "tiers", "bits", "dense", "now", "kernel")


def page(report: Report, title: str) -> str:
    """The page. Whatever comes from a model or its files is escaped."""
    dense, now = report.dense_bytes, report.resident_bytes
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(report.summary()[0])}</p>",
            _facts(report),
            *([_bar(now / dense)] if dense else []),
            "<h2>Attentions with a cache</h2>",
            _table(_COLUMNS, (_row(n, site) for n, site in enumerate(report.sites)))
            if report.sites
            else "<p>None.</p>",
            "<h2>Settings</h2>",
            _table(("setting", "value"), (_pair(*item) for item in report.settings.items())),
            "<h2>Versions</h2>",
            _table(("package", "version"), (_pair(*item) for item in report.versions.items())),
            "<h2>As JSON</h2>",
            f"<details><summary>The whole report</summary><pre>{escape(report.to_json())}</pre>",
            "</details></body></html>",
            "",
        ]
    )


def _facts(report: Report) -> str:
    dense, now = report.dense_bytes, report.resident_bytes
    facts = {
        "rewritten": f"{len(report.rewritten)} of {len(report.sites)}",
        "bytes of their cache, dense": f"{dense:,}",
        "bytes now": f"{now:,}",
        "dense / now": f"{dense / now:.2f}" if now else "-",
    }
    boxes = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(boxes)}</dl>"


def _bar(share: float) -> str:
    words = f"{share:.0%} of the dense bytes"
    width = min(100.0, 100 * share)
    return f'<div class="bar" title="{words}"><div style="width:{width:.1f}%"></div></div>'


def _table(columns: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join(rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _pair(name: str, value: Any) -> str:
    shown = "-" if value is None else str(value)
    return f"<tr><td>{escape(name)}</td><td><code>{escape(shown)}</code></td></tr>"


def _row(number: int, site: SiteReport) -> str:
    where = f"<code>{escape(site.where or 'unknown line')}</code>"
    start = f'<tr><td class="number">{number}</td>'
    if not site.rewritten:
        why = f"{where}<br>{escape(site.reason)}<br><small>{escape(site.code)}</small>"
        rest = '<td colspan="6">the model\'s own attention and dense cache</td>'
        return f'{start}<td class="no">left dense</td><td>{why}</td>{rest}</tr>'
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in site.tiers.items())
    tokens = f"{rates}; retention {site.retention}, {site.max_tokens:,} tokens"
    cells = (
        '<td class="yes">rewritten</td>',
        f"<td>{where}<br><small>{escape(f'written by {site.write}, gqa {site.gqa}')}</small></td>",
        f'<td class="number">{site.heads}/{site.kv_heads} of {site.head_dim}</td>',
        f"<td>{escape(site.tier)}<br><small>{escape(tokens)}</small></td>",
        f'<td class="number">{site.bits_per_coordinate:.4g}</td>',
        f'<td class="number">{site.dense_bytes:,}</td>',
        f'<td class="number">{site.resident_bytes:,}</td>',
        f"<td>{escape(site.kernel)}<br><small>{escape(site.kernel_reason)}</small></td>",
    )
    return start + "".join(cells) + "</tr>"
