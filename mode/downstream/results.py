"""Results of downstream tasks, and the report that follows from them.

A result is a JSON in `downstream/` of a folder of results: what was asked (run, task, version, prompt), what happened
and under what conditions. `downstream.md` and `downstream.csv` follow from them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from mode.records.collection import Collection
from mode.records.measurement import Measurement, pick_fields

SCHEMA = 1


SHARES = ("pass@1", "exact_match", "acc", "acc_norm")
"""Metrics that are shares, and shown in per cent."""


INTRO = (
    "Decoding is greedy. Scores stand with their standard error over the questions asked, in per cent where the metric "
    "is a share. Unparsed: answers that could not be read as answers, which count as wrong; a dash where every answer "
    "can be read. Cut: questions whose prompt lost its beginning, since the model reads no more. With few questions "
    "asked the score is of the first ones, and its error is large; where all are wrong the formula gives 0, which says "
    "nothing."
)


@dataclass(frozen=True)
class Request:
    """What a run was asked.

    Attributes:
        run: Id of the run.
        run_name: Name of the run, for people.
        backbone: Name of the backbone.
        task: Name of the task.
        version: Version of the task.
        metric: The metric that is the score.
        num_fewshot: Worked examples in a prompt.
        chance: Score of guessing; None where nobody guesses.
        max_tokens: Tokens of an answer; None or 0 where nothing is generated.
        stop: Texts that end an answer.
        unparsed: What counts as an unparsed answer; empty where every answer can be read.
        prompt: The prompt, as a template.
        prompt_sha256: Digest of the prompt.
        limit: Questions asked, the first ones; None for all.
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
    """What came of a task.

    Attributes:
        n: Questions asked.
        of: Questions of the task.
        score: The score.
        stderr: Standard error of the score.
        metrics: By name, the value and the standard error of every metric.
        unparsed: Unparsed answers; None where every answer can be read.
        truncated: Prompts whose beginning was cut off.
        outcomes: Answers by what became of them.
        seconds: Seconds of scoring.
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
    """What a run did on a task.

    `asked` and `happened` are what its file holds; `request` and `outcome` are the same by name. `provenance` has the
    data with their digest, and the conditions. `happened` also has the score of every question.
    """

    @cached_property
    def request(self) -> Request:
        """What was asked."""
        return pick_fields(Request, self.asked)

    @cached_property
    def outcome(self) -> Outcome:
        """What came of it."""
        return pick_fields(Outcome, self.happened)

    @property
    def filename(self) -> str:
        """Name of its file: the run, the task, and how many questions if not all."""
        limit = self.request.limit
        return f"{self.request.run}-{self.request.task}{f'-first-{limit}' if limit else ''}.json"

    @property
    def score(self) -> str:
        """The score and its standard error, as people read it."""
        return format_metric(self.request.metric, self.outcome.score, self.outcome.stderr)

    @property
    def unparsed(self) -> str:
        """The number of unparsed answers, as people read it."""
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
    """Render a result as a line of the table."""
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


def describe_task(result: Result) -> str:
    """Render what a task is."""
    asked, data = result.request, result.provenance["data"]
    facts = [f"{asked.num_fewshot} worked examples", f"scored by {asked.metric}"]
    if asked.chance is not None:
        facts.append(f"guessing gives {100 * asked.chance:.0f} %")
    if asked.max_tokens:
        ends = ", ".join(f"`{end!r}`" for end in asked.stop)
        facts.append(f"answers of up to {asked.max_tokens} tokens, ended by {ends}")
    if asked.unparsed:
        facts.append(f"unparsed: {asked.unparsed}")
    first = f"{data['description']}. From {data['requirement']}, licence: {data['licence']}. {'; '.join(facts)}."
    prompt = f"The prompt (sha256 {asked.prompt_sha256}):\n\n```\n{asked.prompt}\n```\n"
    return f"## {asked.task} v{asked.version}\n\n{first} {prompt}"


def render_results(results: Sequence[Result]) -> dict[str, str]:
    """Render results in Markdown, and as CSV with one line per result and metric."""
    ordered = sorted(results, key=lambda each: (each.request.task, each.request.backbone, each.filename))
    table = pd.DataFrame([format_row(result) for result in ordered]).to_markdown(index=False, disable_numparse=True)
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
"""The folder of results of downstream tasks in a folder of results, and the report beside it."""
