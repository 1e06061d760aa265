"""Text from outside, made safe for where it goes: a name, a message, Markdown, LaTeX."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")
"""Names that are valid as part of a file name, in Hydra's grammar and in Markdown."""


VALUES = frozenset({"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"})
"""Words that YAML or Hydra reads as a value."""


USER = re.compile(r"(?<=://)(?:[^\s/?#:@]*:\S*|[^\s/?#@]+)@")
"""User and password in a URL."""


BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""Control characters and line breaks."""


MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
"""Characters with a meaning in Markdown. An underscore inside a word has none."""


HTML = re.compile(r"&(?=#?\w+;)|<")
"""Characters that begin an entity or a tag of HTML."""


WORDED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
"""LaTeX commands for characters that a backslash does not escape."""


def check_name(text: object) -> str:
    """Return a name of a domain, an expert or a file of configuration, after checking it.

    >>> check_name("code-2")
    'code-2'

    Raises:
        ValueError: The text is not a name.
    """
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise ValueError("a name has up to 100 letters, digits, - and _, and starts with a letter or _")
    if text.lower() in VALUES:
        raise ValueError(f"YAML reads {text} as a value; choose another name")
    return text


def is_name(text: object) -> bool:
    """Return whether a text is a name.

    >>> is_name("code"), is_name("../code"), is_name("True")
    (True, False, False)
    """
    try:
        return bool(check_name(text))
    except ValueError:
        return False


def format_file_name(text: str) -> str:
    """Return text as a part of a file name: up to 100 characters, none of which separates folders.

    >>> format_file_name("llama-3.2-1b"), format_file_name("../a b")
    ('llama-3.2-1b', '.._a_b')
    """
    return re.sub(r"[^\w.+@-]", "_", text, flags=re.ASCII)[:100]


def join_lines(text: str) -> str:
    r"""Return text in one line, without control characters.

    >>> join_lines("a\nb\x1b[31m")
    'a b [31m'
    """
    return BREAKS.sub(" ", text)


def shorten(value: object) -> str:
    """Return a value as text for a message. The middle of a long text is left out.

    >>> shorten("7" * 5000)
    '7777777777777777777777777777777777777777 ... 7777777777 (5,000 characters)'
    """
    try:
        text = str(value)
    except ValueError:  # Python does not write an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 400 else f"{text[:40]} ... {text[-10:]} ({len(text):,} characters)"


def mask_passwords(text: str) -> str:
    """Return text with the users and passwords of its URLs masked.

    >>> mask_passwords("https://me:secret@example.org:8080/x cannot be reached")
    'https://***@example.org:8080/x cannot be reached'
    """
    return USER.sub("***@", text)


def escape_markdown(text: str) -> str:
    r"""Return plain text for Markdown, in one line. It adds no markup, no HTML, and no cell of a table.

    >>> escape_markdown("a|b <img> x_1 *y*")
    'a\\|b &lt;img> x_1 \\*y\\*'
    """
    return escape_html(MARKUP.sub(lambda found: f"\\{found[0]}", text))


def escape_html(text: str) -> str:
    """Return prose in Markdown, in one line, with its markup but without its HTML.

    >>> escape_html("`x` & <img>")
    '`x` & &lt;img>'
    """
    return HTML.sub(lambda found: {"&": "&amp;", "<": "&lt;"}[found[0]], join_lines(text))


def format_code(text: str) -> str:
    """Return text as code in Markdown, in one line.

    >>> format_code("runs/x"), format_code("a`b")
    ('`runs/x`', '`` a`b ``')
    """
    line = join_lines(text)
    longest = max((len(found) for found in re.findall("`+", line)), default=0)
    mark = "`" * (longest + 1)
    return f"{mark} {line} {mark}" if longest else f"`{line}`"


def escape_latex(text: str) -> str:
    r"""Return text with the special characters of LaTeX escaped, in one line.

    >>> escape_latex("100% of A & B_1"), escape_latex("a^b")
    ('100\\% of A \\& B\\_1', 'a\\textasciicircum{}b')
    """
    return re.sub(r"[&%$#_{}\\~^<>|]", lambda found: WORDED.get(found[0], rf"\{found[0]}"), join_lines(text))
