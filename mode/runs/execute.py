"""Execute a run: data, backbone, method, training, evaluation, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mode.backbone.load import load_model
from mode.config.check import to_yaml
from mode.config.run import Run
from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.files import AGAIN, CURVE, PARTIAL, SETTINGS, WEIGHTS, list_checkpoints, remove, write_atomic
from mode.core.locks import lock_folder
from mode.data.contamination import measure_contamination
from mode.methods.base import Material
from mode.records.provenance import describe_provenance
from mode.records.record import SCHEMA, Record, find_record
from mode.runs.fit import Observer, fingerprint_self_sampled, fit, measure_divergences, score_domains
from mode.runs.prepare import Prepared, find_finished, has_weights, prepare_run
from mode.runs.texts import read_texts
from mode.runs.tracking import NoTracker, Tracker, make_tracker

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from mode.config.train import Train
    from mode.records.score import Score
    from mode.train.loop import Trained


def execute(
    run: Run,
    *,
    again: bool = False,
    weights: bool = False,
    observe: Observer = lambda prepared, point: None,
    wait: Callable[[str], None] | None = None,
) -> Record:
    """Execute a run and the earlier stages that it needs, except those that are finished.

    Args:
        run: Configuration.
        again: Train even if there is a record.
        weights: Train even if there is a record, where the trained weights are not on this machine.
        observe: Called with every point of a training curve.
        wait: None refuses a run that another process is training. A function waits for that process; it is called
            once per run, with a description of the process.

    Returns:
        The record, which is also written to the results folder.

    Raises:
        ConfigError: The configuration, the data or an artefact is wrong.
    """
    with processes.main_first():
        prepared = prepare_run(run)

    def find_done() -> Record | None:
        record = find_finished(prepared)
        done = record is not None and not again and (has_weights(prepared) or not weights)
        done = processes.broadcast_decision(done)
        if done and processes.is_main():
            remove_finished_checkpoint(prepared)
        return read_finished(prepared) if done else None

    # The lock is taken for training alone, so that runs that need the same finished stage do not wait for each other.
    if (record := find_done()) is not None:
        return record
    with lock_folder(prepared.folder, wait) if processes.is_main() else nullcontext():
        if (record := find_done()) is not None:
            return record
        if again:
            with processes.main_first():  # the others must not resume from checkpoints that are removed here
                start_over(prepared.folder)
        needs = []
        check_layout(run.train, prepared.method.branches(run))
        for stage in prepared.method.needs(run):
            execute(stage, weights=True, observe=observe, wait=wait)
            needs.append(prepare_run(stage))
        return train_and_record(prepared, needs, observe, again=again)


def remove_finished_checkpoint(prepared: Prepared) -> None:
    """Remove the checkpoint of a finished run that was killed between writing its record and removing it.

    Weights are written at the end of training alone, so a run with weights needs no checkpoint. Nothing is removed
    while another process holds the run's lock.
    """
    leftovers = [*list_checkpoints(prepared.folder), *prepared.folder.glob(f".*{PARTIAL}")]
    if leftovers and has_weights(prepared):
        with suppress(ConfigError), lock_folder(prepared.folder):
            remove(*list_checkpoints(prepared.folder), prepared.folder / AGAIN)


def check_layout(settings: Train, branches: Sequence[str]) -> None:
    """Check the layout, before anything is loaded and before the earlier stages of a run train.

    Args:
        settings: Settings of the loop.
        branches: Names of the model's branches; empty for a model without branches, which `choose_layout` checks.

    Raises:
        ConfigError: The layout does not go with the number of processes or with the branches.
    """
    from mode.distributed.choose import check_processes
    from mode.distributed.mpmd import check_placement

    check_processes(settings)
    if settings.parallelism.placement is not None and branches:
        check_placement(settings.parallelism.placement, len(branches))


def read_finished(prepared: Prepared) -> Record:
    """Return the record of a finished run.

    Raises:
        ConfigError: There is none: processes on several machines have different results folders.
    """
    record = find_record(prepared.results, prepared.id)
    if record is None:
        raise ConfigError(f"{prepared.results}: another folder than that of the first process; paths.* must be shared")
    return record


def start_over(folder: Path) -> None:
    """Remove checkpoints, curve and weights, once: if the new training is interrupted, it resumes as usual.

    A damaged checkpoint, from which nothing can resume, is always removed.
    """
    from mode.train.checkpoint import find_checkpoint_damage

    marker = folder / AGAIN
    if processes.is_main() and (not marker.exists() or any(map(find_checkpoint_damage, list_checkpoints(folder)))):
        remove(*list_checkpoints(folder), folder / CURVE, folder / WEIGHTS)
        marker.touch()


def train_and_record(prepared: Prepared, needs: list[Prepared], observe: Observer, *, again: bool) -> Record:
    """Train, evaluate and record one run whose earlier stages are finished."""
    from mode.core.device import describe_device, read_peak_memory, set_up
    from mode.evaluation.next_token import flatten_scores
    from mode.ops.quantize import quantize_frozen
    from mode.runs.forecast import count_training_flops, forecast
    from mode.train.precision import choose_precision

    run = prepared.run
    device = set_up(run.train.threads, run.train.device)
    model = build(prepared, needs)
    check_context(model, run.train.sequence_length, run.backbone.name)
    sizes = count_model_parameters(model, prepared.method.backbone_size(run))
    quantize_frozen(
        model, run.train.memory.frozen_weights
    )  # before the model moves to the device, which saves its memory
    model = model.to(device)
    conditions = describe_provenance(
        data=prepared.fingerprints,
        backbone=prepared.backbone,
        pretraining=prepared.method.pretraining_data(run),
        needs=[stage.id for stage in needs],
        device=describe_device(device),
        precision=choose_precision(run.train, model),
        threads=run.train.threads,
        layout=run.train.parallelism.strategy,
    )
    if processes.is_main():
        write_atomic(prepared.folder / SETTINGS, to_yaml(run).encode())
    # Operations are counted before training, so that a model that cannot be counted fails at no cost.
    expected = forecast(run)
    token_flops = count_training_flops(model, run.train) + prepared.method.anchoring_flops(run)
    tracker = open_tracker(prepared)
    try:
        trained = fit(prepared, model, tracker, observe, token_flops)
        scores, scoring = evaluate_finished(prepared, model)
    except BaseException as error:  # an interrupt too: the tracker must not stay open for this process's next run
        tracker.abandon()
        if type(error).__name__ == "OutOfMemoryError":
            raise ConfigError(
                "out of memory: raise train.batch.gradient_accumulation_steps, or lower train.batch.size"
            ) from error
        raise
    tracker.finish(flatten_scores(scores, run.evaluate.split))
    happened = summarise_training(prepared, trained, scores, fingerprint_self_sampled(prepared, device)) | {
        "flops": trained.tokens * token_flops,
        "forecast": None if expected is None else asdict(expected),
        "parameters": sizes,
        "peak_memory_bytes": read_peak_memory(device),
        **scoring,
    }
    happened["divergence"] = measure_divergences(prepared, model)  # after the peak, to which it does not belong
    if processes.is_main():
        save_result(prepared, model, Record(SCHEMA, prepared.id, prepared.asked, happened, conditions), again=again)
    processes.wait()
    return read_finished(prepared)


def evaluate_finished(prepared: Prepared, model: nn.Module) -> tuple[dict[str, Score], dict[str, Any]]:
    """Return the scores of a finished model, and the record's fields on scoring: its seconds and the gates' weights."""
    from mode.evaluation.next_token import check_finite

    begin = time.monotonic()
    with prepared.method.probed(model) as probe:
        scores = score_domains(prepared, model, prepared.run.evaluate.split, probe=probe)
    check_finite(scores, trained=prepared.method.steps(prepared.run) > 0)
    fields: dict[str, Any] = {"evaluation_seconds": round(time.monotonic() - begin, 2)}
    if probe is not None:
        fields |= {"gates": probe.result(), "branches": prepared.method.branches(prepared.run)}
    return scores, fields


def summarise_training(
    prepared: Prepared, trained: Trained, scores: Mapping[str, Score], self_sampled: str | None
) -> dict[str, Any]:
    """Return the record's fields on training and scores.

    Args:
        prepared: The run.
        trained: Result of the loop.
        scores: Score of every domain.
        self_sampled: Fingerprint of the rows sampled from the backbone; None if there are none.
    """
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
        **({} if self_sampled is None else {"own_rows": self_sampled}),
    }


def check_context(model: nn.Module, sequence_length: int, backbone: str) -> None:
    """Check that rows are not longer than the backbone's context.

    Raises:
        ConfigError: They are.
    """
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise ConfigError(f"train.sequence_length={sequence_length}: {backbone} reads {longest} at most")


def save_result(prepared: Prepared, model: nn.Module, record: Record, *, again: bool) -> None:
    """Write a finished run's weights and its record, and remove its checkpoint, in this order.

    A run that is killed before its record is written resumes from its last checkpoint, with no step left to train. A
    record is never edited: a run that is trained anew for its weights alone keeps its record.
    """
    from mode.core.tensors import list_trainable

    if list_trainable(model):
        save_weights(prepared, model, record.happened["steps"], record.happened["tokens"])
        record.happened["kept_bytes"] = prepared.method.kept(prepared.folder).stat().st_size
    if again or find_finished(prepared) is None:
        record.write(prepared.results / "records")
    remove(*list_checkpoints(prepared.folder), prepared.folder / AGAIN)


def build(prepared: Prepared, needs: list[Prepared]) -> nn.Module:
    """Build a run's model from its backbone and its earlier stages."""
    backbone = prepared.run.backbone
    material = Material(
        backbone=lambda: load_model(backbone),
        needs=tuple(stage.folder for stage in needs),
        source=asdict(backbone) | {"fingerprint": prepared.backbone},
        artefacts=prepared.asked.get("artefacts", {}),
        texts=partial(read_texts, prepared.run),
    )
    return prepared.method.build(prepared.run, material)


