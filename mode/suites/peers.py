"""Other trainers of the same model on the same rows, each through its own loop: what people would use otherwise."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode import config
from mode.backbone import load_model
from mode.method import Adaptation, Material
from mode.timing import Case, wait
from mode.train import Job, train

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mode.settings import Run

STEPS = 4
"""Optimizer steps that a loop makes each time. The first, in which an optimizer's states may be made, is not timed."""
OTHERS = {"Trainer": "accelerate", "SFTTrainer": "trl"}
"""Trainers to compare with, and what has to be installed for each."""


def peers(run: Run, methods: Mapping[str, Adaptation], device: torch.device, folder: Path) -> list[Case]:
    """Return the loops to time: other trainers that are installed, first in a job, and this project's.

    Args:
        run: Names backbone, rows and their length.
        methods: What is trained, by name; a low-rank method is PEFT's own with the other trainers.
        device: Where it trains.
        folder: For what the loops write.
    """
    others = [name for name, package in OTHERS.items() if find_spec(package)]
    cases = []
    for name, method in methods.items() if others else ():
        for precision in ("fp32", "bf16"):
            job = f"{name}, loops in {precision}"
            for other in others:
                loop = other_loop(other, run, method, precision, device, folder)
                cases.append(case(job, other, loop, run, precision))
            cases.append(case(job, "mode", own_loop(run, method, precision, device, folder), run, precision))
            if precision == "fp32":
                quick = own_loop(run, method, precision, device, folder, compiled=True)
                cases.append(case(job, "mode, compiled layers", quick, run, precision))
            if precision == "fp32" and can_bf16(device):
                cases.append(case(job, "mode, bf16", own_loop(run, method, "bf16", device, folder), run, "bf16"))
    return cases


def case(job: str, variant: str, loop: Callable[[], float], run: Run, precision: str) -> Case:
    """Return what to time."""
    tokens = (STEPS - 1) * run.train.batch_size * run.train.sequence_length
    return Case(job, variant, loop, tokens=tokens, precision=precision)


def can_bf16(device: torch.device) -> bool:
    """Say whether a device has instructions for bf16."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


class Rows:
    """The same rows at every step."""

    def __init__(self, run: Run, vocabulary: int) -> None:
        """Draw them."""
        shape = (run.train.batch_size, run.train.sequence_length + 1)
        self.rows: NDArray[np.int64] = torch.randint(vocabulary, shape).numpy()

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step, (B, S + 1)."""
        return self.rows


def own_loop(
    run: Run, method: Adaptation, precision: str, device: torch.device, folder: Path, *, compiled: bool = False
) -> Callable[[], float]:
    """Return an action that trains a model by this project's loop for some steps, and returns their seconds."""
    settings = config.replace(run.train, precision=precision, log_every=1, compile=compiled)
    asked = config.replace(run, method=method, train=settings)
    load = partial(load_model, run.backbone)
    model = method.build(asked, Material(backbone=load)).to(device)
    rows = Rows(run, model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def loop() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            job = Job(settings=settings, steps=STEPS, lr=1e-6, folder=Path(place), validate=dict)
            curve = train(model, rows, job).curve  # type: ignore[arg-type]  # all that the loop asks of batches
            return float(curve[-1]["seconds"] - curve[0]["seconds"])

    return loop


def other_loop(
    other: str, run: Run, method: Adaptation, precision: str, device: torch.device, folder: Path
) -> Callable[[], float]:
    """Return an action that trains a model by another trainer's loop for some steps, and returns their seconds."""
    from transformers import PrinterCallback, TrainerCallback

    model = load_model(run.backbone)
    lora = low_rank(run, method)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    length = run.train.sequence_length
    rows = torch.randint(vocabulary, (STEPS * run.train.batch_size, length + 1))[:, :length].tolist()

    class Clock(TrainerCallback):  # type: ignore[misc]
        """From the beginning of the second step to the end of the last."""

        begin = end = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                wait()
                self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                wait()
                self.end = time.perf_counter()

    clock = Clock()
    with hushed():
        trainer = make_trainer(other, model, lora, rows, settings(run, precision, device, folder), clock)
        trainer.remove_callback(PrinterCallback)

    def loop() -> float:
        with hushed():
            trainer.train()
        return clock.end - clock.begin

    return loop


def low_rank(run: Run, method: Adaptation) -> Any:
    """Return a low-rank method's settings as PEFT's, or None for full fine-tuning."""
    made: Any = method.build(config.replace(run, method=method), Material(backbone=partial(load_model, run.backbone)))
    return getattr(made, "peft_config", {}).get("default")


def settings(run: Run, precision: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Return the arguments that any of the trainers takes: its defaults, but for what has to be equal."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": run.train.batch_size,
        "learning_rate": 1e-6,
        "bf16": precision == "bf16",
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def make_trainer(
    other: str, model: Any, lora: Any, rows: list[list[int]], arguments: Mapping[str, Any], clock: Any
) -> Any:
    """Return another trainer, ready to train."""
    if other == "SFTTrainer":
        return make_sft_trainer(model, lora, rows, arguments, clock)
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in rows]
    if lora is not None:
        model = get_peft_model(model, lora)
    return Trainer(model, TrainingArguments(**arguments), train_dataset=data, callbacks=[clock])


def make_sft_trainer(model: Any, lora: Any, rows: list[list[int]], arguments: Mapping[str, Any], clock: Any) -> Any:
    """Return TRL's trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        args=SFTConfig(**arguments, max_length=len(rows[0])),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=one_word(),
        peft_config=lora,
        callbacks=[clock],
    )


def one_word() -> Any:
    """Return a tokenizer for those who want one, though what they are given are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what other libraries have to say to themselves."""
    from datasets.utils import logging as bars
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), bars.is_progress_bar_enabled()
    logging.set_verbosity_error()
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            bars.enable_progress_bar()
