"""The Typer application and the entry point `mode`."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from mode.core import processes

# Spinning OpenMP threads are much slower next to a busy core; waiting threads are not. torch reads this on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if processes.world_size() > 1:  # DDP warns if it searches for unused parameters and finds none
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import typer

from cli import (
    analyze,
    bench,
    data,
    eval,
    expert,
    generate,
    launch,
    plan,
    prune,
    report,
    reproduce,
    show,
    tracking,
    train,
)

app = typer.Typer(
    name="mode",
    help="Multi-domain adaptation of language models: MoDE and its baselines, measured alike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train.app, name="train")
app.command("compose")(train.compose)
app.command("launch", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(
    launch.launch
)
app.command("eval")(eval.evaluate)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("sync")(tracking.sync)
app.command("generate")(generate.generate)
app.command("export")(expert.export)
app.command("prune")(prune.prune)
app.add_typer(expert.app, name="expert")
app.add_typer(analyze.app, name="analyze")
app.add_typer(show.app, name="show")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line. Of several processes, only the first prints to stdout."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if processes.world_size() > 1 and command not in launch.ABLE:
        if processes.is_main():
            print(f"mode: {command}: several processes can only run {' or '.join(launch.ABLE)}", file=sys.stderr)
        raise SystemExit(2)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(sys.stdout if processes.is_main() else nowhere):
        app()


if __name__ == "__main__":
    main()
