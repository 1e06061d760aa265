"""Score programs that a model completes: each is run against its tests in a sandbox."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mode.core.errors import ConfigError
from mode.downstream.sandbox import run_program
from mode.downstream.task import Progress, Task, TaskScore, cut_at_stops, render_prompt
from mode.evaluation.generate import Sampling, count_context, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.backbone.tokenizer import BackboneTokenizer

FIELDS = ("test", "entry_point")
"""Fields of a question besides the prompt: Python source that defines `check(candidate)`, and the function's name."""


def complete_prompt(
    model: PreTrainedModel, tokenizer: BackboneTokenizer, prompt: str, max_tokens: int, stop: Sequence[str]
) -> str:
    """Continue a prompt greedily. A prompt that is too long for the model's context is cut at its beginning.

    The completion ends at the first stop text, at a token that ends a text, or after `max_tokens` tokens.
    """
    text = ""
    for piece in generate(model, tokenizer, prompt, Sampling(max_tokens), cut=True):
        text += piece.text
        if any(end in text for end in stop):
            break
    return cut_at_stops(text, stop)


def score_programs(
    task: Task,
    questions: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    tokenizer: BackboneTokenizer,
    limit: int | None = None,
    done: Progress = lambda number, total: None,
) -> TaskScore:
    """Complete every program greedily and run it against its tests.

    Args:
        task: A task of the kind `program`.
        questions: Questions of the task.
        model: A causal LM with a key-value cache, in evaluation mode.
        tokenizer: Tokenizer of the model.
        limit: Maximum number of questions, from the first; None for all.
        done: Called after every question.

    Returns:
        pass@1 of one greedy sample, and the number of completions by outcome. Completions that are not valid Python
        count as unparsed.

    Raises:
        ConfigError: A question is incomplete, or the context of the model is shorter than an answer.
    """
    length = task.max_tokens or 0
    window = count_context(model) - length
    if window <= 0:
        raise ConfigError(f"an answer takes up to {length} tokens: this model reads {count_context(model)}")
    asked = questions[:limit]
    check_questions(asked)
    prompts = [render_prompt(task, question) for question in asked]
    passed, outcomes, truncated = [], Counter[str](), 0
    for number, (question, prompt) in enumerate(zip(asked, prompts, strict=True), 1):
        truncated += len(tokenizer.encode([prompt])[0]) > window
        program = prompt + complete_prompt(model, tokenizer, prompt, length, task.stop)
        verdict = run_program(program, f"{question['test']}\ncheck({question['entry_point']})")
        passed.append(verdict.outcome == "passed")
        outcomes[verdict.outcome] += 1
        done(number, len(asked))
    return TaskScore(
        asked=len(asked),
        of=len(questions),
        values=[float(value) for value in passed],
        metrics={task.metric: compute_mean(passed)},
        unparsed=outcomes["unparsed"],
        truncated=truncated,
        example=prompts[0],
        outcomes=dict(sorted(outcomes.items())),
    )


def check_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse questions without tests.

    Raises:
        ConfigError: A question lacks its test or the name of its function.
    """
    for number, question in enumerate(questions, 1):
        missing = [name for name in FIELDS if not isinstance(question.get(name), str)]
        if missing:
            raise ConfigError(f"question {number} has no {missing[0]}")


def compute_mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of values and its standard error, which is None for a single value.

    >>> compute_mean([True, False, False, False])
    (0.25, 0.25)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
