"""Turn the text files in pinned wheels into prose documents.

A document is a scene of a play, a chapter of a book or a section of an article. Documents are small, so that splitting
them by hash gives each split about its share of the tokens. Each document is long enough to make sense on its own.
"""

from __future__ import annotations

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise

HEADING = re.compile(r"^=+\s*.*?\s*=+\s*$", re.MULTILINE)
MIN_CHARACTERS = 200
"""Shortest document. Shorter pieces are headings, stubs and lists of names, not prose."""


def read_play(data: bytes) -> Iterator[str]:
    r"""Yield the scenes of a play in Markdown, without its markup.

    >>> scene = "# T\n\n### SCENE I. A wood.\n\n**PUCK**  \n" + "How now, spirit! whither wander you?  \n" * 9
    >>> next(read_play(scene.encode()))[:43]
    'SCENE I. A wood.\n\nPUCK\nHow now, spirit! whi'
    """
    for scene in re.split(r"^### ", data.decode("utf-8"), flags=re.MULTILINE)[1:]:
        text = re.sub(r"^## .*$", "", scene, flags=re.MULTILINE)
        text = re.sub(r"[*_]", "", text)
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()
        if len(text) >= MIN_CHARACTERS:
            yield text


def read_bible(data: bytes) -> Iterator[str]:
    """Yield the chapters of the text in a generated `pythonbible` module. The module is parsed, never executed.

    The module holds one long string literal and the offset of every verse. Verses are numbered BBCCCVVV (book, chapter,
    verse).

    >>> module = 'Bible(' + '"' * 3 + "a" * 200 + "b" * 300 + '"' * 3 + ", {1001001: 0, 1001002: 9, 1002001: 200})"
    >>> [chapter[:3] for chapter in read_bible(module.encode())]
    ['aaa', 'bbb']
    """
    source = data.decode("utf-8")
    start = source.index('"""') + 3
    end = source.index('"""', start)
    text = source[start:end].replace("`", "'")
    first_verses: dict[int, int] = {}
    for verse, offset in re.findall(r"(\d{7,8}): (\d+)", source[end:]):
        first_verses.setdefault(int(verse) // 1000, int(offset))
    offsets = [*sorted(first_verses.values()), len(text)]
    for begin, stop in pairwise(offsets):
        chapter = text[begin:stop].strip()
        if len(chapter) >= MIN_CHARACTERS:
            yield chapter


def read_wikipedia(data: bytes) -> Iterator[str]:
    """Yield the sections of the articles in a bz2 MediaWiki dump, stripped of wiki markup."""
    import mwparserfromhell

    tree = ElementTree.fromstring(bz2.decompress(data))
    namespace = tree.tag.partition("}")[0] + "}"
    for page in tree.iter(f"{namespace}page"):
        title = page.findtext(f"{namespace}title") or ""
        markup = page.findtext(f"{namespace}revision/{namespace}text") or ""
        if page.find(f"{namespace}redirect") is not None or markup.lower().startswith("#redirect"):
            continue
        markup = re.sub(r"\{\|.*?\|\}", "", markup, flags=re.DOTALL)
        markup = re.sub(r"\[\[(File|Image|Category):[^\[\]]*(\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", markup)
        for section in HEADING.split(markup):
            text = mwparserfromhell.parse(section).strip_code()
            lines = [line.strip() for line in text.splitlines() if is_prose(line.strip())]
            prose = "\n\n".join(lines)
            if len(prose) >= MIN_CHARACTERS:
                yield f"{title}\n\n{prose}"


def is_prose(line: str) -> bool:
    """Return whether a line is running text, not the remainder of a table, a list of links or a caption.

    >>> is_prose("A wiki is a site that its readers edit together."), is_prose("thumb|left|x")
    (True, False)
    """
    return len(line) >= 40 and "|" not in line and line[0] not in "*#:;!" and line[-1] in ".?!\"')"


READERS = {"play": read_play, "bible": read_bible, "wikipedia": read_wikipedia}
