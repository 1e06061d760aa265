"""The Typer application and the entry point `mode`."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mode.core import processes
from mode.core.interrupts import end_with_launcher

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
    """Run the command line, and exit with its code. Of several processes, only the first prints to stdout."""
    end_with_launcher()
    prepare_streams()
    try:
        run_command()
    except SystemExit as ended:
        code = ended.code
    except OSError as error:  # such as a full disk behind the standard output
        code = report_stream(error)
    code = flush_streams(quiet=bool(code)) or code
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to interrupt but the interpreter's own end
    raise SystemExit(code)


def run_command() -> None:
    """Run the command of the arguments."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if processes.world_size() > 1 and command not in launch.ABLE:
        if processes.is_main():
            print(f"mode: {command}: several processes can only run {' or '.join(launch.ABLE)}", file=sys.stderr)
        raise SystemExit(2)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(sys.stdout if processes.is_main() else nowhere):
        app()


def prepare_streams() -> None:
    """Open closed standard streams on the null device, and let the others print every character in any encoding.

    Without this, the next file that is opened would take the place of a closed stream.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is that of the stream
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_streams(*, quiet: bool) -> int:
    """Flush the standard streams. Return 0, or the exit code if the output cannot be written.

    Args:
        quiet: Whether the command has reported an error already.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = code or report_stream(error, quiet=quiet)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter flushes again
    return code


def report_stream(error: OSError, *, quiet: bool = False) -> int:
    """Report that the output cannot be written, and return the exit code. A closed pipe is not reported."""
    if isinstance(error, BrokenPipeError):
        return 1
    with suppress(OSError):
        if not quiet:
            print(f"mode: standard output: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
