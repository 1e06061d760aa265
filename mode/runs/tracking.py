"""Logging to Weights & Biases: the only module that imports it. Records never depend on it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from mode.config.run import Track
from mode.core.errors import ConfigError
from mode.core.escape import mask_passwords
from mode.core.files import expand_home, find_paths

if TYPE_CHECKING:
    import pandas as pd


class Tracker(Protocol):
    """Receives a run's progress."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values at a step."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the final values and close."""

    def abandon(self) -> None:
        """Close without final values, because the run failed or was interrupted."""


class NoTracker:
    """A tracker that discards everything."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log nothing."""

    def abandon(self) -> None:
        """Close nothing."""


class WandbTracker:
    """Logs to a Weights & Biases run with the id of the run, so that a resumed run continues in it."""

    def __init__(
        self, track: Track, *, run_id: str, name: str, job_type: str, config: Mapping[str, Any], folder: Path
    ) -> None:
        """Open the run, without any prompt."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=track.project,
                group=track.group,
                name=name,
                job_type=job_type,
                id=run_id,
                resume="allow",
                config=dict(config),
                dir=str(folder),
                mode=track.mode if track.mode != "none" else "disabled",
                settings=wandb.Settings(console="off", x_disable_stats=True, quiet=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"Weights & Biases: {str(error).splitlines()[0]} (track=wandb logs offline)") from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values at a step."""
        self.run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the final values and close."""
        self.run.summary.update(dict(summary))
        self.run.finish()

    def abandon(self) -> None:
        """Close without final values, because the run failed or was interrupted."""
        self.run.finish(exit_code=1)

    def show(self, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Path]) -> None:
        """Log tables and images of figures."""
        import wandb

        shown = {name: wandb.Table(dataframe=table) for name, table in tables.items()}
        self.run.log({**shown, **{name: wandb.Image(str(path)) for name, path in figures.items()}})


class LateTracker:
    """Opens another tracker at the first value to log, so that the first step of a run does not wait for it."""

    def __init__(self, make: Callable[[], Tracker]) -> None:
        """Open nothing yet."""
        self.make = make

    @cached_property
    def opened(self) -> Tracker:
        """Return the tracker, and open it if it is not open yet."""
        return self.make()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values at a step."""
        self.opened.log(values, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the final values and close."""
        self.opened.finish(summary)

    def abandon(self) -> None:
        """Close without final values, if open."""
        if "opened" in vars(self):
            self.opened.abandon()


def make_tracker(
    track: Track, *, run_id: str, name: str, job_type: str, config: Mapping[str, Any], folder: Path
) -> Tracker:
    """Return the tracker of the settings; one with a server opens at once, since that can fail.

    Raises:
        ConfigError: There is no home folder, or the server cannot be used.
    """
    if track.mode == "none":
        return NoTracker()
    try:
        expand_home("~")
    except ConfigError as error:
        raise ConfigError("Weights & Biases needs a home folder: set HOME, or choose track=none") from error
    make = partial(WandbTracker, track, run_id=run_id, name=name, job_type=job_type, config=config, folder=folder)
    return LateTracker(make) if track.mode == "offline" else make()


def list_unsynced(runs: Path) -> list[Path]:
    """Return the offline logs under a folder of runs that are not synchronised yet, oldest first."""
    logs = find_paths(runs, "*/wandb/offline-run-*/*.wandb")
    found = [path.parent for path in logs if not sync_marker(path).exists()]
    return sorted(found, key=lambda path: path.name)


def sync_marker(path: Path) -> Path:
    """Return the file that Weights & Biases writes next to a synchronised log."""
    return path.with_name(f"{path.name}.synced")


def remove_user(url: str) -> str:
    """Return a URL without a user and a password, which urllib would take for a part of the host.

    >>> remove_user("https://me:secret@example.org:8080/x")
    'https://example.org:8080/x'
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def sync(logs: Sequence[Path]) -> None:
    """Upload offline logs to Weights & Biases.

    Raises:
        ConfigError: The server cannot be reached, or refuses a log. Logs that were not uploaded stay for the next call.
    """
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:  # without this, wandb would go on trying for hours
        plain = remove_user(url)
        urllib.request.urlopen(urllib.request.Request(plain, method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError:
        pass  # the server answers
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{url} cannot be reached ({reason}); {len(logs)} offline runs stay as they are") from error
    command = [sys.executable, "-m", "wandb", "sync", *map(str, logs)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr or ():
            print(mask_passwords(line), end="", file=sys.stderr)
            lines.append(line.strip())
    if process.returncode:
        reason = next((line for line in reversed(lines) if "rror" in line), "wandb sync failed")
        raise ConfigError(f"Weights & Biases: {reason.removeprefix('Error: ')}")
