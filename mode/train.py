"""The one training loop. A method changes the model, its stages and which parameters train; never this loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mode.checked import ConfigError
from mode.checkpoint import load_checkpoint, save_checkpoint, trainable
from mode.data.batches import Batches
from mode.files import CHECKPOINT, CURVE, write_atomic
from mode.layers import Layers
from mode.loss import auxiliary_loss, divergence, head, hidden_states, next_token_loss, softcap, token_scores
from mode.settings import Train

Point = dict[str, Any]
"""One point of the training curve: step, loss, accuracy, lr, seconds, and what the method reports of its model."""


@dataclass(frozen=True)
class Hold:
    """How a model is held to its backbone on some rows.

    Attributes:
        weight: Factor on KL(backbone || model) beside the cross-entropy of the other rows.
        held: Which rows of a step are such rows, (B,).
        reference: What the backbone says of rows of tokens: its final hidden states, and its head.
    """

    weight: float
    held: Callable[[int], NDArray[np.bool_]]
    reference: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
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
    """

    settings: Train
    steps: int
    lr: float
    folder: Path
    validate: Callable[[], Point]
    observe: Callable[[Point], None] = lambda point: None
    inspect: Callable[[nn.Module], Point] = lambda model: {}
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    hold: Hold | None = None
    seed: int = 0
    kinds: Callable[[int], NDArray[np.int64]] | None = None

    @property
    def checkpoint(self) -> Path:
        """File of the latest checkpoint."""
        return self.folder / CHECKPOINT

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


def train(model: nn.Module, batches: Batches, job: Job) -> Trained:
    """Train the parameters of a model that require a gradient, from the latest checkpoint if there is one.

    Two runs of the same configuration end bit-identical on the same machine, whether or not one of them was
    interrupted: a batch is a function of (seed, step), and checkpoints fall on points of the curve.

    Args:
        model: A causal LM.
        batches: The rows of every step.
        job: Settings, folders and callbacks.

    Raises:
        ConfigError: The loss is no longer finite, or a checkpoint is damaged.
    """
    settings, device = job.settings, next(model.parameters()).device
    optimizer = make_optimizer(model, job)
    layers = Layers(model, settings, half=precision_of(settings, device) == "bf16")
    step, seconds, curve = restore(model, optimizer, job)
    model.train()
    total = torch.zeros((), device=device)
    begin = time.monotonic()
    while step < job.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, job.steps, settings)
        rows = torch.from_numpy(batches.batch(step)).to(device)
        held = torch.from_numpy(job.hold.held(step)).to(device) if job.hold else None
        kinds = torch.from_numpy(job.kinds(step)).to(device) if job.kinds else None
        torch.manual_seed((job.seed << 32) + step)
        with layers:
            loss, states = accumulate(model, rows, held, job, device, kinds)
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss
        step += 1
        if step % settings.log_every == 0 or step == job.steps:
            since = (step - 1) % settings.log_every + 1
            mean = float(total) / since  # waits for the device, so it comes before the clock is read
            seconds += time.monotonic() - begin
            point = measure(model, job, step, mean, states, rows, held)
            curve.append(point | {"seconds": round(seconds, 3)})
            append(job, curve[-1], optimizer, model)
            report = dict(curve[-1], tokens_per_second=throughput(curve, settings))
            job.observe(report)
            total.zero_()
            begin = time.monotonic()
    tokens = job.steps * settings.batch_size * settings.sequence_length
    return Trained(steps=job.steps, tokens=tokens, seconds=seconds, curve=curve)


def accumulate(
    model: nn.Module, rows: Tensor, held: Tensor | None, job: Job, device: torch.device, kinds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run forward and backward over the micro-batches of a step.

    Returns:
        The mean loss of the step, and the last micro-batch's hidden states, (B / accumulate, S, d).
    """
    settings, loss = job.settings, torch.zeros((), device=device)
    states, precision = loss, precision_of(settings, device)
    for number, micro in enumerate(rows.chunk(settings.accumulate)):
        if kinds is not None:
            tell_kinds(model, kinds.chunk(settings.accumulate)[number])
        with autocast(settings, device):
            states = hidden_states(model, micro[:, :-1])
        if job.hold is None or held is None:
            part = next_token_loss(states, head(model), micro[:, 1:], softcap(model), precision) / settings.accumulate
        else:
            chosen = held.chunk(settings.accumulate)[number]
            with torch.no_grad(), autocast(settings, device):
                known = job.hold.reference(micro[chosen, :-1]) if chosen.any() else None
            part = held_loss(model, states, micro, chosen, known, job.hold.weight, precision) / settings.accumulate
        loss += part.detach()
        extra = auxiliary_loss(model)
        torch.autograd.backward(part if extra is None else part + extra / settings.accumulate)
    return loss, states.detach()


UNKNOWN = -1
"""Kind of a row of none of the sources that were trained on."""


def tell_kinds(model: nn.Module, kinds: Tensor) -> None:
    """Tell every module that wants to know of what kind the rows of the next forward pass are, (B,), or all, (1,)."""
    for module in model.modules():
        if hasattr(module, "row_kinds"):
            module.row_kinds = kinds


def held_loss(
    model: nn.Module,
    states: Tensor,
    rows: Tensor,
    held: Tensor,
    known: tuple[Tensor, Tensor] | None,
    weight: float,
    precision: str,
) -> Tensor:
    """Return the mean over a micro-batch's tokens: cross-entropy of free rows, weighted divergence of held ones.

    Args:
        model: The model that trains.
        states: Its final hidden states, (B, S, d).
        rows: Tokens, (B, S + 1).
        held: Which rows are held to the backbone, (B,).
        known: The backbone's final hidden states on those, (held rows, S, d), and its head, (V, d); None without any.
        weight: Factor on their divergence.
        precision: Of the cross-entropy's products of matrices.
    """
    loss, cap = torch.zeros((), device=states.device), softcap(model)
    free, count = ~held, len(rows)
    if free.any():
        loss = loss + next_token_loss(states[free], head(model), rows[free, 1:], cap, precision) * (free.sum() / count)
    if known is not None:
        loss = loss + weight * divergence(states[held], head(model), *known, cap) * (held.sum() / count)
    return loss


def autocast(settings: Train, device: torch.device) -> torch.autocast:
    """Return the context of the forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(settings, device) == "bf16")


