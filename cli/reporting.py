"""mode eval, mode report, mode reproduce."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfOption, Overrides, complete, take_list, told

if TYPE_CHECKING:
    from mode.record import Record
    from mode.reproduce import Outcome, Start
    from mode.settings import Run

Rendered = tuple[str, list[str]]
"""A table and the overrides that it was rendered under."""
PUBLISHED = Path(__file__).parent.parent / "results"


def evaluate(
    overrides: Overrides = None,
    retention: Annotated[
        bool, typer.Option("--retention", help="Show target and retention accuracy of every finished run.")
    ] = False,
    downstream: Annotated[
        bool, typer.Option("--downstream", help="Score the run on downstream tasks: HumanEval, GSM8K, HellaSwag.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="With --downstream: a task; repeat it.", autocompletion=complete("downstream")),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --downstream: questions of each task.")] = None,
    again: Annotated[bool, typer.Option("--again", help="With --downstream: score anew what has a result.")] = False,
    conf: ConfOption = None,
) -> None:
    """Score runs on every domain against the bare backbone.

    With --retention: every finished run, from its record; the backbone is scored first if it has no record yet.
    With --downstream: the run that the settings describe, on downstream tasks, from its weights.
    Without: that run on its domains, from its weights.

    Examples: mode eval --retention; mode eval method=sft; mode eval --downstream --task gsm8k-100 method=sft
    """
    with told():
        from mode import config
        from mode.checked import ConfigError

        if downstream and retention:
            raise ConfigError("--downstream and --retention are two commands: give one of them")
        if not downstream and (task or limit is not None or again):
            raise ConfigError("--task, --limit and --again go with --downstream")
        given = list(overrides or [])
        run = config.compose(given, conf)
        if downstream:
            from cli.downstream import score_downstream

            score_downstream(run, task or [], limit, conf, again=again)
            return
        if not retention:
            rescore(run)
            return
        from mode.record import read_records
        from mode.runner import execute

        bare = config.compose([*given, "method=backbone"], conf)
        zero = execute(config.replace_settings(bare, track=config.replace_settings(bare.track, mode="none")))
        print_retention(read_records(Path(run.paths.results).expanduser()), zero)


def rescore(run: Run) -> None:
    """Score a finished run from its weights and compare with its record."""
    from dataclasses import asdict

    from cli.train import print_scores
    from mode.checked import ConfigError
    from mode.device import set_up
    from mode.prepared import finished, prepare_run
    from mode.quantized import quantize_frozen
    from mode.runner import restore
    from mode.stage import score

    prepared = prepare_run(run)
    record = finished(prepared)
    if record is None:
        raise ConfigError(f"run {prepared.id} is not finished: no record in {prepared.results / 'records'}")
    device, model = set_up(run), restore(prepared)
    quantize_frozen(model, run.train.frozen_weights)
    model = model.to(device)
    scores = {name: asdict(value) for name, value in score(prepared, model, run.evaluate.split).items()}
    print(f"run {prepared.id}, scored from its weights")
    print_scores(type(record)(**{**vars(record), "happened": {**record.happened, "scores": scores}}))
    same = all(
        scores[name]["accuracy"] == record.happened["scores"][name]["accuracy"] for name in record.happened["scores"]
    )
    print("accuracies equal the record's" if same else "accuracies differ from the record's")


def print_retention(records: Sequence[Record], zero: Record) -> None:
    """Print target and retention accuracy of every record under the sky of the bare backbone's."""
    from mode.compiled import qualities

    same = [record for record in records if record.id != zero.id and comparable(record, zero)]
    apart = distinctions([zero, *same])
    names = list(zero.happened["scores"])
    print(f"{'run':<44}" + "".join(f"{name:>10}" for name in names) + f"{'target':>10}{'retention':>11}")
    for record in [zero, *same]:
        values = qualities(record, zero)
        label = record.filename.removesuffix(".json")
        cells = "".join(f"{values[name]:>10.2f}" for name in names)
        kept = f"{values['retention']:>+11.2f}" if "retention" in values else f"{'–':>11}"
        print(f"{label:<44}{cells}{values['target']:>10.2f}{kept}  {apart[record.id]}".rstrip())
    hidden = len(records) - len(same) - 1
    if hidden:
        print(f"{hidden} records on other data, domains or context lengths, or another backbone, are not shown")


