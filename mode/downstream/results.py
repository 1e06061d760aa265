"""Results of downstream tasks, and their rendering.

A result is a JSON file in `downstream/` of a folder of results. The file has what was asked (run, task, version,
prompt), what happened, and the conditions. `downstream.md` and `downstream.csv` are rendered from these files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mode.records.collection import Collection
from mode.records.measurement import Measurement

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
class Result(Measurement):
    """Result of a run on a task.

    `asked` has the run, the limit on questions, and the task with its version, prompt, worked examples, metric and
    limits. `happened` has the number of questions `n`, the score with its standard error and its value on every
    question, every metric, the numbers of unparsed answers and truncated prompts, and seconds. `provenance` has the
    data with its digest, and the conditions.
    """

    @property
    def filename(self) -> str:
        """Name of the result's file: the run, the task, and the limit on questions if there is one."""
        limit = self.asked["limit"]
        return f"{self.asked['run']}-{self.asked['task']}{f'-first-{limit}' if limit else ''}.json"

    @property
    def score(self) -> str:
        """The score and its standard error, as text."""
        return format_metric(self.asked["metric"], self.happened["score"], self.happened["stderr"])

    @property
    def unparsed(self) -> str:
        """The number of unparsed answers, as text; a dash if every answer can be parsed."""
        count = self.happened["unparsed"]
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
    asked, happened = result.asked, result.happened
    others = [
        f"{name} {format_metric(name, each['value'], None)}"
        for name, each in happened["metrics"].items()
        if name != asked["metric"]
    ]
    others += [f"{count} {outcome}" for outcome, count in happened["outcomes"].items()]
    return {
        "Backbone": asked["backbone"],
        "Run": f"{asked['run_name']}-{asked['run']}",
        "Task": f"{asked['task']} v{asked['version']}",
        "Shots": str(asked["num_fewshot"]),
        "Questions": f"{happened['n']} of {happened['of']}",
        "Metric": asked["metric"],
        "Score": result.score,
        "Unparsed": result.unparsed,
        "Cut": str(happened["truncated"]),
        "Besides": ", ".join(others),
    }


def describe_task(result: Result) -> str:
    """Render the description of a result's task in Markdown."""
    asked, data = result.asked, result.provenance["data"]
    facts = [f"{asked['num_fewshot']} worked examples", f"scored by {asked['metric']}"]
    if asked["chance"] is not None:
        facts.append(f"guessing gives {100 * asked['chance']:.0f} %")
    if asked["max_tokens"]:
        ends = ", ".join(f"`{end!r}`" for end in asked["stop"])
        facts.append(f"answers of up to {asked['max_tokens']} tokens, ended by {ends}")
    if asked["unparsed"]:
        facts.append(f"unparsed: {asked['unparsed']}")
    first = f"{data['description']}. From {data['requirement']}, licence: {data['licence']}. {'; '.join(facts)}."
    prompt = f"The prompt (sha256 {asked['prompt_sha256']}):\n\n```\n{asked['prompt']}\n```\n"
    return f"## {asked['task']} v{asked['version']}\n\n{first} {prompt}"


def render_results(results: Sequence[Result]) -> dict[str, str]:
    """Render results in Markdown, and as CSV with one row per result and metric."""
    ordered = sorted(results, key=lambda each: (each.asked["task"], each.asked["backbone"], each.filename))
    table = pd.DataFrame([format_row(result) for result in ordered]).to_markdown(index=False, disable_numparse=True)
    tasks = {
        (each.asked["task"], each.asked["version"], each.asked["prompt_sha256"]): describe_task(each)
        for each in ordered
    }
    parts = ["# Downstream tasks", INTRO, str(table), *tasks.values()]
    lines: list[dict[str, Any]] = []
    for result in ordered:
        asked, happened = result.asked, result.happened
        names = ("backbone", "run", "run_name", "task", "version", "prompt_sha256", "num_fewshot")
        plain = {name: asked[name] for name in names} | {name: happened[name] for name in ("n", "of")}
        counts = {name: happened[name] for name in ("unparsed", "truncated")}
        for name, each in happened["metrics"].items():
            lines.append({**plain, "metric": name, **each, **counts})
    csv = pd.DataFrame(lines).astype({"unparsed": "Int64"}).to_csv(index=False, float_format="%.6g")
    return {"md": "\n\n".join(parts), "csv": str(csv)}


SHEET = Collection("downstream", "result", Result, SCHEMA, "mode eval --downstream", render_results)
"""The downstream results in a folder of results, and the files that are rendered from them."""
