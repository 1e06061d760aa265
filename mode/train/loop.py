"""The one training loop. A method changes the model, its stages and which parameters train; never this loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mode.config.train import Train
from mode.core import processes
from mode.core.device import send
from mode.core.errors import ConfigError
from mode.core.files import CURVE, list_checkpoints, write_atomic
from mode.core.tensors import trainable_parameters
from mode.data.batches import Batches
from mode.distributed.choose import choose_layout
from mode.distributed.layout import DDP
from mode.ops.loss import logit_softcap, output_head, score_states
from mode.train.checkpoint import Saver, check_checkpoint, load_checkpoint, read_counters, remove_stale
from mode.train.cuda_graph import record_passes
from mode.train.curve import Point, compute_throughput, read_curve
from mode.train.objective import AnchorTerm, Objective
from mode.train.optimizer import make_optimizer, schedule, set_rates
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from mode.distributed.mpmd import MPMD


@dataclass(frozen=True)
class TrainJob:
    """What the loop is asked to do.

    Attributes:
        settings: The loop's settings.
        steps: Optimizer steps of this stage.
        lr: Peak learning rate.
        folder: Where the checkpoint and the training curve go.
        validate: Scores the model on the validation split of the domains it trains on.
        observe: Called with every new point of the curve.
        inspect: What the method reports of its model at every point.
        lr_scales: Factor on the learning rate for parameters whose name contains the key.
        hold: How the model is held to its backbone; None where it is not.
        seed: With the step, what anything random in a forward pass is a function of, as the rows are.
        kinds: Of what kind each row of a step is, (B,), where the model wants to know (`row_kinds`).
        end: Token that closes a document, where documents of a row do not see each other.
    """

    settings: Train
    steps: int
    lr: float
    folder: Path
    validate: Callable[[], Point]
    observe: Callable[[Point], None] = lambda point: None
    inspect: Callable[[nn.Module], Point] = lambda model: {}
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    hold: AnchorTerm | None = None
    seed: int = 0
    kinds: Callable[[int], NDArray[np.int64]] | None = None
    end: int | None = None

    @property
    def curve(self) -> Path:
        """File of the training curve, one JSON object a line."""
        return self.folder / CURVE


@dataclass(frozen=True)
class Trained:
    """What the loop did: steps, tokens seen, seconds of training alone, and the training curve."""

    steps: int
    tokens: int
    seconds: float
    curve: Sequence[Point]


def train(model: nn.Module, batches: Batches, job: TrainJob) -> Trained:
    """Train the parameters of a model that require a gradient, from the latest checkpoint if there is one.

    Two runs of the same configuration end bit-identical on the same machine, whether or not one of them was
    interrupted: a batch is a function of (seed, step), and checkpoints fall on points of the curve. Several processes
    have the gradients of one with as many times `accumulate`; the accuracy in the curve is the mean of all theirs.

    Args:
        model: A causal LM.
        batches: The rows of every step.
        job: Settings, folders and callbacks.

    Raises:
        ConfigError: The loss is no longer finite, or a checkpoint is damaged or cannot be written.
    """
    settings, device = job.settings, next(model.parameters()).device
    spread = choose_layout(model, job.hold is not None, settings, device)
    checkpoint, step, seconds, curve = resume(model, job)
    if step >= job.steps:  # it was stopped after its last step: the model is to stay whole
        return finish(job, seconds, curve)
    made = Objective(model.train(), settings, job.hold, spread.part, job.end)
    objective, optimizer = spread.wrap(
        made, partial(make_optimizer, lr=job.lr, scales=job.lr_scales, settings=settings)
    )
    if checkpoint:
        load_checkpoint(checkpoint, spread.trained(), optimizer)
    layers = StepOptions(spread.model, settings, half=spread.halves and made.precision == "bf16")
    passes = record_passes(
        accumulate, list(trainable_parameters(spread.model).values()), settings, held=job.hold is not None
    )
    total, begin = torch.zeros((), device=device), time.monotonic()
    with Saver() as saver:
        while step < job.steps:
            set_rates(optimizer, schedule(step, job.steps, settings))
            rows, held, kinds = take_batch(batches, job, step, spread, device)
            torch.manual_seed(spread.seed((job.seed << 32) + step))
            with layers, spread():
                loss, states = passes(
                    objective, rows, settings.batch.gradient_accumulation_steps, held, kinds, spread.slots
                )
            spread.clip(settings.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss
            step += 1
            if step % settings.log_every == 0 or step == job.steps:
                mean = float(processes.all_reduce_mean(total)) / ((step - 1) % settings.log_every + 1)
                seconds += time.monotonic() - begin  # after the mean, which waits for the device
                spread.collect(is_scored(step, job))
                point = measure_point(model, job, step, mean, states, spread, rows, held) | {
                    "seconds": round(seconds, 3)
                }
                curve.append(point)
                append_point(job, point, spread, optimizer, saver)
                job.observe(point | {"tokens_per_second": compute_throughput(curve, settings)})
                total.zero_()
                begin = time.monotonic()
    return finish(job, seconds, curve)


def finish(job: TrainJob, seconds: float, curve: Sequence[Point]) -> Trained:
    """Return what the loop did when it has made all steps."""
    return Trained(job.steps, job.steps * job.settings.batch.size * job.settings.sequence_length, seconds, curve)


def is_scored(step: int, job: TrainJob) -> bool:
    """Say whether the whole model is scored after a step."""
    every = job.settings.validate_every
    return step == job.steps or bool(every and step % every == 0)


def take_batch(
    batches: Batches, job: TrainJob, step: int, spread: DDP | MPMD, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return this process's rows of a step, (B, S + 1), and of each whether it is held and of what kind it is, (B,).

    Which rows are held stays in the processor's memory: it decides what is run.
    """

    def mine(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(spread.rows(values))

    held = mine(job.hold.held(step)) if job.hold else None
    kinds = send(mine(job.kinds(step)), device) if job.kinds else None
    return send(mine(batches.batch(step)), device), held, kinds


def accumulate(
    objective: nn.Module,
    rows: Tensor,
    parts: int,
    held: Tensor | None = None,
    kinds: Tensor | None = None,
    slots: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run forward and backward over the micro-batches of a step.

    Args:
        objective: An `Objective`, or several processes' (`mode.core.processes.replicate`).
        rows: Tokens, (B, S + 1).
        parts: Micro-batches.
        held: Which rows are held to the backbone, (B,), in the processor's memory.
        kinds: Of what kind each row is, (B,), where the model wants to know.
        slots: Processes that share every row, and of whose losses the mean is meant.

    Returns:
        The mean loss of the step, and the last micro-batch's hidden states, (B / parts, S, d).
    """
    loss = torch.zeros((), device=rows.device)
    states = loss
    for number, micro in enumerate(rows.chunk(parts)):
        some = [None if each is None else each.chunk(parts)[number] for each in (held, kinds)]
        with nullcontext() if number == parts - 1 else processes.no_sync(objective):
            found, extra, states = objective(micro, *some)
            part = found / parts
            loss += part.detach()
            whole = part if extra is None else part + extra / parts
            torch.autograd.backward(whole if slots == 1 else whole / slots)
    return loss, states.detach()


def measure_point(
    model: nn.Module,
    job: TrainJob,
    step: int,
    loss: float,
    states: Tensor,
    spread: DDP | MPMD,
    rows: Tensor,
    held: Tensor | None,
) -> Point:
    """Return a point of the curve: the mean loss since the last point, and the last micro-batch's accuracy.

    Rows that are held to the backbone do not count for the accuracy, unless the micro-batch has no others.
    """
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is {loss} at step {step}; try a lower train.lr than {job.lr:g}")
    targets = spread.part(rows.chunk(job.settings.batch.gradient_accumulation_steps)[-1])[:, 1:]
    if held is not None:
        free = ~held.chunk(job.settings.batch.gradient_accumulation_steps)[-1]
        states, targets = (states[free], targets[free]) if free.any() else (states, targets)
    scores = score_states(states, output_head(model), targets, cap=logit_softcap(model))
    lr = job.lr * schedule(step - 1, job.steps, job.settings)
    accuracy = float(processes.all_reduce_mean(scores.hit.float().mean()))
    point: Point = {"step": step, "loss": loss, "accuracy": accuracy, "lr": lr}
    point |= job.inspect(model)
    every = job.settings.validate_every
    if every and (step % every == 0 or step == job.steps):
        point |= job.validate()
        model.train()
    return point


def append_point(
    job: TrainJob, point: Point, spread: DDP | MPMD, optimizer: torch.optim.Optimizer, saver: Saver
) -> None:
    """Append a point to the curve, and save a checkpoint where one is due."""
    if processes.is_main():
        with job.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
    if point["step"] % job.settings.checkpoint_every == 0 or point["step"] == job.steps:
        saver.save(job.folder, spread.trained(), optimizer, point["step"], point["seconds"])


def resume(model: nn.Module, job: TrainJob) -> tuple[Path | None, int, float, list[Point]]:
    """Find the latest checkpoint, its step, its seconds of training, and the curve up to it.

    Where no step is left, the model is given the weights of it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    step, seconds, curve = 0, 0.0, []
    latest = next(reversed(list_checkpoints(job.folder)), None)
    if latest:
        check_checkpoint(latest, trainable_parameters(model))
        step, seconds = read_counters(latest)
        if step >= job.steps:
            load_checkpoint(latest, trainable_parameters(model))
        curve = [point for point in read_curve(job.curve) if point["step"] <= step]
    if processes.is_main():
        remove_stale(job.folder, latest)
        write_atomic(job.curve, "".join(json.dumps(point) + "\n" for point in curve).encode())
    return latest, step, seconds, curve
