"""Typed contents of a record: the request, the outcome and the provenance of a run.

`upgrade` fills in what earlier versions did not write, so other code does not depend on the version of a record. Files
are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mode.config.method import Anchor
from mode.config.run import Evaluate
from mode.records.measurement import pick_fields
from mode.records.score import Score


@dataclass(frozen=True)
class Request:
    """The configuration of a run, in part. `Record.asked` holds all settings.

    Attributes:
        seed: The run's seed.
        targets: Domains that the run adapts to.
        backbone: Name of the backbone.
        method: Name of the method in records, in general the import path of a class.
        sequence_length: Tokens per row.
        examples: Number of different training rows; None for all.
        scoring: Precision of scoring.
        anchor: `share` and `weight` of the anchored rows; None if the method has no anchor.
    """

    seed: int
    targets: tuple[str, ...]
    backbone: str
    method: str
    sequence_length: int
    examples: int | None
    scoring: str
    anchor: Mapping[str, float] | None

    @property
    def method_name(self) -> str:
        """Last part of the method's name in records: the name of its class, in general."""
        return self.method.rpartition(".")[2]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: in total, trainable, and added to the backbone."""

    total: int
    trainable: int
    added: int


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run: tokens, floating-point operations, and active parameters, which a prediction can depend on."""

    tokens: int
    flops: float
    active: int


@dataclass(frozen=True)
class Gates:
    """Gate weights on the scored text of a domain.

    Attributes:
        mean: Mean weight of every branch, by block.
        entropy: Mean entropy of the weights in nats, by block; None if the record does not hold it.
        active: Mean number of branches in use per token, by block; None if the record does not hold it.
    """

    mean: Sequence[Sequence[float]]
    entropy: Sequence[float] | None
    active: Sequence[float] | None


@dataclass(frozen=True)
class Point:
    """A point of the training curve: a step, and values by name, such as `loss` and `validation/DOMAIN/accuracy`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. A value is None if nothing was trained, or if the record does not hold it.

    Attributes:
        steps: Number of training steps.
        tokens: Number of training tokens.
        seconds: Seconds of training.
        tokens_per_second: Ratio of `tokens` and `seconds`.
        lr: Peak learning rate.
        flops: Floating-point operations of training.
        forecast: Forecast from before training.
        parameters: Numbers of parameters.
        peak_memory_bytes: Peak memory of the process in bytes, including scoring.
        kept_bytes: Size on disk, in bytes, of the weights that the method keeps.
        evaluation_seconds: Seconds of scoring.
        split: Split that was scored.
        scores: Scores by domain.
        contamination: Share of the n-grams of a scored domain that occur in a training text, by domain and text.
        curve: The training curve.
        gates: Gate weights by scored domain; empty without gates.
        divergence: KL(backbone || model) on the validation text of each target, in nats per token; empty if the record
            does not hold it.
        branches: Names of the branches; empty without gates.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    lr: float | None
    flops: float | None
    forecast: Forecast | None
    parameters: Parameters
    peak_memory_bytes: int | None
    kept_bytes: int | None
    evaluation_seconds: float | None
    split: str
    scores: Mapping[str, Score]
    contamination: Mapping[str, Mapping[str, float | None]]
    curve: tuple[Point, ...]
    gates: Mapping[str, Gates]
    branches: tuple[str, ...]
    divergence: Mapping[str, float]


@dataclass(frozen=True)
class Provenance:
    """The provenance of a run.

    Attributes:
        data: Fingerprints of the data, by domain.
        backbone: Fingerprint of the backbone.
        precision: Precision of matrix products.
        pretraining_data: Fingerprints of the backbone's pretraining data, by domain; empty if unknown.
        needs: Ids of the run's earlier stages.
        commit: Commit of the code; None outside a clone.
        dirty: Whether the code differed from the commit.
        versions: Versions of Python and packages, by name.
        machine: Processor, cores, system and device.
        threads: Number of CPU threads of torch; None if the record does not hold it.
        date: Start of the run in UTC; None if the record does not hold it.
    """

    data: Mapping[str, str]
    backbone: str
    precision: str
    pretraining_data: Mapping[str, str]
    needs: tuple[str, ...]
    commit: str | None
    dirty: bool | None
    versions: Mapping[str, str | None]
    machine: Mapping[str, Any]
    threads: int | None
    date: str | None


OUTCOME: Mapping[str, Any] = {
    "tokens_per_second": None,
    "lr": None,
    "flops": None,
    "forecast": None,
    "peak_memory_bytes": None,
    "kept_bytes": None,
    "evaluation_seconds": None,
    "contamination": {},
    "gates": {},
    "divergence": {},
}
"""Defaults of outcome fields that earlier versions did not write."""


PROVENANCE: Mapping[str, Any] = {
    "pretraining_data": {},
    "commit": None,
    "dirty": None,
    "versions": {},
    "machine": {},
    "threads": None,
    "date": None,
}
"""Defaults of provenance fields that earlier versions did not write."""


def upgrade(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a record of any version with all fields that this version reads."""
    asked, happened = plain["asked"], {**OUTCOME, **plain["happened"]}
    train, anchor = {"examples": None} | asked["train"], asked["method"].get("anchor")
    evaluate = {"precision": Evaluate.precision} | asked["evaluate"]
    if anchor is not None:
        anchor = {name: anchor.get(name, getattr(Anchor, name)) for name in ("share", "weight")}
    gates = {name: {"entropy": None, "active": None} | dict(each) for name, each in (happened["gates"] or {}).items()}
    return {
        "asked": {**asked, "train": train, "evaluate": evaluate, "method": {**asked["method"], "anchor": anchor}},
        "happened": {
            **happened,
            "scores": {name: upgrade_score(score) for name, score in happened["scores"].items()},
            "gates": gates,
            "branches": happened.get("branches") or (name_branches(asked, gates) if gates else []),
            "contamination": happened["contamination"] or {},
        },
        "provenance": {**PROVENANCE, **plain["provenance"]},
    }


