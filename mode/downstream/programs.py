"""Score programs that a model completes: whether their tests pass, each run in a sandbox."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mode.core.errors import ConfigError
from mode.downstream.sandbox import run_program
from mode.downstream.task import Done, Scored, Task, cut_at_stops, render_prompt
from mode.evaluation.generate import Sampling, count_context, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.backbone.tokenizer import BackboneTokenizer

FIELDS = ("test", "entry_point")
"""What a question has beside its prompt: Python that defines `check(candidate)`, and the name of the function."""


def complete_prompt(
    model: PreTrainedModel, tokenizer: BackboneTokenizer, prompt: str, max_tokens: int, stop: Sequence[str]
) -> str:
    """Continue a prompt greedily up to the first of the texts that end it, the end of a document or so many tokens."""
    text = ""
    for piece in generate(model, tokenizer, prompt, Sampling(max_tokens)):
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
    done: Done = lambda number, total: None,
) -> Scored:
    """Complete every program greedily and run it against its tests.

    Args:
        task: A task of the kind program.
        questions: Its questions.
        model: A causal LM with a key-value cache, not training.
        tokenizer: Its tokenizer.
        limit: Questions to ask at most, the first ones.
        done: Called after every question with how many are done, and of how many.

    Returns:
        pass@1 of one greedy sample, and what became of every completion; those that are not Python are unparsed.

    Raises:
        ConfigError: A question is incomplete, or the model reads too little to make the answer.
    """
    length = task.max_tokens or 0
    window = count_context(model) - length
    if window <= 0:
        raise ConfigError(f"an answer of up to {length} tokens: this model reads {count_context(model)}")
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
    return Scored(
        asked=len(asked),
        of=len(questions),
        values=[float(each) for each in passed],
        metrics={task.metric: mean_with_error(passed)},
        unparsed=outcomes["unparsed"],
        truncated=truncated,
        example=prompts[0],
        outcomes=dict(sorted(outcomes.items())),
    )


def check_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse questions without tests.

    Raises:
        ConfigError: One has no test, or no name of a function.
    """
    for number, question in enumerate(questions, 1):
        missing = [name for name in FIELDS if not isinstance(question.get(name), str)]
        if missing:
            raise ConfigError(f"question {number} has no {missing[0]}")


def mean_with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return a mean and its standard error, which one value has not.

    >>> mean_with_error([True, False, False, False])
    (0.25, 0.25)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
