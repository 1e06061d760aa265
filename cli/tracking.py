"""Command `mode sync`: push offline runs to Weights & Biases."""

from __future__ import annotations

from cli.options import ConfOption, Overrides, find_runs_folder, reporting_errors


def sync(overrides: Overrides = None, conf: ConfOption = None) -> None:
    """Push offline runs to Weights & Biases.

    Runs that are already pushed are skipped.

    Example: mode sync paths.runs=runs
    """
    with reporting_errors():
        from mode.runs.tracking import list_unsynced
        from mode.runs.tracking import sync as push

        runs = find_runs_folder(overrides, conf)
        logs = list_unsynced(runs)
        if not logs:
            print(f"nothing to push: {runs} has no offline run that is not pushed yet")
            return
        push(logs)
        print(f"{len(logs)} offline runs pushed")
