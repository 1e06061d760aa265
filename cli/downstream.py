"""mode eval --downstream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.result import Result
    from mode.settings import Run


def score_downstream(run: Run, names: Sequence[str], limit: int | None, conf: Path | None, *, again: bool) -> None:
    """Score the finished run that the settings describe on downstream tasks, and keep the results."""
    from mode.checked import ConfigError
    from mode.downstream import measure, plan
    from mode.prepared import finished, prepare_run

    planned = plan(names, Path(run.paths.cache).expanduser(), conf)
    prepared = prepare_run(run)
    record = finished(prepared)
    if record is None:
        raise ConfigError(f"run {prepared.id} is not finished: no record in {prepared.results / 'records'}")
    print(f"run {prepared.id}: {record.filename.removesuffix('.json')}", file=sys.stderr)
    for result, existed in measure(prepared, record, planned, limit=limit, again=again, done=tell_progress):
        print(describe_result(result) + ("  (exists; --again scores it anew)" if existed else ""))
    print("`mode report downstream` renders all", file=sys.stderr)


def tell_progress(name: str, number: int, total: int) -> None:
    """Say how far a task is: in place on a terminal, else ten times in all."""
    if sys.stderr.isatty():
        print(f"\r{name}: {number} of {total}", end="\n" if number == total else "", file=sys.stderr, flush=True)
    elif number == total or number % max(1, total // 10) == 0:
        print(f"{name}: {number} of {total}", file=sys.stderr)


def describe_result(result: Result) -> str:
    """Phrase a result in one line."""
    asked, happened = result.asked, result.happened
    parts = [
        f"{asked['task']} v{asked['version']}",
        f"{asked['metric']} {result.score}",
        f"{happened['n']} of {happened['of']} questions",
        f"{asked['num_fewshot']} shots",
        f"unparsed {result.unparsed}",
        *(f"{count} {outcome}" for outcome, count in happened["outcomes"].items() if outcome != "unparsed"),
        *([f"{happened['truncated']} prompts cut"] if happened["truncated"] else []),
        f"{happened['seconds']:.0f} s",
        f"prompt {asked['prompt_sha256']}",
    ]
    return "  ".join(parts)
