"""Run a benchmark suite and write its record."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mode.backbone.load import fingerprint_weights
from mode.backbone.shape import read_shape
from mode.bench.records import COLLECTION, SCHEMA, SUITES_IN_RECORDS, Benchmark, find_suite
from mode.bench.suites.data import prepare_data
from mode.bench.suites.evaluation import prepare_evaluation
from mode.bench.suites.inference import prepare_generation, prepare_inference
from mode.bench.suites.loops import prepare_loops
from mode.bench.suites.loss import prepare_losses
from mode.bench.suites.options import prepare_branches, prepare_options
from mode.bench.suites.scale import prepare_scale
from mode.bench.suites.sharding import prepare_sharding
from mode.bench.suites.startup import prepare_startup
from mode.bench.suites.step import PLAIN, prepare_steps
from mode.bench.timing import Case, interleave, time_limits
from mode.config.check import replace_settings
from mode.config.names import RECORDED
from mode.config.quoting import format_value
from mode.config.run import Run
from mode.core.device import describe_device, measure_allocated, set_up
from mode.core.errors import ConfigError, suggest
from mode.core.files import expand_home
from mode.methods.mode import MoDE
from mode.records.measurement import make_id
from mode.records.provenance import describe_environment
from mode.train.precision import resolve_precision

Cases = list[Case] | Iterator[list[Case]]
"""Cases of a suite: one list that is timed together, or lists that are timed one after the other."""


SUITES: dict[str, Callable[[Run, MoDE, torch.device, Path], tuple[Cases, dict[str, int]]]] = {
    "branches": prepare_branches,
    "data": prepare_data,
    "eval": prepare_evaluation,
    "generate": prepare_generation,
    "inference": prepare_inference,
    "loops": prepare_loops,
    "loss": prepare_losses,
    "options": prepare_options,
    "scale": prepare_scale,
    "sharding": prepare_sharding,
    "startup": prepare_startup,
    "step": prepare_steps,
}
"""Suites by name. A suite prepares its cases and measures sizes in bytes."""


ROWS = ("branches", "data", "eval", "loops", "loss", "options", "scale", "step")
"""Suites that use rows of tokens with the run's batch size and sequence length."""


STEPS = ("loops", "scale", "step")
"""Suites that use the training options of the run. The suites `branches` and `options` vary these options."""


NOT_ASKED = {
    "memory.activation_checkpointing=auto": "choose which layers recompute activations",
    "kernels.compile=auto": "choose true or false",
    "batch.intra_document_masking=true": "the rows are random tokens without documents",
    "memory.frozen_weights=int8": "suite `options` times every kind of frozen weights",
    "memory.frozen_weights=fp8": "suite `options` times every kind of frozen weights",
}
"""Training settings that no suite supports, with the reason."""


def run_suite(
    name: str, run: Run, rounds: int, done: Callable[[int], None] = lambda number: None
) -> tuple[Benchmark, Path]:
    """Run a suite and write its record into the run's folder of results, atomically.

    Args:
        name: Name of the suite.
        run: Run with backbone, shape, threads and device. Its method must be MoDE.
        rounds: Number of rounds after the warm-up.
        done: Called after every round with its number; 0 is the warm-up.

    Returns:
        The benchmark, and the path of its file.

    Raises:
        ConfigError: There is no such suite, or it does not support the settings.
    """
    name = find_suite(name)
    if name not in SUITES:
        raise ConfigError(f"{name}: not one of the suites {', '.join(SUITES)}{suggest(name, SUITES)}")
    method = run.method
    if not isinstance(method, MoDE):
        raise ConfigError("a benchmark measures a model with experts: choose method=mode")
    for setting, why in NOT_ASKED.items():
        key, value = setting.split("=")
        if format_value(attrgetter(key)(run.train)) == value:
            raise ConfigError(f"train.{setting} is not supported by mode bench: {why}")
    results = expand_home(run.paths.results) / COLLECTION.name
    results.mkdir(parents=True, exist_ok=True)  # fails before any work if the folder is not writable
    device = set_up(run.train.threads, run.train.device)
    precision = resolve_precision(run.train.precision, device, read_shape(run.backbone).hidden)
    run = replace_settings(run, train=replace_settings(run.train, precision=precision))
    environment = describe_environment(describe_device(device), run.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases, sizes = SUITES[name](run, method, device, Path(folder))
        timed: list[dict[str, Any]] = []
        groups: Iterable[list[Case]] = [cases] if isinstance(cases, list) else cases
        for group in groups:
            timed += time_group(group, rounds, done, device)
    asked = describe_benchmark(name, run, method)
    fingerprint = fingerprint_weights(run.backbone)
    benchmark = Benchmark(
        schema=SCHEMA,
        id=make_id([asked, fingerprint, environment["machine"]]),
        asked=asked,
        happened={"rounds": rounds, "bytes": sizes, "cases": timed},
        provenance={"backbone": fingerprint, **environment},
    )
    return benchmark, benchmark.write(results)


def time_group(
    cases: list[Case], rounds: int, done: Callable[[int], None], device: torch.device
) -> list[dict[str, Any]]:
    """Time cases in turn and return their entries of a record.

    If operations are counted, the limits of the machine are timed too. The list is emptied, so that its models are
    freed before the next group is made.
    """
    if any(case.flops for case in cases):
        cases += time_limits(device)
    seconds = interleave(cases, rounds, done)
    entries = [summarise_case(case, times, device) for case, times in zip(cases, seconds, strict=True)]
    cases.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return entries


def summarise_case(case: Case, seconds: Sequence[float], device: torch.device) -> dict[str, Any]:
    """Return a case's entry of a record. The peak memory is measured here, after the warm-up."""
    about = {"job": case.job, "variant": case.variant, "tokens": case.tokens}
    about["seconds"] = [round(time, 6) for time in seconds]
    if case.flops:
        about |= {"flops": case.flops, "precision": case.precision}
    if case.bytes:
        about["bytes"] = case.bytes
    if case.counted:
        about["peak"] = measure_allocated(case.action, device) + case.resident()
    return about


def describe_benchmark(name: str, run: Run, method: MoDE) -> dict[str, Any]:
    """Return the block `asked` of a record. Options that equal the benchmark's default are left out."""
    size = run.evaluate.batch_size if name == "eval" else run.train.batch.size
    values: dict[str, tuple[Any, object]] = {
        "train.batch.gradient_accumulation_steps": (run.train.batch.gradient_accumulation_steps, 1),
        "method.head_rank": (method.head_rank, 0),
    }
    if name in STEPS:
        values |= {
            f"train.{key}": (attrgetter(key)(run.train), plain) for key, plain in PLAIN.items() if key != "precision"
        }
    options = {RECORDED.get(key, key): value for key, (value, plain) in values.items() if value != plain}
    return {
        "suite": SUITES_IN_RECORDS.get(name, name),
        "backbone": run.backbone.name,
        "num_blocks": method.num_blocks,
        "expert_layers": method.expert_layers,
        "gate": asdict(method.gate),
        "threads": run.train.threads,
        "precision": run.train.precision if name in ("branches", "loops", "scale", "step") else "fp32",
        **({"rows": [size, run.train.sequence_length]} if name in ROWS else {}),
        **({"options": options} if options and name in (*STEPS, "branches", "options") else {}),
    }
