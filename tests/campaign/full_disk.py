"""A full disk: from some call on, no byte can be written; later there is space again."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.campaign import calls
from tests.campaign.place import Place, copy_state, find_difference
from tests.campaign.processes import find_fault, find_refusal_fault, run_mode
from tests.campaign.trials import Kind, Trial, UnavailableError

COUNTS = {"train": 24, "prepare": 10, "export": 8, "report": 4, "page": 4}
LARGEST = {"train": 60_000, "prepare": 12_000, "export": 60_000, "report": 400, "page": 60_000}
"""Sizes of a file that the limit of a process is drawn up to."""


def list_commands(place: Place) -> dict[str, Callable[[Path], list[str]]]:
    """Return the commands that write files, by name."""
    return {
        "train": place.train,
        "prepare": place.prepare,
        "export": place.export,
        "report": place.report,
        "page": lambda folder: [*place.report(folder), "--html"],
    }


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return trials of every command: a full disk from a call on, and a limit of the size of a file."""
    if not calls.is_loaded():
        raise UnavailableError("needs Linux and a C compiler")
    rng = random.Random(seed)
    trials = []
    for name, words in list_commands(place).items():
        start = None if name in ("train", "prepare") else place.whole
        whole = place.log_calls(words, f"full-{name}", start)
        numbers = [number for number, (_, grows, _) in enumerate(whole, 1) if grows]
        chosen = rng.sample(numbers, min(len(numbers), COUNTS[name]))
        trials += [
            Trial(f"{name}, disk full from call {number} on", partial(attempt, place, name, number, 0))
            for number in chosen
        ]
        sizes = [rng.randrange(LARGEST[name]) for _ in range(COUNTS[name] // 2)]
        trials += [
            Trial(f"{name}, no file larger than {size} bytes", partial(attempt, place, name, 0, size)) for size in sizes
        ]
    rng.shuffle(trials)
    return trials


def limit_files(size: int) -> None:
    """Limit the size of this process's files; a write beyond fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def attempt(place: Place, name: str, number: int, size: int, folder: Path) -> str | None:
    """Run a command on a full disk, then again on one with space, and compare with one that always had space."""
    if name not in ("train", "prepare"):
        copy_state(place.whole, folder)
    words = list_commands(place)[name](folder)
    before = partial(calls.arm, folder, calls.FULL, number) if number else partial(limit_files, size)
    full = run_mode(words, folder, before=before)
    if full.code != 0 and (fault := find_refusal_fault(full)):
        return fault
    if full.code != 0 and (partials := [str(path) for path in folder.rglob("*.partial*")]):
        return f"leftover: {partials[0].removeprefix(f'{folder}/')}"
    ended = run_mode(words, folder)
    if name == "export" and full.code == 0:  # the folder is there already
        ended = full
    return find_fault(ended, (0,)) or find_difference(folder, place.root / f"full-{name}")


KIND = Kind(
    "full disk",
    "no one line, a leftover, or another result once there is space",
    make_trials,
)
