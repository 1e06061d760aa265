"""Turn the text files in pinned wheels into documents.

A document is a scene of a play, a chapter of a book, a section of an article, a category of a classification, a group
of verses or molecules, or a source file. Documents are small, so that splitting them by hash gives each split about its
share of the tokens. Each document is long enough to make sense on its own.
"""

from __future__ import annotations

import bz2
import gzip
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


def read_text(data: bytes) -> Iterator[str]:
    """Yield a text file as one document, unless it is short."""
    text = data.decode("utf-8").strip()
    if len(text) >= MIN_CHARACTERS:
        yield text


NOTES = {
    "includes": "Includes",
    "inclusionTerm": "Also",
    "excludes1": "Never coded here",
    "excludes2": "Not included here",
    "codeFirst": "Code first",
    "codeAlso": "Code also",
    "useAdditionalCode": "Use additional code",
    "notes": "Note",
}
"""Words before the notes of a code, by the element of the ICD-10-CM's tabular list that contains them."""


def read_icd10cm(data: bytes) -> Iterator[str]:
    """Yield the categories of the ICD-10-CM's tabular list in XML, each with its codes, their titles and their notes.

    >>> diag = "<diag><name>A%s</name><desc>%s</desc>%s</diag>"
    >>> inner = diag % ("00.0", "Classical cholera", "<inclusionTerm><note>Asiatic</note></inclusionTerm>")
    >>> xml = f"<r><section>{diag % ('00', 'Cholera ' * 30, inner)}</section></r>"
    >>> next(read_icd10cm(xml.encode()))[-46:].splitlines()
    [' Cholera', 'A00.0 Classical cholera', 'Also: Asiatic']
    """
    for section in ElementTree.fromstring(data).iter("section"):
        for category in section.findall("diag"):
            text = "\n".join(list_code_lines(category))
            if len(text) >= MIN_CHARACTERS:
                yield text


def list_code_lines(code: ElementTree.Element) -> Iterator[str]:
    """Yield the lines of a code of the ICD-10-CM: its name and title, its notes, and the lines of the codes below."""
    yield f"{code.findtext('name', '').strip()} {code.findtext('desc', '').strip()}"
    for part in code:
        if part.tag == "diag":
            yield from list_code_lines(part)
        elif part.tag in NOTES:
            yield from (f"{NOTES[part.tag]}: {(note.text or '').strip()}" for note in part.iter("note"))


VERSES = 10
"""Verses per document of the Quran, whose longest chapter has 286."""


def read_quran(data: bytes) -> Iterator[str]:
    """Yield the verses of the Quran in Tanzil's XML, a line each, in groups of `VERSES` under their chapter's name."""
    for chapter in ElementTree.fromstring(data).iter("sura"):
        verses = [verse.get("text", "").strip() for verse in chapter.iter("aya")]
        for start in range(0, len(verses), VERSES):
            text = "\n".join([chapter.get("name", ""), *verses[start : start + VERSES]])
            if len(text) >= MIN_CHARACTERS:
                yield text


MOLECULES = 20
"""Molecules per document. One molecule has about 36 characters."""


def read_smiles(data: bytes) -> Iterator[str]:
    r"""Yield the molecules of a gzip CSV with one SMILES a line under a heading, in groups of `MOLECULES`.

    >>> lines = ["SMILES", *["CCO" * 10] * 25]
    >>> [len(text.splitlines()) for text in read_smiles(gzip.compress("\n".join(lines).encode()))]
    [20]
    """
    molecules = gzip.decompress(data).decode("utf-8").splitlines()[1:]
    for start in range(0, len(molecules), MOLECULES):
        text = "\n".join(molecules[start : start + MOLECULES])
        if len(text) >= MIN_CHARACTERS:
            yield text


READERS = {
    "play": read_play,
    "bible": read_bible,
    "wikipedia": read_wikipedia,
    "text": read_text,
    "icd10cm": read_icd10cm,
    "quran": read_quran,
    "smiles": read_smiles,
}
