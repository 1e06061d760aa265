"""A run's record: what was asked, what happened, and under what sky. Tables and plots follow from records."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mode import parallel
from mode.measurement import Measurement, read_measurement
from mode.settings import Run

SCHEMA = 1
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy", "reasoning-gym", "mwparserfromhell")


@dataclass(frozen=True)
class Record(Measurement):
    """What a finished run leaves.

    `asked` is the configuration that identifies it, as `mode.identity.asked` gives it; `happened` has steps, tokens,
    seconds, parameters, scores per domain and the training curve; `provenance` the fingerprints of data and backbone,
    the ids of the runs it stands on, commit, versions, machine and date.
    """

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """The three parts: asked, happened, provenance."""
        return self.asked, self.happened, self.provenance

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.asked["seed"])

    @property
    def sky(self) -> str:
        """Data, backbone and precision that scores depend on; only records under one sky can be compared."""
        shown = {name: self.provenance[name] for name in ("backbone", "precision", "data")}
        return json.dumps(shown, sort_keys=True)

    @property
    def overlap(self) -> tuple[str, ...]:
        """Domains whose text differs from what the backbone was pretrained on, so that their splits may overlap it."""
        before = self.provenance.get("pretraining_data", {})
        return tuple(name for name, data in self.provenance["data"].items() if before.get(name, data) != data)

    @property
    def filename(self) -> str:
        """Name of the record's file: method, targets, seed and id, for people; the id alone decides."""
        method = self.asked["method"]["_target_"].rpartition(".")[2].lower()
        return f"{method}-{'-'.join(self.asked['targets'])}-s{self.seed}-{self.id}.json"


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        ConfigError: The file is not a whole record of a known schema.
    """
    return read_measurement(path, Record, SCHEMA, "record", check_parts)


def check_parts(record: Record) -> None:
    """Refuse a record whose parts are not what they should be."""
    if not (isinstance(record.id, str) and all(isinstance(part, dict) for part in record.parts)):
        raise TypeError("its parts are not what they should be")


def read_records(folder: Path) -> list[Record]:
    """Read every record of a results folder, in the order of their file names."""
    return [read_record(path) for path in sorted((folder / "records").glob("*.json"))]


def find_record(folder: Path, run_id: str) -> Record | None:
    """Return the record of a run in a results folder, if it has one."""
    found = sorted((folder / "records").glob(f"*-{run_id}.json"))
    return read_record(found[0]) if found else None


def provenance(
    run: Run,
    *,
    data: Mapping[str, str],
    backbone: str,
    pretraining: Mapping[str, str],
    needs: Sequence[str],
    device: str,
    precision: str,
) -> dict[str, Any]:
    """Describe the sky a run is made under; asked for at its start, since the code may change before its end."""
    return {
        "data": dict(data),
        "backbone": backbone,
        "pretraining_data": dict(pretraining),
        "needs": list(needs),
        "precision": precision,
        **surroundings(device, run.train.threads),
        **parallel.layout(run.train.layout),
    }


def surroundings(device: str, threads: int) -> dict[str, Any]:
    """Describe the code, the packages and the machine that something is measured with."""
    commit, dirty = git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(), "device": device},
        "threads": threads,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the source tree and whether its code differs from it; both unknown outside a clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None, None
    # Results and runs are what a run writes, so they do not make the code dirty.
    code = ["cli", "mode", "conf", "baselines", "setup.cfg", "constraints.txt"]
    head = git(root, "rev-parse", "HEAD")
    status = git(root, "status", "--porcelain", "--", *code)
    return head, None if status is None else bool(status)


def git(root: Path, *arguments: str) -> str | None:
    """Run git in a folder and return what it prints, or None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(name: str) -> str | None:
    """Return the installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()
