"""Train one stage, and score a model: the loop and the evaluator on a prepared run's data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.method import SELF
from mode.core import processes
from mode.core.files import expand_home
from mode.data.batches import Batches, Stream
from mode.data.pack import Tokens
from mode.methods.anchored import Adaptation
from mode.methods.base import Probe, TokenWeights, Weighing
from mode.runs.prepare import Prepared, prepare_run

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from mode.config.run import Run
    from mode.records.score import Score
    from mode.runs.tracking import Tracker
    from mode.train.curve import Point
    from mode.train.loop import Trained, TrainJob
    from mode.train.objective import AnchorTerm
    from mode.train.step_batch import StepBatch

Observer = Callable[[Prepared, "Point"], None]


def fit(prepared: Prepared, model: nn.Module, tracker: Tracker, observe: Observer, token_flops: float) -> Trained:
    """Train a model by the training loop, if its method has any steps.

    Args:
        prepared: The run.
        model: Its model, on the device.
        tracker: Where the points of the curve are logged.
        observe: Called with the run and every point of the curve, in the first process.
        token_flops: Floating-point operations of training, per token.
    """
    from mode.evaluation.next_token import flatten_scores
    from mode.train.loop import Trained, TrainJob, train
    from mode.train.step_options import should_compile

    run, method = prepared.run, prepared.method
    steps = method.steps(run)
    if steps == 0:
        return Trained(steps=0, tokens=0, seconds=0.0, curve=())
    device = next(model.parameters()).device
    batches = make_batches(prepared, device)

    def report(point: Point) -> None:
        if processes.is_main():
            observe(prepared, point)
        tracker.log({name: value for name, value in point.items() if name != "step"}, step=point["step"])

    row_kinds = method.row_kinds(run)
    trained_on = tuple(name for name in method.mixture(run) if name in prepared.packed)
    flops = token_flops * steps * run.train.batch.size * run.train.sequence_length
    job = TrainJob(
        settings=replace_settings(run.train, **{"kernels.compile": should_compile(run.train, device, flops)}),
        steps=steps,
        lr=run.lr,
        folder=prepared.folder,
        validate=lambda: flatten_scores(score_domains(prepared, model, "validation", trained_on or run.targets)),
        observe=report,
        inspect=method.inspect,
        lr_scales=method.lr_scales(),
        anchor=make_anchor_term(run, batches, device),
        weigh=make_token_weights(prepared, model, batches, steps),
        seed=run.seed,
        document_end=find_document_end(prepared, trained_on) if run.train.batch.intra_document_masking else None,
        row_kinds=(lambda step: np.array([row_kinds[name] for name in batches.domains(step)])) if row_kinds else None,
    )
    return train(model, batches, fit_memory(model, batches, job))


def make_batches(prepared: Prepared, device: torch.device) -> Batches:
    """Return the batches of a run's own stage.

    Args:
        prepared: The run.
        device: Device to sample rows from the backbone on, for an anchor on sampled rows.
    """
    run, method = prepared.run, prepared.method
    return Batches(
        [Stream(name, open_tokens(prepared, name, device), count) for name, count in method.mixture(run).items()],
        seed=run.seed,
        batch_size=run.train.batch.size,
        sequence_length=run.train.sequence_length,
        order=method.order(run),
        examples=run.train.batch.examples,
    )


def fit_memory(model: nn.Module, batches: Batches, job: TrainJob) -> TrainJob:
    """Return a job in which `activation_checkpointing=auto` is resolved to the layers that are recomputed."""
    if job.settings.memory.activation_checkpointing != "auto":
        return job
    from mode.distributed.layout import DDP
    from mode.train.loop import read_batch
    from mode.train.memory import choose_checkpointing

    device = next(model.parameters()).device

    def read_first() -> StepBatch:
        return read_batch(batches, job, 0).map(DDP(model).select_rows).to(device)

    choice = choose_checkpointing(model, job.settings, job.anchor, job.document_end, read_first)
    return replace(
        job,
        settings=replace_settings(
            job.settings, **{"memory.activation_checkpointing": choice, "memory.budget_gb": None}
        ),
    )


def find_document_end(prepared: Prepared, domains: Sequence[str]) -> int:
    """Return the token that ends every document, from the first of the domains that a run trains on."""
    split = prepared.packed[domains[0]].split(prepared.method.split)
    return int(split.tokens[split.starts[1] - 1])


def open_tokens(prepared: Prepared, name: str, device: torch.device) -> Tokens:
    """Return the tokens of one source of the mix: from a domain, from the method, or sampled from the backbone."""
    own = prepared.method.stream(prepared.run, prepared.packed, name)
    if own is not None:
        return own
    if name in prepared.packed:
        return prepared.packed[name].split(prepared.method.split).tokens
    return open_self_sampled(prepared, device)


def open_self_sampled(prepared: Prepared, device: torch.device) -> Tokens:
    """Return the tokens that were sampled from a run's backbone."""
    from mode.train.anchor_rows import load_or_sample_rows

    run, method = prepared.run, prepared.method
    assert isinstance(method, Adaptation)
    cache = expand_home(run.paths.cache)
    with processes.main_first():
        return load_or_sample_rows(
            method.anchor, run.backbone, prepared.backbone, run.train.sequence_length, cache, device
        )


