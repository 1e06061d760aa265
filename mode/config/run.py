"""The settings of a run, as frozen, checked dataclasses.

Hydra composes YAML, and `mode.config.compose` turns the result into these classes. No other module uses a `DictConfig`.
Unknown keys are refused, so a mistyped setting is never ignored.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mode.config.backbone import Backbone
from mode.config.base import STRICT, Name
from mode.config.data import Domain
from mode.config.train import Train

Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,128}$")]
"""Free text in one line, as Weights & Biases takes it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodSettings:
    """Settings of every method. Subclasses add their own settings, and `mode.methods.base` adds the behaviour.

    Attributes:
        recorded_as: The method's name in records, which is part of a run's identity. It never changes, wherever the
            class moves; by default it is the class's import path.
        always_recorded: Settings that always identify a run although they have a default: they had none when they were
            first recorded.
        lr: Peak learning rate, chosen on the validation split.
    """

    recorded_as: ClassVar[str]
    always_recorded: ClassVar[frozenset[str]] = frozenset()

    lr: Annotated[float, Field(gt=0.0)]

    @classmethod
    def recorded_name(cls) -> str:
        """Return the method's name in records. A subclass does not inherit the name of its base."""
        return str(vars(cls).get("recorded_as", f"{cls.__module__}.{cls.__qualname__}"))

    def peak_lr(self) -> float:
        """Return the peak learning rate of the stage that these settings describe."""
        return self.lr

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget with the same result. This budget identifies the run."""
        return run.budget

    def reads(self) -> tuple[str, ...]:
        """Return the domains that training reads in addition to targets and replay."""
        return ()

    def unused(self) -> tuple[str, ...]:
        """Return the settings without an effect, given the other settings. They do not identify a run."""
        return ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Budget:
    """The amount of training of a row, over all its stages.

    Attributes:
        policy: `paper`: every stage has `train.steps` steps, as published. `data`: the stages of a row share
            `train.steps`, so all rows see the same number of tokens. `compute`: every row has the floating-point
            operations of `train.steps` steps of full fine-tuning, in equal parts for its stages. `params`: as `data`;
            in addition adapters have the rank, and MoV the number of vectors, that add as many parameters as MoDE.
        num_blocks: With `params`, B of the MoDE model to match. The model has one expert per target.
        expert_layers: With `params`, l of that model.
    """

    policy: Literal["paper", "data", "compute", "params"]
    num_blocks: Annotated[int, Field(gt=0)] | None = None
    expert_layers: Annotated[int, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if {self.policy == "params"} != {self.num_blocks is not None, self.expert_layers is not None}:
            raise ValueError("policy=params needs num_blocks and expert_layers, and no other policy accepts them")

    @property
    def shares_steps(self) -> bool:
        """Whether the stages of a row share `train.steps`."""
        return self.policy in ("data", "params")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluate:
    """Scoring of a finished model.

    Attributes:
        domains: Domains to score in addition to the targets. Domains that are not targets measure retention.
        split: `test` for results; `validation` for choosing settings, so that tuning never uses the test split.
        batch_size: Maximum number of rows per forward pass. A CPU uses fewer rows where that is faster.
        logit_chunk_size: Maximum number of tokens whose logits are in memory at the same time.
        tokens: Number of tokens of every split to score, in whole rows that are chosen by the hash of their content;
            null scores all.
        precision: Precision of scoring: `fp32`, or `bf16` by autocast. The output head and probabilities are always in
            fp32.
    """

    always_recorded: ClassVar[frozenset[str]] = frozenset({"split", "batch_size", "logit_chunk_size"})

    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    split: Literal["test", "validation"] = "test"
    batch_size: Annotated[int, Field(gt=0)] = 16
    logit_chunk_size: Annotated[int, Field(gt=0)] = 512
    tokens: Annotated[int, Field(gt=0)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Track:
    """Tracking of a run. It is never the source of a number.

    Attributes:
        mode: `offline` and `online` log to Weights & Biases; `none` does not log.
        project: Weights & Biases project.
        group: Group of the runs of one table.
        name: Name of the run's row in the table.
    """

    mode: Literal["offline", "online", "none"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:\x00-\x1f]{1,128}$")]
    group: Label | None = None
    name: Label | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Paths:
    """Folders. They are not part of a run's identity.

    Attributes:
        runs: Folder of the work folders, one per run: checkpoints, logs, weights.
        results: Folder of the records and of the tables rendered from them.
        cache: Folder of prepared data and fetched wheels.
    """

    runs: str
    results: str
    cache: str


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Run:
    """A resolved configuration: one stage of one method on one backbone with one seed.

    Attributes:
        seed: Seed of the initialisation and of the order of the data.
        targets: Domains that the model is adapted to.
        domains: Settings of every domain that the run trains on or is scored on.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    domains: dict[Name, Domain]
    backbone: Backbone
    method: MethodSettings
    budget: Budget
    train: Train = Train()
    evaluate: Evaluate
    track: Track
    paths: Paths

    @property
    def scored(self) -> tuple[str, ...]:
        """Domains that the finished model is scored on: those of `evaluate.domains`, and all that it trains on."""
        replay = self.train.batch.replay or ()
        return tuple(dict.fromkeys([*self.evaluate.domains, *self.targets, *replay, *self.method.reads()]))

    @property
    def lr(self) -> float:
        """Peak learning rate of this run's own stage."""
        return self.method.peak_lr() if self.train.lr is None else self.train.lr
