"""The place of the campaign: a world of tiny domains and a tiny backbone, and runs that nothing disturbed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.campaign import calls
from tests.campaign.processes import Ended, in_child, run_mode

STEPS = ("train.steps=6", "train.checkpoint_every=2", "train.log_every=1", "train.threads=1", "train.device=cpu")
ALIKE = ("runs", "results", "cache")
"""Folders that commands write."""


class Place:
    """A folder with a world and finished runs, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        """Make nothing yet."""
        self.root = root

    @cached_property
    def world(self) -> Any:
        """The world, with a table of two rows."""
        from tests.conftest import make_world

        world = in_child(partial(make_world, self.root / "world"))
        plain = [text for text in world.overrides if not text.startswith(("paths.", "train."))]
        lengths = [text for text in world.overrides if text.startswith(("train.batch", "train.sequence"))]
        overrides = json.dumps([*plain, *lengths, *STEPS])
        (world.conf / "table" / "tiny.yaml").write_text(
            "title: Tiny\nrows:\n"
            "  - {name: backbone, label: Backbone, overrides: [method=backbone]}\n"
            "  - {name: sft, label: SFT, overrides: [method=sft]}\n"
            "  - {name: mode, label: MoDE, overrides: [method=mode]}\n"
            f"overrides: {overrides}\n",
            "utf-8",
        )
        return world

    def settings(self, folder: Path) -> list[str]:
        """Return the words that keep a command in the world, with runs, results and cache below a folder."""
        kept = [text for text in self.world.overrides if not text.startswith("paths.")]
        paths = [f"paths.{name}={folder / name}" for name in ALIKE]
        return [*kept, *STEPS, *paths, "--conf", str(self.world.conf)]

    def paths(self, folder: Path) -> list[str]:
        """Return the words for commands that know the settings already."""
        return [f"paths.{name}={folder / name}" for name in ALIKE] + ["--conf", str(self.world.conf)]

    def train(self, folder: Path, method: str = "mode") -> list[str]:
        """Return the command that trains: experts first, then the composed model."""
        return ["train", "baseline", method, *self.settings(folder)]

    def prepare(self, folder: Path) -> list[str]:
        """Return the command that prepares the data."""
        return ["data", "prepare", *self.settings(folder)]

    def export(self, folder: Path) -> list[str]:
        """Return the command that writes the trained model as a folder."""
        return ["export", self.run_id("mode"), str(folder / "exported"), *self.paths(folder)]

    def report(self, folder: Path) -> list[str]:
        """Return the command that renders the table."""
        return ["report", "tiny", *self.paths(folder)]

    def reproduce(self, folder: Path) -> list[str]:
        """Return the command that executes every run of the table."""
        return ["reproduce", "tiny", *self.paths(folder)]

    def make(self, words: list[str], folder: Path, **options: Any) -> Ended:
        """Run a command that nothing disturbs.

        Raises:
            RuntimeError: The command failed: then there is nothing to try.
        """
        ended = run_mode(words, folder, **options)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(words)}\n{ended.out}{ended.err}")
        return ended

    @cached_property
    def whole(self) -> Path:
        """Folder of finished runs: backbone, experts, MoDE and SFT, with their table."""
        folder = self.root / "whole"
        folder.mkdir()
        self.make(self.train(folder), folder)
        self.make(self.train(folder, "sft"), folder)
        self.make(self.train(folder, "backbone"), folder)
        self.make(self.report(folder), folder)
        return folder

    @cached_property
    def exported(self) -> Path:
        """Folder of the finished runs with an exported model."""
        folder = self.root / "with-model"
        copy_state(self.whole, folder)
        self.make(self.export(folder), folder)
        return folder

    def run_id(self, method: str) -> str:
        """Return the id of the finished run of a method on both domains."""
        (path,) = (self.root / "whole" / "results" / "records").glob(f"{method}-py-sums-*.json")
        return path.stem.rpartition("-")[2]

    @cached_property
    def calls(self) -> list[tuple[str, bool, Path]]:
        """The calls that change files, of training from nothing."""
        return self.log_calls(self.train, "counted")

    def alone(self, words: Callable[[Path], list[str]]) -> Path:
        """Return a folder in which one command ran alone."""
        folder = self.root / f"alone-{words.__name__}"
        if not folder.exists():
            folder.mkdir()
            self.make(words(folder), folder, seconds=600)
        return folder

    def log_calls(
        self, words: Callable[[Path], list[str]], name: str, start: Path | None = None
    ) -> list[tuple[str, bool, Path]]:
        """Return the calls that change files, of a command in a folder, which is a copy of another if asked."""
        folder, log = self.root / name, self.root / f"{name}.log"
        if start is None:
            folder.mkdir()
        else:
            copy_state(start, folder)
        self.make(words(folder), folder, before=partial(calls.arm, folder, calls.COUNT, log=log))
        return calls.read_log(log)

    @cached_property
    def interrupted(self) -> Path:
        """Folder of the same training, killed after the second checkpoint of its last stage."""
        names = [path.name for name, _, path in self.calls if name == "rename"]
        assert "checkpoint-4" in names, names
        last = max(
            n for n, (name, _, path) in enumerate(self.calls) if name == "rename" and path.name == "checkpoint-4"
        )
        for number in range(last + 3, len(self.calls)):  # the checkpoint is written by another thread: try again
            folder = self.root / "interrupted"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run_mode(self.train(folder), folder, before=partial(calls.arm, folder, calls.KILL, number))
            found = {path.name for path in (folder / "runs").glob("*/checkpoint-*")}
            if found == {"checkpoint-4"}:
                return folder
        raise RuntimeError("no kill leaves the second checkpoint")


def copy_state(start: Path, folder: Path) -> None:
    """Copy runs, results and cache into another folder."""
    for each in ALIKE:
        shutil.copytree(start / each, folder / each)


def read_results(folder: Path) -> dict[str, Any]:
    """Return what must be the same in the end: scores and curve without times of every record, weights, data."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "results" / "records").glob("*.json")):
        happened = json.loads(path.read_text("utf-8"))["happened"]
        curve = [{name: value for name, value in point.items() if "second" not in name} for point in happened["curve"]]
        found[path.name] = happened["scores"], curve, happened["steps"], happened["tokens"]
    data = [path for pattern in ("*.bin", "*.npy") for path in (folder / "cache").rglob(pattern)]
    weights = [path for name in ("runs", "exported") for path in (folder / name).rglob("*.safetensors")]
    for path in [*weights, *data]:
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def find_difference(left: Path, right: Path) -> str | None:
    """Return the first result in which two folders differ, or a file that only one of them has."""
    ours, theirs = read_results(left), read_results(right)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            missing = name not in ours or name not in theirs
            return f"{name} {'is in one only' if missing else 'differs'}"
    for each in (*ALIKE, "exported"):
        files = [{str(path.relative_to(place)) for path in (place / each).rglob("*")} for place in (left, right)]
        if other := sorted(files[0] ^ files[1]):
            return f"leftover or missing: {other[0]}"
    return None