def fingerprint_self_sampled(prepared: Prepared, device: torch.device) -> str | None:
    """Return the digest of the tokens sampled from a run's backbone; None if the run does not train on any."""
    method = prepared.method
    if not isinstance(method, Adaptation) or method.anchor.source != SELF:
        return None
    return hashlib.sha256(open_self_sampled(prepared, device).tobytes()).hexdigest()[:16]


def make_anchor_term(run: Run, batches: Batches, device: torch.device) -> AnchorTerm | None:
    """Return the anchor term of a run's objective; None without an anchor.

    Args:
        run: The run.
        batches: The rows of every step, with the rows of the anchor's source.
        device: Device of the model.
    """
    from mode.ops.quantize import quantize_frozen
    from mode.train.objective import AnchorTerm

    method = run.method
    if not isinstance(method, Adaptation) or method.anchor.source == "none":
        return None
    source = method.anchor.source

    def backbone() -> PreTrainedModel:
        loaded = load_model(run.backbone).requires_grad_(False)
        quantize_frozen(loaded, run.train.memory.frozen_weights)  # like the backbone inside a MoDE model
        return loaded

    return AnchorTerm(
        weight=method.anchor.weight,
        anchored=lambda step: np.array([name == source for name in batches.domains(step)]),
        reference=method.reference(backbone, device),
    )


def make_token_weights(prepared: Prepared, model: nn.Module, batches: Batches, steps: int) -> TokenWeights | None:
    """Return the function that weighs the tokens of every step; None where all tokens count alike.

    Args:
        prepared: The run.
        model: Its model, on the device.
        batches: The rows of every step.
        steps: Optimizer steps of its own stage.
    """
    import torch

    from mode.ops.loss import score_tokens
    from mode.train.precision import autocast, choose_precision

    run, method, device = prepared.run, prepared.method, next(model.parameters()).device
    precision = choose_precision(run.train, model)

    def score(scored: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        was_training = scored.training
        with torch.no_grad(), autocast(precision, device):
            losses = score_tokens(scored.eval(), rows[:, :-1], rows[:, 1:]).nll.view_as(rows[:, 1:])
        scored.train(was_training)
        return losses

    return method.weigh(
        Weighing(
            model=model,
            steps=steps,
            rows=lambda step: torch.from_numpy(batches.batch(step)).to(device),
            score=score,
            backbone=lambda: load_model(run.backbone).requires_grad_(False).eval().to(device),
            needs=lambda: tuple(prepare_run(stage).folder for stage in method.needs(run)),
        )
    )


def score_domains(
    prepared: Prepared, model: nn.Module, split: Any, names: tuple[str, ...] = (), probe: Probe | None = None
) -> dict[str, Score]:
    """Return a model's scores on a split, by domain.

    Args:
        prepared: The run.
        model: A model of the run's tokenizer.
        split: `validation` or `test`.
        names: Domains to score; by default all that the run scores.
        probe: Measures the model's gates while it is scored.
    """
    import torch

    from mode.evaluation.next_token import evaluate
    from mode.train.objective import UNKNOWN, set_row_kinds
    from mode.train.precision import autocast

    run, device = prepared.run, next(model.parameters()).device
    scores, row_kinds = {}, prepared.method.row_kinds(run)
    for name in names or run.scored:
        if row_kinds:
            set_row_kinds(model, torch.tensor([row_kinds.get(name, UNKNOWN)]).to(device))
        with autocast(run.evaluate.precision, device):
            scores[name] = evaluate(
                model,
                prepared.packed[name].split(split),
                sequence_length=run.train.sequence_length,
                batch_size=run.evaluate.batch_size,
                chunk=run.evaluate.logit_chunk_size,
                tokens=run.evaluate.tokens,
                probe=(lambda count: None) if probe is None else partial(probe.add, name),
            )
    return scores


def measure_divergences(prepared: Prepared, model: nn.Module) -> dict[str, float]:
    """Return how far a model is from its backbone on the validation text of its targets, in nats, by domain.

    Empty where nothing stands on a backbone, and with several processes, each of which would need one of its own. If a
    part of a split is scored, a quarter of so many tokens is compared.
    """
    from mode.evaluation.divergence import TOKENS, measure_divergence

    run = prepared.run
    if processes.world_size() > 1 or prepared.method.backbone_size(run) == 0:
        return {}
    backbone = load_model(run.backbone).to(next(model.parameters()).device)
    return {
        name: measure_divergence(
            model,
            backbone,
            prepared.packed[name].split("validation"),
            sequence_length=run.train.sequence_length,
            chunk=run.evaluate.logit_chunk_size,
            tokens=TOKENS if run.evaluate.tokens is None else min(TOKENS, run.evaluate.tokens // 4),
        )
        for name in run.targets
    }
