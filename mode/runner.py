"""Execute a run: data, backbone, method, training, evaluation, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mode import config, identity
from mode.backbone import load_model
from mode.checked import ConfigError
from mode.data.batches import Batches, Stream
from mode.data.contamination import contamination
from mode.data.pack import Packed, Tokens, prepare
from mode.files import AGAIN, CHECKPOINT, CURVE, SETTINGS, WEIGHTS, write_atomic
from mode.lock import only_one
from mode.method import Adaptation, Material, Method, Probe
from mode.record import SCHEMA, Record, find_record, provenance, read_record, write_record
from mode.settings import SELF, Run
from mode.track import Tracker, make_tracker

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mode.evaluate import Score
    from mode.train import Hold, Point, Trained


@dataclass(frozen=True)
class Prepared:
    """A run with its data at hand and its identity known.

    Attributes:
        run: Configuration.
        method: The run's method.
        packed: Prepared domains.
        backbone: Fingerprint of the weights that the run starts from.
        asked: What identifies the run, but for data and weights.
        id: Identity of the run.
    """

    run: Run
    method: Method
    packed: Mapping[str, Packed]
    backbone: str
    asked: dict[str, Any]
    id: str

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of every domain's data."""
        return {name: packed.fingerprint for name, packed in self.packed.items()}

    @property
    def folder(self) -> Path:
        """Work folder: checkpoint, curve, weights."""
        return Path(self.run.paths.runs).expanduser() / self.id

    @property
    def results(self) -> Path:
        """Folder of records and tables."""
        return Path(self.run.paths.results).expanduser()


Observer = Callable[[Prepared, "Point"], None]
_prepared: dict[str, Packed] = {}
"""Domains prepared by this process, so that planning many runs reads each domain's sources once."""


def prepare_run(run: Run) -> Prepared:
    """Prepare a run's data (from the cache after the first time) and work out its identity; needs no torch."""
    method = run.method
    if not isinstance(method, Method):
        raise ConfigError(f"method._target_={type(method).__qualname__}: does not say how to build a model")
    tokenizer = method.tokenizer(run)
    cache = Path(run.paths.cache).expanduser()
    packed = {}
    for name in run.scored:
        domain = run.domains[name]
        key = f"{name} {domain} {tokenizer.fingerprint} {cache}"
        packed[name] = _prepared[key] = _prepared.get(key) or prepare(name, domain, tokenizer, cache)
    asked = identity.asked(run)
    asked["backbone"] = {"name": run.backbone.name}
    if artefacts := method.artefacts(run):
        asked["artefacts"] = artefacts
    backbone = method.backbone_fingerprint(run)
    fingerprints = {name: data.fingerprint for name, data in packed.items()} | {"backbone": backbone}
    return Prepared(run, method, packed, backbone, asked, identity.digest(asked, fingerprints))


def finished(prepared: Prepared) -> Record | None:
    """Return the record of a run, if it has one: then it is finished, although its weights may be elsewhere."""
    return find_record(prepared.results, prepared.id)


def has_weights(prepared: Prepared) -> bool:
    """Say whether the trained weights of a run are here."""
    return (prepared.folder / WEIGHTS).exists()


def execute(
    run: Run, *, again: bool = False, weights: bool = False, observe: Observer = lambda prepared, point: None
) -> Record:
    """Execute a run and the runs it stands on, skipping what is done.

    Args:
        run: Configuration.
        again: Train anew although there is a record.
        weights: Train also when there is a record but its weights are not here.
        observe: Called with every point of a training curve.

    Returns:
        The record, which is also written to the results folder.

    Raises:
        ConfigError: Something in the configuration, the data or an artefact is wrong.
    """
    prepared = prepare_run(run)

    def done() -> Record | None:
        record = finished(prepared)
        return record if record is not None and not again and (has_weights(prepared) or not weights) else None

    # Only those who train take the lock, so runs that stand on the same finished one never meet at it.
    if (record := done()) is not None:
        return record
    with only_one(prepared.folder):
        if (record := done()) is not None:
            return record
        if again:
            start_over(prepared.folder)
        needs = []
        for stage in prepared.method.needs(run):
            execute(stage, weights=True, observe=observe)
            needs.append(prepare_run(stage))
        return work(prepared, needs, observe, again=again)


