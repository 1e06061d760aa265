"""Kills: training is killed at a call that changes a file, and the same command goes on."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

from tests.campaign import calls
from tests.campaign.place import Place, find_difference
from tests.campaign.processes import find_fault, run_mode
from tests.campaign.trials import Kind, Trial, UnavailableError

COUNT = 64


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return trials at calls of all names, spread over the whole training."""
    if not calls.is_loaded():
        raise UnavailableError("needs Linux and a C compiler")
    rng = random.Random(seed)
    by_name: dict[str, list[int]] = {}
    for number, (name, _, _) in enumerate(place.calls, 1):
        by_name.setdefault(name, []).append(number)
    chosen: set[int] = set()
    for numbers in by_name.values():
        chosen.update(rng.sample(numbers, min(3, len(numbers))))
    rest = [number for number in range(1, len(place.calls) + 1) if number not in chosen]
    chosen.update(rng.sample(rest, max(0, min(len(rest), COUNT - len(chosen)))))
    numbers = sorted(chosen)
    rng.shuffle(numbers)
    return [Trial(describe(place, number), partial(attempt, place, number)) for number in numbers]


def describe(place: Place, number: int) -> str:
    """Return the name of a trial: the call that the training is killed at."""
    name, _, path = place.calls[number - 1]
    return f"killed at call {number}, {name} {path.relative_to(place.root / 'counted')}"


def attempt(place: Place, number: int, folder: Path) -> str | None:
    """Kill the training at a call, let the same command end, and compare with a training that was not killed."""
    words = place.train(folder)
    killed = run_mode(words, folder, before=partial(calls.arm, folder, calls.KILL, number))
    if killed.code != -signal.SIGKILL:
        return find_fault(killed) or f"not killed: there is no call {number} this time"
    ended = run_mode(words, folder)
    return find_fault(ended, (0,)) or find_difference(folder, place.root / "counted")


KIND = Kind("kills", "the same command does not end with the same bits and the same files", make_trials)
