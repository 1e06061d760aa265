"""The interface of a method: settings that build a model and name the earlier stages that it needs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic.dataclasses import dataclass as settings

from mode.backbone.load import fingerprint_weights, read_pretraining_data
from mode.backbone.shape import read_shape
from mode.backbone.tokenizer import BackboneTokenizer, load_tokenizer
from mode.config.base import STRICT, as_fraction
from mode.config.data import Split
from mode.config.run import Budget, MethodSettings, Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, compute_full_cost, compute_untouched_cost

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mode.data.pack import Packed, Tokens


@dataclass(frozen=True)
class Material:
    """The inputs of `Method.build`.

    Attributes:
        backbone: Loads a fresh copy of the backbone in fp32.
        needs: Work folders of the runs that `Method.needs` returned, in order.
        source: Source of the backbone: name, path, revision, fingerprint.
        artefacts: Digests of the input files that are part of the run's identity, as `Method.artefacts` returned them.
        texts: Returns at most so many rows of text that the backbone wrote, then of the training split of every target,
            (N, S) each; None where no text is at hand.
    """

    backbone: Callable[[], PreTrainedModel]
    needs: tuple[Path, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    artefacts: Mapping[str, str] = field(default_factory=dict)
    texts: Callable[[int], Sequence[Tensor]] | None = None

    def read_texts(self, rows: int) -> Sequence[Tensor]:
        """Return the texts.

        Args:
            rows: Maximum number of rows of a text.

        Raises:
            ConfigError: No text is at hand.
        """
        if self.texts is None:
            raise ConfigError("the method reads text of its targets, and here is none")
        return self.texts(rows)


Reference = Callable[["nn.Module", "Tensor"], tuple["Tensor", "Tensor"]]
"""From the model that trains and rows of tokens, (B, S), to the backbone's final hidden states, (B, S, d), and head,
(V, d)."""


FAMILIES = (
    "reference",
    "full tuning",
    "regularised tuning",
    "low rank",
    "mixtures of low rank",
    "merged models",
    "models apart",
    "modular layers",
    "mixtures from dense models",
)
"""Families of methods in the order of `mode show methods`; other families come after them."""


TokenWeights = Callable[[int, "Tensor"], "Tensor"]
"""From a step and its rows of tokens, (B, S + 1), to the weight of every token's cross-entropy, (B, S)."""


@dataclass(frozen=True)
class Weighing:
    """The inputs of `Method.weigh`.

    Attributes:
        model: The model that trains.
        steps: Optimizer steps of the run's own stage.
        rows: Returns the rows of a step, (B, S + 1), on the model's device.
        score: Returns the cross-entropy of every token in nats, (B, S), under a model, for rows of tokens, (B, S + 1).
            No gradient is computed.
        backbone: Loads a frozen copy of the backbone onto the model's device.
        needs: Returns the work folders of the runs that `Method.needs` returned, in order.
    """

    model: nn.Module
    steps: int
    rows: Callable[[int], Tensor]
    score: Callable[[nn.Module, Tensor], Tensor]
    backbone: Callable[[], PreTrainedModel]
    needs: Callable[[], tuple[Path, ...]]