def distinctions(records: Sequence[Record]) -> dict[str, str]:
    """Say, by run id, which settings tell a record apart from the others of its method and targets."""
    from mode import config

    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(f"{record.asked['method']['_target_']} {record.asked['targets']}", []).append(record)
    told: dict[str, str] = {}
    for members in groups.values():
        flat = {record.id: config.flatten(record.asked) for record in members}
        keys = dict.fromkeys(key for settings in flat.values() for key in settings)
        differing = [key for key in keys if len({str(settings.get(key)) for settings in flat.values()}) > 1]
        for run_id, settings in flat.items():
            shown = [key for key in differing if key in settings and key != "seed"]
            told[run_id] = " ".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in shown)
    return told


def comparable(record: Record, zero: Record) -> bool:
    """Say whether two records score the same tokens of the same domains with the same context, under one sky."""
    return (
        record.sky == zero.sky
        and list(record.happened["scores"]) == list(zero.happened["scores"])
        and record.happened["split"] == zero.happened["split"]
        and record.asked["train"]["sequence_length"] == zero.asked["train"]["sequence_length"]
    )


def report(
    table: Annotated[
        str | None,
        typer.Argument(help="Table, or bench, downstream or pruning.", autocompletion=complete("table")),
    ] = None,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a published table no longer follows from its records.")
    ] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log the tables and figures to Weights & Biases too.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Write tables, figures and every run as one page, report.html.")
    ] = False,
    conf: ConfOption = None,
) -> None:
    """Render tables and figures from records; alone, all that there are records for.

    Examples: mode report table1; mode report --check; mode report --html
    """
    with told():
        from mode import config
        from mode.checked import ConfigError, nearest
        from mode.sheet import SHEETS

        if table is not None and "=" in table:
            overrides, table = [table, *(overrides or [])], None
        refuse_both({"--check": check, "--wandb": wandb, "--html": html})
        given = list(overrides or [])
        names = [*config.list_members("table", conf), *SHEETS]
        if table is not None and table not in names:
            raise ConfigError(f"table {table}: not one of {', '.join(names)}{nearest(table, names)}")
        results = results_folder(given, conf)
        if check:
            chosen = results if any(text.startswith("paths.results=") for text in given) else PUBLISHED
            check_published(chosen, [table] if table else names, conf)
            return
        folder = table if table in SHEETS else "records"
        published = not any((results / folder).glob("*.json")) and any((PUBLISHED / folder).glob("*.json"))
        if published:
            print(f"no records in {results}; these are the published ones", file=sys.stderr)
        chosen = PUBLISHED if published else results
        shown = [table] if table else names
        if html:
            print_page(shown, chosen, results, given, conf)
            return
        rendered = render_tables(shown, chosen, given, conf, write=not published)
        if wandb:
            publish_tables(rendered, chosen, given, conf)


def refuse_both(flags: Mapping[str, bool]) -> None:
    """Refuse two flags that each do something else with what was rendered."""
    from mode.checked import ConfigError

    given = [name for name, chosen in flags.items() if chosen]
    if len(given) > 1:
        does = {"--check": "compares files", "--wandb": "logs tables", "--html": "writes a page"}
        raise ConfigError(f"{' and '.join(f'{name} {does[name]}' for name in given)}: one of the two")


def print_page(names: Sequence[str], records: Path, results: Path, given: Sequence[str], conf: Path | None) -> None:
    """Write the page of some tables into the folder of results, wherever its records lie, and print where it is."""
    from mode.page import write_page

    tables = [(name, each) for name in names for each in known_variants(name, given, conf)]
    print(write_page(tables, records, results, conf))


def publish_tables(rendered: Sequence[Rendered], results: Path, given: Sequence[str], conf: Path | None) -> None:
    """Log rendered tables to Weights & Biases."""
    from mode import config
    from mode.checked import ConfigError
    from mode.publish import publish
    from mode.sheet import SHEETS

    run = config.compose(given, conf)
    tables = [item for item in rendered if item[0] not in SHEETS]
    if run.track.mode == "none" or not tables:
        raise ConfigError("--wandb with track=none logs nowhere" if tables else "--wandb: no table to log")
    run_id = publish(
        tables, config.replace_settings(run, paths=config.replace_settings(run.paths, results=str(results))), conf
    )
    where = "`mode sync` pushes it" if run.track.mode == "offline" else "pushed"
    print(f"logged to Weights & Biases as {run_id}: {where}", file=sys.stderr)


def check_published(results: Path, names: Sequence[str], conf: Path | None) -> None:
    """Compare the tables of a results folder with those that follow from its records."""
    from mode.checked import ConfigError
    from mode.report import check_tables
    from mode.sheet import SHEETS, find_sheet

    tables = [name for name in names if name not in SHEETS]
    stale = check_tables(results, tables, conf) if tables else []
    stale += [path for name in names if name in SHEETS for path in find_sheet(name).stale(results)]
    if stale:
        raise ConfigError(f"{stale[0]} does not follow from the records beside it: `mode report` makes it anew")
    print(f"every table in {results} follows from its records")


