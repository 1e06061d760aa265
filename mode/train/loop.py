"""The training loop. A method changes the model, its stages and which parameters train, but never this loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mode.config.train import Train
from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.files import CURVE, list_checkpoints
from mode.core.tensors import list_trainable
from mode.data.batches import Batches
from mode.distributed.choose import choose_layout
from mode.ops.loss import find_head, find_softcap, score_states
from mode.train.checkpoint import (
    Saver,
    check_checkpoint,
    damaged_error,
    load_checkpoint,
    read_counters,
    remove_stale,
)
from mode.train.cuda_graph import capture_step
from mode.train.curve import Point, append_point, compute_throughput, is_whole, read_curve, write_curve
from mode.train.objective import AnchorTerm, Objective
from mode.train.optimizer import make_optimizer, schedule, set_learning_rates
from mode.train.step_batch import StepBatch
from mode.train.step_options import StepOptions
from mode.train.token_weights import check_weighing, measure_share, weigh_tokens


@dataclass(frozen=True)
class TrainJob:
    """One stage of training.

    Attributes:
        settings: Settings of the loop.
        steps: Optimizer steps of this stage.
        lr: Peak learning rate.
        folder: Folder of the checkpoint and the training curve.
        validate: Scores the model on the validation split of the domains that it trains on.
        observe: Called with every new point of the curve.
        inspect: Returns what the method reports of its model at every point of the curve.
        lr_scales: Factor on the learning rate for parameters whose name contains the key.
        anchor: The anchor term of the objective; None without an anchor.
        seed: Seed of the run. A step's random numbers, such as those of dropout, depend on it and on the step alone.
        row_kinds: Returns the kind of every row of a step, (B,), for models that condition on it (`row_kinds`).
        document_end: Token that ends a document, where attention is masked across documents; else None.
        weigh: Returns the weight of every token's cross-entropy, (B, S), from a step and its rows, (B, S + 1); None
            where all tokens count alike.
    """

    settings: Train
    steps: int
    lr: float
    folder: Path
    validate: Callable[[], Point]
    observe: Callable[[Point], None] = lambda point: None
    inspect: Callable[[nn.Module], Point] = lambda model: {}
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    anchor: AnchorTerm | None = None
    seed: int = 0
    row_kinds: Callable[[int], NDArray[np.int64]] | None = None
    document_end: int | None = None
    weigh: Callable[[int, Tensor], Tensor] | None = None

    @property
    def curve(self) -> Path:
        """File of the training curve, one JSON object a line."""
        return self.folder / CURVE


@dataclass(frozen=True)
class Trained:
    """Result of a stage: optimizer steps, tokens, seconds of training alone, and the training curve."""

    steps: int
    tokens: int
    seconds: float
    curve: Sequence[Point]


def train(model: nn.Module, batches: Batches, job: TrainJob) -> Trained:
    """Train the parameters of a model that require a gradient, from the latest checkpoint if there is one.

    Two runs of one configuration end bit-identical on the same machine, whether or not one of them was interrupted: a
    batch is a function of (seed, step), and every checkpoint coincides with a point of the curve. Several processes
    compute the gradients of one process with as many times the micro-batches, up to rounding.

    Args:
        model: A causal LM.
        batches: The rows of every step.
        job: Settings, folder and callbacks.

    Raises:
        ConfigError: The loss is not finite, or a checkpoint is damaged or cannot be written.
    """
    settings, device = job.settings, next(model.parameters()).device
    layout = choose_layout(model, settings, device, anchored=job.anchor is not None)
    check_weighing(settings, job.weigh)
    checkpoint, step, seconds, curve = resume(model, job)
    tokens = job.steps * settings.batch.size * settings.sequence_length
    if step >= job.steps:  # the run was interrupted after its last step; nothing is wrapped, so the model stays whole
        return Trained(job.steps, tokens, seconds, curve)

    plain = Objective(model.train(), settings, job.anchor, layout.select_loss_rows, job.document_end)
    make = partial(make_optimizer, lr=job.lr, scales=job.lr_scales, settings=settings)
    objective, optimizer = layout.wrap(plain, make)
    if checkpoint:
        load_checkpoint(checkpoint, layout.find_local_parameters(), optimizer)
    half = layout.supports_bf16_weights and plain.precision == "bf16"
    options = StepOptions(layout.model, settings, half=half)
    parameters = list(list_trainable(layout.model).values())
    run_step = capture_step(forward_backward, parameters, settings, anchored=job.anchor is not None)

    loss_sum, begin = torch.zeros((), device=device), time.monotonic()
    with Saver() as saver:
        while step < job.steps:
            set_learning_rates(optimizer, schedule(step, job.steps, settings))
            batch = read_batch(batches, job, step).map(layout.select_rows).to(device)
            batch = weigh_tokens(batch, step, job.weigh)
            torch.manual_seed(layout.derive_seed((job.seed << 32) + step))
            with options, layout.enter_step():
                loss, states = run_step(objective, batch, settings.batch.gradient_accumulation_steps, layout.slots)
            layout.clip_gradients(settings.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss
            step += 1
            last = step == job.steps
            if step % settings.log_every and not last:
                continue

            logged_steps = (step - 1) % settings.log_every + 1
            mean_loss = float(processes.all_reduce_mean(loss_sum)) / logged_steps
            seconds += time.monotonic() - begin  # after reading the loss, which waits for the device
            if not math.isfinite(mean_loss):
                raise ConfigError(f"the loss is {mean_loss} at step {step}; try a lower train.lr than {job.lr:g}")
            validating = bool(settings.validate_every) and (last or step % settings.validate_every == 0)
            layout.gather_weights(due=validating or last)
            last_micro_batch = batch.split(settings.batch.gradient_accumulation_steps)[-1]
            point: Point = {
                "step": step,
                "loss": mean_loss,
                "accuracy": measure_accuracy(model, states, last_micro_batch, layout.select_loss_rows),
                "lr": job.lr * schedule(step - 1, job.steps, settings),
                **measure_share(batch),
                **job.inspect(model),
            }
            if validating:
                point |= job.validate()
                model.train()
            point["seconds"] = round(seconds, 3)
            curve.append(point)
            if processes.is_main():
                append_point(job.curve, point)
            if step % settings.checkpoint_every == 0 or last:
                saver.save(job.folder, layout.find_local_parameters(), optimizer, step, point["seconds"])
            job.observe(point | {"tokens_per_second": compute_throughput(curve, settings)})
            loss_sum.zero_()
            begin = time.monotonic()
    return Trained(job.steps, tokens, seconds, curve)


def read_batch(batches: Batches, job: TrainJob, step: int) -> StepBatch:
    """Return all rows of a step, in CPU memory."""
    return StepBatch(
        tokens=torch.from_numpy(batches.batch(step)),
        anchored=torch.from_numpy(job.anchor.anchored(step)) if job.anchor else None,
        row_kinds=torch.from_numpy(job.row_kinds(step)) if job.row_kinds else None,
    )


def forward_backward(
    objective: nn.Module, batch: StepBatch, micro_batches: int, slots: int = 1
) -> tuple[Tensor, Tensor]:
    """Run forward and backward over the micro-batches of a step, and accumulate the gradients.

    Args:
        objective: An `Objective`, as the layout has wrapped it.
        batch: This process's rows, B of them.
        micro_batches: Number of micro-batches.
        slots: Processes that share every row; the gradient is that of the mean of their losses.

    Returns:
        The mean loss of the step, a scalar, and the last micro-batch's hidden states, (B / micro_batches, S, d).
    """
    total = torch.zeros((), device=batch.tokens.device)
    states = total
    for index, micro_batch in enumerate(batch.split(micro_batches)):
        with nullcontext() if index == micro_batches - 1 else processes.no_sync(objective):
            loss, auxiliary, states = objective(micro_batch)
            share = loss / micro_batches
            total += share.detach()
            minimised = share if auxiliary is None else share + auxiliary / micro_batches
            torch.autograd.backward(minimised if slots == 1 else minimised / slots)
    return total, states.detach()


def measure_accuracy(
    model: nn.Module, states: Tensor, micro_batch: StepBatch, select_loss_rows: Callable[[Tensor], Tensor]
) -> float:
    """Return the next-token accuracy on a micro-batch, averaged over processes.

    Anchored rows do not count, unless the micro-batch has no others.

    Args:
        model: The model that trains.
        states: Its final hidden states, (B, S, d).
        micro_batch: The rows that they were computed from.
        select_loss_rows: Returns the rows whose hidden states this process has.
    """
    targets = select_loss_rows(micro_batch.tokens)[:, 1:]
    if micro_batch.anchored is not None and not micro_batch.anchored.all():
        free = ~micro_batch.anchored
        states, targets = states[free], targets[free]
    scores = score_states(states, find_head(model), targets, cap=find_softcap(model))
    return float(processes.all_reduce_mean(scores.hit.float().mean()))


def resume(model: nn.Module, job: TrainJob) -> tuple[Path | None, int, float, list[Point]]:
    """Return the latest checkpoint, its step, its seconds of training, and the curve up to that step.

    Where no step is left, the checkpoint's weights are loaded into the model.

    Raises:
        ConfigError: The checkpoint or the curve is damaged, or belongs to another model.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    step, seconds, curve = 0, 0.0, []
    latest = next(reversed(list_checkpoints(job.folder)), None)
    if latest:
        check_checkpoint(latest, list_trainable(model))
        step, seconds = read_counters(latest)
        curve = [point for point in read_curve(job.curve) if point["step"] <= step]
        if not is_whole(curve, step):
            raise damaged_error(latest, f"the points of {job.curve} do not lead up to step {step}")
        if step > job.steps:
            raise damaged_error(latest, f"the run has only {job.steps} steps")
        if step == job.steps:
            load_checkpoint(latest, list_trainable(model))
    if processes.is_main():
        remove_stale(job.folder, latest)
        write_curve(job.curve, curve)
    return latest, step, seconds, curve
