"""Commands `mode train` (expert, baseline, backbone) and `mode compose`."""

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
    add_domains,
    add_fixed,
    add_method,
    complete,
    reporting_errors,
    show_config,
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
    """Train one expert for one domain: stage 1 of MoDE.

    Example: mode train expert --domain code train.steps=300
    """
    with reporting_errors():
        given = add_domains(overrides or [], domain)
        given = add_method(given, "mode", "mode train expert", conf, variants=True)
        given = add_fixed(given, {"method.start": "fresh", "method.num_experts": "1"}, "mode train expert")
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
    """Train a baseline.

    Example: mode train baseline lora --domain code,math method.rank=8
    """
    with reporting_errors():
        given = add_method(add_domains(overrides or [], domain), method, f"mode train baseline {method}", conf)
        launch(given, again=again, sweep=sweep, print_config=print_config, conf=conf)


@app.command("backbone")
def backbone(
    overrides: Overrides = None,
    again: AgainOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Pretrain the embedded backbone and its tokenizer.

    This takes over an hour on two cores. The weights are written to runs/ID/backbone. Use them with
    backbone.path=runs/ID/backbone.
    """
    with reporting_errors():
        given = list(overrides or [])
        if not any(text.startswith("experiment=") for text in given):
            given = ["experiment=pretrain_tiny", *given]
        given = add_method(given, "pretrain", "mode train backbone", conf)
        launch(given, again=again, sweep=False, print_config=print_config, conf=conf)


def compose(
    domains: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERT]... [KEY=VALUE]...",
            help="Experts to compose (domain, id of a run, or folder of an expert or model), then settings.",
        ),
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Train only the gates.")] = False,
    uninitialized: Annotated[bool, typer.Option("--uninitialized", help="Train fresh experts on the mix.")] = False,
    again: AgainOption = False,
    sweep: SweepOption = False,
    print_config: PrintOption = False,
    conf: ConfOption = None,
) -> None:
    """Compose experts into one model and fine-tune it: stage 2.

    The model has one expert per domain and trains on the mix of the domains. Without names, the command uses the
    experts of the target domains. A missing expert of a domain is trained first. The folder of a model stands for all
    its experts, so a model from `mode expert add` can be fine-tuned.

    Example: mode compose code math; mode compose code ~/experts/law
    """
    with reporting_errors():
        from mode.core.errors import ConfigError

        names = [text for text in domains or [] if "=" not in text]
        names, given = resolve_experts(names, [text for text in domains or [] if "=" in text], conf)
        given = add_domains(given, ",".join(names) or None)
        given = add_method(given, "mode", "mode compose", conf, variants=True)
        if frozen and uninitialized:
            raise ConfigError(
                "--frozen trains only the gates and needs trained experts: choose --frozen or --uninitialized"
            )
        if frozen:
            given = add_fixed(given, {"method.train_experts": "false"}, "mode compose --frozen")
        if uninitialized:
            fixed = {"method.start": "fresh"} | ({"method.num_experts": str(len(names))} if names else {})
            given = add_fixed(given, fixed, "mode compose --uninitialized")
        launch(given, again=again, sweep=sweep, print_config=print_config, conf=conf)


def resolve_experts(names: Sequence[str], overrides: Sequence[str], conf: Path | None) -> tuple[list[str], list[str]]:
    """Return the domains of named experts, and the overrides with the folders of experts that are no domain names."""
    from mode.config.compose import compose as compose_run
    from mode.config.groups import list_members
    from mode.config.quoting import quote

    known = list_members("domain", conf)
    if all(name in known for name in names):
        return list(names), list(overrides)
    from mode.artefacts.find import find_expert_folder
    from mode.modular.artefact import read_descriptions

    runs = Path(compose_run(overrides, conf).paths.runs).expanduser()  # training makes this folder if it is missing
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
    """Compose and check the runs of overrides, then execute or print them.

    Args:
        overrides: Overrides of the configuration.
        again: Whether a finished run is trained again.
        sweep: Whether a comma in a value means one run per value.
        print_config: Whether the configurations are printed instead.
        conf: Folder of the user's own configuration.
        single: Whether a run must have exactly one target domain.

    Raises:
        ConfigError: A run is not valid, or the flags do not fit together.
    """
    from mode.config.compose import compose as compose_run
    from mode.config.compose import expand_sweep
    from mode.core import processes
    from mode.core.errors import ConfigError

    sets = expand_sweep(overrides) if sweep else [list(overrides)]
    runs = [compose_run(values, conf) for values in sets]
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
            raise ConfigError("--sweep executes one run after the other: not with several processes")
        if again:
            raise ConfigError("--again trains one run again: not with --sweep")
        execute_all(runs)
    else:
        execute(runs[0], again=again)


def execute_all(runs: Sequence[Run]) -> None:
    """Execute several runs in order, one process each, and print a summary. After a failure the next run starts."""
    from cli.progress import make_display
    from mode.launch.schedule import run_all
    from mode.runs.prepare import find_finished, prepare_run

    with make_display() as display:
        outcome = run_all(runs, jobs=1, display=display)
    for run in runs:
        prepared = prepare_run(run)
        warn_of_small_splits(prepared)
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
    from mode.runs.execute import remove_finished_checkpoint
    from mode.runs.prepare import find_finished, has_weights, prepare_run

    prepared = prepare_run(run)
    record = find_finished(prepared)
    warn_of_small_splits(prepared)
    trains = prepared.method.steps(run) > 0
    if record is not None and not again and (has_weights(prepared) or not trains):
        remove_finished_checkpoint(prepared)
        where = f"; weights in {prepared.folder}" if trains else ""
        print(f"run {prepared.id} is done (--again trains it again){where}")
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


def warn_of_small_splits(prepared: Prepared) -> None:
    """Print a warning on stderr for every scored split that has few effective documents."""
    from mode.core import processes
    from mode.data.pack import describe_small_splits

    for packed in prepared.packed.values():
        for warning in describe_small_splits(packed) if processes.is_main() else ():
            print(f"mode: warning: {warning}", file=sys.stderr)


def print_scores(scores: Mapping[str, Score], targets: Sequence[str]) -> None:
    """Print every metric that a record holds, with its standard error, by domain."""
    from mode.records.metrics import METRICS

    metrics = [
        metric for metric in METRICS.values() if any(score.find(metric) is not None for score in scores.values())
    ]
    rows = [["domain", "role", *(f"{metric.heading.lower()}{' %' * (metric.unit == '%')}" for metric in metrics)]]
    for name, score in scores.items():
        row = [name, "target" if name in targets else "retention"]
        for metric in metrics:
            value, error = score.find(metric), score.find_error(metric)
            spread = "" if error is None else f" ± {metric.format(error)}"
            row.append("–" if value is None else metric.format(value) + spread)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()
