"""Run a benchmark suite, keep what it measured, and render that: speed as ratios of what was timed in turn."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mode.backbone.load import fingerprint_weights
from mode.backbone.shape import read_shape
from mode.bench.records import COLLECTION, SCHEMA, Benchmark
from mode.bench.suites.data import batches
from mode.bench.suites.evaluation import evaluation
from mode.bench.suites.inference import edge, generation
from mode.bench.suites.loops import loops
from mode.bench.suites.loss import losses
from mode.bench.suites.options import branches, options
from mode.bench.suites.scale import scale
from mode.bench.suites.sharding import sharding
from mode.bench.suites.startup import startup
from mode.bench.suites.step import PLAIN, steps
from mode.bench.timing import Case, interleave, time_limits
from mode.config.check import replace_settings
from mode.config.compose import format_value
from mode.config.names import RECORDED
from mode.config.run import Run
from mode.core.device import describe_device, measure_allocated, set_up
from mode.core.errors import ConfigError, suggest
from mode.methods.mode import MoDE
from mode.records.provenance import describe_environment
from mode.train.precision import resolve_precision

Cases = list[Case] | Iterator[list[Case]]
"""What a suite times: all in turn, or group by group."""


SUITES: dict[str, Callable[[Run, MoDE, torch.device, Path], tuple[Cases, dict[str, int]]]] = {
    "branches": branches,
    "data": batches,
    "edge": edge,
    "eval": evaluation,
    "generate": generation,
    "loops": loops,
    "loss": losses,
    "options": options,
    "scale": scale,
    "sharding": sharding,
    "startup": startup,
    "step": steps,
}


ROWS = ("branches", "data", "eval", "loops", "loss", "options", "scale", "step")
"""Suites that work on rows of tokens, as many and as long as a run's."""


STEPS = ("loops", "scale", "step")
"""Suites whose steps are made with the loop's options that are asked for; `branches` and `options` vary these."""


NOT_ASKED = {
    "memory.activation_checkpointing=auto": "say which layers form activations again",
    "kernels.compile=auto": "say true or false, as there is no stage that is short or long",
    "batch.intra_document_masking=true": "the tokens of its rows are random",
    "memory.frozen_weights=int8": "suite `options` times all of them",
    "memory.frozen_weights=fp8": "suite `options` times all of them",
}
"""Settings of the loop that no suite measures, and why."""


def run_suite(
    name: str, run: Run, rounds: int, done: Callable[[int], None] = lambda number: None
) -> tuple[Benchmark, Path]:
    """Run a suite and write what it measured into the run's folder of results, atomically.

    Args:
        name: Name of the suite.
        run: Names backbone, shape, threads and device; its method has to be MoDE.
        rounds: Rounds that count.
        done: Told the number of every round that is over.

    Returns:
        The benchmark, and the path of its file.

    Raises:
        ConfigError: There is no such suite, or the settings do not fit it.
    """
    if name not in SUITES:
        raise ConfigError(f"{name}: not one of the suites {', '.join(SUITES)}{suggest(name, SUITES)}")
    method = run.method
    if not isinstance(method, MoDE):
        raise ConfigError("a benchmark measures a model with experts: it goes with method=mode")
    for setting, why in NOT_ASKED.items():
        key, value = setting.split("=")
        if format_value(attrgetter(key)(run.train)) == value:
            raise ConfigError(f"train.{setting} is of no suite's asking: {why}")
    results = Path(run.paths.results).expanduser() / COLLECTION.name
    results.mkdir(parents=True, exist_ok=True)  # now, so that a place where nothing can be written costs no time
    device = set_up(run.train.threads, run.train.device)
    precision = resolve_precision(run.train.precision, device, read_shape(run.backbone).hidden)
    run = replace_settings(run, train=replace_settings(run.train, precision=precision))
    seen = describe_environment(describe_device(device), run.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases, sizes = SUITES[name](run, method, device, Path(folder))
        told: list[dict[str, Any]] = []
        groups: Iterable[list[Case]] = [cases] if isinstance(cases, list) else cases
        for group in groups:
            told += time_group(group, rounds, done, device)
    asked = describe_benchmark(name, run, method)
    fingerprint = fingerprint_weights(run.backbone)
    identity = json.dumps([asked, fingerprint, seen["machine"]], sort_keys=True)
    benchmark = Benchmark(
        schema=SCHEMA,
        id=hashlib.sha256(identity.encode()).hexdigest()[:12],
        asked=asked,
        happened={"rounds": rounds, "bytes": sizes, "cases": told},
        provenance={"backbone": fingerprint, **seen},
    )
    return benchmark, benchmark.write(results)


def time_group(
    cases: list[Case], rounds: int, done: Callable[[int], None], device: torch.device
) -> list[dict[str, Any]]:
    """Time cases in turn, and the machine among them where operations are known; return what a record says of them.

    The list is emptied, so that models are gone when the next group's are made.
    """
    if any(case.flops for case in cases):
        cases += time_limits(device)
    seconds = interleave(cases, rounds, done)
    told = [summarise_case(case, times, device) for case, times in zip(cases, seconds, strict=True)]
    cases.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return told


def summarise_case(case: Case, seconds: Sequence[float], device: torch.device) -> dict[str, Any]:
    """Return what a record says of a case; its memory is counted now, when it has been warmed up long since."""
    about = {"job": case.job, "variant": case.variant, "tokens": case.tokens}
    about["seconds"] = [round(one, 6) for one in seconds]
    if case.flops:
        about |= {"flops": case.flops, "precision": case.precision}
    if case.bytes:
        about["bytes"] = case.bytes
    if case.counted:
        about["peak"] = measure_allocated(case.action, device) + case.resident()
    return about


def describe_benchmark(name: str, run: Run, method: MoDE) -> dict[str, Any]:
    """Return what a benchmark is asked to measure; options are told where they are not the plain ones."""
    size = run.evaluate.batch_size if name == "eval" else run.train.batch.size
    told: dict[str, tuple[Any, object]] = {
        "train.batch.gradient_accumulation_steps": (run.train.batch.gradient_accumulation_steps, 1),
        "method.head_rank": (method.head_rank, 0),
    }
    if name in STEPS:
        told |= {
            f"train.{key}": (attrgetter(key)(run.train), plain) for key, plain in PLAIN.items() if key != "precision"
        }
    options = {RECORDED.get(key, key): value for key, (value, plain) in told.items() if value != plain}
    return {
        "suite": name,
        "backbone": run.backbone.name,
        "num_blocks": method.num_blocks,
        "expert_layers": method.expert_layers,
        "gate": asdict(method.gate),
        "threads": run.train.threads,
        "precision": run.train.precision if name in ("branches", "loops", "scale", "step") else "fp32",
        **({"rows": [size, run.train.sequence_length]} if name in ROWS else {}),
        **({"options": options} if options and name in (*STEPS, "branches", "options") else {}),
    }
