"""A real document for demonstrations and measurements, with no download.

Every Python carries its language reference as plain text in ``pydoc_data.topics``. The
chapters chosen here are mostly prose and read the same in Python 3.10 to 3.13, so two
machines measure on the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Chapters in reading order. All are word for word equal in Python 3.10 to 3.13.
CHAPTERS = ("context-managers", "with", "exceptions", "import", "global", "assert", "comparisons")

#: Taken after those, should a later Python have renamed or shortened some.
SPARE = ("objects", "execmodel", "function", "calls", "specialnames", "compound", "types")

#: Characters the document has at least; about 4.5 to a token.
MINIMUM = 20_000

#: A question whose answer lies more than a thousand tokens before the end of a prompt of 1,500.
QUESTION = 'What does the "with" statement do?'


def paragraphs() -> list[str]:
    """The document's paragraphs: chapter titles, prose, lists and short code examples."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in CHAPTERS:
        found += _paragraphs_of(topics.get(name, ""))
    for name in SPARE:
        if sum(map(len, found)) >= MINIMUM:
            break
        found += _paragraphs_of(topics.get(name, ""))
    if sum(map(len, found)) < MINIMUM:
        raise RuntimeError(
            "this Python's pydoc_data.topics is too short to serve as the document; "
            "pass your own text with --prompt-file"
        )
    return found


def document() -> str:
    """The whole document, at least :data:`MINIMUM` characters."""
    return "\n\n".join(paragraphs())


def document_of(tokens: int, encode: Callable[[str], Sequence[int]]) -> str:
    """The document's first paragraphs that make at least ``tokens`` tokens."""
    chosen: list[str] = []
    count = 0
    for paragraph in paragraphs():
        chosen.append(paragraph)
        # Tokenizing paragraph by paragraph is cheap and can only be off by a few tokens.
        count += len(encode(paragraph))
        if count >= tokens:
            joined = "\n\n".join(chosen)
            if len(encode(joined)) >= tokens:
                return joined
    raise ValueError(f"the document has only about {count} tokens, {tokens} were asked for")


def _paragraphs_of(topic: str) -> list[str]:
    """Split a chapter, drop its grammar and underlines, and join hard-wrapped prose."""
    result: list[str] = []
    for block in topic.strip().split("\n\n"):
        lines = [line.rstrip() for line in block.strip("\n").splitlines()]
        lines = [line for line in lines if line and not _is_rule(line)]
        if not lines or any("::=" in line for line in lines):
            continue
        if any(line.startswith(" ") for line in lines):
            result.append("\n".join(lines))  # lists and code keep their lines
        else:
            result.append(" ".join(" ".join(lines).split()))
    return result


def _is_rule(line: str) -> bool:
    """Whether a line only underlines a title."""
    return len(line) > 3 and len(set(line)) == 1 and line[0] in '*=-~^"'
