"""Log rendered tables and figures as one Weights & Biases run. Records remain the source of every number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mode.config.run import Run
from mode.core.files import expand_home
from mode.records.record import read_records
from mode.report.estimate import compile_in_full
from mode.report.frames import make_cost_frame, make_frame
from mode.report.render import list_gates
from mode.runs.tracking import WandbTracker
from mode.tables.table import file_stem, load_table

JOB = "report"
"""Name and job type of the Weights & Biases run."""


def publish(
    rendered: Sequence[tuple[str, Sequence[str]]], run: Run, extra: Path | None = None, metrics: Sequence[str] = ()
) -> str:
    """Log rendered tables and their figures.

    Args:
        rendered: Names of tables, each with the overrides of its rendering. The files are in the results folder.
        run: Settings of the tracker and the folders.
        extra: A folder of the user's own configuration.
        metrics: Metrics that the tables show in place of their own.

    Returns:
        The id of the Weights & Biases run, which is a hash of the tables.
    """
    results = expand_home(run.paths.results)
    records = read_records(results)
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Path] = {}
    content = hashlib.sha256()
    for name, overrides in rendered:
        table = load_table(name, extra, metrics)
        compiled = compile_in_full(table, records, overrides, extra)
        base = results / file_stem(name, overrides, table.overrides, metrics)
        tables |= {base.name: make_frame(compiled), f"{base.name}-cost": make_cost_frame(compiled)}
        figures |= {
            f"{path.stem}-figure": path for path in (base.with_suffix(".png"), *list_gates(base)) if path.exists()
        }
        content.update(base.with_suffix(".md").read_bytes())
    run_id = f"{JOB}-{content.hexdigest()[:12]}"
    folder = expand_home(run.paths.runs) / JOB
    settings = {"records": sorted(record.id for record in records)}
    tracker = WandbTracker(run.track, run_id=run_id, name=JOB, job_type=JOB, config=settings, folder=folder)
    tracker.show(tables, figures)
    tracker.finish({"records": len(records)})
    return run_id
