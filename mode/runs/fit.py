"""Train one stage, and score a model: the loop and the evaluator on a prepared run's data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
import numpy as np
from mode.core import processes
from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.data.batches import Batches, Stream
from mode.data.pack import Tokens
from mode.methods.anchored import Adaptation
from mode.methods.base import Probe
from mode.runs.prepare import Prepared
from mode.config.method import SELF

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from mode.records.score import Score
    from mode.train.objective import AnchorTerm
    from mode.runs.tracking import Tracker
    from mode.train.loop import TrainJob, Trained
    from mode.train.curve import Point

Observer = Callable[[Prepared, "Point"], None]


def fit(prepared: Prepared, model: nn.Module, tracker: Tracker, observe: Observer, flops: float) -> Trained:
    """Train a model by the one loop, if its method trains at all; a token takes so many operations."""
    from mode.evaluation.next_token import flatten_scores
    from mode.train.step_options import should_compile
    from mode.train.loop import TrainJob, Trained, train

    run, method = prepared.run, prepared.method
    steps = method.steps(run)
    if steps == 0:
        return Trained(steps=0, tokens=0, seconds=0.0, curve=())
    mixture = method.mixture(run)
    device = next(model.parameters()).device
    batches = Batches(
        [Stream(name, open_tokens(prepared, name, device), count) for name, count in mixture.items()],
        seed=run.seed,
        batch_size=run.train.batch_size,
        sequence_length=run.train.sequence_length,
        order=method.order(run),
        examples=run.train.examples,
    )

    def observed(point: Point) -> None:
        if processes.is_main():
            observe(prepared, point)
        tracker.log({name: value for name, value in point.items() if name != "step"}, step=point["step"])

    kinds, seen = method.row_kinds(run), tuple(name for name in mixture if name in prepared.packed)
    total = flops * steps * run.train.batch_size * run.train.sequence_length
    job = TrainJob(
        settings=replace_settings(run.train, compile=should_compile(run.train, device, total)),
        steps=steps,
        lr=run.lr,
        folder=prepared.folder,
        validate=lambda: flatten_scores(score_domains(prepared, model, "validation", seen or run.targets)),
        observe=observed,
        inspect=method.inspect,
        lr_scales=method.lr_scales(),
        hold=make_anchor_term(prepared, model, batches),
        seed=run.seed,
        end=closing_token(prepared) if run.train.documents == "apart" else None,
        kinds=(lambda step: np.array([kinds[name] for name in batches.domains(step)])) if kinds else None,
    )
    return train(model, batches, fit_memory(model, batches, job))


def fit_memory(model: nn.Module, batches: Batches, job: TrainJob) -> TrainJob:
    """Return a job whose choice of what forms activations again is made, if it was left to the memory that there is."""
    if job.settings.activation_checkpointing != "auto":
        return job
    from mode.train.memory import choose_checkpointing
    from mode.distributed.layout import DDP
    from mode.train.loop import take_batch

    device = next(model.parameters()).device
    given = partial(take_batch, batches, job, 0, DDP(model), device)
    choice = choose_checkpointing(model, job.settings, job.hold, job.end, given)
    return dataclasses.replace(
        job, settings=replace_settings(job.settings, activation_checkpointing=choice, memory=None)
    )


def closing_token(prepared: Prepared) -> int:
    """Return the token that closes every document of a run's domains."""
    split = next(iter(prepared.packed.values())).split(prepared.method.split)
    return int(split.tokens[split.starts[1] - 1])


def open_tokens(prepared: Prepared, name: str, device: torch.device) -> Tokens:
    """Return the tokens that one source of a mix trains on: a domain's, its method's, or the backbone's own."""
    own = prepared.method.stream(prepared.run, prepared.packed, name)
    if own is not None:
        return own
    if name in prepared.packed:
        return prepared.packed[name].split(prepared.method.split).tokens
    return open_self_sampled(prepared, device)


def open_self_sampled(prepared: Prepared, device: torch.device) -> Tokens:
    """Return the tokens that a run's backbone made up itself."""
    from mode.train.anchor_rows import load_or_sample_rows

    run, method = prepared.run, prepared.method
    assert isinstance(method, Adaptation)
    cache = Path(run.paths.cache).expanduser()
    with processes.main_first():
        return load_or_sample_rows(method.anchor, run.backbone, prepared.backbone, run.train.sequence_length, cache, device)


def fingerprint_self_sampled(prepared: Prepared, device: torch.device) -> str | None:
    """Return the digest of the tokens that a run's backbone made up itself, if it trains on any."""
    method = prepared.method
    if not isinstance(method, Adaptation) or method.anchor.source != SELF:
        return None
    return hashlib.sha256(open_self_sampled(prepared, device).tobytes()).hexdigest()[:16]


def make_anchor_term(prepared: Prepared, model: nn.Module, batches: Batches) -> AnchorTerm | None:
    """Return how a model is held to its backbone, if its method asks for it."""
    from mode.train.objective import AnchorTerm
    from mode.ops.quantize import quantize_frozen

    method, run = prepared.method, prepared.run
    if not isinstance(method, Adaptation) or method.anchor.source == "none":
        return None
    source = method.anchor.source

    def backbone() -> PreTrainedModel:
        loaded = load_model(run.backbone).requires_grad_(False)
        quantize_frozen(loaded, run.train.frozen_weights)  # as MoDE's, which is in the model
        return loaded

    return AnchorTerm(
        weight=method.anchor.weight,
        held=lambda step: np.array([name == source for name in batches.domains(step)]),
        reference=method.reference(backbone, next(model.parameters()).device),
    )


def score_domains(
    prepared: Prepared, model: nn.Module, split: Any, names: tuple[str, ...] = (), probe: Probe | None = None
) -> dict[str, Score]:
    """Score a model on a split of the run's domains."""
    import torch

    from mode.evaluation.next_token import evaluate
    from mode.train.objective import UNKNOWN, set_row_kinds

    run = prepared.run
    scores, kinds = {}, prepared.method.row_kinds(run)
    for name in names or run.scored:
        if kinds:
            set_row_kinds(model, torch.tensor([kinds.get(name, UNKNOWN)]).to(next(model.parameters()).device))
        scores[name] = evaluate(
            model,
            prepared.packed[name].split(split),
            sequence_length=run.train.sequence_length,
            batch_size=run.evaluate.batch_size,
            chunk=run.evaluate.chunk,
            probe=(lambda count: None) if probe is None else partial(probe.add, name),
        )
    return scores
