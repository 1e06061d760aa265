"""Suite `eval`: log-likelihoods of short texts and of whole rows, compared with lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mode.backbone.load import load_model
from mode.backbone.shape import read_shape
from mode.bench.timing import Case
from mode.core.errors import ConfigError
from mode.cost.flops import compute_untouched_cost
from mode.data.pack import PackedSplit
from mode.downstream.harness import is_installed, silence_harness
from mode.evaluation.likelihood import Text, compute_log_likelihoods
from mode.evaluation.next_token import evaluate

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

SHORTEST, LONGEST, TEXTS = 32, 254, 24
"""Fewest and most tokens of a short text, with lengths evenly spaced, and number of texts."""


TOLERANCE = 1e-6
"""Largest relative difference between the two sums of log-likelihoods."""


def prepare_evaluation(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that score the same texts with mode and with lm-evaluation-harness.

    Args:
        run: Run with the backbone, the sequence length and the batch size of evaluation.
        method: Not used.
        device: Device of the model.
        folder: Not used.

    Raises:
        ConfigError: The two sums of log-likelihoods differ.
    """
    model = load_model(run.backbone).to(device).eval()
    shape, random = read_shape(run.backbone), np.random.default_rng(0)
    lengths = np.linspace(SHORTEST, LONGEST, TEXTS).astype(int)
    texts = [random.integers(shape.vocabulary, size=length).tolist() for length in random.permutation(lengths)]
    count, row = run.evaluate.batch_size, run.train.sequence_length
    stream = random.integers(shape.vocabulary, size=2 * count * row + 1, dtype=np.uint32)
    windows = [stream[start : start + row + 1].tolist() for start in range(0, len(stream) - 1, row)]
    split = PackedSplit(stream, np.asarray([0, len(stream)]), len(stream))
    jobs: dict[str, tuple[list[list[int]], Callable[[], float]]] = {
        "short texts": (texts, partial(score_short, model, texts, row, count)),
        "whole rows": (windows, partial(score_whole, model, split, run)),
    }
    cases = []
    for job, (tokens, ours) in jobs.items():
        scored = sum(len(each) - 1 for each in tokens)
        flops = scored * compute_untouched_cost(shape, row).flops.forward
        ways = {"mode": ours}
        if is_installed():
            ways = {"lm-evaluation-harness": make_harness_action(model, tokens, count), "mode": ours}
            first, second = (way() for way in ways.values())
            if abs(first / second - 1) > TOLERANCE:
                raise ConfigError(f"{job}: the sums of log-likelihoods differ: {first} and {second}")
        cases += [Case(job, name, drop_result(way), scored, flops=flops, counted=True) for name, way in ways.items()]
    return cases, {}


def drop_result(action: Callable[[], float]) -> Callable[[], None]:
    """Return an action without a result, since a float would be taken as seconds."""

    def act() -> None:
        action()

    return act


def score_short(model: Any, texts: Sequence[Sequence[int]], row: int, rows: int) -> float:
    """Return the sum of the log-likelihoods of texts, packed into rows."""
    scores = compute_log_likelihoods(model, [Text(tokens) for tokens in texts], row=row, batch_size=rows)
    return sum(score.total for score in scores)


def score_whole(model: Any, split: PackedSplit, run: Run) -> float:
    """Return the sum of the log-likelihoods of a stream, cut into rows."""
    score = evaluate(
        model,
        split,
        sequence_length=run.train.sequence_length,
        batch_size=run.evaluate.batch_size,
        chunk=run.evaluate.logit_chunk_size,
    )
    return -score.loss * score.tokens


def make_harness_action(model: Any, texts: Sequence[Sequence[int]], rows: int) -> Callable[[], float]:
    """Return an action that sums the log-likelihoods of texts with lm-evaluation-harness."""
    with silence_harness():
        from lm_eval.models.huggingface import HFLM

        from mode.bench.suites.trainers import make_one_word_tokenizer

        reader = HFLM(
            pretrained=model,
            tokenizer=make_one_word_tokenizer(),
            batch_size=rows,
            backend="causal",
            add_bos_token=False,
        )
    asked = [(("", ""), list(tokens[:1]), list(tokens[1:])) for tokens in texts]
    return lambda: sum(total for total, _ in reader._loglikelihood_tokens(asked, disable_tqdm=True))
