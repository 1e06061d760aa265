"""mode train, mode compose."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    AgainOption,
    ConfOption,
    DomainOption,
    Overrides,
    PrintOption,
    SweepOption,
    complete,
    reporting_errors,
    runs_folder,
    show_config,
    with_domains,
    with_fixed,
    with_method,
)

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.records.score import Score
    from mode.runs.prepare import Prepared
    from mode.train.curve import Point

app = typer.Typer(help="Train an expert, a baseline or the embedded backbone.", no_args_is_help=True)


@app.command("expert")
def expert(
    overrides: Overrides = None,
    domain: DomainOption = None,
    again: AgainOption = False,
    sweep: SweepOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Stage 1 of MoDE: train one expert for one domain.

    Example: mode train expert --domain code train.steps=300
    """
    with reporting_errors():
        given = with_domains(overrides or [], domain)
        given = with_method(given, "mode", "mode train expert", conf, variants=True)
        given = with_fixed(given, {"method.start": "fresh", "method.num_experts": "1"}, "mode train expert")
        launch(given, again=again, sweep=sweep, print_config=print_config, conf=conf, single=True)


@app.command("baseline")
def baseline(
    method: Annotated[str, typer.Argument(help="Method to train.", autocompletion=complete("method"))],
    overrides: Overrides = None,
    domain: DomainOption = None,
    again: AgainOption = False,
    sweep: SweepOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Train a method that MoDE is compared with.

    Example: mode train baseline lora --domain code,math method.rank=8
    """
    with reporting_errors():
        given = with_method(with_domains(overrides or [], domain), method, f"mode train baseline {method}", conf)
        launch(given, again=again, sweep=sweep, print_config=print_config, conf=conf)


@app.command("backbone")
def backbone(
    overrides: Overrides = None,
    again: AgainOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Pretrain the embedded backbone again, tokenizer included; over an hour on two cores.

    The weights end in runs/ID/backbone; use them with backbone.path=runs/ID/backbone.
    """
    with reporting_errors():
        given = list(overrides or [])
        if not any(text.startswith("experiment=") for text in given):
            given = ["experiment=pretrain_tiny", *given]
        given = with_method(given, "pretrain", "mode train backbone", conf)
        launch(given, again=again, sweep=False, print_config=print_config, conf=conf)


def compose(
    domains: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERT]... [KEY=VALUE]...",
            help="Experts to compose: a domain, a run's id, the folder of an expert or of a model; then settings.",
        ),
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Train the gates alone.")] = False,
    uninitialized: Annotated[bool, typer.Option("--uninitialized", help="Train fresh experts on the mix.")] = False,
    again: AgainOption = False,
    sweep: SweepOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Stage 2 of MoDE: compose one expert per domain into one model and fine-tune it on the mix.

    Without names, the experts of the configured target domains. A domain's expert is trained first if it is not yet. A
    model's folder stands for all its experts, so that what `mode expert add` wrote can be fine-tuned.

    Example: mode compose code math; mode compose code ~/experts/law
    """
    with reporting_errors():
        from mode.core.errors import ConfigError

        names = [text for text in domains or [] if "=" not in text]
        names, given = with_experts(names, [text for text in domains or [] if "=" in text], conf)
        given = with_domains(given, ",".join(names) or None)
        given = with_method(given, "mode", "mode compose", conf, variants=True)
        if frozen and uninitialized:
            raise ConfigError("--frozen trains gates alone, so it needs trained experts: not with --uninitialized")
        if frozen:
            given = with_fixed(given, {"method.train_experts": "false"}, "mode compose --frozen")
        if uninitialized:
            fixed = {"method.start": "fresh"} | ({"method.num_experts": str(len(names))} if names else {})
            given = with_fixed(given, fixed, "mode compose --uninitialized")
        launch(given, again=again, sweep=sweep, print_config=print_config, conf=conf)


def with_experts(names: Sequence[str], overrides: Sequence[str], conf: Path | None) -> tuple[list[str], list[str]]:
    """Turn names of experts into the domains they are for, with an override for those that are at hand."""
    from mode.config.compose import quote
    from mode.config.groups import list_members

    known = list_members("domain", conf)
    if all(name in known for name in names):
        return list(names), list(overrides)
    from mode.artefacts.find import find_expert_folder
    from mode.modular.artefact import read_descriptions

    runs = runs_folder(overrides, conf)
    folders = {name: find_expert_folder(name, runs, known) for name in names if name not in known}
    domains = [domain for name in names for domain in (read_descriptions(folders[name]) if name in folders else [name])]
    given = ", ".join(quote(str(folder)) for folder in folders.values())
    return domains, [*overrides, f"method.experts=[{given}]"]


def launch(
    overrides: Sequence[str],
    *,
    again: bool,
    sweep: bool,
    print_config: bool,
    conf: Path | None,
    single: bool = False,
) -> None:
    """Compose the runs that overrides describe, check them all, then execute them in order."""
    from mode.config.compose import compose as compose_run
    from mode.config.compose import expand_sweep
    from mode.core import processes
    from mode.core.errors import ConfigError

    sets = expand_sweep(overrides) if sweep else [list(overrides)]
    runs = [compose_run(each, conf) for each in sets]
    for run in runs:
        if single and len(run.targets) != 1:
            raise ConfigError(
                f"an expert has one domain, but targets={list(run.targets)}: choose one with --domain, "
                f"or train on the mix with `mode compose --uninitialized`"
            )
    if print_config:
        for number, run in enumerate(runs):
            print("---\n" if number else "", end="")
            show_config(run)
        return
    if sweep:
        if processes.world_size() > 1:
            raise ConfigError("--sweep is one run after the other; it does not go with several processes")
        if again:
            raise ConfigError("--again trains one run anew; it does not go with --sweep")
        execute_all(runs)
    else:
        execute(runs[0], again=again)


def execute_all(runs: Sequence[Run]) -> None:
    """Execute several runs in order, one process each, going on after a failure, and print a summary."""
    from cli.progress import make_display
    from mode.launch.schedule import run_all
    from mode.runs.prepare import find_finished, prepare_run

    with make_display() as display:
        outcome = run_all(runs, jobs=1, display=display)
    for run in runs:
        prepared = prepare_run(run)
        record = find_finished(prepared)
        if record is not None:
            print(f"run {record.id}: lr {run.lr:g}, seed {run.seed}; {prepared.folder}")
            print_scores(record.outcome.scores, record.request.targets)
        else:
            print(f"run {prepared.id} failed: {outcome.failed.get(prepared.id, 'no record')}")
    if outcome.failed:
        raise typer.Exit(1)


def execute(run: Run, *, again: bool) -> None:
    """Execute one run with a progress display and print its scores."""
    from cli.progress import make_display
    from mode.launch.schedule import name_run
    from mode.runs.execute import execute as execute_run
    from mode.runs.prepare import find_finished, has_weights, prepare_run

    prepared = prepare_run(run)
    record = find_finished(prepared)
    trains = prepared.method.steps(run) > 0
    if record is not None and not again and (has_weights(prepared) or not trains):
        where = f"; weights in {prepared.folder}" if trains else ""
        print(f"run {prepared.id} is done (--again makes it anew){where}")
        print_scores(record.outcome.scores, record.request.targets)
        return
    with make_display() as display:
        shown: list[str] = []

        def observe(stage: Prepared, point: Point) -> None:
            if stage.id not in shown:
                if shown:
                    display.end(shown[-1], None)
                shown.append(stage.id)
                display.start(stage.id, name_run(stage.run), stage.method.steps(stage.run))
            display.point(stage.id, point)

        record = execute_run(run, again=again, weights=trains, observe=observe)
        if shown:
            display.end(shown[-1], None)
    outcome = record.outcome
    print(f"run {record.id}: {outcome.steps} steps, {outcome.seconds:.0f} s; {prepared.folder}")
    print_scores(outcome.scores, record.request.targets)


def print_scores(scores: Mapping[str, Score], targets: Sequence[str]) -> None:
    """Print every metric that a record holds, by domain."""
    from mode.records.metrics import METRICS

    for name, score in scores.items():
        parts = [f"  {name:<10} {'target' if name in targets else 'retention':<10}"]
        for metric in METRICS.values():
            value, error = score.find(metric), score.find_error(metric)
            if value is not None:
                spread = "" if error is None else f" ± {metric.format(error)}"
                unit = " %" if metric.unit == "%" else ""
                parts.append(f"{metric.heading.lower()} {metric.format(value)}{unit}{spread} ")
        print(" ".join(parts).rstrip())
    sys.stdout.flush()
