"""Records of benchmarks, and their rendering."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode.bench.figures import draw_layouts, draw_scale
from mode.bench.ratios import MACHINE, compute_ratio
from mode.config.names import OLD_NAMES
from mode.core.escape import escape_html, escape_markdown, format_file_name
from mode.records.collection import Collection
from mode.records.measurement import Measurement, make_id

SCHEMA = 1


FIGURES = {"scale": draw_scale, "sharding": draw_layouts}
"""Suites whose records have a figure, with the function that draws it."""


SUITES_IN_RECORDS = {"inference": "edge"}
"""From today's name of a suite to its name in records, which never changes. The old name is still accepted."""


HEADS = ("Job", "Variant", "Median", "Ratio", "Quartiles")
"""Columns of every table."""


USAGE = ("GFLOP", "Of peak", "Peak MB")
"""Further columns of tables with operations or peak memory."""


INTRODUCTION = (
    "Every variant is timed once per round, in one process. The order is reversed from round to round. Ratios are "
    "relative to the first variant of the same job: of tokens per second (more is better) if tokens are counted, else "
    "of time or size (less is better). They are medians and quartiles of paired ratios of the rounds. Loading and "
    "exchange include the first token, since memory-mapped weights are read on first use. Absolute values are medians "
    "and hold only for the machine of the measurement."
)


@dataclass(frozen=True)
class Benchmark(Measurement):
    """Record of a suite.

    Its identity is what was asked and the machine, so a second measurement replaces the first. `asked` has suite,
    backbone, shape, threads, precision and options. `happened` has the cases (job, variant, tokens, seconds by round)
    and sizes in bytes.
    """

    def compute_id(self) -> str:
        """Return the id that follows from what was asked, the backbone and the machine."""
        return make_id([self.asked, self.provenance["backbone"], self.provenance["machine"]])

    @property
    def title(self) -> str:
        """Suite and backbone, as a heading."""
        return f"{find_suite(self.asked['suite'])}: {self.asked['backbone']}"

    @property
    def filename(self) -> str:
        """Name of the record's file. Only the id identifies the record."""
        return f"{self.asked['suite']}-{format_file_name(self.asked['backbone'])}-{self.id}.json"


def find_suite(name: str) -> str:
    """Return today's name of a suite for its name in records; others are returned as they are.

    >>> find_suite("edge"), find_suite("loss")
    ('inference', 'loss')
    """
    return {recorded: today for today, recorded in SUITES_IN_RECORDS.items()}.get(name, name)


def render_benchmarks(benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Render benchmarks in Markdown."""
    return {"md": "\n".join(["# Benchmarks", "", INTRODUCTION, *(f"\n{render_section(one)}" for one in benchmarks)])}


def draw_figures(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """Draw the figure of every benchmark whose suite has one."""
    for benchmark in benchmarks:
        if benchmark.asked["suite"] in FIGURES:
            path = folder / f"bench-{benchmark.filename.removesuffix('.json')}.png"
            FIGURES[benchmark.asked["suite"]](benchmark.happened["cases"], path)


COLLECTION = Collection("bench", "benchmark", Benchmark, SCHEMA, "mode bench branches", render_benchmarks, draw_figures)
"""The benchmarks in a folder of results, and the files that are rendered from them."""


def render_section(benchmark: Benchmark) -> str:
    """Render one benchmark in Markdown."""
    heads, *rows = make_cells(benchmark)
    lines = [
        f"## {escape_markdown(benchmark.title)}",
        "",
        escape_html(describe_conditions(benchmark)),
        "",
        f"| {' | '.join(heads)} |",
        "|:----|:--------|-------:|------:|----------:|" + (len(heads) - len(HEADS)) * "------:|",
        *(f"| {' | '.join(map(escape_markdown, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def make_cells(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return the rows of a benchmark's table, headings first. Columns of usage are left out if nothing was counted."""
    cases = benchmark.happened["cases"]
    timed = [(*format_case(case, cases), *format_usage(case, cases)) for case in cases]
    sizes = [(*row, *[""] * (1 + len(USAGE))) for row in format_sizes(benchmark)]
    counted = any("flops" in case or "peak" in case for case in cases)
    return [row if counted else row[: len(HEADS)] for row in (HEADS + USAGE, *timed, *sizes)]


def describe_conditions(benchmark: Benchmark) -> str:
    """Describe the shape, the machine, the versions and the date of a benchmark in one line."""
    asked, provenance = benchmark.asked, benchmark.provenance
    machine = provenance["machine"]
    return (
        f"{asked['num_blocks']} blocks, {asked['expert_layers']} layers per expert and block, {asked['precision']}"
        f"{'; {} rows of {} tokens'.format(*asked['rows']) if 'rows' in asked else ''}"
        f"{''.join(f'; {OLD_NAMES.get(key, key)}={value}' for key, value in asked.get('options', {}).items())}; "
        f"{machine['device']} of {machine['processor']}, {asked['threads']} of {machine['cores']} threads; "
        f"torch {provenance['versions']['torch']}; {benchmark.happened['rounds']} rounds, {provenance['date'][:10]}."
    )


def format_sizes(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """Return `size`, variant, megabytes and ratio of every size, as texts."""
    sizes = benchmark.happened["bytes"]
    first = next(iter(sizes.values()), 0)
    return [("size", name, f"{size / 1e6:.2f} MB", f"{size / first:.3f}") for name, size in sizes.items()]


def format_case(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return job, variant, median, ratio to the first case of the job, and quartiles, as texts."""
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
    """Return operations, share of the machine's peak rate, and peak memory of a case, as texts."""
    peak = f"{case['peak'] / 1e6:,.1f}" if "peak" in case else ""
    if "flops" not in case or case["job"] == MACHINE:
        return "", "", peak
    after = cases[cases.index(case) :]  # the limits of the machine are the last cases of a group
    limit = next(other for other in after if other["job"] == MACHINE and other.get("precision") == case["precision"])
    rate = compute_ratio(limit["seconds"], case["seconds"]).median / (limit["flops"] / case["flops"])
    return f"{case['flops'] / 1e9:,.1f}", f"{100 * rate:.0f} %", peak