def precision_of(settings: Train, device: torch.device) -> str:
    """Return the precision of the forward pass: with `auto`, bf16 on an accelerator that has it, else fp32."""
    if settings.precision != "auto":
        return settings.precision
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"


def make_optimizer(model: nn.Module, job: Job) -> torch.optim.AdamW:
    """Build AdamW over what trains: matrices with weight decay, vectors without, learning rates scaled by name."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        scale = next((value for part, value in job.lr_scales.items() if part in name), 1.0)
        decay = job.settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ConfigError("nothing to train: every parameter of this model is frozen")
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "peak": job.lr * scale}
            for (scale, decay), members in groups.items()
        ],
        lr=job.lr,
        betas=job.settings.betas,
        fused=True,
    )


def schedule(step: int, steps: int, settings: Train) -> float:
    """Return the learning rate of a step as a share of its peak: linear warm-up, then a cosine.

    >>> from types import SimpleNamespace as Settings
    >>> [round(schedule(step, 10, Settings(warmup=0.2, final_lr=0.1)), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.134]
    """
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.final_lr + (1.0 - settings.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def measure(
    model: nn.Module, job: Job, step: int, loss: float, states: Tensor, rows: Tensor, held: Tensor | None
) -> Point:
    """Return a point of the curve: the mean loss since the last point, and the last micro-batch's accuracy.

    Rows that are held to the backbone do not count for the accuracy, unless the micro-batch has no others.
    """
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is {loss} at step {step}; try a lower train.lr than {job.lr:g}")
    targets = rows.chunk(job.settings.accumulate)[-1][:, 1:]
    if held is not None:
        free = ~held.chunk(job.settings.accumulate)[-1]
        states, targets = (states[free], targets[free]) if free.any() else (states, targets)
    scores = token_scores(states, head(model), targets, cap=softcap(model))
    lr = job.lr * schedule(step - 1, job.steps, job.settings)
    point: Point = {"step": step, "loss": loss, "accuracy": float(scores.hit.float().mean()), "lr": lr}
    point |= job.inspect(model)
    every = job.settings.validate_every
    if every and (step % every == 0 or step == job.steps):
        point |= job.validate()
        model.train()
    return point


def append(job: Job, point: Point, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Append a point to the curve, and save a checkpoint where one is due."""
    with job.curve.open("a", encoding="utf-8") as file:
        file.write(json.dumps(point) + "\n")
    if point["step"] % job.settings.checkpoint_every == 0 or point["step"] == job.steps:
        save_checkpoint(job.checkpoint, model, optimizer, {"step": point["step"], "seconds": point["seconds"]})


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> tuple[int, float, list[Point]]:
    """Go back to the latest checkpoint: its step, its seconds of training, and the curve up to it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    step, seconds, curve = 0, 0.0, []
    if job.checkpoint.exists():
        counters = load_checkpoint(job.checkpoint, model, optimizer)
        step, seconds = int(str(counters["step"])), float(str(counters["seconds"]))
        curve = [point for point in read_curve(job.curve) if point["step"] <= step]
    write_atomic(job.curve, "".join(json.dumps(point) + "\n" for point in curve).encode())
    return step, seconds, curve


def read_curve(path: Path) -> list[Point]:
    """Read a training curve, without a last line that a crash cut short."""
    points: list[Point] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return points


def throughput(curve: Sequence[Point], settings: Train) -> float:
    """Return the tokens per second between the last two points of a curve."""
    last, before = curve[-1], curve[-2] if len(curve) > 1 else {"step": 0, "seconds": 0.0}
    steps, seconds = last["step"] - before["step"], last["seconds"] - before["seconds"]
    return float(steps * settings.batch_size * settings.sequence_length / max(seconds, 1e-9))
