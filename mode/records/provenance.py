"""The provenance of a record: code, packages and machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mode.core import processes

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy", "reasoning-gym", "mwparserfromhell")
"""Packages whose versions are recorded."""


def describe_provenance(
    *,
    data: Mapping[str, str],
    backbone: str,
    pretraining: Mapping[str, str],
    needs: Sequence[str],
    device: str,
    precision: str,
    threads: int,
    layout: str,
) -> dict[str, Any]:
    """Return the provenance of a run. It is read at the start of the run, because the code may change before the end.

    Args:
        data: Fingerprint of every domain's data.
        backbone: Fingerprint of the initial weights.
        pretraining: Fingerprints of the backbone's pretraining data.
        needs: Ids of the run's earlier stages.
        device: Description of the device.
        precision: Precision of forward and backward passes.
        threads: CPU threads of torch.
        layout: Layout of the run over several processes.
    """
    return {
        "data": dict(data),
        "backbone": backbone,
        "pretraining_data": dict(pretraining),
        "needs": list(needs),
        "precision": precision,
        **describe_environment(device, threads),
        **processes.describe_layout(layout),
    }


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """Return the commit, the versions of packages, the machine, and the date.

    Args:
        device: Description of the device.
        threads: CPU threads of torch.
    """
    commit, dirty = read_git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **{name: find_version(name) for name in PACKAGES}},
        "machine": {
            "processor": read_processor_name(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "device": device,
        },
        "threads": threads,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def read_git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the source tree, and whether its code differs from the commit; None outside a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    # Only code counts: a run itself writes results and runs.
    code = ["cli", "mode", "conf", "baselines", "setup.cfg", "constraints.txt"]
    head = run_git(root, "rev-parse", "HEAD")
    status = run_git(root, "status", "--porcelain", "--", *code)
    return head, None if status is None else bool(status)


def run_git(root: Path, *arguments: str) -> str | None:
    """Run git in a folder and return its output; None if git fails or is missing.

    Git does not refresh the index, so that a run never takes the lock of the user's repository.
    """
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_version(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_processor_name() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()
