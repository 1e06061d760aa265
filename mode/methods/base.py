"""What a method is: settings that know how to build a model and which earlier runs it stands on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic.dataclasses import dataclass as settings

from mode.backbone.load import count_parameters, fingerprint_weights, read_pretraining_data
from mode.backbone.shape import read_shape
from mode.backbone.tokenizer import BackboneTokenizer, load_tokenizer
from mode.config.base import STRICT, as_fraction
from mode.config.data import Split
from mode.config.run import Budget, MethodSettings, Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, full_cost, untouched_cost

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mode.data.pack import Packed, Tokens


@dataclass(frozen=True)
class Material:
    """What a method builds its model from.

    Attributes:
        backbone: Loads a fresh copy of the backbone in fp32.
        needs: Work folders of the runs that `Method.needs` asked for, in its order.
        source: Where the backbone comes from: name, path, revision, fingerprint.
    """

    backbone: Callable[[], PreTrainedModel]
    needs: tuple[Path, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


Reference = Callable[["nn.Module", "Tensor"], tuple["Tensor", "Tensor"]]
"""From rows of tokens, (B, S), to a backbone's final hidden states, (B, S, d), and its head, (V, d)."""


class Probe(Protocol):
    """Measures the inside of a model while it is scored."""

    def add(self, domain: str, count: int) -> None:
        """Take in the first `count` tokens of the latest forward pass."""

    def result(self) -> dict[str, dict[str, Any]]:
        """Return what was measured, by domain."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Method(MethodSettings):
    """A way to adapt a backbone: a frozen dataclass whose fields are its YAML's schema.

    A run is one stage of a method. A method with several stages asks for the runs of its earlier ones with `needs`;
    they are ordinary runs, found by their identity and never trained twice.
    """

    split: ClassVar[Split] = "train"
    """Split of the domains that the method trains on."""
    identical_at_start: ClassVar[bool] = False
    """Whether the untrained model predicts what the backbone predicts, under the settings of the method's YAML."""
    groups_tokens: ClassVar[bool] = False
    """Whether an expert runs on the tokens that chose it, in one batch: the batch's size changes the last bits."""

    @property
    def weighs_experts(self) -> bool:
        """Whether the model weighs experts token by token; the record then has the weights."""
        return False

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return the earlier stages that this run stands on, in order."""
        return ()

    def steps(self, run: Run) -> int:
        """Return the optimizer steps of this run's own stage, given the row's budget.

        Raises:
            ConfigError: The budget is one of operations, and the method does not say what it takes.
        """
        if run.budget.shares_steps:
            return run.train.steps - sum(stage.train.steps for stage in self.needs(run))
        if run.budget.policy == "compute" and run.train.steps:
            spent = sum(stage.train.steps * flops_per_token(stage) for stage in self.needs(run))
            return max(1, round((full_tuning_flops(run) - spent) / flops_per_token(run)))
        return run.train.steps

    def effective(self, run: Run) -> Budget:
        """Return the plainest budget under which this run is the same: sharing steps is nothing for a single stage."""
        if run.budget.shares_steps:
            return Budget(policy="data" if self.needs(run) else "paper")
        return run.budget

    def cost(self, run: Run) -> Cost | None:
        """Return what this run's own stage takes, by closed form, or None where the method does not say."""
        return None

    def anchoring_flops(self, run: Run) -> float:
        """Return the operations per token of the mix that the backbone's own predictions take."""
        return 0.0

    def tokenizer(self, run: Run) -> BackboneTokenizer:
        """Return the tokenizer that the run's data are prepared with: the backbone's own."""
        return load_tokenizer(run.backbone)

    def backbone_fingerprint(self, run: Run) -> str:
        """Return the fingerprint of the weights that the run starts from."""
        return fingerprint_weights(run.backbone)

    def pretraining_data(self, run: Run) -> dict[str, str]:
        """Return the fingerprints of the data that the run's backbone was pretrained on; empty if unknown."""
        return read_pretraining_data(run.backbone)

    def backbone_size(self, run: Run) -> int:
        """Return the number of parameters of the weights that the run starts from."""
        return count_parameters(run.backbone)

    def artefacts(self, run: Run) -> dict[str, str]:
        """Return the digests of the files that the run stands on besides data and backbone; part of its identity.

        Raises:
            ConfigError: A file is missing, damaged, or made for something else.
        """
        return {}

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the rows that each domain gives in a cycle of the training mix: targets equal ones, after replay."""
        replay = {name: as_fraction(share) for name, share in (run.train.replay or {}).items()}
        each = (1 - sum(replay.values(), start=Fraction())) / len(run.targets)
        shares = dict.fromkeys(run.targets, each) | replay
        common = math.lcm(*(share.denominator for share in shares.values()))
        return {name: int(share * common) for name, share in shares.items()}

    def stream(self, run: Run, packed: Mapping[str, Packed], name: str) -> Tokens | None:
        """Return the tokens of a source of the mix that is no domain, if the method makes them; None for the others."""
        return None

    def order(self, run: Run) -> int:
        """Return a number that, with the seed, fixes the order of the training rows.

        It depends on the mixture alone: every method sees the same mix in the same order, and a stage on one domain
        does not see the rows that the mix will draw from that domain.
        """
        return zlib.crc32(",".join(self.mixture(run)).encode())

    def row_kinds(self, run: Run) -> Mapping[str, int]:
        """Return a number for the rows of every source of the mix, if the model wants to know (`row_kinds`)."""
        return {}

    def lr_scales(self) -> Mapping[str, float]:
        """Return factors on the learning rate for parameters, by a part of their name."""
        return {}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        """Return what a point of the training curve says about the model, such as gate means."""
        return {}

    @contextmanager
    def probed(self, model: nn.Module) -> Iterator[Probe | None]:
        """Measure, while the finished model is scored, what weighs its experts, if it has any."""
        from mode.gating.meter import GateMeter, find_gates, watch_gates

        with watch_gates(model) as latest:
            yield GateMeter(latest, list(find_gates(model))) if latest else None

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of what is weighed; here of experts that have none but their numbers."""
        return ()

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the model to train: a causal LM whose trainable parameters require a gradient."""
        raise NotImplementedError

    def plain(self, model: Any) -> PreTrainedModel:
        """Return a finished model as one that its library saves and loads without this method."""
        plain: PreTrainedModel = model
        return plain

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write what people may keep of a finished run, beside the trained parameters that are always kept."""

    def kept(self, folder: Path) -> Path:
        """Return the file that a finished run's domain needs beside the backbone: here all that was trained."""
        return folder / WEIGHTS


