"""Errors that a user can mend, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in what the user asked for, told in one line: what is wrong, where, and the nearest right thing."""


class NothingError(ConfigError):
    """Nothing of what was asked for is there yet, and nothing is wrong."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Phrase the nearest valid choice, if there is one.

    >>> suggest("lroa", ["sft", "lora"])
    '; did you mean lora?'
    """
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
