"""Tasks that lm-evaluation-harness scores: the project's own, offline, and any other of its registry by name.

lm-evaluation-harness is an extra and takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mode.core.errors import ConfigError, suggest
from mode.downstream.task import Done, Scored, Task
from mode.evaluation.generate import count_context
from mode.evaluation.likelihood import Text, compute_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install -c constraints.txt -e '.[downstream]'"


INVALID = "[invalid]"
"""What the harness's filters put in the place of an answer that they cannot read."""


DEFAULT_TOKENS = 256
"""Tokens of an answer where a task of the registry does not say, as in the harness."""


ROW, ROWS = 256, 8
"""Tokens of a row of packed texts, and rows that are read at a time."""


def is_installed() -> bool:
    """Say whether lm-evaluation-harness is here, without importing it."""
    return find_spec("lm_eval") is not None


@dataclass(frozen=True)
class Harnessed:
    """A task as lm-evaluation-harness has it.

    Attributes:
        name: Its name.
        task: The harness's own object.
        prompt: Its template; the first prompt if it is made by a function.
        version: Its version, as the harness gives it.
        num_fewshot: Worked examples before the question.
        metric: The metric that is its score.
        questions: Questions that it has.
    """

    name: str
    task: Any
    prompt: str | None
    version: int | float | str | None
    num_fewshot: int
    metric: str
    questions: int


def convert_task(name: str, task: Task, questions: Sequence[Mapping[str, Any]]) -> Harnessed:
    """Turn a task of the project's own into one of the harness's, over questions that are at hand.

    Raises:
        ConfigError: The harness refuses its settings.
    """
    from datasets import Dataset

    settings = copy.deepcopy(task.harness) | {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list([dict(question) for question in questions])},
        "test_split": "test",
        "doc_to_text": task.prompt,
        "num_fewshot": task.num_fewshot,
        "metadata": {"version": task.version},
    }
    if task.max_tokens is not None:
        generation = {"until": list(task.stop), "max_gen_toks": task.max_tokens, "do_sample": False}
        settings["generation_kwargs"] = generation
    with silence_harness(), reporting_refusals(name), sandbox_templates():
        from lm_eval.api.registry import metric_registry
        from lm_eval.api.task import ConfigurableTask

        for metric in settings.get("metric_list", ()):
            # The harness would fetch any other, and any `hf_evaluate`, from the hub as code, and run it.
            if metric.get("metric") not in metric_registry or "hf_evaluate" in metric:
                raise ConfigError(f"task {name}: metric {metric.get('metric')}: not one of lm-evaluation-harness's own")
        made = ConfigurableTask(config=settings)
    return Harnessed(name, made, task.prompt, task.version, task.num_fewshot, task.metric, len(questions))


def load_registered_tasks(name: str, own: Sequence[str]) -> list[Harnessed]:
    """Load a task, or all tasks of a group, from the harness's registry; most need the Hugging Face hub.

    Args:
        name: Its name there.
        own: Names that could have been meant besides.

    Raises:
        ConfigError: There is no such task, or its data are not to be had, or it runs programs unconfined.
    """
    with silence_harness(), reporting_refusals(name):
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        if name not in manager.all_tasks:
            raise ConfigError(
                f"task {name}: neither one of {', '.join(own)} nor one of lm-evaluation-harness's "
                f"{len(manager.all_tasks)}{suggest(name, [*own, *manager.all_tasks])}"
            )
        loaded = manager.load([name])["tasks"]
    found = []
    for each, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"task {each}: runs what a model writes unconfined; humaneval confines it")
        shots = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots)
        text = task.get_config("doc_to_text")
        metrics = list(task.higher_is_better())
        version = getattr(task, "VERSION", None)
        prompt = text if isinstance(text, str) else None
        found.append(Harnessed(each, task, prompt, version, shots, metrics[0], len(task.eval_docs)))
    return found


