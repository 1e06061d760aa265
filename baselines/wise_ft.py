"""WiSE-FT (Wortsman et al., 2022): the weights of a fine-tuned model, interpolated with those of its backbone.

theta = (1 - alpha) theta_0 + alpha theta_SFT for every parameter. Nothing trains after the fine-tuning, so one run of
full fine-tuning gives the models of all values of alpha.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.run import Budget, Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, compute_untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stage_on_targets

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class WiSEFT(Method):
    """A fine-tuned model, interpolated with its backbone.

    Attributes:
        tuned: Method that fine-tunes, with the settings of its YAML file.
        alpha: Weight of the fine-tuned model: 0 is the backbone, 1 the fine-tuned model.
    """

    recorded_as: ClassVar[str] = "baselines.wise_ft.WiSEFT"
    family: ClassVar[str] = "merged models"
    source: ClassVar[str] = "Wortsman et al., 2022"

    tuned: dict[str, Any]
    alpha: Annotated[float, Field(ge=0, le=1)]

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: nothing trains in this stage, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return the run that fine-tunes on all targets, with the steps of this run."""
        return (stage_on_targets(run, build_method(self.tuned, "method.tuned")),)

    def steps(self, run: Run) -> int:
        """Return 0: only the fine-tuning trains."""
        return 0

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget: that of the fine-tuning."""
        return self.needs(run)[0].budget

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the interpolated model.

        Raises:
            ConfigError: `tuned` does not train exactly the parameters of the backbone.
        """
        import torch

        from mode.core.tensors import load_run_tensors

        model: nn.Module = material.backbone().requires_grad_(False)
        parameters, (folder,) = dict(model.named_parameters()), material.needs
        tuned = load_run_tensors(folder / WEIGHTS, folder.name)
        if set(tuned) != set(parameters):
            raise ConfigError(f"method.tuned._target_={self.tuned['_target_']}: not a method that trains all weights")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.lerp_(tuned[name], self.alpha)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost of a forward pass of one model. Nothing trains."""
        return compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)
