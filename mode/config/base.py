"""Types that all settings share: the configuration of pydantic, pins, and shares."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from mode.core.escape import check_name

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown settings and non-finite numbers are refused."""


PIN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]*==[A-Za-z0-9][A-Za-z0-9_.\-+!]*$"
"""Pattern of a package at an exact version. It never begins like an option of pip."""


Name = Annotated[str, AfterValidator(check_name)]
"""Name of a domain or an expert: part of the names of files, of settings and of headings."""


Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole, from 0 to 1."""


def as_fraction(share: float) -> Fraction:
    """Return a share of rows as the nearest fraction with a denominator up to 100.

    >>> as_fraction(0.125)
    Fraction(1, 8)
    """
    return Fraction(share).limit_denominator(100)
