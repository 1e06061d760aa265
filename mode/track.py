"""Weights & Biases as a window on a run; the only module that knows it, and never the source of a number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mode.checked import ConfigError
from mode.settings import Track


class Tracker(Protocol):
    """Where a run's progress goes."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values at a step."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the final values and close."""

    def abandon(self) -> None:
        """Close without final values, because the run failed or was interrupted."""


class NoTracker:
    """Logs nothing."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log nothing."""

    def abandon(self) -> None:
        """Close nothing."""


class WandbTracker:
    """Logs to one Weights & Biases run, whose id is the run's own, so that a resumed run goes on in it."""

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


def make_tracker(
    track: Track, *, run_id: str, name: str, job_type: str, config: Mapping[str, Any], folder: Path
) -> Tracker:
    """Return the tracker that the settings ask for."""
    if track.mode == "none":
        return NoTracker()
    return WandbTracker(track, run_id=run_id, name=name, job_type=job_type, config=config, folder=folder)