def start_over(folder: Path) -> None:
    """Forget what was trained before, once: a run that is started over and interrupted goes on where it stopped."""
    marker = folder / AGAIN
    if not marker.exists():
        for name in (CHECKPOINT, CURVE, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        marker.touch()


def work(prepared: Prepared, needs: list[Prepared], observe: Observer, *, again: bool) -> Record:
    """Train, evaluate and record one run whose needs are met."""
    from mode.checkpoint import trainable
    from mode.device import device_name, peak_memory, set_up
    from mode.evaluate import check_finite
    from mode.forecast import count, forecast
    from mode.train import precision_of

    run, device = prepared.run, set_up(prepared.run)
    sky = provenance(
        run,
        data=prepared.fingerprints,
        backbone=prepared.backbone,
        pretraining=prepared.method.pretraining_data(run),
        needs=[stage.id for stage in needs],
        device=device_name(device),
        precision=precision_of(run.train, device),
    )
    model = build(prepared, needs).to(device)
    check_context(model, run)
    write_atomic(prepared.folder / SETTINGS, config.to_yaml(run).encode())
    # The count comes before training, so that a model that it cannot cope with costs nothing.
    sizes, expected, taken = parameters(prepared, model), forecast(run), count(run, model)
    tracker = track(prepared)
    try:
        trained = fit(prepared, model, tracker, observe)
        begin = time.monotonic()
        with prepared.method.probed(model) as probe:
            scores = score(prepared, model, run.evaluate.split, probe=probe)
        check_finite(scores)
    except BaseException as error:  # an interrupt too: the tracker must not stay open for this process's next run
        tracker.abandon()
        if type(error).__name__ == "OutOfMemoryError":
            raise ConfigError("out of memory: raise train.accumulate, or lower train.batch_size") from error
        raise
    tracker.finish({f"{run.evaluate.split}/{name}/accuracy": value.accuracy for name, value in scores.items()})
    seconds = round(time.monotonic() - begin, 2)
    happened = told(prepared, trained, scores) | {
        "flops": trained.tokens * taken,
        "forecast": None if expected is None else asdict(expected),
        "evaluation_seconds": seconds,
        "parameters": sizes,
        "peak_memory_bytes": peak_memory(device),
    }
    if probe is not None:
        happened["gates"] = probe.result()
    if trainable(model):
        save(prepared, model, happened)
        happened["kept_bytes"] = prepared.method.kept(prepared.folder).stat().st_size
    return settle(prepared, Record(SCHEMA, prepared.id, prepared.asked, happened, sky), again=again)


def told(prepared: Prepared, trained: Trained, scores: Mapping[str, Score]) -> dict[str, Any]:
    """Return what a record says of a run's training and scores."""
    run, known = prepared.run, prepared.method.pretraining_data(prepared.run)
    return {
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 2),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1) if trained.seconds else None,
        "lr": run.lr if trained.steps else None,
        "split": run.evaluate.split,
        "scores": {name: asdict(value) for name, value in scores.items()},
        "contamination": contamination(prepared.packed, run.evaluate.split, known),
        "curve": list(trained.curve),
    }


def check_context(model: nn.Module, run: Run) -> None:
    """Refuse rows longer than the backbone is made for."""
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and run.train.sequence_length > longest:
        raise ConfigError(
            f"train.sequence_length={run.train.sequence_length}: {run.backbone.name} reads {longest} at most"
        )


def settle(prepared: Prepared, record: Record, *, again: bool) -> Record:
    """Write a finished run's record and let its checkpoint go, in this order.

    A run killed before its record stands goes on from its last checkpoint, with nothing left to train. A record is
    never edited: one that stands already, of a run trained anew for its weights, stays as it is.
    """
    standing = None if again else finished(prepared)
    if standing is not None:
        (prepared.folder / CHECKPOINT).unlink(missing_ok=True)
        return standing
    path = write_record(record, prepared.results / "records")
    for name in (CHECKPOINT, AGAIN):
        (prepared.folder / name).unlink(missing_ok=True)
    return read_record(path)


def build(prepared: Prepared, needs: list[Prepared]) -> nn.Module:
    """Build a run's model from its backbone and the runs it stands on."""
    backbone = prepared.run.backbone
    material = Material(
        backbone=lambda: load_model(backbone),
        needs=tuple(stage.folder for stage in needs),
        source=asdict(backbone) | {"fingerprint": prepared.backbone},
    )
    return prepared.method.build(prepared.run, material)


def restore(prepared: Prepared) -> nn.Module:
    """Return a finished run's model: built as for training, then given its trained weights.

    Raises:
        ConfigError: The weights are not here, or do not fit.
    """
    from mode.checkpoint import load_tensors, trainable

    needs = [prepare_run(stage) for stage in prepared.method.needs(prepared.run)]
    model = build(prepared, needs)
    parameters = trainable(model)
    if parameters:
        tensors, _ = load_tensors(prepared.folder / WEIGHTS)
        if set(tensors) != set(parameters):
            raise ConfigError(f"{prepared.folder / WEIGHTS}: not the weights of this run's model")
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
    return model


