"""Every setting of a run as plain, frozen, checked types.

Hydra composes YAML, `mode.config.compose` turns the result into these types, and nothing else in the project sees a
`DictConfig`. Extra keys are refused, so a mistyped setting can never be ignored.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mode.config.backbone import Backbone
from mode.config.base import STRICT
from mode.config.data import Domain
from mode.config.train import Train


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodSettings:
    """What every method says about itself; subclasses add their own settings and the behaviour (`mode.methods.base`).

    Attributes:
        recorded_as: The method's name in records, which is part of a run's identity. It never changes, wherever the
            class moves; by default it is the class's import path.
        always_recorded: Settings with a default that always identify a run, since they had none when they were first
            recorded.
        lr: Peak learning rate, chosen on the validation split.
    """

    recorded_as: ClassVar[str]
    always_recorded: ClassVar[frozenset[str]] = frozenset()

    lr: Annotated[float, Field(gt=0.0)]

    @classmethod
    def recorded_name(cls) -> str:
        """Return the method's name in records. A subclass never inherits the name of its base."""
        return str(vars(cls).get("recorded_as", f"{cls.__module__}.{cls.__qualname__}"))

    def peak_lr(self) -> float:
        """Return the peak learning rate of the stage that these settings describe."""
        return self.lr

    def effective(self, run: Run) -> Budget:
        """Return the plainest budget under which this run is the same: it identifies the run."""
        return run.budget

    def reads(self) -> tuple[str, ...]:
        """Return the domains that training reads besides the targets and what is replayed."""
        return ()

    def unused(self) -> tuple[str, ...]:
        """Name the settings that make no difference as the others stand, and so do not identify a run."""
        return ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Budget:
    """How much training a row gets in all.

    Attributes:
        policy: `paper`: every stage gets `train.steps`, as published; `data`: the stages of a row share them, so that
            all rows see the same number of tokens; `compute`: every row gets the floating-point operations of
            `train.steps` steps of full fine-tuning, its stages in equal parts; `params`: as `data`, and adapters get
            the rank, and MoV the number of vectors, with which they add as many parameters as MoDE.
        num_blocks: Of `params`: B of the MoDE model that is matched, which has one expert per target.
        expert_layers: Of `params`: its l.
    """

    policy: Literal["paper", "data", "compute", "params"]
    num_blocks: Annotated[int, Field(gt=0)] | None = None
    expert_layers: Annotated[int, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if {self.policy == "params"} != {self.num_blocks is not None, self.expert_layers is not None}:
            raise ValueError("num_blocks and expert_layers go with policy=params, which needs them")

    @property
    def shares_steps(self) -> bool:
        """Whether the stages of a row share `train.steps`."""
        return self.policy in ("data", "params")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluate:
    """How a finished model is scored.

    Attributes:
        domains: Domains that are scored beside the targets; those that are not targets measure retention.
        split: `test` for results; `validation` for choosing settings, so that tuning never touches the test split.
        batch_size: Rows per forward pass, at most: a processor reads fewer where that is faster.
        logit_chunk_size: Tokens whose logits exist at one time, at most.
    """

    always_recorded: ClassVar[frozenset[str]] = frozenset({"split", "batch_size", "logit_chunk_size"})

    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    split: Literal["test", "validation"] = "test"
    batch_size: Annotated[int, Field(gt=0)] = 16
    logit_chunk_size: Annotated[int, Field(gt=0)] = 512


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Track:
    """Where a run can be watched; never the source of a number.

    Attributes:
        mode: `offline` and `online` log to Weights & Biases, `none` to nothing.
        project: Weights & Biases project.
        group: Groups the runs of one table.
        name: Row of the table that the run belongs to.
    """

    mode: Literal["offline", "online", "none"]
    project: str
    group: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Paths:
    """Folders; never part of a run's identity.

    Attributes:
        runs: Work folders (checkpoints, logs, weights), one per run.
        results: Records and the tables rendered from them.
        cache: Prepared data and fetched wheels.
    """

    runs: str
    results: str
    cache: str


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Run:
    """One resolved configuration: one stage of one method on one backbone with one seed.

    Attributes:
        seed: Seeds initialisation and the order of the data.
        targets: Domains the model is adapted to.
        domains: Settings of every domain that the run trains on or is scored on.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    domains: dict[str, Domain]
    backbone: Backbone
    method: MethodSettings
    budget: Budget
    train: Train = Train()
    evaluate: Evaluate
    track: Track
    paths: Paths

    @property
    def scored(self) -> tuple[str, ...]:
        """Domains that the finished model is scored on: those of the evaluation, and all that it trains on."""
        replay = self.train.batch.replay or ()
        return tuple(dict.fromkeys([*self.evaluate.domains, *self.targets, *replay, *self.method.reads()]))

    @property
    def lr(self) -> float:
        """Peak learning rate of this run's stage."""
        return self.method.peak_lr() if self.train.lr is None else self.train.lr
