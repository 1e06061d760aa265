"""Records of benchmarks, and the page that is rendered from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode.bench.figures import draw_layouts, draw_scale
from mode.bench.timing import MACHINE, compute_ratio
from mode.config.names import OLD_NAMES
from mode.records.collection import Collection
from mode.records.measurement import Measurement

SCHEMA = 1


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


def render_benchmarks(benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Render benchmarks in Markdown."""
    return {"md": "\n".join(["# Benchmarks", "", INTRODUCTION, *(f"\n{render_section(each)}" for each in benchmarks)])}


def draw_figures(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """Draw the figure of every benchmark whose suite has one."""
    for each in benchmarks:
        if each.asked["suite"] in FIGURES:
            path = folder / f"bench-{each.filename.removesuffix('.json')}.png"
            FIGURES[each.asked["suite"]](each.happened["cases"], path)


COLLECTION = Collection("bench", "benchmark", Benchmark, SCHEMA, "mode bench branches", render_benchmarks, draw_figures)
"""The folder of benchmarks in a folder of results, and their table beside it."""


def render_section(benchmark: Benchmark) -> str:
    """Render one benchmark."""
    heads, *rows = make_cells(benchmark)
    lines = [
        f"## {benchmark.title}",
        "",
        describe_conditions(benchmark),
        "",
        f"| {' | '.join(heads)} |",
        "|:----|:--------|-------:|------:|----------:|" + (len(heads) - len(HEADS)) * "------:|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def make_cells(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return a benchmark's table as texts, its heads first; without columns of usage where nothing was counted."""
    found = benchmark.happened["cases"]
    timed = [(*format_case(case, found), *format_usage(case, found)) for case in found]
    weighed = [(*each, *[""] * (1 + len(USAGE))) for each in format_sizes(benchmark)]
    counted = any("flops" in case or "peak" in case for case in found)
    return [each if counted else each[: len(HEADS)] for each in (HEADS + USAGE, *timed, *weighed)]


def describe_conditions(benchmark: Benchmark) -> str:
    """Say what was measured, on what, and when."""
    asked, seen = benchmark.asked, benchmark.provenance
    machine = seen["machine"]
    return (
        f"{asked['num_blocks']} blocks, {asked['expert_layers']} layers per expert and block, {asked['precision']}"
        f"{'; {} rows of {} tokens'.format(*asked['rows']) if 'rows' in asked else ''}"
        f"{''.join(f'; {OLD_NAMES.get(key, key)}={value}' for key, value in asked.get('options', {}).items())}; "
        f"{machine['device']} of {machine['processor']}, {asked['threads']} of {machine['cores']} threads; "
        f"torch {seen['versions']['torch']}; {benchmark.happened['rounds']} rounds, {seen['date'][:10]}."
    )


def format_sizes(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return `size`, variant, megabytes and ratio of everything weighed, as texts."""
    found = benchmark.happened["bytes"]
    first = next(iter(found.values()), 0)
    return [("size", name, f"{size / 1e6:.2f} MB", f"{size / first:.3f}") for name, size in found.items()]


def format_case(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Render one case beside the first of its job: job, variant, median, ratio and quartiles."""
    median = statistics.median(case["seconds"])
    if case["job"] == MACHINE:
        shown = f"{(case.get('bytes') or case['flops']) / median / 1e9:,.1f} {'GB' if 'bytes' in case else 'GFLOP'}/s"
        return case["job"], case["variant"], shown, "", ""
    base = next(other for other in cases if other["job"] == case["job"])
    shown = f"{case['tokens'] / median:,.1f} tokens/s" if case["tokens"] else f"{1000 * median:,.1f} ms"
    first, second = (base, case) if case["tokens"] else (case, base)
    paired = compute_ratio(first["seconds"], second["seconds"])
    spread = "" if base is case else f"{paired.low:.3f} – {paired.high:.3f}"
    return case["job"], case["variant"], shown, f"{paired.median:.3f}", spread


def format_usage(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Render what a case takes: operations, the share of the machine's rate at them, and peak memory."""
    peak = f"{case['peak'] / 1e6:,.1f}" if "peak" in case else ""
    if "flops" not in case or case["job"] == MACHINE:
        return "", "", peak
    after = cases[cases.index(case) :]  # a group's own limits are the last of its cases
    limit = next(other for other in after if other["job"] == MACHINE and other.get("precision") == case["precision"])
    rate = compute_ratio(limit["seconds"], case["seconds"]).median / (limit["flops"] / case["flops"])
    return f"{case['flops'] / 1e9:,.1f}", f"{100 * rate:.0f} %", peak
