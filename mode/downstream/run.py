"""Score a finished run on downstream tasks and write the results.

The model is rebuilt from the weights of the run. Decoding is greedy, in fp32.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.backbone.load import locate
from mode.backbone.tokenizer import BackboneTokenizer, load_tokenizer
from mode.config.groups import list_members
from mode.core.errors import ConfigError, suggest
from mode.downstream.results import COLLECTION, SCHEMA, Result
from mode.downstream.task import DEFAULT, Progress, Task, TaskScore, digest_prompt, load_task, read_questions
from mode.records.measurement import make_id
from mode.records.provenance import describe_environment, find_version
from mode.records.record import Record
from mode.runs.execute import restore
from mode.runs.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.downstream.harness import HarnessTask


class RunModel:
    """Model and tokenizer of a finished run. They are loaded on first use.

    Attributes:
        prepared: The run.
    """

    def __init__(self, prepared: Prepared) -> None:
        """Keep the run, without loading the model."""
        self.prepared = prepared

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the run's device, in evaluation mode."""
        from mode.core.device import set_up

        train = self.prepared.run.train
        device = set_up(train.threads, train.device)
        model: PreTrainedModel = self.prepared.method.plain(restore(self.prepared)).to(device).eval()
        return model

    @cached_property
    def tokenizer(self) -> BackboneTokenizer:
        """The tokenizer."""
        return load_tokenizer(self.prepared.run.backbone)

    @cached_property
    def harness_model(self) -> Any:
        """The model, wrapped for lm-evaluation-harness."""
        from mode.downstream.harness import wrap_model

        return wrap_model(self.model, self.tokenizer, locate(self.prepared.run.backbone))


Scorer = Callable[[RunModel, int | None, Progress], TaskScore]
"""Scores a run's model, given the limit on questions (None for all) and a progress function."""


@dataclass(frozen=True)
class PlannedTask:
    """A task that is ready to be scored: its questions and all required packages are available.

    Attributes:
        task: Description of the task, part of the identity of a result.
        data: Description of the questions: source, licence and digest.
        of: Number of questions.
        score: Scores a run's model on the task.
    """

    task: dict[str, Any]
    data: dict[str, Any]
    of: int
    score: Scorer

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.task["task"])


def plan_tasks(names: Sequence[str], cache: Path, extra: Path | None = None) -> list[PlannedTask]:
    """Find tasks and load their questions.

    Args:
        names: Tasks of this project, of the user's configuration, or of lm-evaluation-harness's registry. If empty, the
            default tasks.
        cache: Folder for downloaded wheels.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: There is no such task, or its data or a required package is missing.
    """
    own = list_members("downstream", extra)
    names = list(dict.fromkeys(names or DEFAULT))
    tasks = {name: load_task(name, extra) for name in names if name in own}
    check_needs(names, tasks, own)
    planned: list[PlannedTask] = []
    for name in names:
        if name in tasks:
            planned.append(plan_own(name, tasks[name], cache))
        else:
            from mode.downstream.harness import load_registered_tasks

            planned += [plan_registered(task) for task in load_registered_tasks(name, own)]
    return planned


def check_needs(names: Sequence[str], tasks: Mapping[str, Task], own: Sequence[str]) -> None:
    """Check that tasks can be scored on this machine, before anything is loaded.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or programs cannot be confined.
    """
    from mode.downstream.harness import INSTALL, is_installed
    from mode.downstream.sandbox import check_isolation

    for name in names:
        if name not in tasks and not is_installed():
            raise ConfigError(
                f"task {name}: not one of {', '.join(own)}{suggest(name, own)} "
                f"(lm-evaluation-harness has more: {INSTALL})"
            )
        if name in tasks and tasks[name].kind == "harness" and not is_installed():
            raise ConfigError(f"task {name} needs lm-evaluation-harness: {INSTALL}")
    if any(task.kind == "program" for task in tasks.values()):
        check_isolation()


def plan_own(name: str, task: Task, cache: Path) -> PlannedTask:
    """Prepare a task of this project, or of the user's configuration."""
    questions = read_questions(task, cache)
    about = {
        "task": name,
        "version": task.version,
        "prompt": task.prompt,
        "prompt_sha256": digest_prompt(task.prompt),
        "num_fewshot": task.num_fewshot,
        "max_tokens": task.max_tokens,
        "stop": list(task.stop),
        "metric": task.metric,
        "chance": task.chance,
        "unparsed": task.unparsed,
    }
    data = {"description": task.description, "licence": task.licence, **asdict(task.source)}
    if task.kind == "program":
        from mode.downstream.sandbox import LIMITS

        return PlannedTask(
            about | {"limits": asdict(LIMITS)}, data, len(questions), make_program_scorer(task, questions)
        )
    from mode.downstream.harness import convert_task

    return PlannedTask(about, data, len(questions), make_harness_scorer(convert_task(name, task, questions)))


