"""Suite `startup`: start-up time of commands, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mode.bench.timing import Case
from mode.core.errors import ConfigError
from mode.core.files import CURVE, expand_home, find_paths

if TYPE_CHECKING:
    import torch

    from mode.config.run import Run
    from mode.methods.mode import MoDE

EMBEDDED = "tiny"
"""Name of the embedded backbone."""


MAIN = "from cli.app import main; main()"
"""Script that runs the command line."""


def prepare_startup(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that time Python, its large imports, help, the first step of a run, and a finished table.

    Args:
        run: Run with the cache and the number of threads.
        method: Not used.
        device: Not used.
        folder: Folder for runs and records.

    Raises:
        ConfigError: The backbone is not the embedded one, which Table 1 uses by default.
    """
    if run.backbone.name != EMBEDDED:
        raise ConfigError(f"suite `startup` supports only backbone={EMBEDDED}, not {run.backbone.name}")
    cache = expand_home(run.paths.cache)
    given = [f"paths.cache={cache}", f"train.threads={run.train.threads}"]
    here = [f"paths.runs={folder / 'runs'}", f"paths.results={folder / 'results'}", *given]
    short = ["train.steps=2", "train.sequence_length=32", "train.batch.size=2", "evaluate.split=validation"]
    table = ["reproduce", "table1", "seeds=[0]", *short, *here]
    make_command_action(table)()  # also prepares the data for later calls
    return [
        Case("start", "python", make_script_action("")),
        Case("start", "python with torch and transformers", make_script_action("import torch, transformers")),
        Case("start", "mode --help", make_command_action(["--help"])),
        Case(
            "start",
            "first step of a run",
            make_first_step(["train", "baseline", "sft", "train.log_every=1", *given], folder),
        ),
        Case("start", "Table 1, all of whose runs are done", make_command_action(table)),
    ], {}


def make_script_action(text: str) -> Callable[[], None]:
    """Return an action that runs a script in a fresh interpreter."""
    return lambda: run_silently([sys.executable, "-c", text])


def make_command_action(words: Sequence[str]) -> Callable[[], None]:
    """Return an action that runs a command of `mode` in a fresh interpreter."""
    return lambda: run_silently([sys.executable, "-c", MAIN, *words])


def make_first_step(words: Sequence[str], folder: Path) -> Callable[[], float]:
    """Return an action that starts a run in a fresh interpreter and stops it after its first step."""

    def action() -> float:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            here = [f"paths.runs={place}/runs", f"paths.results={place}/results"]
            asked = [sys.executable, "-c", MAIN, *words, *here]
            with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                try:
                    curves = f"runs/*/{CURVE}"
                    while process.poll() is None and not any(map(os.path.getsize, find_paths(Path(place), curves))):
                        time.sleep(0.005)
                    seconds, ended = time.perf_counter() - begin, process.poll()
                finally:
                    process.terminate()
                output = process.stderr.read() if process.stderr else ""
        if ended:
            raise ConfigError(f"`mode {' '.join(words)}` failed: {(output.strip().splitlines() or ['no message'])[-1]}")
        return seconds

    return action


def run_silently(words: Sequence[str]) -> None:
    """Run a program silently.

    Raises:
        ConfigError: The program failed.
    """
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"`{' '.join(words[2:])}` failed: {reason}")
