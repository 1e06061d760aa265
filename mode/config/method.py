"""Settings that methods share: anchors, gates and routers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT, as_fraction

SELF = "self"
"""Source of rows that the backbone itself made up."""


NONE = "none"
"""Source of no rows."""


SAMPLED = ("rows", "temperature", "prompt")
"""Settings of such rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Anchor:
    """Rows of the mix on which a model is held to its backbone: by the divergence of its predictions, not by the text.

    Attributes:
        source: Where the rows come from: `self`, sampled once from the backbone; a domain, whose training split gives
            them; or `none`.
        share: Share of the rows of the mix.
        weight: Factor on KL(backbone || model) of such a row, beside a cross-entropy of weight 1 of the others.
        rows: Of `self`: rows that are sampled; they are seen again when training is longer.
        temperature: Of `self`: divides the logits.
        prompt: Of `self`: what a sampled row begins with: a new `document`, or a random `token`.
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
        # What has no effect is as by default: the same training is the same run however it is written.
        unused = {"none": ("share", "weight", *SAMPLED), SELF: ()}.get(self.source, SAMPLED)
        for name in unused:
            object.__setattr__(self, name, getattr(type(self), name))

    @property
    def domain(self) -> str | None:
        """The domain that gives the rows, if one does."""
        return None if self.source in ("none", SELF) else self.source


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Choice:
    """Which of several branches a token hears, and how their load is kept even.

    Attributes:
        top_k: Branches that a token keeps, the largest first.
        top_p: Share of weight that the branches a token keeps must hold: as few of them as can.
        renormalize: Whether the kept weights are scaled to sum to one.
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
            raise ValueError("renormalize=false goes with top_k or top_p: all branches' weights sum to one anyway")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GateSettings(Choice):
    """How a MoDE gate turns its logits into weights of branches; the defaults are the paper's.

    Attributes:
        reads: What a gate reads: its block's `input`, or the `output` of the block's backbone layers, which has context
            in the first block too.
        scope: What a gate sees of it: its `token`, or the mean of the `prefix` up to it.
        norm: Whether a root-mean-square norm, without weights of its own, comes before the gate.
        temperature: Divides the logits.
        hidden: Width of a hidden layer of the gate; 0, the paper's way, for none.
    """

    reads: Literal["input", "output"] = "input"
    scope: Literal["token", "prefix"] = "token"
    norm: bool = False
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    hidden: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterSettings(Choice):
    """How the router of a mixture of experts turns its logits into weights; by default all experts run.

    Attributes:
        z: Weight of the z-loss, the mean square of the logits' log-sum-exp.
        entropy: Weight of the mean entropy of the weights before any choice.
        sample: Whether a token has one expert, drawn by its weight in training, and the one of most weight afterwards.
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
        """Whether it is known beforehand how many experts a token has."""
        return self.top_p is None

    @property
    def active(self) -> int | None:
        """Experts that a token has; None for all."""
        return 1 if self.sample else self.top_k
