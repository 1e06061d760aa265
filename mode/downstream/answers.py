"""Answers of a model to prompts that may differ in their limits and their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mode.downstream.task import cut_at_stops
from mode.evaluation.complete import complete_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.backbone.tokenizer import BackboneTokenizer


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: BackboneTokenizer,
    asked: Sequence[tuple[str, int, list[str]]],
    done: Callable[[int], None],
) -> list[str]:
    """Return the greedy continuation of every prompt.

    Args:
        model: A causal LM, on its device, in evaluation mode.
        tokenizer: Tokenizer of the model.
        asked: Prompts, each with its maximum number of new tokens and the texts that end its answer.
        done: Called after every answer with the number of answers.
    """
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for number, (_, length, stop) in enumerate(asked):
        alike.setdefault((length, tuple(stop)), []).append(number)
    answers: dict[int, str] = {}
    for (length, ends), numbers in alike.items():
        prompts = [asked[number][0] for number in numbers]
        for index, text in complete_prompts(model, tokenizer, prompts, length, ends):
            answers[numbers[index]] = cut_at_stops(text, ends)
            done(len(answers))
    return [answers[number] for number in range(len(asked))]
