"""Closed-form cost of training low-rank adapters on a frozen decoder (see `mode.cost.flops`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mode.backbone.shape import Flops, Layer, Shape
from mode.cost.flops import Cost, add_flops

NOTHING: Mapping[str, int] = {}


def compute_adapter_cost(
    layer: Layer,
    length: int,
    targets: Mapping[str, int],
    *,
    upstream: bool,
    routers: Mapping[str, int] = NOTHING,
    trains: bool = True,
) -> Flops:
    """Return the operations per token of a frozen layer with low-rank adapters.

    A matrix computes the gradient of its inputs only if parameters before it train. In the first layer, no parameters
    precede the input matrices of attention, and attention has a backward pass only if these matrices have adapters.

    Args:
        layer: Shape of the layer.
        length: Tokens per row.
        targets: Rank of the adapter of every matrix that has one, by path; 0 if only vectors train.
        upstream: Whether parameters before the layer train.
        routers: Number of weights in the router of every matrix that has one, by path.
        trains: Whether the adapters train. If not, only their routers train.
    """
    into, out, up, down = layer.stages
    within = upstream or any(path in targets for path in into)
    after = upstream or (not layer.parallel and (within or any(path in targets for path in out)))
    reached = (upstream, within, after, after or any(path in targets for path in up))
    parts = [layer.attention(length, passes=within)]
    for stage, passes in zip((into, out, up, down), reached, strict=True):
        for path, (inputs, outputs) in stage.items():
            parts.append(Flops(2 * inputs * outputs, 2 * inputs * outputs if passes else 0))
            rank = targets.get(path, 0)
            back = (1 + passes) * inputs + 2 * outputs if trains else passes * (inputs + outputs)
            parts.append(Flops(2 * rank * (inputs + outputs), 2 * rank * back))
            routed = 2.0 * routers.get(path, 0)
            parts.append(Flops(routed, (1 + passes) * routed))
    return add_flops(parts)


def compute_bank_cost(
    shape: Shape, length: int, count: int, rank: int, chosen: Callable[[Layer], Sequence[str]], routed: bool = True
) -> Cost:
    """Return the cost of training low-rank experts, and their routers, on matrices of a frozen decoder.

    Args:
        shape: Shape of the decoder.
        length: Tokens per row, S.
        count: Number of experts per matrix, N. All experts run.
        rank: Rank of each expert, r.
        chosen: Maps a layer to the paths of its matrices that have experts.
        routed: Whether each of these matrices has a router that reads the matrix's inputs.
    """
    parts, added = [shape.head(trains=False)], 0
    for number, layer in enumerate(shape.layers):
        sizes = {path: layer.matrices[path] for path in chosen(layer)}
        routers = {path: inputs * count for path, (inputs, _) in sizes.items() if routed}
        parts.append(
            compute_adapter_cost(
                layer, length, dict.fromkeys(sizes, count * rank), upstream=number > 0, routers=routers
            )
        )
        added += sum(routers.values()) + count * rank * sum(map(sum, sizes.values()))
    total = shape.parameters + added
    return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total)
