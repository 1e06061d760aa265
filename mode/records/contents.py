"""What a record holds, by name: the request, the outcome and the provenance of a run.

`upgrade` fills what earlier versions did not write, so that no reader asks which version wrote a record. Files keep the
content that they were written with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mode.config.method import Anchor
from mode.records.measurement import pick_fields
from mode.records.score import Score


@dataclass(frozen=True)
class Request:
    """What a run was asked for. `Record.asked` holds every setting.

    Attributes:
        seed: The run's seed.
        targets: Domains that the run adapts to.
        backbone: Name of the backbone.
        method: Name of the method in records, a path of a class.
        sequence_length: Tokens per row.
        examples: Different rows that the run trains on; None for all.
        anchor: Share and weight of the rows on which the model is anchored to its backbone; None where the method has
            no such term.
    """

    seed: int
    targets: tuple[str, ...]
    backbone: str
    method: str
    sequence_length: int
    examples: int | None
    anchor: Mapping[str, float] | None

    @property
    def method_name(self) -> str:
        """Name of the method's class."""
        return self.method.rpartition(".")[2]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of the model, of those trained, and of those added to the backbone."""

    total: int
    trainable: int
    added: int


@dataclass(frozen=True)
class Forecast:
    """What was forecast of a run: tokens, operations, and parameters that a token's prediction can depend on."""

    tokens: int
    flops: float
    active: int


@dataclass(frozen=True)
class Gates:
    """Gates on the scored text of a domain.

    Attributes:
        mean: By block, the mean weight of every branch.
        entropy: By block, the mean entropy of the weights; None in records that do not hold it.
        active: By block, the mean number of branches in use; None in records that do not hold it.
    """

    mean: Sequence[Sequence[float]]
    entropy: Sequence[float] | None
    active: Sequence[float] | None


@dataclass(frozen=True)
class Point:
    """A point of the training curve: a step, and numbers by name, such as `loss` and `validation/DOMAIN/accuracy`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What happened in a run. None stands where nothing was trained, or where a record does not hold a number.

    Attributes:
        steps: Steps trained.
        tokens: Tokens trained on.
        seconds: Seconds of training.
        tokens_per_second: Their ratio.
        lr: Peak learning rate.
        flops: Operations of training.
        forecast: What was forecast before training.
        parameters: Numbers of parameters.
        peak_memory_bytes: Peak memory of the process, with scoring.
        kept_bytes: Size on disk of the weights that the method keeps.
        evaluation_seconds: Seconds of scoring.
        split: The split scored.
        scores: Scores by domain.
        contamination: By domain scored, the share of its n-grams by where in training they occur.
        curve: The training curve.
        gates: Gates by domain scored; empty without gates.
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


@dataclass(frozen=True)
class Provenance:
    """Under what conditions a run was made.

    Attributes:
        data: Fingerprints of the data, by domain.
        backbone: Fingerprint of the backbone.
        precision: Precision of the products of matrices.
        pretraining_data: Fingerprints of the data that the backbone is known to have been pretrained on.
        needs: Ids of the runs that the run stands on.
        commit: Commit of the code; None outside a clone.
        dirty: Whether the code differed from the commit.
        versions: Versions of Python and packages.
        machine: Processor, cores, system and device.
        threads: Threads of the processor; None where a record does not hold the number.
        date: When the run began; None where a record does not hold the date.
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
}
"""What earlier versions did not write of what happened."""


PROVENANCE: Mapping[str, Any] = {
    "pretraining_data": {},
    "commit": None,
    "dirty": None,
    "versions": {},
    "machine": {},
    "threads": None,
    "date": None,
}
"""What earlier versions did not write of the provenance."""


def upgrade(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with everything that this version reads, from one of any version."""
    asked, happened = plain["asked"], {**OUTCOME, **plain["happened"]}
    train, anchor = {"examples": None} | asked["train"], asked["method"].get("anchor")
    if anchor is not None:
        anchor = {name: anchor.get(name, getattr(Anchor, name)) for name in ("share", "weight")}
    gates = {name: {"entropy": None, "active": None} | dict(each) for name, each in (happened["gates"] or {}).items()}
    return {
        "asked": {**asked, "train": train, "method": {**asked["method"], "anchor": anchor}},
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
    """Return a domain's score with everything that is no metric."""
    return {"stderr": None, "tokens": sum(plain["document_tokens"]), "bytes": None} | dict(plain)


def name_branches(asked: Mapping[str, Any], gates: Mapping[str, Any]) -> list[str]:
    """Name the branches where a record does not: by targets where MoDE composed their experts, else by number."""
    count, method = len(next(iter(gates.values()))["mean"][0]), asked["method"]
    if "num_blocks" not in method:
        return [f"expert {number + 1}" for number in range(count)]
    composed = method.get("start") == "experts"
    return ["backbone", *(asked["targets"] if composed else [f"expert {number + 1}" for number in range(count - 1)])]


def read_request(asked: Mapping[str, Any]) -> Request:
    """Read what an upgraded record asked for."""
    return Request(
        seed=int(asked["seed"]),
        targets=tuple(asked["targets"]),
        backbone=asked["backbone"]["name"],
        method=asked["method"]["_target_"],
        sequence_length=asked["train"]["sequence_length"],
        examples=asked["train"]["examples"],
        anchor=asked["method"]["anchor"],
    )


def read_outcome(happened: Mapping[str, Any]) -> Outcome:
    """Read what happened in an upgraded record's run."""
    forecast = happened["forecast"]
    read = {
        "forecast": None if forecast is None else pick_fields(Forecast, forecast),
        "parameters": pick_fields(Parameters, happened["parameters"]),
        "scores": {name: Score.from_plain(score) for name, score in happened["scores"].items()},
        "curve": tuple(
            Point(point["step"], {name: value for name, value in point.items() if name != "step"})
            for point in happened["curve"]
        ),
        "gates": {name: pick_fields(Gates, gates) for name, gates in happened["gates"].items()},
        "branches": tuple(happened["branches"]),
    }
    return pick_fields(Outcome, {**happened, **read})


def read_provenance(provenance: Mapping[str, Any]) -> Provenance:
    """Read the provenance of an upgraded record."""
    return pick_fields(Provenance, {**provenance, "needs": tuple(provenance["needs"])})