def render_tables(
    names: Sequence[str], results: Path, given: Sequence[str], conf: Path | None, *, write: bool
) -> list[Rendered]:
    """Render every table that there are records for, and each under the experiments and budgets that it knows."""
    from mode.checked import NothingError
    from mode.report import report as render_report
    from mode.sheet import SHEETS, find_sheet

    rendered: list[Rendered] = []
    for name in names:
        variants = known_variants(name, given, conf)
        for each in variants:
            try:
                if name in SHEETS:
                    text, path = find_sheet(name).report(results, write=write)
                else:
                    text, path = render_report(name, results, each, conf, write=write)
            except NothingError:
                if len(names) == len(variants) == 1:
                    raise
                continue
            print(text)
            if write:
                print(f"written to {path}", file=sys.stderr)
            rendered.append((name, each))
    if not rendered:
        raise NothingError(f"no record of {names[0]} in {results / 'records'}: `mode reproduce {names[0]}` makes them")
    return rendered


def known_variants(table: str, given: Sequence[str], conf: Path | None) -> list[list[str]]:
    """Return the overrides to render a table under: those given alone if they choose, else each that it knows."""
    from mode.sheet import SHEETS
    from mode.table import load_table

    if table in SHEETS or any(text.startswith(("experiment=", "budget=")) for text in given):
        return [list(given)]
    return [[*variant, *given] for variant in load_table(table, conf).variants]


def results_folder(overrides: Sequence[str], conf: Path | None) -> Path:
    """Return the folder that the configuration puts records in."""
    from mode import config

    return Path(config.compose(overrides, conf).paths.results).expanduser()


def reproduce(
    table: Annotated[str, typer.Argument(help="Table to make.", autocompletion=complete("table"))],
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one per core.")] = 0,
    launcher: Annotated[
        str, typer.Option("--launcher", help="Where runs are executed.", autocompletion=complete("launcher"))
    ] = "local",
    conf: ConfOption = None,
) -> None:
    """Execute every run that a table needs, skipping those that exist, then render it.

    A run whose process dies is started again from its checkpoint; one that fails is told, and the rest go on.

    Example: mode reproduce table1 seeds=[0,1,2]
    """
    with told():
        from cli.progress import make_display
        from mode.reproduce import run_all, table_runs

        given, seeds = take_list(overrides or [], "seeds")
        runs = table_runs(table, seeds, given, conf)
        start, retries = started_by(launcher, runs, conf)
        with make_display() as display:
            outcome = run_all(runs, jobs=jobs or default_jobs(runs), display=display, start=start, retries=retries)
        finish(table, given, conf, outcome)


def started_by(name: str, runs: Sequence[Run], conf: Path | None) -> tuple[Start | None, int]:
    """Return what starts a run, None for a process of this machine, and how often one that dies is started again."""
    from mode.launchers import read, starter

    launcher = read(name, conf)
    if launcher.kind == "local":
        return None, launcher.retries
    return starter(launcher, Path(runs[0].paths.runs).expanduser() / "jobs"), launcher.retries


def finish(table: str, overrides: Sequence[str], conf: Path | None, outcome: Outcome) -> None:
    """Render the table of what succeeded, and tell what failed."""
    from mode.checked import ConfigError
    from mode.report import report as render_report

    print(f"{outcome.executed} runs executed, {outcome.skipped} existed, {len(outcome.failed)} failed", file=sys.stderr)
    for run_id, error in outcome.failed.items():
        print(f"  {run_id}: {error}", file=sys.stderr)
    if outcome.failed and not outcome.executed and not outcome.skipped:
        raise ConfigError("no run succeeded")
    text, path = render_report(
        table, results_folder(overrides, conf), overrides, conf, write=True if outcome.executed else None
    )
    print(text)
    print(f"written to {path} with .tex, .csv and .png beside it", file=sys.stderr)
    if outcome.failed:
        raise typer.Exit(1)


def default_jobs(runs: Sequence[Run]) -> int:
    """Return how many runs fit on this machine: one on an accelerator, else as many as have cores for their threads."""
    if any(run.train.device != "cpu" for run in runs) and has_accelerator():
        return 1
    return max(1, (os.cpu_count() or 1) // max(run.train.threads for run in runs))


def has_accelerator() -> bool:
    """Say whether this machine has a CUDA device."""
    from mode.device import has_cuda

    return has_cuda()
