"""Run a benchmark suite, keep what it measured, and render that: speed as ratios of what was timed in turn."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mode.backbone import weights_fingerprint
from mode.checked import ConfigError, nearest
from mode.device import device_name, set_up
from mode.edge import edge
from mode.measurement import Measurement
from mode.modular_method import MoDE
from mode.record import surroundings
from mode.settings import Run
from mode.sheet import Sheet
from mode.steps import steps
from mode.timing import Case, interleave, ratio
from mode.train import precision_of

SCHEMA = 1
SUITES: dict[str, Callable[[Run, MoDE, torch.device, Path], tuple[list[Case], dict[str, int]]]] = {
    "edge": edge,
    "step": steps,
}
HEADS = ("Job", "Variant", "Median", "Ratio", "Quartiles")
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
    shape, threads and precision, `happened` the cases (job, variant, tokens, seconds by round) and bytes.
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
    if not isinstance(run.method, MoDE):
        raise ConfigError("a benchmark measures a model with experts: it goes with method=mode")
    results = Path(run.paths.results).expanduser() / SHEET.name
    results.mkdir(parents=True, exist_ok=True)  # now, so that a place where nothing can be written costs no time
    device = set_up(run)
    seen = surroundings(device_name(device), run.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases, sizes = SUITES[name](run, run.method, device, Path(folder))
        seconds = interleave(cases, rounds, done)
    asked = describe(name, run, run.method, device)
    told = [
        {"job": case.job, "variant": case.variant, "tokens": case.tokens, "seconds": [round(one, 6) for one in times]}
        for case, times in zip(cases, seconds, strict=True)
    ]
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


def describe(name: str, run: Run, method: MoDE, device: torch.device) -> dict[str, Any]:
    """Return what a benchmark is asked to measure."""
    return {
        "suite": name,
        "backbone": run.backbone.name,
        "num_blocks": method.num_blocks,
        "expert_layers": method.expert_layers,
        "gate": asdict(method.gate),
        "threads": run.train.threads,
        "precision": precision_of(run.train, device) if name == "step" else "fp32",
        **({"rows": [run.train.batch_size, run.train.sequence_length]} if name == "step" else {}),
    }


def render(benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Render benchmarks in Markdown."""
    return {"md": "\n".join(["# Benchmarks", "", INTRODUCTION, *(f"\n{section(each)}" for each in benchmarks)])}


SHEET = Sheet("bench", "benchmark", Benchmark, SCHEMA, f"mode bench {next(iter(SUITES))}", render)
"""The folder of benchmarks in a folder of results, and their table beside it."""


def section(benchmark: Benchmark) -> str:
    """Render one benchmark."""
    lines = [
        f"## {benchmark.title}",
        "",
        conditions(benchmark),
        "",
        f"| {' | '.join(HEADS)} |",
        "|:----|:--------|-------:|------:|----------:|",
        *(f"| {' | '.join(cells)} |" for cells in timings(benchmark)),
        *(f"| {' | '.join(cells)} | |" for cells in sizes(benchmark)),
    ]
    return "\n".join(lines) + "\n"


def conditions(benchmark: Benchmark) -> str:
    """Say what was measured, on what, and when."""
    asked, seen = benchmark.asked, benchmark.provenance
    machine = seen["machine"]
    return (
        f"{asked['num_blocks']} blocks, {asked['expert_layers']} layers per expert and block, {asked['precision']}"
        f"{'; {} rows of {} tokens'.format(*asked['rows']) if 'rows' in asked else ''}; "
        f"{machine['device']} of {machine['processor']}, {asked['threads']} of {machine['cores']} threads; "
        f"torch {seen['versions']['torch']}; {benchmark.happened['rounds']} rounds, {seen['date'][:10]}."
    )


def timings(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return job, variant, median, ratio and quartiles of everything timed, as texts."""
    cases = benchmark.happened["cases"]
    return [row(case, cases) for case in cases]


def sizes(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return `size`, variant, megabytes and ratio of everything weighed, as texts."""
    found = benchmark.happened["bytes"]
    first, *_ = found.values()
    return [("size", name, f"{size / 1e6:.2f} MB", f"{size / first:.3f}") for name, size in found.items()]


def row(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Render one case beside the first of its job."""
    base = next(other for other in cases if other["job"] == case["job"])
    median = statistics.median(case["seconds"])
    shown = f"{case['tokens'] / median:,.1f} tokens/s" if case["tokens"] else f"{1000 * median:,.1f} ms"
    first, second = (base, case) if case["tokens"] else (case, base)
    paired = ratio(first["seconds"], second["seconds"])
    spread = "" if base is case else f"{paired.low:.3f} – {paired.high:.3f}"
    return case["job"], case["variant"], shown, f"{paired.median:.3f}", spread
