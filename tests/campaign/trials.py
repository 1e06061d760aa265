"""Trials of the campaign: their order, their results on disk, and the table."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.place import Place
from tests.campaign.processes import Job, first_ready

ROOT = Path(__file__).parents[2]
WORKERS = 2


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: What is tried, for people.
        attempt: Makes the trial in the folder that it is given; returns the fault, or None.
    """

    name: str
    attempt: Callable[[Path], str | None]


class UnavailableError(Exception):
    """This machine cannot make the trials of a kind."""


@dataclass(frozen=True)
class Kind:
    """A kind of trials.

    Attributes:
        name: Name, for the command line and the table.
        fault: What counts as a fault.
        make_trials: Returns all trials, for a place and a seed, always the same ones in the same order. The order is
            random, so that the first few are a sample.
    """

    name: str
    fault: str
    make_trials: Callable[[Place, int], Sequence[Trial]]


def draw(strategy: Any, count: int, seed: int) -> list[Any]:
    """Return different examples of a strategy of hypothesis, always the same ones for a seed.

    Hypothesis makes many examples out of the one before. So more are drawn than asked for, and a sample is returned.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    drawn: list[Any] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=4 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        drawn.append(example)

    collect()
    different = list({repr(example): example for example in drawn}.values())
    return random.Random(seed).sample(different, min(count, len(different)))


class Results:
    """Results of trials in a file of JSON lines. Results of other code than today's do not count."""

    def __init__(self, path: Path, code: str) -> None:
        """Read a file, and drop what is in it if the code has changed."""
        self.path, self.code = path, code
        self.found: dict[tuple[int, str], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    result = json.loads(line)
                except ValueError:  # the campaign was killed while it wrote the line
                    continue
                if result["code"] == code:
                    self.found[result["seed"], result["trial"]] = result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(result) + "\n" for result in self.found.values()), "utf-8")

    def forget(self, seed: int, trials: Iterable[str]) -> None:
        """Drop the results of trials."""
        for trial in trials:
            self.found.pop((seed, trial), None)

    def add(self, seed: int, trial: str, name: str, fault: str | None, seconds: float) -> None:
        """Add the result of a trial."""
        values = {"code": self.code, "seed": seed, "trial": trial, "name": name, "fault": fault}
        self.found[seed, trial] = result = {**values, "seconds": round(seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def digest_code(folders: Iterable[str] = ("mode", "cli", "baselines", "conf", "tests/campaign")) -> str:
    """Return a digest of the code that the campaign tries, and of its own."""
    total = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(ROOT)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def run_trials(
    trials: Mapping[str, Trial], results: Results, seed: int, work: Path, *, show: Callable[[str], None] = print
) -> None:
    """Make the trials that have no result yet, two at a time, each in a process and a folder of its own."""
    waiting = [key for key in trials if (seed, key) not in results.found]
    running: dict[Job, tuple[str, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            key = waiting.pop(0)
            folder = Path(tempfile.mkdtemp(dir=work, prefix=key.replace("/", "-") + "-"))
            running[Job(lambda key=key, folder=folder: attempt(trials[key], folder))] = key, folder, time.monotonic()
        job = first_ready(list(running))
        key, folder, begin = running.pop(job)
        try:
            fault = job.result()
        except RuntimeError as error:
            fault = f"the trial itself failed: {error}"
        shutil.rmtree(folder, ignore_errors=True)
        results.add(seed, key, trials[key].name, fault, time.monotonic() - begin)
        if fault is not None:
            show(f"{key}: {trials[key].name}\n  {fault}\n  repeat: {repeat_command(key, seed)}")


def attempt(trial: Trial, folder: Path) -> str | None:
    """Make one trial, with temporary files in its folder."""
    os.environ["TMPDIR"] = os.environ["HOME"] = str(folder)
    tempfile.tempdir = None
    return trial.attempt(folder)


def repeat_command(key: str, seed: int) -> str:
    """Return the command that makes a trial again."""
    return f"python -m tests.campaign --seed {seed} --only {key} --again"


def format_table(kinds: Sequence[Kind], results: Results, seed: int, chosen: Mapping[str, Sequence[str] | str]) -> str:
    """Return the table in Markdown.

    Args:
        kinds: All kinds.
        results: Results of the trials.
        seed: Seed of the campaign.
        chosen: The trials of every kind, or the reason why they were not made.
    """
    lines = ["| Kind | Tried | Survived | What counts as a fault |", "|:---|---:|---:|:---|"]
    for kind in kinds:
        keys = chosen.get(kind.name, ())
        if isinstance(keys, str):
            lines.append(f"| {kind.name} | not run | | {keys} |")
            continue
        done = [results.found[seed, key] for key in keys if (seed, key) in results.found]
        if done:
            survived = sum(result["fault"] is None for result in done)
            lines.append(f"| {kind.name} | {len(done):,} | {survived:,} | {kind.fault} |")
    return "\n".join(lines)
