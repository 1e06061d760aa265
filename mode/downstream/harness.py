"""Tasks that lm-evaluation-harness scores: tasks of this project, offline, and tasks of the harness's registry.

lm-evaluation-harness is an optional dependency and slow to import, so functions import it when they need it.
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

from mode.core.errors import ConfigError, suggest, summarize_error
from mode.downstream.answers import answer_prompts
from mode.downstream.task import Progress, Task, TaskScore
from mode.evaluation.generate import count_context
from mode.evaluation.likelihood import Text, compute_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mode.backbone.tokenizer import BackboneTokenizer

INSTALL = "pip install -c constraints.txt -e '.[downstream]'"
"""Command that installs lm-evaluation-harness."""


INVALID = "[invalid]"
"""Text that the harness's filters return for an answer that they cannot parse."""


DEFAULT_TOKENS = 256
"""Maximum number of tokens of an answer if a task of the registry sets none: the harness's own default."""


WITHOUT_EFFECT = frozenset({"temperature", "top_p", "top_k", "min_p"})
"""Settings of sampling, which greedy decoding ignores."""


ROW, ROWS = 256, 8
"""Tokens of a row of packed texts, and rows of a batch."""


def is_installed() -> bool:
    """Return whether lm-evaluation-harness is installed, without importing it."""
    return find_spec("lm_eval") is not None


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness.

    Attributes:
        name: Name of the task.
        task: The harness's task object.
        prompt: Template of the prompt; None if a function makes the prompt.
        version: Version of the task, as the harness reports it.
        num_fewshot: Number of worked examples before the question.
        metric: Name of the headline metric.
        questions: Number of questions.
    """

    name: str
    task: Any
    prompt: str | None
    version: int | float | str | None
    num_fewshot: int
    metric: str
    questions: int


def convert_task(name: str, task: Task, questions: Sequence[Mapping[str, Any]]) -> HarnessTask:
    """Convert a task of this project to a task of the harness.

    Args:
        name: Name of the task.
        task: The task, of the kind `harness`.
        questions: Questions of the task.

    Raises:
        ConfigError: The harness refuses the settings.
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
            # The harness would download any other metric, and any `hf_evaluate`, as code from the hub and run it.
            if metric.get("metric") not in metric_registry or "hf_evaluate" in metric:
                raise ConfigError(f"task {name}: metric {metric.get('metric')}: not one of lm-evaluation-harness's own")
        converted = ConfigurableTask(config=settings)
    return HarnessTask(name, converted, task.prompt, task.version, task.num_fewshot, task.metric, len(questions))


