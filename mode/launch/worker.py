"""Execute one run for a launcher, in one process or in several that share every step."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mode.config.check import from_yaml
from mode.config.run import Run
from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.files import expand_home
from mode.core.interrupts import end_with_launcher
from mode.launch.elastic import launch_processes
from mode.launch.limit import OutOfTimeError
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run

MESSAGE = ".error"
"""Suffix of the file that the first of several processes writes an error message to."""


def try_execute(
    run: Run,
    run_id: str,
    observe: Callable[[Any, Any], None] = lambda prepared, point: None,
    wait: Callable[[str], None] | None = None,
) -> str | None:
    """Execute a run; return an error message of one line, or None. Tracebacks of program errors go to `error.log`.

    `observe` and `wait` are those of `mode.runs.execute.execute`.

    Raises:
        OutOfTimeError: `observe` raises it.
    """
    try:
        execute(run, weights=True, observe=observe, wait=wait)
    except ConfigError as error:
        return str(error)
    except OutOfTimeError:
        raise
    except Exception as error:
        folder = expand_home(run.paths.runs) / run_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error} (see {folder / 'error.log'})"
    return None


def execute_yaml(text: str, run_id: str, nproc: int) -> str | None:
    """Execute a run in `nproc` processes; return an error message of one line, or None.

    If one of several processes dies, the calling process exits with code 1.

    Args:
        text: The run as YAML.
        run_id: Id of the run.
        nproc: Number of processes.
    """
    if nproc == 1:
        return try_execute(from_yaml(text), run_id, wait=lambda holder: print(f"{run_id} waits for {holder}"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            code = launch_processes([str(path)], nproc, module=__name__)
        except KeyboardInterrupt:  # the cluster ends the job, and may start it again
            code = 1
        message = path.with_suffix(MESSAGE)
        if message.exists():
            return message.read_text("utf-8")
    if code:
        os._exit(1)  # a process died: the job dies too, so that the launcher restarts it
    return None


def main() -> None:
    """Execute the run in the YAML file of the first argument, as one of several processes."""
    end_with_launcher()
    run = from_yaml(Path(sys.argv[1]).read_bytes(), sys.argv[1])
    message = try_execute(run, prepare_run(run).id)
    if message is not None:
        if processes.is_main():
            Path(sys.argv[1]).with_suffix(MESSAGE).write_text(message, encoding="utf-8")
        sys.exit(f"mode: {message}")


if __name__ == "__main__":
    main()
