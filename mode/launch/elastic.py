"""Start a command in several processes of this machine with torch's elastic agent, and report a failure in one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mode.core.interrupts import PARENT


def launch_processes(command: Sequence[str], nproc: int, module: str = "cli") -> int:
    """Run a command in several processes and return the exit code. Only the first process prints.

    Args:
        command: Words of the command.
        nproc: Number of processes.
        module: Module that runs the command: `python -m MODULE COMMAND`.

    Raises:
        KeyboardInterrupt: The command was interrupted.
    """
    # `report_failure` reports what the agent would log.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())  # for `end_with_launcher`
    with tempfile.TemporaryDirectory() as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, nproc), Std.ALL)),
        )
        try:
            elastic_launch(settings, sys.executable)("-m", module, *command)
        except ChildFailedError as error:
            return report_failure(error, Path(logs))
        except SignalException:
            raise KeyboardInterrupt from None
    return 0


def report_failure(error: ChildFailedError, logs: Path) -> int:
    """Print in one line why the processes failed, unless the first process already did, and return the exit code."""
    first = error.failures.get(0)
    if first is not None and first.exitcode > 0:
        return int(first.exitcode)
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(
            f"mode: process {rank} was ended by {name}; the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        return 1
    lines = [line for log in logs.rglob(f"{rank}/stderr.log") for line in log.read_text("utf-8").splitlines()]
    print(lines[-1] if lines else f"mode: process {rank} failed", file=sys.stderr)
    return int(failure.exitcode)
