"""docs/models.md: rows to text and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .trial import (
    FAILED,
    NO_CACHE,
    NOT_BUILT,
    NOT_COMPILED,
    NOT_STATIC,
    REFUSED,
    REWRITTEN,
    Row,
)

MEANING = {
    REWRITTEN: "every full-attention layer is rewritten, and the tokens are those of a dense cache",
    REFUSED: "left alone, or stopped with an error of ours, for the reason given",
    NOT_COMPILED: "the right tokens from the compressed cache, but each layer is made dense for "
    "its attention, and a warning says so",
    NO_CACHE: "there are no keys and values to compress",
    NOT_STATIC: "does not work with transformers' own `StaticCache` either",
    NOT_BUILT: "could not be built small from its config, or does not generate from text alone",
    FAILED: "other tokens, or an error that is not ours",
}
LONGEST = 300


def line(row: Row) -> str:
    """A row of the table."""
    layers = f"{row.rewritten} of {row.layers}" if row.layers else ""
    if row.layers and row.dense:
        layers += f" (+{row.dense} sliding)"
    cells = (row.architecture, row.model, row.result, layers, reason(row))
    return f"| {' | '.join(cells)} |"


def reason(row: Row) -> str:
    """The reason as the table has it: of one line, bounded, without what differs between runs."""
    text = re.sub(r"0x[0-9a-f]+", "0x..", " ".join(row.reason.split()))
    text = re.sub(r"(/[\w.-]+)+/site-packages/", "", text).replace("|", "\\|")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def document(rows: Sequence[Row], versions: dict[str, Any]) -> str:
    """The whole of docs/models.md."""
    counts = Counter(row.result for row in rows)
    lines = [
        "# Models",
        "",
        f"Every decoder of transformers {versions['transformers']} (torch {versions['torch']}), "
        "built tiny from its own config with one layer of each kind and random weights. Two "
        "prompts of 60 tokens, one of them padded, then 12 tokens greedily: with a dense cache, "
        'and after `skv.compile(model, codec="identity")`. Tokens must be equal, and logits to a '
        "thousandth of their spread. What the rows say is checked by "
        "`tests/integration/test_zoo.py`; `python benchmarks/models.py` writes them anew.",
        "",
        "| result | architectures | meaning |",
        "|---|---|---|",
        *(f"| {name} | {counts[name]} | {what} |" for name, what in MEANING.items()),
        "",
        "Models that see images are given text only.",
        "",
        "| architecture | class | result | layers rewritten | reason |",
        "|---|---|---|---|---|",
        *(line(row) for row in sorted(rows, key=lambda row: row.architecture)),
    ]
    return "\n".join(lines) + "\n"


def lines_of(text: str) -> dict[str, str]:
    """Architecture -> its line, of the text of docs/models.md."""
    table = text[text.index("| architecture |") :].splitlines()[2:]
    return {x.split(" | ")[0].removeprefix("| "): x for x in table if x.startswith("| ")}


def from_json(result: dict[str, Any]) -> dict[str, Row]:
    """Architecture -> row, of benchmarks/results/models.json."""
    return {row["architecture"]: Row(**row) for row in result["rows"]}
