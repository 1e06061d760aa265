"""Completions of many prompts are those of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest

from mode.artefacts.find import find_model
from mode.backbone.load import load_model
from mode.backbone.tokenizer import load_tokenizer
from mode.config.compose import compose
from mode.evaluation.complete import complete_prompts
from mode.evaluation.generate import Sampling, generate
from mode.runs.execute import execute
from tests.conftest import World
from tests.downstream.test_downstream import pico

PROMPTS = ["def f", "x", "", "def add(first, second):\n    return", "1 + 1 =", "import", "def g"]
METHODS = {
    "mode": ("method=mode",),
    "mode-prefix": ("method=mode", "method.gate.scope=prefix"),
    "lora": ("method=lora",),
    "btm": ("method=btm",),
    "btm-window": ("method=btm", "method.window=4"),
}


def complete_alone(model: Any, tokenizer: Any, prompt: str, stop: str = "") -> str:
    text = ""
    for piece in generate(model, tokenizer, prompt, Sampling(max_tokens=12), cut=True):
        text += piece.text
        if stop and stop in text:
            break
    return text


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_batch_gives_the_texts_of_single_prompts(world: World, rows: int) -> None:
    model, tokenizer = load_model(pico(world)).eval(), load_tokenizer(pico(world))
    alone = [complete_alone(model, tokenizer, prompt) for prompt in PROMPTS]
    found = dict(complete_prompts(model, tokenizer, PROMPTS, 12, [], rows=rows))
    assert [found[number] for number in range(len(PROMPTS))] == alone


def test_rows_end_apart(world: World) -> None:
    """A text that stops leaves its batch; the others are as they would be without it."""
    model, tokenizer = load_model(pico(world)).eval(), load_tokenizer(pico(world))
    stop = complete_alone(model, tokenizer, PROMPTS[0])[0]
    alone = [complete_alone(model, tokenizer, prompt, stop) for prompt in PROMPTS]
    made = list(complete_prompts(model, tokenizer, PROMPTS, 12, [stop]))
    assert [text for _, text in sorted(made)] == alone
    assert len({len(text) for text in alone}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_a_composed_model_gives_the_texts_of_single_prompts(world: World, name: str) -> None:
    record = execute(compose([*world.overrides, *METHODS[name]], world.conf))
    found = find_model(record.id, world.root / "runs")
    alone = [complete_alone(found.model, found.tokenizer, prompt) for prompt in PROMPTS]
    made = list(complete_prompts(found.model, found.tokenizer, PROMPTS, 12, [], rows=4))
    assert [text for _, text in sorted(made)] == alone
