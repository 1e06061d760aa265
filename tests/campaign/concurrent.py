"""Four processes of each kind at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.campaign.place import Place, copy_state, find_difference
from tests.campaign.processes import Command, Ended, find_fault, last_line
from tests.campaign.trials import Kind, Trial

PROCESSES = 4
ROUNDS = 4
BUSY = "is training this run"


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return rounds of every kind; in each round the processes start at other times."""
    rng = random.Random(seed)
    for words in (place.train, place.prepare, place.reproduce):
        place.alone(words)
    place.whole  # noqa: B018  # made before the trials are forked
    attempts: dict[str, Callable[[Place, float, Path], str | None]] = {
        "train the same run": train,
        "prepare the same data": prepare,
        "reproduce the same table": reproduce,
        "report while training": report,
    }
    return [
        Trial(f"{PROCESSES} processes {name}, {delay:.2f} s apart", partial(attempt, place, delay))
        for delay in [0.0, *(rng.uniform(0, 0.5) for _ in range(ROUNDS - 1))]
        for name, attempt in attempts.items()
    ]


def run_together(commands: list[list[str]], delay: float, folder: Path) -> list[Ended]:
    """Run commands at once, started one after the other."""
    started = []
    for words in commands:
        started.append(Command(words, folder, seconds=120))
        time.sleep(delay)
    return [command.wait() for command in started]


def find_first_fault(ended: list[Ended], *, busy: bool = False) -> str | None:
    """Return the first fault of several commands.

    Args:
        ended: The commands.
        busy: Whether a command may end because another one trains a run that it needs.
    """
    for each in ended:
        fault = find_fault(each, (0, 1, 2) if busy else (0,))
        if fault is None and each.code and BUSY not in each.err:
            fault = f"exit code {each.code}: {last_line(each.err)}"
        failed = [line for line in each.err.splitlines() if "failed: " in line and BUSY not in line]
        if fault or failed:
            return fault or failed[0]
    return None


def train(place: Place, delay: float, folder: Path) -> str | None:
    """Train one run in all processes."""
    ended = run_together([place.train(folder)] * PROCESSES, delay, folder)
    return find_first_fault(ended, busy=True) or find_difference(folder, place.alone(place.train))


def prepare(place: Place, delay: float, folder: Path) -> str | None:
    """Prepare one set of domains in all processes, then train on them."""
    ended = run_together([place.prepare(folder)] * PROCESSES, delay, folder)
    if len({each.out for each in ended}) > 1:
        return "the processes name different data"
    return find_first_fault(ended) or find_difference(folder, place.alone(place.prepare))


def reproduce(place: Place, delay: float, folder: Path) -> str | None:
    """Reproduce one table in all processes, then again in one for the runs that each left to the others."""
    ended = run_together([place.reproduce(folder)] * PROCESSES, delay, folder)
    last = run_together([place.reproduce(folder)], 0, folder)
    fault = find_first_fault(ended, busy=True) or find_first_fault(last)
    return fault or find_difference(folder, place.alone(place.reproduce))


def report(place: Place, delay: float, folder: Path) -> str | None:
    """Render a table while its last run trains; in the end the table is that of all runs."""
    copy_state(place.whole, folder)
    for path in (folder / "results" / "records").glob("mode-py-sums-*.json"):
        path.unlink()
    words = place.report(folder)
    ended = run_together([[*place.train(folder), "--again"], *[words] * (PROCESSES - 1)], delay, folder)
    last = [*run_together([words], 0, folder), *run_together([[*words, "--check"]], 0, folder)]
    return find_first_fault([*ended, *last]) or find_difference(folder, place.whole)


KIND = Kind(
    "concurrent",
    "an error but the line that another process trains, or a result that differs from that of one process",
    make_trials,
)
