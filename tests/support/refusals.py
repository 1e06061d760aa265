"""How tests look at a refusal: by what the message names, not by its sentence.

The sentences are reviewed in one place, `tests/support/messages.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mode.core.errors import ConfigError


@contextmanager
def refused(*named: str, suggestion: str | None = None) -> Iterator[Any]:
    """Expect an error in one line that names settings, files or values and, at its end, the nearest right thing."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    check_message(str(caught.value), *named, suggestion=suggestion)


def check_refused(result: Any, *named: str, suggestion: str | None = None) -> None:
    """Check that a command ended with exit code 2 and one line that names what is wrong, without a traceback."""
    code = result.exit_code if hasattr(result, "exit_code") else result.returncode
    assert code == 2, (code, result.stdout, result.stderr)
    (line,) = result.stderr.splitlines()
    assert line.startswith("mode: ")
    check_message(line, *named, suggestion=suggestion)


def check_message(message: str, *named: str, suggestion: str | None = None) -> None:
    """Check a message in one line."""
    assert len(message.splitlines()) == 1, message
    assert [name for name in named if name not in message] == [], message
    assert suggestion is None or message.rstrip("?`'.").endswith(suggestion), message
