"""Execute one run wherever a launcher has brought it: in a process, or in several that share it."""

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
    """Execute a run, and return its mistake in one line if there was one; what is no user's is kept in `error.log`."""
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
    """Execute a run that is written as YAML by so many processes, and return its mistake if there was one.

    Where one of several processes dies, this one ends too.
    """
    if nproc == 1:
        return try_execute(from_yaml(text), run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        code = launch_processes([str(path)], nproc, module=__name__)
        told = path.with_suffix(".mistake")
        if told.exists():
            return told.read_text("utf-8")
    if code:
        os._exit(1)  # a process of it died: so does the job, for the launcher to start it again
    return None


def main() -> None:
    """Execute the run whose file is named, as one of several processes."""
    run = from_yaml(Path(sys.argv[1]).read_text("utf-8"))
    mistake = try_execute(run, prepare_run(run).id)
    if mistake is not None:
        if processes.is_main():
            Path(sys.argv[1]).with_suffix(".mistake").write_text(mistake, encoding="utf-8")
        sys.exit(f"mode: {mistake}")


if __name__ == "__main__":
    main()
