"""Where a record was made: code, packages, machine."""

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
    """Describe the conditions of a run. Called at its start, since the code may change before its end.

    Args:
        data: Fingerprint of every domain's data.
        backbone: Fingerprint of the weights that the run starts from.
        pretraining: Fingerprints of the data that the backbone was pretrained on.
        needs: Ids of the run's earlier stages.
        device: Description of the device.
        precision: Precision of forward and backward passes.
        threads: CPU threads of torch.
        layout: How several processes share the run.
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
    """Describe the code, the packages and the machine that something is measured with."""
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
    """Return the commit of the source tree and whether its code differs from it; both unknown outside a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    # Results and runs are what a run writes, so they do not make the code dirty.
    code = ["cli", "mode", "conf", "baselines", "setup.cfg", "constraints.txt"]
    head = run_git(root, "rev-parse", "HEAD")
    status = run_git(root, "status", "--porcelain", "--", *code)
    return head, None if status is None else bool(status)


def run_git(root: Path, *arguments: str) -> str | None:
    """Run git in a folder and return what it prints, or None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_version(name: str) -> str | None:
    """Return the installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_processor_name() -> str:
    """Return the processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()
