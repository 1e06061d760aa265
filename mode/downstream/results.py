"""Results of downstream tasks, and their rendering.

A result is a JSON file in `downstream/` of a folder of results. The file has what was asked (run, task, version,
prompt), what happened, and the conditions. `downstream.md` and `downstream.csv` are rendered from these files alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from mode.core.escape import escape_html, escape_markdown, format_code, format_file_name
from mode.records.collection import Collection
from mode.records.measurement import Measurement, pick_fields

SCHEMA = 1


SHARES = ("pass@1", "exact_match", "acc", "acc_norm")
"""Metrics that are shares and are shown in per cent."""


INTRO = (
    "Decoding is greedy. Scores have their standard error over the questions asked, in per cent if the metric is a "
    "share. Unparsed: answers that could not be parsed, which count as wrong; a dash if every answer can be parsed. "
    "Cut: questions whose prompt was truncated at its beginning to fit the context. If not all questions are asked, "
    "the first ones are. With few questions the error is large. If all answers are wrong, the formula gives an error "
    "of 0, which has no meaning."
)


@dataclass(frozen=True)
class Request:
    """Run, task and limit of a result.

    Attributes:
        run: Id of the run.
        run_name: Readable name of the run.
        backbone: Name of the backbone.
        task: Name of the task.
        version: Version of the task.
        metric: Name of the headline metric.
        num_fewshot: Number of worked examples in a prompt.
        chance: Score of random guessing, as a share; None if unknown.
        max_tokens: Maximum number of tokens of an answer; None or 0 if nothing is generated.
        stop: Texts that end an answer.
        unparsed: Description of unparsed answers; empty if every answer can be parsed.
        prompt: Template of the prompt.
        prompt_sha256: Digest of the prompt.
        limit: Number of questions asked, from the first; None for all.
    """

    run: str
    run_name: str
    backbone: str
    task: str
    version: int | str
    metric: str
    num_fewshot: int
    chance: float | None
    max_tokens: int | None
    stop: Sequence[str]
    unparsed: str | None
    prompt: str
    prompt_sha256: str
    limit: int | None


@dataclass(frozen=True)
class Outcome:
    """Scores of a result.

    Attributes:
        n: Number of questions asked.
        of: Number of questions of the task.
        score: Value of the headline metric.
        stderr: Standard error of the score.
        metrics: Value and standard error of every metric, by name.
        unparsed: Number of unparsed answers; None if every answer can be parsed.
        truncated: Number of prompts that were truncated at their beginning.
        outcomes: Number of answers by outcome.
        seconds: Duration of the scoring.
    """

    n: int
    of: int
    score: float
    stderr: float | None
    metrics: Mapping[str, Mapping[str, float | None]]
    unparsed: int | None
    truncated: int
    outcomes: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Result(Measurement):
    """Result of a run on a task.

    `asked` and `happened` have the contents of the file; `request` and `outcome` have the same values by name.
    `provenance` has the data with its digest, and the conditions. `happened` also has the score of every question.
    """

    @cached_property
    def request(self) -> Request:
        """Run, task and limit."""
        return pick_fields(Request, self.asked)

    @cached_property
    def outcome(self) -> Outcome:
        """Scores."""
        return pick_fields(Outcome, self.happened)

    @property
    def filename(self) -> str:
        """Name of the result's file: the run, the task, and the limit on questions if there is one."""
        limit = self.request.limit
        return f"{self.request.run}-{format_file_name(self.request.task)}{f'-first-{limit}' if limit else ''}.json"

    @property
    def score(self) -> str:
        """The score and its standard error, as text."""
        return format_metric(self.request.metric, self.outcome.score, self.outcome.stderr)

    @property
    def unparsed(self) -> str:
        """The number of unparsed answers, as text; a dash if every answer can be parsed."""
        count = self.outcome.unparsed
        return "–" if count is None else str(count)