def make_reader(model: PreTrainedModel, folder: Path) -> Any:
    """Wrap a model for the harness.

    Log-likelihoods are this project's own, of texts packed without padding (`mode.evaluation.likelihood`); answers are
    generated one at a time, so that padding cannot change one. Nothing gets special tokens, as in training. `done`
    receives the number of questions done and the number of all.

    Args:
        model: A causal LM, on its device, not training.
        folder: Folder of its tokenizer.
    """
    with silence_harness():
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        class Reader(HFLM):  # type: ignore[misc]
            """The harness's own wrapper, but for how texts are scored."""

            done: Done = staticmethod(lambda number, total: None)
            questions = 0

            def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
                answers, questions = [], len({request.doc_id for request in requests})
                for number, request in enumerate(requests, 1):
                    answers += super().generate_until([request], disable_tqdm=True)
                    if number * questions % len(requests) == 0:
                        self.done(number * questions // len(requests), questions)
                return answers

            def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
                self.questions = len({request.doc_id for request in requests})
                found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
                return found

            def _loglikelihood_tokens(
                self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
            ) -> list[tuple[float, bool]]:
                return score_texts(self, requests)

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return Reader(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=count_context(model),
            batch_size=1,
            add_bos_token=False,
            backend="causal",
        )


def score_texts(reader: Any, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each request's end, and whether it is what the model would say greedily."""

    def count_questions(number: int) -> None:
        reader.done(number * reader.questions // len(requests), reader.questions)

    texts = [cut_to_end(given, scored, reader.max_length + 1) for _, given, scored in requests]
    found = compute_log_likelihoods(reader.model, texts, row=ROW, batch_size=ROWS, done=count_questions)
    return [(each.total, each.greedy) for each in found]


def cut_to_end(given: Sequence[int], scored: Sequence[int], longest: int) -> Text:
    """Return a text of which the end is scored, cut at its beginning where it is longer than a model can read.

    >>> cut_to_end([1, 2, 3], [4, 5], 4)
    Text(tokens=[2, 3, 4, 5], given=2)

    Raises:
        ConfigError: Not even the end alone can be read.
    """
    if len(scored) >= longest:
        raise ConfigError(f"an answer of {len(scored)} tokens: this model reads {longest - 1}")
    tokens = [*given, *scored][-longest:]
    return Text(tokens, len(tokens) - len(scored))


def score_harnessed(
    given: Harnessed, reader: Any, limit: int | None = None, done: Done = lambda number, total: None
) -> Scored:
    """Score a model on a task, greedily.

    Args:
        given: The task.
        reader: The model, as `make_reader` wraps it.
        limit: Questions to ask at most, the first ones.
        done: Called after every question with how many are done, and of how many.

    Raises:
        ConfigError: The model reads too little to make an answer, or the harness fails.
    """
    task = given.task
    generates = task.OUTPUT_TYPE == "generate_until"
    length = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_TOKENS) if generates else 0
    window = count_context(reader.model) - length
    if window <= 0:
        raise ConfigError(f"{given.name}: an answer of up to {length} tokens: this model reads {window + length}")
    task.set_fewshot_seed(seed=1234)  # the harness's own default
    with silence_harness() as stderr, reporting_refusals(given.name), sandbox_templates():
        from lm_eval.evaluator import evaluate

        reader.done = restore_output(done, stderr)
        results = evaluate(reader, {"tasks": {given.name: task}, "groups": {}}, limit=limit, log_samples=True)
    samples = results["samples"][given.name]
    first = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first]
    texts = [
        ["".join(part for part in request[:2] if isinstance(part, str)) for request in each["arguments"]]
        for each in samples
    ]
    cut = sum(any(len(reader.tok_encode(text)) > window for text in each) for each in texts)
    counts = results["n-samples"][given.name]
    return Scored(
        asked=counts["effective"],
        of=counts["original"],
        values=[float(value) for sample in samples if isinstance(value := sample.get(given.metric), int | float)],
        metrics=read_metrics(results["results"][given.name], first),
        unparsed=sum(INVALID in sample["filtered_resps"] for sample in samples) if generates else None,
        truncated=cut,
        example=samples[0]["arguments"][0][0],
    )


def read_metrics(found: Mapping[str, Any], first: str) -> dict[str, tuple[float, float | None]]:
    """Return the metrics of the harness's results under one filter, each with its standard error.

    >>> read_metrics({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "none")
    {'acc': (0.5, None)}
    """
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if kind != first or name.endswith("_stderr"):
            continue
        error = found.get(f"{name}_stderr,{kind}")
        known = isinstance(error, int | float) and math.isfinite(error)
        metrics[name] = (float(value), float(error) if known and error is not None else None)
    return metrics


@contextlib.contextmanager
def reporting_refusals(name: str) -> Iterator[None]:
    """Tell in one line what the harness, its tasks or the hub refuse; their exceptions are of many kinds.

    Raises:
        ConfigError: Something was refused.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"task {name}: {reason}") from error


@contextlib.contextmanager
def sandbox_templates() -> Iterator[None]:
    """Let the harness render templates in Jinja's sandbox: a template is text, and must not reach Python's insides."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    confined = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    confined.filters.update(plain.filters)
    utils.env = confined
    try:
        yield
    finally:
        utils.env = plain


@contextlib.contextmanager
def silence_harness() -> Iterator[TextIO]:
    """Keep what the harness logs and its progress bars to itself; yield where messages of our own still go."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    stderr = sys.stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield stderr
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def restore_output(done: Done, stderr: TextIO) -> Done:
    """Return a callback that prints to a stream although output around the callback is kept quiet."""

    def print_done(number: int, total: int) -> None:
        with contextlib.redirect_stderr(stderr):
            done(number, total)

    return print_done