def parameters(prepared: Prepared, model: nn.Module) -> dict[str, int]:
    """Count a model's parameters: in all, training, and added to the backbone."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trains, "added": total - prepared.method.backbone_size(prepared.run)}


def track(prepared: Prepared) -> Tracker:
    """Open the tracker of a run."""
    run, name = prepared.run, type(prepared.method).__name__
    return make_tracker(
        run.track,
        run_id=prepared.id,
        name=f"{run.track.name or name}-{'-'.join(run.targets)}-s{run.seed}",
        job_type=name,
        config=prepared.asked,
        folder=prepared.folder,
    )


def fit(prepared: Prepared, model: nn.Module, tracker: Tracker, observe: Observer) -> Trained:
    """Train a model by the one loop, if its method trains at all."""
    from mode.evaluate import headline
    from mode.train import Job, Trained, train

    run, method = prepared.run, prepared.method
    steps = method.steps(run)
    if steps == 0:
        return Trained(steps=0, tokens=0, seconds=0.0, curve=())
    mixture = method.mixture(run)
    device = next(model.parameters()).device
    batches = Batches(
        [Stream(name, tokens(prepared, name, device), count) for name, count in mixture.items()],
        seed=run.seed,
        batch_size=run.train.batch_size,
        sequence_length=run.train.sequence_length,
        order=method.order(run),
        examples=run.train.examples,
    )

    def observed(point: Point) -> None:
        observe(prepared, point)
        tracker.log({name: value for name, value in point.items() if name != "step"}, step=point["step"])

    job = Job(
        settings=run.train,
        steps=steps,
        lr=run.lr,
        folder=prepared.folder,
        validate=lambda: headline(score(prepared, model, "validation", tuple(set(mixture) - {SELF}))),
        observe=observed,
        inspect=method.inspect,
        lr_scales=method.lr_scales(),
        hold=hold(prepared, model, batches),
    )
    return train(model, batches, job)


def tokens(prepared: Prepared, name: str, device: torch.device) -> Tokens:
    """Return the tokens that one source of a mix trains on: a domain's, or those sampled from the backbone."""
    run, method = prepared.run, prepared.method
    if name in prepared.packed:
        return prepared.packed[name].split(method.split).tokens
    from mode.anchor import sampled

    cache = Path(run.paths.cache).expanduser()
    anchor = method.anchor  # type: ignore[attr-defined]  # else the mix had no such source
    return sampled(anchor, run.backbone, prepared.backbone, run.train.sequence_length, cache, device)


def hold(prepared: Prepared, model: nn.Module, batches: Batches) -> Hold | None:
    """Return how a model is held to its backbone, if its method asks for it."""
    from mode.train import Hold

    method, run = prepared.method, prepared.run
    if not isinstance(method, Adaptation) or method.anchor.source == "none":
        return None
    source = method.anchor.source
    return Hold(
        weight=method.anchor.weight,
        held=lambda step: np.array([name == source for name in batches.domains(step)]),
        reference=method.reference(model, lambda: load_model(run.backbone)),
    )


def score(
    prepared: Prepared, model: nn.Module, split: Any, names: tuple[str, ...] = (), probe: Probe | None = None
) -> dict[str, Score]:
    """Score a model on a split of the run's domains."""
    from mode.evaluate import evaluate

    run = prepared.run
    scores = {}
    for name in names or run.scored:
        scores[name] = evaluate(
            model,
            prepared.packed[name].split(split),
            sequence_length=run.train.sequence_length,
            batch_size=run.evaluate.batch_size,
            chunk=run.evaluate.chunk,
            probe=(lambda count: None) if probe is None else partial(probe.add, name),
        )
    return scores


def save(prepared: Prepared, model: nn.Module, happened: Mapping[str, Any]) -> None:
    """Write the trained weights and what the method keeps."""
    from mode.checkpoint import save_tensors, trainable

    run = prepared.run
    about = {
        "backbone": run.backbone.name,
        "backbone_fingerprint": prepared.backbone,
        "run": prepared.id,
        "seed": run.seed,
        "steps": happened["steps"],
        "tokens": happened["tokens"],
        "data": prepared.fingerprints,
    }
    prepared.method.save(model, run, prepared.folder, about)
    save_tensors(prepared.folder / WEIGHTS, trainable(model), {"run": prepared.id})