def format_metric(metric: str, value: float, error: float | None) -> str:
    """Render a metric with its standard error.

    >>> format_metric("acc", 0.25, 0.0435), format_metric("word_perplexity", 12.5, None)
    ('25.00 ± 4.35', '12.50')
    """
    scale = 100 if metric in SHARES else 1
    return f"{scale * value:.2f}" + ("" if error is None else f" ± {scale * error:.2f}")


def format_row(result: Result) -> dict[str, str]:
    """Render a result as a row of the table."""
    asked, outcome = result.request, result.outcome
    others = [
        f"{name} {format_metric(name, value, None)}"
        for name, each in outcome.metrics.items()
        if name != asked.metric and (value := each["value"]) is not None
    ]
    others += [f"{count} {kind}" for kind, count in outcome.outcomes.items()]
    return {
        "Backbone": asked.backbone,
        "Run": f"{asked.run_name}-{asked.run}",
        "Task": f"{asked.task} v{asked.version}",
        "Shots": str(asked.num_fewshot),
        "Questions": f"{outcome.n} of {outcome.of}",
        "Metric": asked.metric,
        "Score": result.score,
        "Unparsed": result.unparsed,
        "Cut": str(outcome.truncated),
        "Besides": ", ".join(others),
    }


def make_frame(results: Sequence[Result]) -> pd.DataFrame:
    """Return results as a table of texts, with a row for every result."""
    return pd.DataFrame([format_row(result) for result in results])


def describe_task(result: Result) -> str:
    """Render the description of a result's task in Markdown."""
    asked, data = result.request, result.provenance["data"]
    facts = [f"{asked.num_fewshot} worked examples", f"scored by {asked.metric}"]
    if asked.chance is not None:
        facts.append(f"guessing gives {100 * asked.chance:.0f} %")
    if asked.max_tokens:
        ends = ", ".join(format_code(repr(end)) for end in asked.stop)
        facts.append(f"answers of up to {asked.max_tokens} tokens, ended by {ends}")
    if asked.unparsed:
        facts.append(f"unparsed: {escape_html(asked.unparsed)}")
    about, source, licence = (escape_html(str(data[key])) for key in ("description", "requirement", "licence"))
    first = f"{about}. From {source}, licence: {licence}. {'; '.join(facts)}."
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", f"{asked.prompt}`")))
    prompt = f"The prompt (sha256 {asked.prompt_sha256}):\n\n{fence}\n{asked.prompt}\n{fence}\n"
    return f"## {escape_markdown(asked.task)} v{asked.version}\n\n{first} {prompt}"


def render_results(results: Sequence[Result]) -> dict[str, str]:
    """Render results in Markdown, and as CSV with one row per result and metric."""
    ordered = sorted(results, key=lambda each: (each.request.task, each.request.backbone, each.filename))
    cells = make_frame(ordered).map(escape_markdown)
    table = cells.to_markdown(index=False, disable_numparse=True)
    tasks = {
        (each.request.task, each.request.version, each.request.prompt_sha256): describe_task(each) for each in ordered
    }
    parts = ["# Downstream tasks", INTRO, str(table), *tasks.values()]
    lines: list[dict[str, Any]] = []
    for result in ordered:
        asked, outcome = result.request, result.outcome
        names = ("backbone", "run", "run_name", "task", "version", "prompt_sha256", "num_fewshot")
        plain = {name: getattr(asked, name) for name in names} | {"n": outcome.n, "of": outcome.of}
        counts = {"unparsed": outcome.unparsed, "truncated": outcome.truncated}
        for name, each in outcome.metrics.items():
            lines.append({**plain, "metric": name, **each, **counts})
    csv = pd.DataFrame(lines).astype({"unparsed": "Int64"}).to_csv(index=False, float_format="%.6g")
    return {"md": "\n\n".join(parts), "csv": str(csv)}


COLLECTION = Collection("downstream", "result", Result, SCHEMA, "mode eval --downstream", render_results)
"""The downstream results in a folder of results, and the files that are rendered from them."""