def restore(prepared: Prepared) -> nn.Module:
    """Return a finished run's model: built as for training, with the trained weights loaded.

    Frozen weights are in full precision, even if training and scoring used eight bits (`mode.ops.quantize`).

    Raises:
        ConfigError: The weights are missing, changed, or those of another run.
    """
    from mode.core.tensors import list_trainable, load_run_tensors

    needs = [prepare_run(stage) for stage in prepared.method.needs(prepared.run)]
    model = build(prepared, needs)
    parameters = list_trainable(model)
    if parameters:
        for name, tensor in load_run_tensors(prepared.folder / WEIGHTS, prepared.id, parameters).items():
            parameters[name].data.copy_(tensor)
    return model


def load_finished(prepared: Prepared) -> tuple[nn.Module, torch.device]:
    """Return a finished run's model as it was scored, in evaluation mode on the run's device, and the device.

    Raises:
        ConfigError: `restore` refuses the weights.
    """
    from mode.core.device import set_up
    from mode.ops.quantize import quantize_frozen

    train = prepared.run.train
    device = set_up(train.threads, train.device)
    model = restore(prepared).eval()
    quantize_frozen(model, train.memory.frozen_weights)
    return model.to(device), device


def count_model_parameters(model: nn.Module, backbone_size: int) -> dict[str, int]:
    """Count a model's parameters: in total, trainable, and added to those of the backbone."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trains, "added": total - backbone_size}


def open_tracker(prepared: Prepared) -> Tracker:
    """Open the tracker of a run, in the first process alone."""
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


def save_weights(prepared: Prepared, model: nn.Module, steps: int, tokens: int) -> None:
    """Write the trained weights, and the artefacts of the method."""
    from mode.core.tensors import list_trainable, save_run_tensors

    run = prepared.run
    about = {
        "backbone": run.backbone.name,
        "backbone_fingerprint": prepared.backbone,
        "run": prepared.id,
        "seed": run.seed,
        "steps": steps,
        "tokens": tokens,
        "data": prepared.fingerprints,
    }
    prepared.method.save(model, run, prepared.folder, about)
    save_run_tensors(prepared.folder / WEIGHTS, list_trainable(model), prepared.id)