def load_registered_tasks(name: str, own: Sequence[str]) -> list[HarnessTask]:
    """Load a task, or all tasks of a group, from the harness's registry. Most tasks need the Hugging Face hub.

    Args:
        name: Name of the task or group.
        own: Names of this project's tasks. The error message suggests the nearest name.

    Raises:
        ConfigError: There is no such task, its data are not available, or it runs programs without confinement.
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
    tasks = []
    for task_name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"task {task_name}: runs programs of a model unconfined; use humaneval, which confines them"
            )
        shots = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots)
        text = task.get_config("doc_to_text")
        metrics = list(task.higher_is_better())
        version = getattr(task, "VERSION", None)
        prompt = text if isinstance(text, str) else None
        tasks.append(HarnessTask(task_name, task, prompt, version, shots, metrics[0], len(task.eval_docs)))
    return tasks


def wrap_model(model: PreTrainedModel, tokenizer: BackboneTokenizer, folder: Path) -> Any:
    """Wrap a model for the harness.

    This project computes log-likelihoods and generates answers, several texts at a time and without padding. Texts
    begin with a special token only if the backbone's documents do. The attribute `done` reports progress.

    Args:
        model: A causal LM, on its device, in evaluation mode.
        tokenizer: Its tokenizer.
        folder: Folder of the tokenizer's files, for the harness.
    """
    with silence_harness():
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        class HarnessModel(HFLM):  # type: ignore[misc]
            """The harness's own wrapper with this project's scoring and generation of texts."""

            done: Progress = staticmethod(lambda number, total: None)
            questions = 0
            bos_id = tokenizer.bos_id

            def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
                questions = len({request.doc_id for request in requests})

                def report(number: int) -> None:
                    if number * questions % len(requests) == 0:
                        self.done(number * questions // len(requests), questions)

                asked = [(prompt, *read_generation(settings)) for prompt, settings in (each.args for each in requests)]
                return answer_prompts(self.model, tokenizer, asked, report)

            def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
                self.questions = len({request.doc_id for request in requests})
                return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

            def _loglikelihood_tokens(
                self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
            ) -> list[tuple[float, bool]]:
                return score_texts(self, requests)

        return HarnessModel(
            pretrained=model,
            tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            max_length=count_context(model),
            batch_size=1,
            add_bos_token=False,
            prefix_token_id=tokenizer.bos_id,
            backend="causal",
        )


def read_generation(settings: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return the maximum number of tokens of an answer, and the texts that end it, from a task's settings.

    >>> read_generation({"until": "Q:", "max_gen_toks": 9, "do_sample": False, "temperature": 0.0})
    (9, ['Q:'])

    Raises:
        ConfigError: The task asks for something other than greedy decoding.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), DEFAULT_TOKENS))
    until, length = known.pop("until", []), int(known.pop("max_gen_toks"))
    if known.pop("do_sample"):
        raise ConfigError("the task samples its answers (do_sample); only greedy decoding is supported")
    unknown = sorted(set(known) - WITHOUT_EFFECT)
    if unknown:
        raise ConfigError(f"the task sets {unknown[0]}; answers are decoded greedily, without further settings")
    return length, [text for text in until if text]


def score_texts(wrapped: Any, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Return, per request, the log-likelihood of its continuation, and whether greedy decoding would generate it."""

    def report(number: int) -> None:
        wrapped.done(number * wrapped.questions // len(requests), wrapped.questions)

    texts = [cut_to_end(given, scored, wrapped.max_length + 1, wrapped.bos_id) for _, given, scored in requests]
    scores = compute_log_likelihoods(wrapped.model, texts, row=ROW, batch_size=ROWS, done=report)
    return [(score.total, score.greedy) for score in scores]


def cut_to_end(given: Sequence[int], scored: Sequence[int], longest: int, bos: int | None = None) -> Text:
    """Return a text whose end is scored. A text that is too long is truncated at its beginning.

    Args:
        given: Tokens of the context.
        scored: Tokens of the continuation, which is scored.
        longest: Maximum number of tokens of the text.
        bos: The token that begins every text, also after truncation; None if there is none.

    >>> cut_to_end([1, 2, 3], [4, 5], 4)
    Text(tokens=[2, 3, 4, 5], given=2)
    >>> cut_to_end([1, 2, 3], [4, 5], 4, bos=0)
    Text(tokens=[0, 3, 4, 5], given=2)

    Raises:
        ConfigError: The continuation alone is too long.
    """
    if len(scored) >= longest:
        raise ConfigError(f"an answer has {len(scored)} tokens: this model reads {longest - 1}")
    tokens = [*given, *scored][-longest:]
    if bos is not None and tokens[0] != bos:
        tokens = [bos, *tokens[1 - longest :]]
    return Text(tokens, len(tokens) - len(scored))


def score_harness_task(
    given: HarnessTask, wrapped: Any, limit: int | None = None, done: Progress = lambda number, total: None
) -> TaskScore:
    """Score a model on a task, greedily.

    Args:
        given: The task.
        wrapped: The model, wrapped by `wrap_model`.
        limit: Maximum number of questions, from the first; None for all.
        done: Called after every question.

    Raises:
        ConfigError: The context of the model is shorter than an answer, or the harness fails.
    """
    task = given.task
    generates = task.OUTPUT_TYPE == "generate_until"
    with reporting_refusals(given.name):
        length = read_generation(task.get_config("generation_kwargs") or {})[0] if generates else 0
    window = count_context(wrapped.model) - length
    if window <= 0:
        raise ConfigError(f"{given.name}: an answer takes up to {length} tokens: this model reads {window + length}")
    task.set_fewshot_seed(seed=1234)  # the harness's own default
    with silence_harness() as stderr, reporting_refusals(given.name), sandbox_templates():
        from lm_eval.evaluator import evaluate

        wrapped.done = restore_output(done, stderr)
        results = evaluate(wrapped, {"tasks": {given.name: task}, "groups": {}}, limit=limit, log_samples=True)
    samples = results["samples"][given.name]
    first = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first]
    texts = [
        ["".join(part for part in request[:2] if isinstance(part, str)) for request in sample["arguments"]]
        for sample in samples
    ]
    room = window - (wrapped.bos_id is not None)
    truncated = sum(any(len(wrapped.tok_encode(text)) > room for text in group) for group in texts)
    counts = results["n-samples"][given.name]
    return TaskScore(
        asked=counts["effective"],
        of=counts["original"],
        values=[float(value) for sample in samples if isinstance(value := sample.get(given.metric), int | float)],
        metrics=read_metrics(results["results"][given.name], first),
        unparsed=sum(INVALID in sample["filtered_resps"] for sample in samples) if generates else None,
        truncated=truncated,
        example=samples[0]["arguments"][0][0],
    )


def read_metrics(results: Mapping[str, Any], first: str) -> dict[str, tuple[float, float | None]]:
    """Return value and standard error of every metric in the harness's results under one filter.

    >>> read_metrics({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "none")
    {'acc': (0.5, None)}
    """
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if kind != first or name.endswith("_stderr"):
            continue
        error = results.get(f"{name}_stderr,{kind}")
        known = isinstance(error, int | float) and math.isfinite(error)
        metrics[name] = (float(value), float(error) if known and error is not None else None)
    return metrics


@contextlib.contextmanager
def reporting_refusals(name: str) -> Iterator[None]:
    """Convert any exception of the harness, its tasks or the hub to an error of one line.

    Raises:
        ConfigError: The code in this context raised an exception.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = summarize_error(error)
        raise ConfigError(f"task {name}: {reason}") from error


@contextlib.contextmanager
def sandbox_templates() -> Iterator[None]:
    """Let the harness render templates in Jinja's sandbox, so that a template cannot reach Python's internals."""
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
    """Silence log messages and progress bars of the harness. Yield the real stderr for other messages."""
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


def restore_output(done: Progress, stderr: TextIO) -> Progress:
    """Return a progress function that prints to the real stderr although stderr is silenced around it."""

    def report(number: int, total: int) -> None:
        with contextlib.redirect_stderr(stderr):
            done(number, total)

    return report