def flops_per_token(run: Run) -> float:
    """Return the floating-point operations per token of a run's training, by closed form.

    Raises:
        ConfigError: The method does not say.
    """
    method = run.method
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None:
        name = type(method).__name__
        raise ConfigError(f"budget=compute: {name} does not say what it takes (`cost`), so its steps cannot be planned")
    assert isinstance(method, Method)
    return cost.flops.total + method.anchoring_flops(run)


def full_tuning_flops(run: Run) -> float:
    """Return what full fine-tuning takes in `train.steps` steps, in operations per token of a step."""
    return run.train.steps * full_cost(read_shape(run.backbone), run.train.sequence_length).flops.total


@settings(frozen=True, kw_only=True, config=STRICT)
class Untouched(Method):
    """The bare backbone: the zero point of retention, scored before anything wraps it."""

    recorded_as: ClassVar[str] = "mode.method.Untouched"
    identical_at_start: ClassVar[bool] = True

    def steps(self, run: Run) -> int:
        """Return 0: nothing trains."""
        return 0

    def effective(self, run: Run) -> Budget:
        """Return the plainest budget: without training they are all the same."""
        return Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return what a forward pass takes; nothing trains."""
        return untouched_cost(read_shape(run.backbone), run.train.sequence_length)

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone as it is."""
        model: nn.Module = material.backbone().requires_grad_(False)
        return model