def plan_registered(given: HarnessTask) -> PlannedTask:
    """Prepare a task of lm-evaluation-harness's registry."""
    task = given.task
    generation = task.get_config("generation_kwargs") or {}
    prompt = given.prompt or "(made by a function of lm-evaluation-harness)"
    about = {
        "task": given.name,
        "version": given.version,
        "prompt": prompt,
        "prompt_sha256": digest_prompt(prompt),
        "num_fewshot": given.num_fewshot,
        "max_tokens": generation.get("max_gen_toks"),
        "stop": list(generation.get("until") or ()),
        "metric": given.metric,
        "chance": None,
        "unparsed": "answers that the task's filter could not read" if task.OUTPUT_TYPE == "generate_until" else "",
    }
    text = json.dumps([dict(question) for question in task.eval_docs], default=str, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    data = {
        "description": f"{given.name} of lm-evaluation-harness",
        "licence": "that of its data set",
        "requirement": " ".join(part for part in (task.DATASET_PATH, task.DATASET_NAME) if part),
        "sha256": digest,
    }
    return PlannedTask(about, data, given.questions, make_harness_scorer(given))


def make_program_scorer(task: Task, questions: Sequence[Mapping[str, Any]]) -> Scorer:
    """Return a function that scores a model on a task of programs."""

    def score(subject: RunModel, limit: int | None, done: Progress) -> TaskScore:
        from mode.downstream.programs import score_programs

        return score_programs(task, questions, subject.model, subject.tokenizer, limit, done)

    return score


def make_harness_scorer(given: HarnessTask) -> Scorer:
    """Return a function that scores a model on a task of the harness."""

    def score(subject: RunModel, limit: int | None, done: Progress) -> TaskScore:
        from mode.downstream.harness import score_harness_task

        return score_harness_task(given, subject.harness_model, limit, done)

    return score


def score_tasks(
    prepared: Prepared,
    record: Record,
    planned: Sequence[PlannedTask],
    *,
    limit: int | None = None,
    overwrite: bool = False,
    done: Callable[[str, int, int], None] = lambda name, number, total: None,
) -> Iterator[tuple[Result, bool]]:
    """Score a finished run on tasks, one after the other. Every result is written as soon as it is complete.

    Args:
        prepared: The run.
        record: Record of the run.
        planned: The tasks.
        limit: Maximum number of questions of each task, from the first; None for all.
        overwrite: Whether to score tasks that have a result.
        done: Called after every question with the task, the number of questions done and the number of all questions.

    Yields:
        Every result, and whether it existed before.

    Raises:
        ConfigError: The weights of the run are missing, or a task does not fit its model.
    """
    folder = prepared.results / COLLECTION.name
    folder.mkdir(parents=True, exist_ok=True)  # fails before any work if the folder is not writable
    subject = RunModel(prepared)
    for task in planned:
        asked = describe_result(prepared, record, task, limit)
        identity = make_id(asked)
        empty = Result(SCHEMA, identity, asked, {}, {})
        path = folder / empty.filename
        before = COLLECTION.read_file(path) if path.exists() and not overwrite else None
        if before is not None and before.id == identity:
            yield before, True
            continue
        provenance = describe_provenance(prepared, task, subject)
        begin = time.monotonic()
        scored = task.score(subject, asked["limit"], partial(done, task.name))
        happened = summarise_score(asked["metric"], scored, time.monotonic() - begin)
        result = Result(SCHEMA, identity, asked, happened, provenance)
        result.write(folder)
        yield result, False


def describe_result(prepared: Prepared, record: Record, task: PlannedTask, limit: int | None) -> dict[str, Any]:
    """Return the block `asked` of a result. The identity of the result is its digest."""
    whole = limit is None or limit >= task.of
    return {
        "run": prepared.id,
        "run_name": record.filename.removesuffix(f"-{record.id}.json"),
        "backbone": prepared.run.backbone.name,
        **task.task,
        "decoding": "greedy",
        "precision": "fp32",
        "limit": None if whole else limit,
    }


def summarise_score(metric: str, scored: TaskScore, seconds: float) -> dict[str, Any]:
    """Return the block `happened` of a result.

    Args:
        metric: Name of the headline metric.
        scored: Scores of the task.
        seconds: Duration of the scoring.

    Raises:
        ConfigError: The headline metric was not measured.
    """
    if metric not in scored.metrics:
        raise ConfigError(f"metric: {metric}: not one of {', '.join(scored.metrics)}{suggest(metric, scored.metrics)}")
    score, error = scored.metrics[metric]
    return {
        "n": scored.asked,
        "of": scored.of,
        "score": score,
        "stderr": error,
        "metrics": {name: {"value": value, "stderr": spread} for name, (value, spread) in scored.metrics.items()},
        "unparsed": scored.unparsed,
        "truncated": scored.truncated,
        "outcomes": dict(scored.outcomes),
        "values": list(scored.values),
        "seconds": round(seconds, 1),
        "example": scored.example,
    }


def describe_provenance(prepared: Prepared, task: PlannedTask, subject: RunModel) -> dict[str, Any]:
    """Return the block `provenance` of a result: data, backbone, versions and machine."""
    from mode.core.device import describe_device

    environment = describe_environment(describe_device(subject.model.device), prepared.run.train.threads)
    versions = environment["versions"] | {"lm-eval": find_version("lm-eval")}
    return {"data": task.data, "backbone": prepared.backbone, **environment, "versions": versions}
