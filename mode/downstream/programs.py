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
from mode.evaluation.complete import complete_prompts
from mode.evaluation.generate import count_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.backbone.tokenizer import BackboneTokenizer

FIELDS = ("test", "entry_point")
"""Fields of a question besides the prompt: Python source that defines `check(candidate)`, and the function's name."""


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
    verdicts: dict[int, str] = {}
    for number, text in complete_prompts(model, tokenizer, prompts, length, task.stop):
        program, question = prompts[number] + cut_at_stops(text, task.stop), asked[number]
        verdicts[number] = run_program(program, f"{question['test']}\ncheck({question['entry_point']})").outcome
        done(len(verdicts), len(asked))
    passed = [verdicts[number] == "passed" for number in range(len(asked))]
    outcomes = Counter(verdicts.values())
    return TaskScore(
        asked=len(asked),
        of=len(questions),
        values=[float(value) for value in passed],
        metrics={task.metric: compute_mean(passed)},
        unparsed=outcomes["unparsed"],
        truncated=sum(len(ids) > window for ids in tokenizer.encode(prompts)),
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
