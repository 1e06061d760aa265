"""Command `mode analyze gates`: weights and entropy of the gates by domain and block."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.options import ConfOption, Overrides, find_runs_folder, reporting_errors

app = typer.Typer(help="Analyze a finished run.", no_args_is_help=True)


@app.command("gates")
def gates(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A MoDE run's id or the start of it.")],
    overrides: Overrides = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Split to measure.")] = "validation",
    html: Annotated[
        Path | None, typer.Option(help="Write gates by token, for a text of every domain, to this file.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each domain in the HTML file.")] = 400,
    conf: ConfOption = None,
) -> None:
    """Show weights and entropy of the gates by domain and block.

    The weight is the mean of every branch. The entropy is in nats.

    Example: mode analyze gates 3f2a90c1d2e4 --html gates.html
    """
    with reporting_errors():
        from mode.artefacts.edit import list_experts
        from mode.artefacts.find import find_model, list_branches
        from mode.core.errors import ConfigError
        from mode.core.files import write_atomic
        from mode.evaluation.generate import score_text
        from mode.gating.meter import GateMeter, watch_gates
        from mode.ops.quantize import quantize_frozen
        from mode.report.generated_text import Section, to_html
        from mode.runs.fit import score_domains
        from mode.runs.prepare import prepare_run

        if html is not None and not html.parent.is_dir():
            raise ConfigError(f"--html {html}: no folder {html.parent}")
        source = find_model(run, find_runs_folder(overrides, conf))
        list_experts(source)  # raises if the model has no experts
        if source.run is None:
            raise ConfigError(f"{run}: a saved model has no domains; name the run that trained it")
        prepared = prepare_run(source.run)
        quantize_frozen(source.model, source.run.train.memory.frozen_weights)
        with watch_gates(source.model) as latest:
            meter = GateMeter(latest)
            score_domains(prepared, source.model, split, probe=meter)
        names = list_branches(source)
        print(f"{'domain':<12} {'block':>5}" + "".join(f"{name:>12}" for name in names) + f"{'entropy':>12}")
        for domain, measured in meter.result().items():
            for number, (means, entropy) in enumerate(zip(measured["mean"], measured["entropy"], strict=True)):
                print(f"{domain:<12} {number:>5}" + "".join(f"{mean:>12.3f}" for mean in means) + f"{entropy:>12.3f}")
        if html is not None:
            starts = {name: data.split(split).tokens[:tokens].tolist() for name, data in prepared.packed.items()}
            texts = [Section(name, "", score_text(source.model, source.tokenizer, ids)) for name, ids in starts.items()]
            write_atomic(html, to_html(f"Gates of run {run}", texts, names).encode())
            print(f"wrote {html}", file=sys.stderr)
