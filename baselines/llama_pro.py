"""LLaMA Pro, block expansion (Wu et al., 2024): copies of layers are inserted in series into a frozen backbone.

The L layers form `num_blocks` groups of equal size. A copy of the last layer of every group is inserted after it. The
output matrices of attention and of the feed-forward part are zero in a copy, so that it starts as the identity. Only
the copies train, on the mix of all targets. There are no gates: all text passes through the copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Layer, divide_layers, read_shape
from mode.backbone.structure import find_layer_stack, resize_cache_slots
from mode.config.base import STRICT
from mode.config.run import Run
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material, Method
from mode.modular.build import copy_layer, set_cache_slot

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class LLaMAPro(Method):
    """Trainable copies of layers in series with a frozen backbone.

    Attributes:
        num_blocks: Number of groups, and of copies. It must divide the number of layers.
    """

    recorded_as: ClassVar[str] = "baselines.llama_pro.LLaMAPro"
    family: ClassVar[str] = "modular layers"
    source: ClassVar[str] = "Wu et al., 2024"
    identical_at_start: ClassVar[bool] = True

    num_blocks: Annotated[int, Field(gt=0)]

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the expanded backbone. Only the copies train.

        Raises:
            ConfigError: `num_blocks` does not divide the number of layers.
        """
        from torch import nn

        model = material.backbone().requires_grad_(False)
        trunk, name = find_layer_stack(model)
        layers: list[Any] = list(getattr(trunk, name))
        size = divide_layers(len(layers), self.num_blocks)
        zeroed = list_output_matrices(read_shape(run.backbone).layers[0])
        expanded: list[Any] = []
        templates: list[int] = []
        for number, layer in enumerate(layers):
            set_cache_slot(layer, len(expanded))
            expanded.append(layer)
            templates.append(number)
            if (number + 1) % size == 0:
                copy = copy_layer(model, layer, len(expanded), "copy")
                for path in zeroed:
                    for parameter in copy.get_submodule(path).parameters():
                        nn.init.zeros_(parameter)
                expanded.append(copy)
                templates.append(number)
        model.config = trunk.config = resize_cache_slots(model.config, templates)
        setattr(trunk, name, nn.ModuleList(expanded))
        deeper: nn.Module = model
        return deeper

    def cost(self, run: Run) -> Cost:
        """Return the cost of training the copies in series with the frozen layers.

        Raises:
            ConfigError: `num_blocks` does not divide the number of layers.
        """
        shape, length = read_shape(run.backbone), run.train.sequence_length
        size = divide_layers(len(shape.layers), self.num_blocks)
        parts, added = [shape.head(trains=False)], 0
        for number, layer in enumerate(shape.layers):
            parts.append(layer.flops(length, trains=False, upstream=number >= size))
            if (number + 1) % size == 0:
                parts.append(layer.flops(length, trains=True, upstream=number >= size))
                added += layer.parameters
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total)


def list_output_matrices(layer: Layer) -> list[str]:
    """Return the paths of the matrices in a layer that write to the residual stream."""
    return [*layer.stages[1], *layer.stages[3]]
