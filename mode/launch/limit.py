"""A time limit on the runs of a table. A run ends at its last checkpoint before the limit, and goes on another time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


class OutOfTimeError(Exception):
    """A run has no time left for another checkpoint."""


@dataclass(frozen=True)
class TimeLimit:
    """A moment at which all runs must have ended.

    Attributes:
        end: The moment, by the clock of `time.monotonic`, which all processes of a machine share.
    """

    end: float

    @classmethod
    def after(cls, seconds: float) -> TimeLimit:
        """Return the limit that is so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether the moment has passed."""
        return time.monotonic() >= self.end


def make_stopper(limit: TimeLimit, checkpoint_every: int, steps: int) -> Callable[[int], None]:
    """Return a function that takes every logged step of a run, after the checkpoint of the step is written.

    It raises OutOfTimeError at a checkpoint if the next one would come after the limit, by the time since the last one,
    or since this call. The last step never raises: nothing but the scores is left then.

    Args:
        limit: The limit.
        checkpoint_every: Steps between two checkpoints.
        steps: Steps of the run.
    """
    last = time.monotonic()

    def stop(step: int) -> None:
        nonlocal last
        if step % checkpoint_every or step == steps:
            return
        now = time.monotonic()
        if now + (now - last) > limit.end:
            raise OutOfTimeError
        last = now

    return stop
