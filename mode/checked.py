"""What all checked settings share: how strict they are, and how a mistake in them is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

PIN = r"^[A-Za-z0-9_.\-]+==[A-Za-z0-9_.\-+!]+$"
"""An exact version of a package."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(ValueError):
    """A mistake in what the user asked for, told in one line: what is wrong, where, and the nearest right thing."""


class NothingError(ConfigError):
    """Nothing of what was asked for is there yet, and nothing is wrong."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Phrase the nearest valid choice, if there is one.

    >>> nearest("lroa", ["sft", "lora"])
    '; did you mean lora?'
    """
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def exact(share: float) -> Fraction:
    """Return a share of rows as the nearest fraction with a denominator up to 100.

    >>> exact(0.125)
    Fraction(1, 8)
    """
    return Fraction(share).limit_denominator(100)
