"""Execute one run, in the process or the processes that a launcher has started."""

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
from mode.launch.elastic import launch_processes
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run


def try_execute(
    run: Run, run_id: str, observe: Callable[[Any, Any], None] = lambda prepared, point: None
) -> str | None:
    """Execute a run, and return its error in one line, if any; the traceback of a bug goes to `error.log`."""
    try:
        execute(run, weights=True, observe=observe)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        folder = Path(run.paths.runs).expanduser() / run_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error} (see {folder / 'error.log'})"
    return None


def execute_yaml(text: str, run_id: str, nproc: int) -> str | None:
    """Execute a run, given as YAML, in `nproc` processes, and return its error in one line, if any.

    If one of several processes dies, this process exits too.
    """
    if nproc == 1:
        return try_execute(from_yaml(text), run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        code = launch_processes([str(path)], nproc, module=__name__)
        report = path.with_suffix(".error")
        if report.exists():
            return report.read_text("utf-8")
    if code:
        os._exit(1)  # a process died: the job fails too, so that the launcher starts it again
    return None


def main() -> None:
    """Execute the run of a YAML file, as one of several processes."""
    run = from_yaml(Path(sys.argv[1]).read_text("utf-8"))
    error = try_execute(run, prepare_run(run).id)
    if error is not None:
        if processes.is_main():
            Path(sys.argv[1]).with_suffix(".error").write_text(error, encoding="utf-8")
        sys.exit(f"mode: {error}")


if __name__ == "__main__":
    main()
