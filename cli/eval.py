"""Command `mode eval`: score finished runs on their domains and on downstream tasks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfOption, MetricOption, Overrides, complete, reporting_errors
from mode.core.files import expand_home

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.downstream.results import Result
    from mode.records.metrics import Metric
    from mode.records.record import Record


def score_downstream(run: Run, names: Sequence[str], limit: int | None, conf: Path | None, *, again: bool) -> None:
    """Score a finished run on downstream tasks, and write the results."""
    from mode.downstream.run import plan_tasks, score_tasks
    from mode.runs.prepare import prepare_run, require_finished

    planned = plan_tasks(names, expand_home(run.paths.cache), conf)
    prepared = prepare_run(run)
    record = require_finished(prepared)
    print(f"run {prepared.id}: {record.filename.removesuffix('.json')}", file=sys.stderr)
    for result, existed in score_tasks(prepared, record, planned, limit=limit, overwrite=again, done=print_progress):
        print(describe_result(result) + ("  (exists; --again scores it again)" if existed else ""))
    print("`mode report downstream` renders all", file=sys.stderr)


def print_progress(name: str, number: int, total: int) -> None:
    """Print the progress of a task: in place on a terminal, else about ten lines per task."""
    if sys.stderr.isatty():
        print(f"\r{name}: {number} of {total}", end="\n" if number == total else "", file=sys.stderr, flush=True)
    elif number == total or number % max(1, total // 10) == 0:
        print(f"{name}: {number} of {total}", file=sys.stderr)


def describe_result(result: Result) -> str:
    """Return a result as one line of text."""
    asked, outcome = result.request, result.outcome
    parts = [
        f"{asked.task} v{asked.version}",
        f"{asked.metric} {result.score}",
        f"{outcome.n} of {outcome.of} questions",
        f"{asked.num_fewshot} shots",
        f"unparsed {result.unparsed}",
        *(f"{count} {kind}" for kind, count in outcome.outcomes.items() if kind != "unparsed"),
        *([f"{outcome.truncated} prompts cut"] if outcome.truncated else []),
        f"{outcome.seconds:.0f} s",
        f"prompt {asked.prompt_sha256}",
    ]
    return "  ".join(parts)


def evaluate(
    overrides: Overrides = None,
    retention: Annotated[
        bool, typer.Option("--retention", help="Show target and retention of every finished run.")
    ] = False,
    downstream: Annotated[
        bool, typer.Option("--downstream", help="Score the run on downstream tasks: HumanEval, GSM8K, HellaSwag.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="With --downstream: a task; repeatable.", autocompletion=complete("downstream")),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --downstream: maximum number of questions per task.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="With --downstream: score tasks again.")] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Score the run on rows in which the domain changes every few tokens.")
    ] = False,
    metric: MetricOption = None,
    conf: ConfOption = None,
) -> None:
    """Score finished runs.

    Without flags: score the run of the given settings on its domains, from its weights, and compare with its record.
    With --downstream: score the same run on downstream tasks.
    With --mixed: score the same run on rows in which the domain changes every 32, 64 or 128 tokens.
    With --retention: show every finished run next to the bare backbone, from records. The backbone is scored first if
    it has no record.

    Examples: mode eval --retention; mode eval method=sft; mode eval --downstream --task gsm8k-100 method=sft
    """
    with reporting_errors():
        from mode.config.compose import compose
        from mode.core.errors import ConfigError

        check_flags({"--downstream": downstream, "--retention": retention, "--mixed": mixed})
        if not downstream and (task or limit is not None or again):
            raise ConfigError("--task, --limit and --again go with --downstream")
        if metric and not retention:
            raise ConfigError("--metric goes with --retention; without it every metric is printed")
        run = compose(overrides or [], conf)
        if downstream:
            score_downstream(run, task or [], limit, conf, again=again)
        elif retention:
            show_retention(overrides or [], conf, metric or ["accuracy"])
        elif mixed:
            score_mixed_rows(run, conf)
        else:
            rescore(run)


def check_flags(flags: Mapping[str, bool]) -> None:
    """Check that at most one of several flags is given.

    Raises:
        ConfigError: Several are given.
    """
    from mode.core.errors import ConfigError

    given = [name for name, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: give one of them")


def score_mixed_rows(run: Run, conf: Path | None) -> None:
    """Score a finished run on mixed rows, write the result and print it."""
    from mode.downstream.mixed import score_mixed
    from mode.downstream.mixed_results import render_mixed

    result, path = score_mixed(run, lambda text: print(text, file=sys.stderr), conf)
    print(render_mixed([result])["md"], end="")
    print(f"written to {path}; `mode report mixed` renders all", file=sys.stderr)


def show_retention(overrides: Sequence[str], conf: Path | None, names: Sequence[str]) -> None:
    """Print metrics of every finished run. The bare backbone is scored first if it has no record."""
    from mode.config.check import replace_settings
    from mode.config.compose import compose
    from mode.records.metrics import find_metrics
    from mode.records.record import read_records
    from mode.runs.execute import execute

    metrics = find_metrics(names)
    bare = compose([*overrides, "method=backbone"], conf)
    baseline = execute(replace_settings(bare, track=replace_settings(bare.track, mode="none")))
    records = read_records(expand_home(bare.paths.results))
    for metric in metrics:
        print_retention(records, baseline, metric)


def rescore(run: Run) -> None:
    """Score a finished run from its weights, and compare the accuracies with its record.

    Raises:
        ConfigError: The run is not finished, or an accuracy differs from the record's.
    """
    from cli.train import print_scores
    from mode.core.device import describe_device
    from mode.core.errors import ConfigError
    from mode.records.provenance import describe_environment
    from mode.runs.execute import load_finished
    from mode.runs.fit import score_domains
    from mode.runs.prepare import prepare_run, require_finished

    prepared = prepare_run(run)
    record = require_finished(prepared)
    model, device = load_finished(prepared)
    scores = score_domains(prepared, model, run.evaluate.split)
    print(f"run {prepared.id}, scored from its weights")
    print_scores(scores, record.request.targets)
    here = describe_environment(describe_device(device), run.train.threads)
    for name, score in record.outcome.scores.items():
        if scores[name].accuracy != score.accuracy:
            other = [key for key in ("versions", "machine", "threads") if record.provenance.get(key) != here[key]]
            raise ConfigError(
                f"accuracies differ from the record's: {name} is {100 * scores[name].accuracy:.4f} %, and "
                f"{100 * score.accuracy:.4f} % in {prepared.results / 'records' / record.filename}; "
                + (
                    f"the record was made with other {', '.join(other)}"
                    if other
                    else "the weights are not those scored"
                )
            )
    print("accuracies equal the record's")


def print_retention(records: Sequence[Record], baseline: Record, metric: Metric) -> None:
    """Print a metric, by domain, and its retention for the bare backbone and every comparable record.

    Args:
        records: All records.
        baseline: Record of the bare backbone.
        metric: The metric.
    """
    from mode.tables.columns import RETENTION, TARGET, Column
    from mode.tables.compile import compute_qualities

    comparable = [record for record in records if record.id != baseline.id and are_comparable(record, baseline)]
    differences = list_differences([baseline, *comparable])
    parts = [*baseline.outcome.scores, TARGET, RETENTION]
    widths = [max(10, len(part) + 2) for part in parts]
    print(f"{'run':<44}" + "".join(f"{part:>{width}}" for part, width in zip(parts, widths, strict=True)))
    for record in [baseline, *comparable]:
        values = compute_qualities(record, baseline, [metric])
        cells = ""
        for part, width in zip(parts, widths, strict=True):
            value, sign = values.get(Column(part, metric).name), "+" if part == RETENTION else ""
            cells += f"{'–':>{width}}" if value is None else f"{value:>{sign}{width}.{metric.decimals}f}"
        print(f"{record.filename.removesuffix('.json'):<44}{cells}  {differences[record.id]}".rstrip())
    hidden = len(records) - len(comparable) - 1
    if hidden:
        print(f"{hidden} records on other data, domains or context lengths, or another backbone, are not shown")


def list_differences(records: Sequence[Record]) -> dict[str, str]:
    """Return, by run id, the settings in which a record differs from others with its method and targets."""
    from mode.config.check import flatten

    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(f"{record.request.method} {record.request.targets}", []).append(record)
    differences: dict[str, str] = {}
    for members in groups.values():
        flat = {record.id: flatten(record.asked) for record in members}
        keys = dict.fromkeys(key for settings in flat.values() for key in settings)
        differing = [key for key in keys if len({str(settings.get(key)) for settings in flat.values()}) > 1]
        for run_id, settings in flat.items():
            shown = [key for key in differing if key in settings and key != "seed"]
            differences[run_id] = " ".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in shown)
    return differences


def are_comparable(record: Record, other: Record) -> bool:
    """Return whether two records score the same tokens, with the same context, data, backbone and precision."""
    return (
        record.conditions == other.conditions
        and list(record.outcome.scores) == list(other.outcome.scores)
        and record.outcome.split == other.outcome.split
        and all(
            score.document_tokens == other.outcome.scores[name].document_tokens
            for name, score in record.outcome.scores.items()
        )
        and record.request.sequence_length == other.request.sequence_length
        and record.request.scoring == other.request.scoring
    )
