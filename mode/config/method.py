"""Settings that methods share: anchors, gates and routers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT, as_fraction

SELF = "self"
"""Value of `source` for rows that are sampled from the backbone."""


NONE = "none"
"""Value of `source` for no rows."""


SAMPLED = ("rows", "temperature", "prompt")
"""Settings of sampled rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Anchor:
    """Anchored rows: rows of the mix that train the divergence from the backbone's predictions, not the cross-entropy.

    Attributes:
        source: Source of the rows: `self`, sampled once from the backbone; the training split of a domain, by its name;
            or `none`.
        share: Share of the rows of the mix.
        weight: Factor on KL(backbone || model) of an anchored row. The cross-entropy of other rows has the factor 1.
        rows: With `self`, the number of sampled rows. Longer training repeats them.
        temperature: With `self`, the temperature of sampling.
        prompt: With `self`, the beginning of a sampled row: a new `document`, or a random `token`.
    """

    source: str = "none"
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0625
    weight: Annotated[float, Field(gt=0.0)] = 16.0
    rows: Annotated[int, Field(gt=1)] = 512
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    prompt: Literal["document", "token"] = "document"

    def __post_init__(self) -> None:
        if abs(float(as_fraction(self.share)) - self.share) > 1e-9:
            raise ValueError(f"share {self.share} is not a fraction with a denominator up to 100, such as 0.125 or 0.1")
        # Settings without an effect are set to their defaults, so that equal training has one identity.
        unused = {"none": ("share", "weight", *SAMPLED), SELF: ()}.get(self.source, SAMPLED)
        for name in unused:
            object.__setattr__(self, name, getattr(type(self), name))

    @property
    def domain(self) -> str | None:
        """The domain that the rows come from; None for sampled rows, or without rows."""
        return None if self.source in ("none", SELF) else self.source


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Choice:
    """The choice of branches per token, and the balance of their load.

    Attributes:
        top_k: Number of branches per token, those of the largest weights.
        top_p: Minimum total weight of the branches per token. As few branches as possible are chosen, by decreasing
            weight.
        renormalize: Whether the weights of the chosen branches are scaled to sum to one.
        balance: Weight of the load-balance loss.
    """

    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    renormalize: bool = True
    balance: Annotated[float, Field(ge=0.0)] = 0.0

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_p is not None:
            raise ValueError("top_k and top_p are two ways to choose branches: give one of them")
        if not self.renormalize and self.top_k is None and self.top_p is None:
            raise ValueError("renormalize=false needs top_k or top_p; without them the weights sum to one")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GateSettings(Choice):
    """Settings of a MoDE gate. The defaults are those of the paper.

    Attributes:
        reads: Input of the gate: the `input` of its block, or the `output` of the block's backbone layers, which has
            context even in the first block.
        scope: Positions that the gate reads for a token: the `token` itself, or the mean over the `prefix` up to it.
        norm: Whether a root mean square norm without weights precedes the gate.
        temperature: Divisor of the logits.
        hidden: Width of a hidden layer of the gate; 0, as in the paper, for none.
    """

    reads: Literal["input", "output"] = "input"
    scope: Literal["token", "prefix"] = "token"
    norm: bool = False
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    hidden: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterSettings(Choice):
    """Settings of the router of a mixture of experts. By default all experts run.

    Attributes:
        z: Weight of the z-loss: the mean square of the log-sum-exp of the logits.
        entropy: Weight of the mean entropy of the weights before the choice.
        sample: Whether a token has one expert: sampled by the weights in training, the one of the largest weight
            afterwards.
    """

    z: Annotated[float, Field(ge=0.0)] = 0.0
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    sample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and (self.top_k is not None or self.top_p is not None):
            raise ValueError("sample is a way to choose one expert: it goes with neither top_k nor top_p")

    @property
    def known(self) -> bool:
        """Whether the number of experts per token is fixed by the settings."""
        return self.top_p is None

    @property
    def active(self) -> int | None:
        """Number of experts per token; None for all."""
        return 1 if self.sample else self.top_k
