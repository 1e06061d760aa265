"""Run a benchmark suite, keep what it measured, and render that: speed as ratios of what was timed in turn."""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mode import config
from mode.backbone import weights_fingerprint
from mode.checked import ConfigError, nearest
from mode.cost import shape_of
from mode.device import allocated, device_name, set_up
from mode.measurement import Measurement
from mode.modular_method import MoDE
from mode.objective import resolved
from mode.record import surroundings
from mode.settings import Run
from mode.sheet import Sheet
from mode.suites.data import batches
from mode.suites.edge import edge
from mode.suites.evaluation import evaluation
from mode.suites.generation import generation
from mode.suites.loss import losses
from mode.suites.machine import MACHINE, limits
from mode.suites.peers import loops
from mode.suites.scale_figure import draw_scale
from mode.suites.sharding import sharding
from mode.suites.sharding_figure import draw_layouts
from mode.suites.startup import startup
from mode.suites.step import PLAIN, branches, options, scale, steps
from mode.timing import Case, interleave, ratio

SCHEMA = 1
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
    "activation_checkpointing=auto": "say which layers form activations again",
    "compile=auto": "say true or false, as there is no stage that is short or long",
    "documents=apart": "the tokens of its rows are random",
    "frozen_weights=int8": "suite `options` times all of them",
    "frozen_weights=fp8": "suite `options` times all of them",
}
"""Settings of the loop that no suite measures, and why."""
FIGURES = {"scale": draw_scale, "sharding": draw_layouts}
"""Suites whose record is drawn too."""
HEADS = ("Job", "Variant", "Median", "Ratio", "Quartiles")
USAGE = ("GFLOP", "Of peak", "Peak MB")
INTRODUCTION = (
    "Every variant is timed once a round, in an order that is reversed from round to round, in one process. "
    "Ratios are to the first variant of the same job: of tokens per second (more is better) where tokens are "
    "counted, else of time or size (less is better); median and quartiles of the rounds' paired ratios. "
    "Loading and exchange end with the first token, since weights that are mapped are read when they are used. "
    "Absolute figures are medians, and hold for the machine they were taken on."
)


@dataclass(frozen=True)
class Benchmark(Measurement):
    """What a suite leaves.

    Its identity is what was asked, on which machine; measuring the same again replaces it. `asked` has suite, backbone,
    shape, threads, precision and options, `happened` the cases (job, variant, tokens, seconds by round) and bytes.
    """

    @property
    def title(self) -> str:
        """Suite and backbone."""
        return f"{self.asked['suite']}: {self.asked['backbone']}"

    @property
    def filename(self) -> str:
        """Name of its file, for people; the id alone decides."""
        return f"{self.asked['suite']}-{self.asked['backbone']}-{self.id}.json"


