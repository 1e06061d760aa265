"""Errors that a user can fix. Each message is one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from mode.core.escape import join_lines, mask_passwords


class ConfigError(ValueError):
    """A mistake in the user's input. The message is one line: what is wrong, where, and the nearest valid choice.

    Line breaks in names and paths become spaces, and passwords in URLs are masked.
    """

    def __init__(self, message: object) -> None:
        """Keep the message."""
        super().__init__(mask_passwords(join_lines(str(message))))


class NothingError(ConfigError):
    """The input is valid, but nothing that it selects exists yet."""


def warn(message: str) -> None:
    """Print one line on stderr about something that was wrong and that the program put right."""
    print(f"mode: {message}", file=sys.stderr)


def summarize_error(error: BaseException) -> str:
    r"""Return the first line of another library's error, with the next one if it ends with a colon; else its type.

    >>> summarize_error(ValueError("none of:\n  a file")), summarize_error(OSError())
    ('none of: a file', 'OSError')
    """
    first, *others = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return (f"{first} {others[0]}" if first.endswith(":") and others[0] else first) or type(error).__name__


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return a hint with the valid choice nearest to a name, or an empty string if none is near.

    >>> suggest("lroa", ["sft", "lora"])
    '; did you mean lora?'
    """
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
