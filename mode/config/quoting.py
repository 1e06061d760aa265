"""Values in Hydra's grammar, as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WORD = re.compile(r"(?!(?:null|true|false|inf|nan)$)[a-z_][a-z0-9_./-]*", re.IGNORECASE | re.ASCII)
"""Texts that need no quotes in Hydra's grammar: words that are neither null nor a boolean nor a number."""


def quote(text: str, mark: str = "'") -> str:
    r"""Quote a string in Hydra's grammar, where a backslash is special only before a quotation mark.

    >>> print(quote("it's"), quote("a\\b\\"))
    'it\'s' 'a\b\\'
    """
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda found: found[1] * 2 + (f"\\{mark}" if found[2] else ""), text)
    return f"{mark}{escaped}{mark}"


def format_value(value: Any) -> str:
    """Return a value in Hydra's grammar.

    >>> format_value([1e-05, None, True]), format_value({"english": 0.2}), format_value("a b")
    ('[1e-05,null,true]', '{english:0.2}', "'a b'")
    >>> format_value(["null", "True", "nan", "none"])
    "['null','True','nan',none]"
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{format_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str):
        return value if WORD.fullmatch(value) else quote(value)
    return repr(value)