def measure(
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
        raise ConfigError(f"{name}: not one of the suites {', '.join(SUITES)}{nearest(name, SUITES)}")
    method = run.method
    if not isinstance(method, MoDE):
        raise ConfigError("a benchmark measures a model with experts: it goes with method=mode")
    for setting, why in NOT_ASKED.items():
        key, value = setting.split("=")
        if str(getattr(run.train, key)) == value:
            raise ConfigError(f"train.{setting} is of no suite's asking: {why}")
    results = Path(run.paths.results).expanduser() / SHEET.name
    results.mkdir(parents=True, exist_ok=True)  # now, so that a place where nothing can be written costs no time
    device = set_up(run)
    precision = resolved(run.train.precision, device, shape_of(run.backbone).hidden)
    run = config.replace_settings(run, train=config.replace_settings(run.train, precision=precision))
    seen = surroundings(device_name(device), run.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases, sizes = SUITES[name](run, method, device, Path(folder))
        told: list[dict[str, Any]] = []
        groups: Iterable[list[Case]] = [cases] if isinstance(cases, list) else cases
        for group in groups:
            told += time_group(group, rounds, done, device)
    asked = describe(name, run, method)
    fingerprint = weights_fingerprint(run.backbone)
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
        cases += limits(device)
    seconds = interleave(cases, rounds, done)
    told = [tell(case, times, device) for case, times in zip(cases, seconds, strict=True)]
    cases.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return told


def tell(case: Case, seconds: Sequence[float], device: torch.device) -> dict[str, Any]:
    """Return what a record says of a case; its memory is counted now, when it has been warmed up long since."""
    about = {"job": case.job, "variant": case.variant, "tokens": case.tokens}
    about["seconds"] = [round(one, 6) for one in seconds]
    if case.flops:
        about |= {"flops": case.flops, "precision": case.precision}
    if case.bytes:
        about["bytes"] = case.bytes
    if case.counted:
        about["peak"] = allocated(case.action, device) + case.resident()
    return about


def describe(name: str, run: Run, method: MoDE) -> dict[str, Any]:
    """Return what a benchmark is asked to measure; options are told where they are not the plain ones."""
    size = run.evaluate.batch_size if name == "eval" else run.train.batch_size
    told: dict[str, tuple[Any, object]] = {
        "train.accumulate": (run.train.accumulate, 1),
        "method.head_rank": (method.head_rank, 0),
    }
    if name in STEPS:
        told |= {f"train.{key}": (getattr(run.train, key), plain) for key, plain in PLAIN.items() if key != "precision"}
    options = {key: value for key, (value, plain) in told.items() if value != plain}
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


def render(benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Render benchmarks in Markdown."""
    return {"md": "\n".join(["# Benchmarks", "", INTRODUCTION, *(f"\n{section(each)}" for each in benchmarks)])}


def draw(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """Draw the figure of every benchmark whose suite has one."""
    for each in benchmarks:
        if each.asked["suite"] in FIGURES:
            path = folder / f"bench-{each.filename.removesuffix('.json')}.png"
            FIGURES[each.asked["suite"]](each.happened["cases"], path)


SHEET = Sheet("bench", "benchmark", Benchmark, SCHEMA, f"mode bench {next(iter(SUITES))}", render, draw)
"""The folder of benchmarks in a folder of results, and their table beside it."""


def section(benchmark: Benchmark) -> str:
    """Render one benchmark."""
    heads, *rows = cells(benchmark)
    lines = [
        f"## {benchmark.title}",
        "",
        conditions(benchmark),
        "",
        f"| {' | '.join(heads)} |",
        "|:----|:--------|-------:|------:|----------:|" + (len(heads) - len(HEADS)) * "------:|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def cells(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return a benchmark's table as texts, its heads first; without columns of usage where nothing was counted."""
    found = benchmark.happened["cases"]
    timed = [(*row(case, found), *usage(case, found)) for case in found]
    weighed = [(*each, *[""] * (1 + len(USAGE))) for each in sizes(benchmark)]
    counted = any("flops" in case or "peak" in case for case in found)
    return [each if counted else each[: len(HEADS)] for each in (HEADS + USAGE, *timed, *weighed)]


def conditions(benchmark: Benchmark) -> str:
    """Say what was measured, on what, and when."""
    asked, seen = benchmark.asked, benchmark.provenance
    machine = seen["machine"]
    return (
        f"{asked['num_blocks']} blocks, {asked['expert_layers']} layers per expert and block, {asked['precision']}"
        f"{'; {} rows of {} tokens'.format(*asked['rows']) if 'rows' in asked else ''}"
        f"{''.join(f'; {key}={value}' for key, value in asked.get('options', {}).items())}; "
        f"{machine['device']} of {machine['processor']}, {asked['threads']} of {machine['cores']} threads; "
        f"torch {seen['versions']['torch']}; {benchmark.happened['rounds']} rounds, {seen['date'][:10]}."
    )


def sizes(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return `size`, variant, megabytes and ratio of everything weighed, as texts."""
    found = benchmark.happened["bytes"]
    first = next(iter(found.values()), 0)
    return [("size", name, f"{size / 1e6:.2f} MB", f"{size / first:.3f}") for name, size in found.items()]


def row(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Render one case beside the first of its job: job, variant, median, ratio and quartiles."""
    median = statistics.median(case["seconds"])
    if case["job"] == MACHINE:
        shown = f"{(case.get('bytes') or case['flops']) / median / 1e9:,.1f} {'GB' if 'bytes' in case else 'GFLOP'}/s"
        return case["job"], case["variant"], shown, "", ""
    base = next(other for other in cases if other["job"] == case["job"])
    shown = f"{case['tokens'] / median:,.1f} tokens/s" if case["tokens"] else f"{1000 * median:,.1f} ms"
    first, second = (base, case) if case["tokens"] else (case, base)
    paired = ratio(first["seconds"], second["seconds"])
    spread = "" if base is case else f"{paired.low:.3f} – {paired.high:.3f}"
    return case["job"], case["variant"], shown, f"{paired.median:.3f}", spread


def usage(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Render what a case takes: operations, the share of the machine's rate at them, and peak memory."""
    peak = f"{case['peak'] / 1e6:,.1f}" if "peak" in case else ""
    if "flops" not in case or case["job"] == MACHINE:
        return "", "", peak
    after = cases[cases.index(case) :]  # a group's own limits are the last of its cases
    limit = next(other for other in after if other["job"] == MACHINE and other.get("precision") == case["precision"])
    rate = ratio(limit["seconds"], case["seconds"]).median / (limit["flops"] / case["flops"])
    return f"{case['flops'] / 1e9:,.1f}", f"{100 * rate:.0f} %", peak
