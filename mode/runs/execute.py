"""Execute a run: data, backbone, method, training, evaluation, record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from mode.config.check import to_yaml
from mode.core import processes
from mode.distributed import mpmd
from mode.backbone.load import load_model
from mode.core.errors import ConfigError
from mode.data.contamination import measure_contamination
from mode.core.files import AGAIN, CURVE, SETTINGS, WEIGHTS, list_checkpoints, remove, write_atomic
from mode.core.files import lock_folder
from mode.methods.base import Material
from mode.runs.prepare import Prepared, find_finished, has_weights, prepare_run
from mode.records.record import SCHEMA, Record
from mode.records.provenance import describe_provenance
from mode.config.run import Run
from mode.runs.fit import Observer, fit, fingerprint_self_sampled, score_domains
from mode.runs.tracking import NoTracker, Tracker, make_tracker

if TYPE_CHECKING:
    from pathlib import Path
    from torch import nn
    from mode.records.score import Score
    from mode.train.loop import Trained

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
    with processes.main_first():
        prepared = prepare_run(run)

    def done() -> Record | None:
        record = find_finished(prepared)
        there = record is not None and not again and (has_weights(prepared) or not weights)
        return list_standing(prepared) if processes.broadcast_decision(there) else None

    # Only those who train take the lock, so runs that stand on the same finished one never meet at it.
    if (record := done()) is not None:
        return record
    with lock_folder(prepared.folder) if processes.is_main() else nullcontext():
        if (record := done()) is not None:
            return record
        if again:
            with processes.main_first():  # others must not go on from what is to be forgotten
                start_over(prepared.folder)
        needs = []
        check_spread(prepared)
        for stage in prepared.method.needs(run):
            execute(stage, weights=True, observe=observe)
            needs.append(prepare_run(stage))
        return train_and_record(prepared, needs, observe, again=again)


def check_spread(prepared: Prepared) -> None:
    """Refuse a layout that cannot be, before anything is loaded and before the stages that a run stands on train."""
    from mode.distributed.choose import check_processes

    settings, branches = prepared.run.train, prepared.method.branches(prepared.run)
    check_processes(settings)
    if settings.placement is not None and branches:  # without branches a model is refused as such
        mpmd.check_placement(settings.placement, len(branches))


def list_standing(prepared: Prepared) -> Record:
    """Return the record of a run that has one.

    Raises:
        ConfigError: It is not here: processes on several machines have different folders of results.
    """
    record = find_finished(prepared)
    if record is None:
        raise ConfigError(f"{prepared.results}: another folder than that of the first process; paths.* must be shared")
    return record


def start_over(folder: Path) -> None:
    """Forget what was trained before, once: a run that is started over and interrupted goes on where it stopped."""
    marker = folder / AGAIN
    if processes.is_main() and not marker.exists():
        remove(*list_checkpoints(folder), folder / CURVE, folder / WEIGHTS)
        marker.touch()


def train_and_record(prepared: Prepared, needs: list[Prepared], observe: Observer, *, again: bool) -> Record:
    """Train, evaluate and record one run whose needs are met."""
    from mode.core.device import describe_device, read_peak_memory, set_up
    from mode.evaluation.next_token import flatten_scores
    from mode.runs.forecast import count_flops, forecast
    from mode.train.precision import choose_precision
    from mode.ops.quantize import quantize_frozen

    run = prepared.run
    device = set_up(run.train.threads, run.train.device)
    model = build(prepared, needs)
    check_context(model, run)
    sizes = count_model_parameters(prepared, model)
    quantize_frozen(model, run.train.frozen_weights)  # here, so that a device need not hold more
    model = model.to(device)
    conditions = describe_provenance(
        run,
        data=prepared.fingerprints,
        backbone=prepared.backbone,
        pretraining=prepared.method.pretraining_data(run),
        needs=[stage.id for stage in needs],
        device=describe_device(device),
        precision=choose_precision(run.train, model),
    )
    if processes.is_main():
        write_atomic(prepared.folder / SETTINGS, to_yaml(run).encode())
    # The count comes before training, so that a model that it cannot cope with costs nothing.
    expected, taken = forecast(run), count_flops(run, model)
    tracker = track_record(prepared)
    try:
        trained = fit(prepared, model, tracker, observe, taken)
        scores, scoring = evaluate_finished(prepared, model)
    except BaseException as error:  # an interrupt too: the tracker must not stay open for this process's next run
        tracker.abandon()
        if type(error).__name__ == "OutOfMemoryError":
            raise ConfigError("out of memory: raise train.accumulate, or lower train.batch_size") from error
        raise
    tracker.finish(flatten_scores(scores, run.evaluate.split))
    happened = summarise_training(prepared, trained, scores, fingerprint_self_sampled(prepared, device)) | {
        "flops": trained.tokens * taken,
        "forecast": None if expected is None else asdict(expected),
        "parameters": sizes,
        "peak_memory_bytes": read_peak_memory(device),
        **scoring,
    }
    if processes.is_main():
        keep_weights(prepared, model, Record(SCHEMA, prepared.id, prepared.asked, happened, conditions), again=again)
    processes.wait()
    return list_standing(prepared)


def evaluate_finished(prepared: Prepared, model: nn.Module) -> tuple[dict[str, Score], dict[str, Any]]:
    """Score a finished model; return what a record says of that, beside the scores: its time, and what gates did."""
    from mode.evaluation.next_token import check_finite

    begin = time.monotonic()
    with prepared.method.probed(model) as probe:
        scores = score_domains(prepared, model, prepared.run.evaluate.split, probe=probe)
    check_finite(scores)
    about: dict[str, Any] = {"evaluation_seconds": round(time.monotonic() - begin, 2)}
    if probe is not None:
        about |= {"gates": probe.result(), "branches": prepared.method.branches(prepared.run)}
    return scores, about


def summarise_training(prepared: Prepared, trained: Trained, scores: Mapping[str, Score], own_rows: str | None) -> dict[str, Any]:
    """Return what a record says of a run's training and scores."""
    run, known = prepared.run, prepared.method.pretraining_data(prepared.run)
    return {
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 2),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1) if trained.seconds else None,
        "lr": run.lr if trained.steps else None,
        "split": run.evaluate.split,
        "scores": {name: value.to_plain() for name, value in scores.items()},
        "contamination": measure_contamination(prepared.packed, run.evaluate.split, known),
        "curve": list(trained.curve),
        **({} if own_rows is None else {"own_rows": own_rows}),
    }


