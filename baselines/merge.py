"""Merging by task vectors: models fine-tuned on one domain each, added to their backbone as differences of weights.

With the task vectors tau_i = theta_i - theta_0 of the domains:

- `rule=sum` is task arithmetic (Ilharco et al., 2023): theta = theta_0 + scale sum_i tau_i.
- `rule=ties` is TIES-Merging (Yadav et al., 2023): of every tau_i the share `density` of the largest magnitude is kept.
  tau has the sign of their sum, and is their mean over the vectors of this sign. theta = theta_0 + scale tau.
- `drop` is DARE (Yu et al., 2024): before the rule, every element of every tau_i is set to zero with this probability,
  and the others are divided by 1 - drop.

Nothing trains after the fine-tuning, so one run per domain gives the models of all settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, compute_untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Weights = Mapping[str, "Tensor"]
"""Weights, or a task vector, by the name of the parameter."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Merge(Method):
    """The sum of a backbone and the task vectors of its fine-tuned copies.

    Attributes:
        branch: Method that fine-tunes on one domain, with the settings of its YAML file.
        rule: How task vectors are combined: `sum` or `ties`.
        scale: Factor of the combined task vector.
        density: Share of a task vector's elements that `ties` keeps.
        drop: Probability with which an element of a task vector is dropped beforehand. The seed is the run's.
    """

    recorded_as: ClassVar[str] = "baselines.merge.Merge"
    family: ClassVar[str] = "merged models"

    branch: dict[str, Any]
    rule: Literal["sum", "ties"] = "sum"
    scale: Annotated[float, Field(ge=0)] = 1.0
    density: Annotated[float, Field(gt=0, le=1)] = 1.0
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if self.density < 1 and self.rule != "ties":
            raise ValueError("density goes with rule=ties")

    @property
    def source(self) -> str:
        """Return the publication: that of DARE with `drop`, else that of the rule."""
        if self.drop:
            return "Yu et al., 2024"
        return {"sum": "Ilharco et al., 2023", "ties": "Yadav et al., 2023"}[self.rule]

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: nothing trains in this stage, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of fine-tuning per target."""
        return stages_by_domain(run, build_method(self.branch, "method.branch"), run.targets, trains=False)

    def steps(self, run: Run) -> int:
        """Return 0: only the earlier stages train."""
        return 0

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the merged model.

        Raises:
            ConfigError: `branch` does not train exactly the parameters of the backbone.
        """
        import torch

        from mode.core.tensors import load_run_tensors

        model: nn.Module = material.backbone().requires_grad_(False)
        parameters = dict(model.named_parameters())
        vectors = []
        for folder in material.needs:
            tuned = load_run_tensors(folder / WEIGHTS, folder.name)
            if set(tuned) != set(parameters):
                raise ConfigError(
                    f"method.branch._target_={self.branch['_target_']}: not a method that trains all weights"
                )
            vectors.append({name: tuned[name] - parameter for name, parameter in parameters.items()})
        random = torch.Generator().manual_seed(run.seed)
        if self.drop:
            vectors = [thin(vector, self.drop, random) for vector in vectors]
        merged = elect([trim(vector, self.density) for vector in vectors]) if self.rule == "ties" else add_up(vectors)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(merged[name], alpha=self.scale)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost of a forward pass of one model. Nothing trains."""
        return compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)


def add_up(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the sum of task vectors."""
    import torch

    return {name: torch.stack([vector[name] for vector in vectors]).sum(0) for name in vectors[0]}


def thin(vector: Weights, drop: float, random: torch.Generator) -> dict[str, Tensor]:
    """Return a task vector without randomly dropped elements, scaled so that its expectation is unchanged.

    Args:
        vector: The task vector.
        drop: Probability with which an element is dropped.
        random: Generator of the random numbers.
    """
    import torch

    return {
        name: part * (torch.rand(part.shape, generator=random) >= drop) / (1.0 - drop)
        for name, part in sorted(vector.items())
    }


def trim(vector: Weights, density: float) -> dict[str, Tensor]:
    """Return a task vector with the elements of the largest magnitude, over all parameters together.

    Args:
        vector: The task vector.
        density: Share of the elements to keep, at least one.

    >>> import torch
    >>> trim({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0, 3.0])}, 0.5)
    {'a': tensor([ 0., -4.]), 'b': tensor([0., 3.])}
    """
    import torch

    sizes = torch.cat([part.abs().flatten() for part in vector.values()])
    kept = max(1, round(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: torch.where(part.abs() >= least, part, 0.0) for name, part in vector.items()}


def elect(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the mean of the elements of task vectors that have the sign of their sum; zeros do not count.

    >>> import torch
    >>> elect([{"w": torch.tensor([1.0, 5.0, 0.0])}, {"w": torch.tensor([3.0, -1.0, -2.0])}])
    {'w': tensor([ 2.,  5., -2.])}
    """
    import torch

    merged = {}
    for name in vectors[0]:
        parts = torch.stack([vector[name] for vector in vectors])
        agrees = (parts.sign() == parts.sum(0).sign()) & (parts != 0)
        merged[name] = torch.where(agrees, parts, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    return merged
