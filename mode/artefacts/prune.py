"""Take experts out of a finished mixture, the least needed first, and score what is left.

By `change`, a layer's experts go in the order of how much the norm of their row of the router grew in training, the
smallest first (Chowdhury et al., 2024); by `norm`, in that of the norm it has; by `usage`, in that of their mean weight
on the validation split of the targets; by `random`, in a random one. Of MoDE the rows of the gates count, and the
backbone stays.

A pruned expert of a mixture says nothing, and what the others weigh stays as it was, as published. What a MoDE gate
gave to a pruned expert goes to the branches that are left: a block's output is a mean of branches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from mode.core.device import describe_device, set_up
from mode.core.errors import ConfigError
from mode.gating.gate import Gate
from mode.gating.meter import GateMeter, find_gates, watch_gates
from mode.ops.quantize import quantize_frozen
from mode.records import command
from mode.records.collection import Collection
from mode.records.measurement import Measurement, pick_fields
from mode.records.metrics import ACCURACY
from mode.records.provenance import describe_environment
from mode.runs.execute import build, restore
from mode.runs.fit import score_domains
from mode.runs.prepare import Prepared, find_finished, prepare_run

if TYPE_CHECKING:
    from pathlib import Path

    from mode.config.run import Run
    from mode.records.record import Record

SCHEMA = 1


def measure_usage(prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every branch on validation text, summed over the targets' means, by the path of its gate."""
    names = list(find_gates(model))
    with watch_gates(model) as latest:
        meter = GateMeter(latest)
        score_domains(prepared, model, "validation", prepared.run.targets, probe=meter)
    totals: dict[str, Tensor] = {}
    for told in meter.result().values():
        for name, mean in zip(names, told["mean"], strict=True):
            totals[name] = totals.get(name, 0.0) + torch.tensor(mean)
    return totals


ORDERS = ("change", "norm", "usage", "random")
"""Orders in which experts go."""


INTRODUCTION = (
    "Next-token top-1 accuracy in per cent after a share of every layer's experts, the least needed by an order, has "
    "been taken out of a finished run, without training on. Change: growth of the norm of the expert's row of the "
    "router; norm: the norm; usage: mean weight on validation text of the targets; random: by a seed. Of MoDE the "
    "backbone stays. Variant: what of the method is not as its configuration has it."
)


@dataclass(frozen=True)
class Case:
    """What is left without some experts: their order and share, and the accuracy by domain."""

    order: str
    ratio: float
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class PruningResult(Measurement):
    """What is left of a run without some of its experts.

    `asked` has the run, what of its method is not as configured, orders, ratios and split, `happened` the cases (order,
    ratio, experts that went and their number, accuracy by domain), the whole model's first.
    """

    @property
    def filename(self) -> str:
        """Name of its file."""
        return f"{self.run_name}-{self.id}.json"

    @property
    def run(self) -> str:
        """Id of the run."""
        return str(self.asked["run"])

    @property
    def run_name(self) -> str:
        """Name of the run, for people."""
        return str(self.asked["run_name"])

    @property
    def method(self) -> str:
        """Name of the run's method."""
        return str(self.asked["method"])

    @property
    def variant(self) -> str:
        """What of the method is not as configured; empty in results of earlier versions."""
        return str(self.asked.get("variant", ""))

    @property
    def cases(self) -> list[Case]:
        """The cases, the whole model first."""
        return [pick_fields(Case, case) for case in self.happened["cases"]]


def prune(
    run: Run,
    ratios: Sequence[float],
    orders: Sequence[str],
    results: Path,
    done: Callable[[str], None],
    extra: Path | None = None,
) -> tuple[PruningResult, Path]:
    """Prune a finished run by every order and ratio, score what is left, and write what was measured, atomically.

    Args:
        run: The run.
        ratios: Shares of a layer's experts that go, from 0 to 1.
        orders: Orders in which they go.
        results: Folder of results.
        done: Called with every case that is scored.
        extra: A folder of the user's own configuration.

    Raises:
        ConfigError: The run is not finished or has no experts that a router weighs, or its weights are not here.
    """
    prepared = prepare_run(run)
    record = find_finished(prepared)
    if record is None:
        raise ConfigError(f"run {prepared.id} is not finished: no record in {prepared.results / 'records'}")
    folder = results / COLLECTION.name
    folder.mkdir(parents=True, exist_ok=True)  # now, so that a place where nothing can be written costs no time
    device = set_up(run.train.threads, run.train.device)
    seen = {"data": prepared.fingerprints, "backbone": prepared.backbone}
    seen |= describe_environment(describe_device(device), run.train.threads)
    model = restore(prepared).eval()
    quantize_frozen(model, run.train.memory.frozen_weights)
    model = model.to(device)
    gates = find_weighing(model)
    if not gates:
        raise ConfigError(f"run {prepared.id}: {type(run.method).__name__} has no experts that a router weighs")
    variant = describe_variant(record, extra)
    cases = [score_case(prepared, model, "", 0.0, {})]
    for order in orders:
        needs = rank_experts(order, prepared, model)
        for ratio in ratios:
            cases.append(
                score_case(prepared, model, order, ratio, {name: choose_least(needs[name], ratio) for name in gates})
            )
            done(f"{order}, {ratio:g} pruned")
    asked = describe_pruning(record, run, ratios, orders)
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    asked["variant"] = variant  # a name for people: no part of the identity
    found = PruningResult(SCHEMA, identity, asked, {"cases": cases}, seen)
    return found, found.write(folder)