def upgrade_score(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a domain's score with all fields other than metrics."""
    return {"stderr": None, "tokens": sum(plain["document_tokens"]), "bytes": None} | dict(plain)


def name_branches(asked: Mapping[str, Any], gates: Mapping[str, Any]) -> list[str]:
    """Return names of branches for a record without names: the targets if MoDE composed their experts, else numbers."""
    count, method = len(next(iter(gates.values()))["mean"][0]), asked["method"]
    if "num_blocks" not in method:
        return [f"expert {number + 1}" for number in range(count)]
    composed = method.get("start") == "experts"
    return ["backbone", *(asked["targets"] if composed else [f"expert {number + 1}" for number in range(count - 1)])]


def read_request(asked: Mapping[str, Any]) -> Request:
    """Return the request of an upgraded record."""
    return Request(
        seed=int(asked["seed"]),
        targets=tuple(asked["targets"]),
        backbone=asked["backbone"]["name"],
        method=asked["method"]["_target_"],
        sequence_length=asked["train"]["sequence_length"],
        examples=asked["train"]["examples"],
        scoring=asked["evaluate"]["precision"],
        anchor=asked["method"]["anchor"],
    )


def read_outcome(happened: Mapping[str, Any]) -> Outcome:
    """Return the outcome of an upgraded record."""
    forecast = happened["forecast"]
    read = {
        "forecast": None if forecast is None else pick_fields(Forecast, forecast),
        "parameters": pick_fields(Parameters, happened["parameters"]),
        "scores": {name: Score.from_plain(score) for name, score in happened["scores"].items()},
        "curve": tuple(
            pick_fields(Point, {"step": point["step"], "values": {key: point[key] for key in point if key != "step"}})
            for point in happened["curve"]
        ),
        "gates": {name: pick_fields(Gates, gates) for name, gates in happened["gates"].items()},
        "branches": tuple(happened["branches"]),
    }
    return pick_fields(Outcome, {**happened, **read})


def read_provenance(provenance: Mapping[str, Any]) -> Provenance:
    """Return the provenance of an upgraded record."""
    return pick_fields(Provenance, {**provenance, "needs": tuple(provenance["needs"])})
