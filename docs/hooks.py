"""Hook of mkdocs: pages show the plots of benchmarks/results where they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
LINK = re.compile(r"\(\.\./benchmarks/results/([\w.-]+\.(?:svg|png))\)")


def on_files(files: Any, config: Any) -> Any:
    """Let the site have every plot."""
    for plot in sorted((*RESULTS.glob("*.svg"), *RESULTS.glob("*.png"))):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the folder, which work on a page read in the repository, are links to the site's."""
    return LINK.sub(r"(plots/\1)", markdown)
