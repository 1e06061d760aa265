"""Methods with earlier stages: one run per domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass as settings

from mode.config.base import STRICT
from mode.config.check import build_method, replace_settings
from mode.config.run import Budget, MethodSettings, Run
from mode.core.files import WEIGHTS
from mode.methods.anchored import Adaptation
from mode.methods.base import Material, flops_per_token, full_tuning_flops

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def stages_by_domain(
    run: Run, method: MethodSettings, domains: Sequence[str], *, trains: bool = True
) -> tuple[Run, ...]:
    """Return the runs that train a method on one domain each, as the earlier stages of a run.

    Where the run's budget asks for it, they share its steps or its operations with its own stage, if that trains. Each
    is the ordinary run of that method on that domain, so it is trained once for all runs that need it.

    Args:
        run: The run.
        method: Method of the earlier stages.
        domains: Their domains.
        trains: Whether the run's own stage trains too.
    """
    if not domains:
        return ()
    stages = len(domains) + trains
    train = replace_settings(
        run.train, lr=None, **{"batch.examples": None, "batch.replay": None, "parallelism.placement": None}
    )
    alone = replace_settings(run, targets=tuple(domains[:1]), method=method, budget=Budget(policy="paper"), train=train)
    steps = run.train.steps
    if run.budget.shares_steps:
        steps //= stages
    elif run.budget.policy == "compute" and steps:
        steps = max(1, round(full_tuning_flops(run) / stages / flops_per_token(alone)))
    train = replace_settings(alone.train, steps=steps)
    return tuple(replace_settings(alone, targets=(domain,), train=train) for domain in domains)


def stage_on_targets(run: Run, method: MethodSettings) -> Run:
    """Return the run that trains a method on all targets with the steps of a run, as the only training of that run."""
    alone = replace_settings(run, method=method, train=replace_settings(run.train, lr=None))
    stage: Run = replace_settings(alone, budget=method.effective(alone))
    return stage


@settings(frozen=True, kw_only=True, config=STRICT)
class Mixture(Adaptation):
    """A mixture of the backbone and of copies of it, each trained on one domain in an earlier stage.

    Attributes:
        branch: The method that trains a copy on a domain, as in its YAML: full fine-tuning.
    """

    branch: dict[str, Any]

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of that method per target."""
        return stages_by_domain(run, build_method(self.branch, "method.branch"), run.targets)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the models that become the experts."""
        return "backbone", *run.targets


def merge_branches(material: Material) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """Average a backbone with the models of the earlier stages.

    Returns:
        The backbone with the mean of all weights, trainable; and the weights of every model by name, the backbone's
        first.
    """
    from mode.core.tensors import average_weights, load_run_tensors

    model = material.backbone().requires_grad_(True)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    states = [own, *(load_run_tensors(folder / WEIGHTS, folder.name, own) for folder in material.needs)]
    model.load_state_dict(average_weights(states), strict=False)  # a tied head has one name
    return model, states