def describe_variant(record: Record, extra: Path | None) -> str:
    """Return what of a record's method is not as configured; nothing where no method of its class is configured."""
    try:
        return command.write_variant(record, extra)
    except ConfigError:
        return ""


def describe_pruning(record: Record, run: Run, ratios: Sequence[float], orders: Sequence[str]) -> dict[str, Any]:
    """Return what identifies a measurement."""
    return {
        "run": record.id,
        "run_name": record.filename.removesuffix(f"-{record.id}.json"),
        "method": type(run.method).__name__,
        "backbone": run.backbone.name,
        "split": run.evaluate.split,
        "orders": list(orders),
        "ratios": list(ratios),
    }


def find_weighing(model: nn.Module) -> dict[str, nn.Module]:
    """Return the gates and routers of a model that have a row of weights for every expert, by their paths."""
    return {name: gate for name, gate in find_gates(model).items() if isinstance(getattr(gate, "weight", None), Tensor)}


def rank_experts(order: str, prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    """Return how much each expert is needed, by an order: for every gate (N,), more for those that stay longer."""
    gates = find_weighing(model)
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
    before = find_weighing(build(prepared, stages))
    return {name: norms[name].cpu() - drop_backbone(gate, compute_row_norms(gate)) for name, gate in before.items()}


def compute_row_norms(gate: nn.Module) -> Tensor:
    """Return the norm of a gate's row of every branch."""
    weight: Any = gate.weight
    norms: Tensor = weight.detach().norm(dim=1)
    return norms


def drop_backbone(gate: nn.Module, values: Tensor) -> Tensor:
    """Return values of branches without that of the backbone, which is the first of a MoDE gate's."""
    return values[1:] if isinstance(gate, Gate) else values


def choose_least(needs: Tensor, ratio: float) -> list[int]:
    """Return the experts that go: so large a share of them, rounded, those that are needed least.

    >>> choose_least(torch.tensor([0.3, -0.2, 0.9, 0.1]), 0.5)
    [1, 3]
    """
    return [int(index) for index in needs.argsort(stable=True)[: round(ratio * len(needs))]]


@contextmanager
def mask_experts(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Let a model do without some experts for a while; tokens that chose those alone have the backbone.

    Args:
        model: The model.
        gone: Numbers of the experts that go, by the path of their gate.
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
        gate.register_forward_hook(hook(gone[name])) for name, gate in find_weighing(model).items() if gone.get(name)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def score_case(
    prepared: Prepared, model: nn.Module, order: str, ratio: float, gone: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Score what is left without some experts."""
    with mask_experts(model, gone):
        scores = score_domains(prepared, model, prepared.run.evaluate.split)
    return {
        "order": order,
        "ratio": ratio,
        "pruned": sum(map(len, gone.values())),
        "gone": {name: list(numbers) for name, numbers in gone.items()},
        "accuracy": {name: found.accuracy for name, found in scores.items()},
        "loss": {name: found.loss for name, found in scores.items()},
    }


def make_frame(found: Sequence[PruningResult]) -> pd.DataFrame:
    """Return measurements as a table of texts: a row for every run, order and share."""
    rows = [
        {
            "Method": each.method,
            "Variant": each.variant or "–",
            "Run": f"{each.run_name}-{each.run}",
            "Order": one.order or "–",
            "Pruned": f"{100 * one.ratio:.0f} %",
            **{name.capitalize(): ACCURACY.format(value) for name, value in one.accuracy.items()},
        }
        for each in sorted(found, key=lambda each: each.filename)
        for one in each.cases
    ]
    return pd.DataFrame(rows).fillna("–")


def render_pruned(found: Sequence[PruningResult]) -> dict[str, str]:
    """Render measurements in Markdown and as CSV."""
    table = make_frame(found)
    markdown = str(table.to_markdown(index=False, disable_numparse=True))
    return {"md": f"# Pruning\n\n{INTRODUCTION}\n\n{markdown}\n", "csv": str(table.to_csv(index=False))}


COLLECTION = Collection("pruning", "pruned run", PruningResult, SCHEMA, "mode prune RUN", render_pruned)
"""The folder of pruned runs in a folder of results, and the report beside it."""
