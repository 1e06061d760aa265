"""What methods have in common whose size is the rank of what they add to a backbone's matrices."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.checked import STRICT
from mode.config import replace_settings
from mode.sized import Sized


@settings(frozen=True, kw_only=True, config=STRICT)
class LowRank(Sized):
    """A method that adds products of two thin matrices.

    Attributes:
        rank: r.
        alpha: Numerator of the scale alpha / r.
    """

    rank: Annotated[int, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0.0)]

    @property
    def scale(self) -> float:
        """Return the factor on what is added."""
        return self.alpha / self.rank

    def at(self, rank: int) -> Self:
        """Return the method at another rank; alpha / r, and so the scale of what is added, stays."""
        changed: Self = replace_settings(self, rank=rank, alpha=self.alpha * (rank / self.rank))
        return changed