class Probe(Protocol):
    """Measures a model's gates while the model is scored."""

    def add(self, domain: str, count: int) -> None:
        """Add the first `count` tokens of the latest forward pass."""

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the measurements, by domain."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Method(MethodSettings):
    """A method that trains a model: a frozen dataclass whose fields are the schema of its YAML.

    A run is one stage of a method. A method with several stages returns the runs of the earlier ones from `needs`; they
    are ordinary runs, found by their identity and never trained twice.
    """

    family: ClassVar[str] = "other"
    """Family of the method, one of `FAMILIES` or a new one."""
    split: ClassVar[Split] = "train"
    """Split of the domains that the method trains on."""
    identical_at_start: ClassVar[bool] = False
    """Whether the untrained model predicts what the backbone predicts, under the settings of the method's YAML."""
    groups_tokens: ClassVar[bool] = False
    """Whether an expert runs on the tokens that chose it, in one batch: the batch's size changes the last bits."""

    @property
    def source(self) -> str:
        """Return the publication of the method under its settings, as authors and year; empty if not stated."""
        return ""

    @property
    def weighs_experts(self) -> bool:
        """Whether the model weighs experts token by token; the record then has the weights."""
        return False

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return the earlier stages that this run needs, in order."""
        return ()

    def steps(self, run: Run) -> int:
        """Return the optimizer steps of this run's own stage, given the run's budget.

        Raises:
            ConfigError: The budget is in operations, and the method does not implement `cost`.
        """
        if run.budget.shares_steps:
            return run.train.steps - sum(stage.train.steps for stage in self.needs(run))
        if run.budget.policy == "compute" and run.train.steps:
            spent = sum(stage.train.steps * flops_per_token(stage) for stage in self.needs(run))
            return max(1, round((full_tuning_flops(run) - spent) / flops_per_token(run)))
        return run.train.steps

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget with the same result: a single stage has nothing to share steps with."""
        if run.budget.shares_steps:
            return Budget(policy="data" if self.needs(run) else "paper")
        return run.budget

    def cost(self, run: Run) -> Cost | None:
        """Return the operations and parameters of this run's own stage, by closed form; None where unknown."""
        return None

    def anchoring_flops(self, run: Run) -> float:
        """Return the operations of predictions beside the training of the model, per token of the mix.

        These are the backbone's predictions on anchored rows, and the losses that tokens are weighed by.
        """
        return 0.0

    def tokenizer(self, run: Run) -> BackboneTokenizer:
        """Return the tokenizer of the run's data: the backbone's."""
        return load_tokenizer(run.backbone)

    def backbone_fingerprint(self, run: Run) -> str:
        """Return the fingerprint of the weights that the run starts from."""
        return fingerprint_weights(run.backbone)

    def pretraining_data(self, run: Run) -> dict[str, str]:
        """Return the fingerprints of the data that the run's backbone was pretrained on; empty if unknown."""
        return read_pretraining_data(run.backbone)

    def backbone_size(self, run: Run) -> int:
        """Return the number of parameters of the weights that the run starts from."""
        return read_shape(run.backbone).parameters

    def artefacts(self, run: Run) -> dict[str, str]:
        """Return the digests of the run's input files other than data and backbone, which are part of its identity.

        Raises:
            ConfigError: A file is missing, damaged, or made for something else.
        """
        return {}

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the rows of every domain in a cycle of the training mix: equal ones of all targets, after replay."""
        replay = {name: as_fraction(share) for name, share in (run.train.batch.replay or {}).items()}
        each = (1 - sum(replay.values(), start=Fraction())) / len(run.targets)
        shares = dict.fromkeys(run.targets, each) | replay
        common = math.lcm(*(share.denominator for share in shares.values()))
        return {name: int(share * common) for name, share in shares.items()}

    def old_text(self, run: Run) -> tuple[str, ...]:
        """Return the sources of rows that keep what the backbone knows, `self` for text that the backbone writes.

        By default they are the sources of the training mix other than the targets.
        """
        return tuple(name for name in self.mixture(run) if name not in run.targets)

    def stream(self, run: Run, packed: Mapping[str, Packed], name: str) -> Tokens | None:
        """Return the tokens of a source that the method itself generates; None for all other sources."""
        return None

    def order(self, run: Run) -> int:
        """Return a number that determines the order of the training rows, together with the seed.

        It depends on the mixture alone. So every method sees the same mix in the same order, and a stage on one domain
        does not see the rows that the mix draws from that domain.
        """
        return zlib.crc32(",".join(self.mixture(run)).encode())

    def row_kinds(self, run: Run) -> Mapping[str, int]:
        """Return the kind of every source's rows, if the model conditions on it (`row_kinds`); else nothing."""
        return {}

    def lr_scales(self) -> Mapping[str, float]:
        """Return factors on the learning rate of parameters, by a part of their name."""
        return {}

    def weigh(self, weighing: Weighing) -> TokenWeights | None:
        """Return a function that gives every token's cross-entropy a weight; None where all tokens count alike.

        The loss of a step is the mean over its tokens of weight times cross-entropy.
        """
        return None

    def inspect(self, model: nn.Module) -> dict[str, float]:
        """Return the method's values for a point of the training curve, such as gate means."""
        return {}

    @contextmanager
    def probed(self, model: nn.Module) -> Iterator[Probe | None]:
        """Measure the weights of the finished model's experts while it is scored; None without experts."""
        from mode.gating.meter import GateMeter, find_gates, watch_gates

        with watch_gates(model) as latest:
            yield GateMeter(latest, list(find_gates(model))) if latest else None

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the gates' branches; empty where branches have indices alone."""
        return ()

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the model to train: a causal LM whose trainable parameters require a gradient."""
        raise NotImplementedError

    def plain(self, model: Any) -> PreTrainedModel:
        """Return a finished model as a plain `transformers` or PEFT model, which loads without this project."""
        plain: PreTrainedModel = model
        return plain

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the artefacts of a finished run; the trained parameters are always written."""

    def kept(self, folder: Path) -> Path:
        """Return the file that a domain needs in addition to the backbone: by default all trained parameters."""
        return folder / WEIGHTS


def flops_per_token(run: Run) -> float:
    """Return the floating-point operations per token of a run's training, by closed form.

    Raises:
        ConfigError: The method does not implement `cost`.
    """
    method = run.method
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None:
        name = type(method).__name__
        raise ConfigError(f"budget=compute: {name} does not say what it takes (`cost`), so its steps cannot be planned")
    assert isinstance(method, Method)
    return cost.flops.total + method.anchoring_flops(run)


def count_generation(run: Run) -> float | None:
    """Return the operations of predicting a token at the end of a row, by closed form; None where unknown."""
    cost = run.method.cost(run) if isinstance(run.method, Method) else None
    return None if cost is None else cost.flops.forward


def full_tuning_flops(run: Run) -> float:
    """Return the operations of full fine-tuning in `train.steps` steps, per token of a step."""
    return run.train.steps * compute_full_cost(read_shape(run.backbone), run.train.sequence_length).flops.total


@settings(frozen=True, kw_only=True, config=STRICT)
class Untouched(Method):
    """The backbone without adaptation: the reference of retention."""

    recorded_as: ClassVar[str] = "mode.method.Untouched"
    family: ClassVar[str] = "reference"
    source: ClassVar[str] = "control"
    identical_at_start: ClassVar[bool] = True

    def steps(self, run: Run) -> int:
        """Return 0: the backbone does not train."""
        return 0

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget: without training all budgets are equal."""
        return Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return the operations of a forward pass; the backbone does not train."""
        return compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone as it is."""
        model: nn.Module = material.backbone().requires_grad_(False)
        return model
