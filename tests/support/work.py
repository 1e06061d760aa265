"""Bound the work of a piece of code by a count that is the same on every machine, however busy it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def limit_calls(limit: int) -> Iterator[None]:
    """Fail in the middle of a block that makes more function calls than `limit`, in Python or of C functions.

    Raises:
        AssertionError: The block makes too many calls.
    """
    count = 0

    def count_call(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}
        if count > limit:
            raise AssertionError(f"more than {limit:,} function calls")

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        yield
    finally:
        sys.setprofile(before)
