"""Downstream tasks: what a finished run answers, scored as benchmarks score it, and kept as results beside its record.

The model is the one that the run's record is about, rebuilt from its weights, in full. Decoding is greedy, in fp32.
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
from mode.downstream.task import DEFAULT, Done, Scored, Task, digest_prompt, load_task, read_questions
from mode.records.provenance import describe_environment, find_version
from mode.records.record import Record
from mode.runs.execute import restore
from mode.runs.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.downstream.harness import Harnessed


class Subject:
    """A finished run's model, loaded when the first task needs it.

    Attributes:
        prepared: The run.
    """

    def __init__(self, prepared: Prepared) -> None:
        """Load nothing yet."""
        self.prepared = prepared

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the run's device, not training."""
        from mode.core.device import set_up

        train = self.prepared.run.train
        device = set_up(train.threads, train.device)
        model: PreTrainedModel = self.prepared.method.plain(restore(self.prepared)).to(device).eval()
        return model

    @cached_property
    def tokenizer(self) -> BackboneTokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.prepared.run.backbone)

    @cached_property
    def reader(self) -> Any:
        """The model as lm-evaluation-harness wants it."""
        from mode.downstream.harness import make_reader

        return make_reader(self.model, locate(self.prepared.run.backbone))


Scorer = Callable[[Subject, int | None, Done], Scored]
"""Scores a run's model on so many questions, or all."""


@dataclass(frozen=True)
class Planned:
    """A task that can be asked: it exists, its questions are here, and what scores it is installed.

    Attributes:
        task: What identifies it in a result.
        data: What its questions are and where they come from, with a digest.
        of: Questions that it has.
        score: Scores a run's model on it.
    """

    task: dict[str, Any]
    data: dict[str, Any]
    of: int
    score: Scorer

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.task["task"])


def plan_tasks(names: Sequence[str], cache: Path, extra: Path | None = None) -> list[Planned]:
    """Find tasks and fetch their questions.

    Args:
        names: Tasks of the project's own, of the user's, or of lm-evaluation-harness's registry; none: the default.
        cache: Folder for fetched wheels.
        extra: A folder of the user's own configuration.

    Raises:
        ConfigError: There is no such task, or something that it needs is not here.
    """
    own = list_members("downstream", extra)
    names = list(dict.fromkeys(names or DEFAULT))
    tasks = {name: load_task(name, extra) for name in names if name in own}
    check_needs(names, tasks, own)
    planned: list[Planned] = []
    for name in names:
        if name in tasks:
            planned.append(plan_own(name, tasks[name], cache))
        else:
            from mode.downstream.harness import load_registered_tasks

            planned += [plan_registered(each) for each in load_registered_tasks(name, own)]
    return planned


def check_needs(names: Sequence[str], tasks: Mapping[str, Task], own: Sequence[str]) -> None:
    """Refuse tasks that cannot be scored on this machine, before anything is loaded.

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


def plan_own(name: str, task: Task, cache: Path) -> Planned:
    """Plan a task of the project's own."""
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

        return Planned(about | {"limits": asdict(LIMITS)}, data, len(questions), program_scorer(task, questions))
    from mode.downstream.harness import convert_task

    return Planned(about, data, len(questions), harness_scorer(convert_task(name, task, questions)))


def plan_registered(given: Harnessed) -> Planned:
    """Plan a task of lm-evaluation-harness's registry."""
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
    return Planned(about, data, given.questions, harness_scorer(given))


def program_scorer(task: Task, questions: Sequence[Mapping[str, Any]]) -> Scorer:
    """Return how a task of programs is scored."""

    def score(subject: Subject, limit: int | None, done: Done) -> Scored:
        from mode.downstream.programs import score_programs

        return score_programs(task, questions, subject.model, subject.tokenizer, limit, done)

    return score


def harness_scorer(given: Harnessed) -> Scorer:
    """Return how a task of the harness is scored."""

    def score(subject: Subject, limit: int | None, done: Done) -> Scored:
        from mode.downstream.harness import score_harnessed

        return score_harnessed(given, subject.reader, limit, done)

    return score


def score_tasks(
    prepared: Prepared,
    record: Record,
    planned: Sequence[Planned],
    *,
    limit: int | None = None,
    again: bool = False,
    done: Callable[[str, int, int], None] = lambda name, number, total: None,
) -> Iterator[tuple[Result, bool]]:
    """Score a finished run on tasks, one after the other, writing every result as soon as it stands.

    Args:
        prepared: The run.
        record: Its record.
        planned: The tasks.
        limit: Questions of each task to ask at most, the first ones.
        again: Score anew although there is a result.
        done: Called with the task, the number of the question that is done, and of how many.

    Yields:
        Every result, and whether it was there before.

    Raises:
        ConfigError: The run's weights are not here, or a task does not fit its model.
    """
    folder = prepared.results / COLLECTION.name
    folder.mkdir(parents=True, exist_ok=True)  # now, so that a place where nothing can be written costs no time
    subject = Subject(prepared)
    for each in planned:
        asked = describe_result(prepared, record, each, limit)
        identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        empty = Result(SCHEMA, identity, asked, {}, {})
        path = folder / empty.filename
        before = COLLECTION.read_file(path) if path.exists() and not again else None
        if before is not None and before.id == identity:
            yield before, True
            continue
        conditions = describe_provenance(prepared, each, subject)
        begin = time.monotonic()
        scored = each.score(subject, asked["limit"], partial(done, each.name))
        happened = summarise_score(asked["metric"], scored, time.monotonic() - begin)
        result = Result(SCHEMA, identity, asked, happened, conditions)
        result.write(folder)
        yield result, False


def describe_result(prepared: Prepared, record: Record, each: Planned, limit: int | None) -> dict[str, Any]:
    """Return what a result is asked for."""
    whole = limit is None or limit >= each.of
    return {
        "run": prepared.id,
        "run_name": record.filename.removesuffix(f"-{record.id}.json"),
        "backbone": prepared.run.backbone.name,
        **each.task,
        "decoding": "greedy",
        "precision": "fp32",
        "limit": None if whole else limit,
    }


def summarise_score(metric: str, scored: Scored, seconds: float) -> dict[str, Any]:
    """Return what a result says of a score.

    Raises:
        ConfigError: The metric that a task calls its score is not among those that were measured.
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


def describe_provenance(prepared: Prepared, each: Planned, subject: Subject) -> dict[str, Any]:
    """Describe the conditions that a result is made under."""
    from mode.core.device import describe_device

    seen = describe_environment(describe_device(subject.model.device), prepared.run.train.threads)
    versions = seen["versions"] | {"lm-eval": find_version("lm-eval")}
    return {"data": each.data, "backbone": prepared.backbone, **seen, "versions": versions}
