"""The suite `startup`: seconds that a command takes before it does what it was asked, each in a process of its own."""

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
from mode.core.files import CURVE

if TYPE_CHECKING:
    import torch

    from mode.config.run import Run
    from mode.methods.mode import MoDE

EMBEDDED = "tiny"


MAIN = "from cli.app import main; main()"


def startup(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time: help, a first step with and without imports that anyone pays, and a table that is done.

    Args:
        run: Says which cache is used, and how many threads.
        method: Not used.
        device: Not used.
        folder: For runs and records.

    Raises:
        ConfigError: Another backbone is asked for than the embedded one, which Table 1 is trained on by default.
    """
    if run.backbone.name != EMBEDDED:
        raise ConfigError(f"suite `startup` starts backbone={EMBEDDED}, not {run.backbone.name}")
    cache = Path(run.paths.cache).expanduser()
    given = [f"paths.cache={cache}", f"train.threads={run.train.threads}"]
    here = [f"paths.runs={folder / 'runs'}", f"paths.results={folder / 'results'}", *given]
    short = ["train.steps=2", "train.sequence_length=32", "train.batch.size=2", "evaluate.split=validation"]
    table = ["reproduce", "table1", "seeds=[0]", *short, *here]
    make_command_action(table)()  # prepares data too, which later calls find
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
    """Return an action that starts a run in a fresh interpreter and stops it when its first step is done."""

    def action() -> float:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            here = [f"paths.runs={place}/runs", f"paths.results={place}/results"]
            asked = [sys.executable, "-c", MAIN, *words, *here]
            with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                while process.poll() is None and not any(path.stat().st_size for path in Path(place).rglob(CURVE)):
                    time.sleep(0.005)
                seconds, ended = time.perf_counter() - begin, process.poll()
                process.terminate()
                told = process.stderr.read() if process.stderr else ""
        if ended:
            raise ConfigError(f"`mode {' '.join(words)}` failed: {(told.strip().splitlines() or ['no message'])[-1]}")
        return seconds

    return action


def run_silently(words: Sequence[str]) -> None:
    """Run a program silently.

    Raises:
        ConfigError: It failed.
    """
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"`{' '.join(words[2:])}` failed: {reason}")
