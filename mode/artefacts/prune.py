"""Prune experts of a finished mixture, the least needed first, and score the pruned model.

Experts of a layer are ranked by one of four orders, and the lowest go first:

- `change`: growth of the norm of the expert's row of the router during training (Chowdhury et al., 2024).
- `norm`: norm of the expert's row of the router.
- `usage`: mean weight of the expert on the validation split of the targets.
- `random`: random numbers.

For MoDE the rows are those of the gates, and the backbone is never pruned.

The output of a pruned expert of a mixture is zero, and the weights of the other experts do not change, as published. In
MoDE the output of a block is a weighted mean of its branches, so the weight of a pruned expert is redistributed to the
branches that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.artefacts.prune_results import COLLECTION, SCHEMA, PruningResult
from mode.core.device import describe_device
from mode.core.errors import ConfigError
from mode.gating.gate import Gate
from mode.gating.meter import GateMeter, find_gates, watch_gates
from mode.records.command import describe_method
from mode.records.measurement import make_id
from mode.records.provenance import describe_environment
from mode.runs.execute import build, load_finished
from mode.runs.fit import score_domains
from mode.runs.prepare import Prepared, prepare_run, require_finished

if TYPE_CHECKING:
    from pathlib import Path

    from mode.config.run import Run
    from mode.records.record import Record


def measure_usage(prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    """Return the mean weight of every branch on validation text, summed over the targets, by the path of the gate."""
    names = list(find_gates(model))
    with watch_gates(model) as latest:
        meter = GateMeter(latest)
        score_domains(prepared, model, "validation", prepared.run.targets, probe=meter)
    totals: dict[str, Tensor] = {}
    for measured in meter.result().values():
        for name, mean in zip(names, measured["mean"], strict=True):
            totals[name] = totals.get(name, 0.0) + torch.tensor(mean)
    return totals


def prune(
    run: Run,
    ratios: Sequence[float],
    orders: Sequence[str],
    results: Path,
    done: Callable[[str], None],
    extra: Path | None = None,
) -> tuple[PruningResult, Path]:
    """Prune a finished run by every order and ratio; return the scores and the path of the file that has them.

    Args:
        run: The run.
        ratios: Shares of the experts of a layer to prune, from 0 to 1.
        orders: Orders in which experts are pruned.
        results: Folder of results.
        done: Called with a description of every case that is scored.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: The run is not finished, has no experts with a router, or its weights are missing.
    """
    prepared = prepare_run(run)
    record = require_finished(prepared)
    folder = results / COLLECTION.name
    folder.mkdir(parents=True, exist_ok=True)  # fails before any work if the folder is not writable
    model, device = load_finished(prepared)
    environment = {"data": prepared.fingerprints, "backbone": prepared.backbone}
    environment |= describe_environment(describe_device(device), run.train.threads)
    gates = find_weighted_gates(model)
    if not gates:
        raise ConfigError(f"run {prepared.id}: {type(run.method).__name__} has no experts with a router to prune")
    variant = describe_method(record, extra)[1]
    cases = [score_case(prepared, model, "", 0.0, {})]
    for order in orders:
        scores = rank_experts(order, prepared, model)
        for ratio in ratios:
            cases.append(
                score_case(prepared, model, order, ratio, {name: choose_least(scores[name], ratio) for name in gates})
            )
            done(f"{order}, {ratio:g} pruned")
    asked = describe_pruning(record, run, ratios, orders)
    identity = make_id(asked)
    asked["variant"] = variant  # for display only: not part of the identity
    result = PruningResult(SCHEMA, identity, asked, {"cases": cases}, environment)
    return result, result.write(folder)


def describe_pruning(record: Record, run: Run, ratios: Sequence[float], orders: Sequence[str]) -> dict[str, Any]:
    """Return the part of a result that its identity is computed from."""
    return {
        "run": record.id,
        "run_name": record.filename.removesuffix(f"-{record.id}.json"),
        "method": type(run.method).__name__,
        "backbone": run.backbone.name,
        "split": run.evaluate.split,
        "orders": list(orders),
        "ratios": list(ratios),
    }


def find_weighted_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the gates and routers that have one row of weights per branch, by their paths."""
    return {name: gate for name, gate in find_gates(model).items() if isinstance(getattr(gate, "weight", None), Tensor)}


def rank_experts(order: str, prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    """Return a score for every expert, by the path of the gate: (N,). Experts with low scores are pruned first."""
    gates = find_weighted_gates(model)
    if order == "random":
        random = torch.Generator().manual_seed(prepared.run.seed)
        return {
            name: torch.rand(len(drop_backbone(gate, compute_row_norms(gate))), generator=random)
            for name, gate in gates.items()
        }
    if order == "usage":
        used = measure_usage(prepared, model)
        return {name: drop_backbone(gate, used[name]) for name, gate in gates.items()}
    norms = {name: drop_backbone(gate, compute_row_norms(gate)) for name, gate in gates.items()}
    if order == "norm":
        return norms
    stages = [prepare_run(stage) for stage in prepared.method.needs(prepared.run)]
    before = find_weighted_gates(build(prepared, stages))
    return {name: norms[name].cpu() - drop_backbone(gate, compute_row_norms(gate)) for name, gate in before.items()}


def compute_row_norms(gate: nn.Module) -> Tensor:
    """Return the norm of every row of a gate's weights."""
    weight: Any = gate.weight
    norms: Tensor = weight.detach().norm(dim=1)
    return norms


def drop_backbone(gate: nn.Module, values: Tensor) -> Tensor:
    """Return the values of the experts. The first branch of a MoDE gate is the backbone, and its value is dropped."""
    return values[1:] if isinstance(gate, Gate) else values


def choose_least(scores: Tensor, ratio: float) -> list[int]:
    """Return the experts to prune: the share `ratio` of all, rounded, with the lowest scores.

    >>> choose_least(torch.tensor([0.3, -0.2, 0.9, 0.1]), 0.5)
    [1, 3]
    """
    return [int(index) for index in scores.argsort(stable=True)[: round(ratio * len(scores))]]


@contextmanager
def mask_experts(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Mask some experts of a model in this context. In MoDE, tokens without any other branch use the backbone.

    Args:
        model: The model.
        gone: Numbers of the experts to mask, by the path of their gate.
    """

    def hook(numbers: Sequence[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def masked(gate: nn.Module, inputs: Any, weights: Tensor) -> Tensor:
            shared = isinstance(gate, Gate)
            kept = torch.ones(weights.shape[-1], device=weights.device)
            kept[[number + shared for number in numbers]] = 0.0
            left = weights * kept
            if not shared:
                return left
            rest = left.sum(-1, keepdim=True)
            alone = torch.zeros_like(left).index_fill_(-1, torch.zeros(1, dtype=torch.long, device=left.device), 1.0)
            return torch.where(rest == 0, alone, left / rest) * weights.sum(-1, keepdim=True)

        return masked

    hooks = [
        gate.register_forward_hook(hook(gone[name]))
        for name, gate in find_weighted_gates(model).items()
        if gone.get(name)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def score_case(
    prepared: Prepared, model: nn.Module, order: str, ratio: float, gone: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Score a model with some experts masked."""
    with mask_experts(model, gone):
        scores = score_domains(prepared, model, prepared.run.evaluate.split)
    return {
        "order": order,
        "ratio": ratio,
        "pruned": sum(map(len, gone.values())),
        "gone": {name: list(numbers) for name, numbers in gone.items()},
        "accuracy": {name: score.accuracy for name, score in scores.items()},
        "loss": {name: score.loss for name, score in scores.items()},
    }