def check_context(model: nn.Module, run: Run) -> None:
    """Refuse rows longer than the backbone is made for."""
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and run.train.sequence_length > longest:
        raise ConfigError(
            f"train.sequence_length={run.train.sequence_length}: {run.backbone.name} reads {longest} at most"
        )


def keep_weights(prepared: Prepared, model: nn.Module, record: Record, *, again: bool) -> None:
    """Write a finished run's weights and its record, and let its checkpoint go, in this order.

    A run killed before its record stands goes on from its last checkpoint, with nothing left to train. A record is
    never edited: one that stands already, of a run trained anew for its weights, stays as it is.
    """
    from mode.core.tensors import trainable_parameters

    if trainable_parameters(model):
        save(prepared, model, record.happened)
        record.happened["kept_bytes"] = prepared.method.kept(prepared.folder).stat().st_size
    if again or find_finished(prepared) is None:
        record.write(prepared.results / "records")
    remove(*list_checkpoints(prepared.folder), prepared.folder / AGAIN)


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

    What is frozen is in full, also where it was scored in eight bits (`mode.ops.quantize`).

    Raises:
        ConfigError: The weights are not here, or do not fit.
    """
    from mode.core.tensors import load_tensors, trainable_parameters

    needs = [prepare_run(stage) for stage in prepared.method.needs(prepared.run)]
    model = build(prepared, needs)
    parameters = trainable_parameters(model)
    if parameters:
        tensors, _ = load_tensors(prepared.folder / WEIGHTS)
        if set(tensors) != set(parameters):
            raise ConfigError(f"{prepared.folder / WEIGHTS}: not the weights of this run's model")
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
    return model


def count_model_parameters(prepared: Prepared, model: nn.Module) -> dict[str, int]:
    """Count a model's parameters: in all, training, and added to the backbone."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trains, "added": total - prepared.method.backbone_size(prepared.run)}


def track_record(prepared: Prepared) -> Tracker:
    """Open the tracker of a run; of several processes the first has one."""
    if not processes.is_main():
        return NoTracker()
    run, name = prepared.run, type(prepared.method).__name__
    return make_tracker(
        run.track,
        run_id=prepared.id,
        name=f"{run.track.name or name}-{'-'.join(run.targets)}-s{run.seed}",
        job_type=name,
        config=prepared.asked,
        folder=prepared.folder,
    )


def save(prepared: Prepared, model: nn.Module, happened: Mapping[str, Any]) -> None:
    """Write the trained weights and what the method keeps."""
    from mode.core.tensors import save_tensors, trainable_parameters

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
    save_tensors(prepared.folder / WEIGHTS, trainable_parameters(model), {"run": prepared.id})
