"""Training loops of other libraries, with their own defaults, for comparison in `mode bench`."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode.backbone.load import load_model, read_config
from mode.bench.suites.setup import STEPS, count_weight_bytes
from mode.bench.timing import synchronize

if TYPE_CHECKING:
    from torch import nn

    from mode.bench.suites.setup import Bench
    from mode.config.run import Run

OTHERS = {"Trainer": "accelerate", "SFTTrainer": "trl"}
"""Trainers to compare with, and the package that each needs."""


class OtherLoop:
    """Trains a model with another library's trainer for `STEPS` steps, and returns the seconds of all but the first."""

    def __init__(self, other: str, at: Bench, *, compiled: bool = False, liger: bool = False) -> None:
        """Build the model and the trainer.

        Args:
            other: Name of the trainer.
            at: Run, method, device and precision.
            compiled: Whether the model is compiled.
            liger: Whether Liger's kernels replace those of the model.
        """
        from transformers import PrinterCallback, TrainerCallback

        model = load_model(at.run.backbone)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        length = at.run.train.sequence_length
        rows = torch.randint(vocabulary, (STEPS * at.run.train.batch.size, length + 1))[:, :length].tolist()

        class Clock(TrainerCallback):  # type: ignore[misc]
            """Measures from the beginning of the second step to the end of the last."""

            begin = end = 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 1:
                    synchronize()
                    self.begin = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == STEPS:
                    synchronize()
                    self.end = time.perf_counter()

        self.clock = Clock()
        arguments = make_arguments(at.run, at.precision, at.device, at.folder) | {"use_liger_kernel": liger}
        if compiled:
            model.compile()  # the trainer's `torch_compile` would make accelerate compile for all trainers
        self.kernels = Kernels(model)
        with silence_libraries(), self.kernels:
            self.trainer = make_trainer(other, model, at.lora, rows, arguments, self.clock)
            self.trainer.remove_callback(PrinterCallback)

    def resident(self) -> int:
        """Return the bytes of weights and optimizer state, which stay allocated between calls."""
        states = (value for state in self.trainer.optimizer.state.values() for value in state.values())
        return count_weight_bytes(self.trainer.model) + sum(int(state.nbytes) for state in states)

    def __call__(self) -> float:
        """Train, and return seconds."""
        with silence_libraries(), self.kernels:
            self.trainer.train()
        # Liger is applied once: a second time, its forward pass would replace the one with autocast.
        self.trainer.args.use_liger_kernel = False
        return float(self.clock.end - self.clock.begin)


class Kernels:
    """A context that confines changes to the module of `transformers` that defines a model's class.

    Liger replaces functions and classes for all models of a family and does not restore them. On exit, this context
    keeps the replacements and restores the originals. On entry, it puts the replacements back.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the module of the model's class."""
        self.place = vars(sys.modules[type(model).__module__])
        self.own: dict[str, Any] = {}
        self.before: dict[str, Any] = {}

    def __enter__(self) -> None:
        """Put the replacements into the module."""
        self.before = dict(self.place)
        self.place.update(self.own)

    def __exit__(self, *_: object) -> None:
        """Keep the replacements and restore the originals."""
        self.own = {name: value for name, value in self.place.items() if value is not self.before.get(name)}
        for name in self.own:
            del self.place[name]
        self.place.update(self.before)


def supports_liger(run: Run) -> bool:
    """Return whether Liger is installed and has kernels for the family of a run's backbone."""
    if find_spec("liger_kernel") is None:
        return False
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    return read_config(run.backbone).model_type in known


def make_arguments(run: Run, precision: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Return the arguments that make a trainer comparable: batch, precision and device. The rest are its defaults."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": run.train.batch.size // run.train.batch.gradient_accumulation_steps,
        "gradient_accumulation_steps": run.train.batch.gradient_accumulation_steps,
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
    """Return another library's trainer, ready to train."""
    if other == "SFTTrainer":
        return make_sft_trainer(model, lora, rows, arguments, clock)
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in rows]
    if lora is not None:
        model = get_peft_model(model, lora)
    return Trainer(model, TrainingArguments(**arguments), train_dataset=data, callbacks=[clock])


def make_sft_trainer(model: Any, lora: Any, rows: list[list[int]], arguments: Mapping[str, Any], clock: Any) -> Any:
    """Return TRL's trainer, ready to train."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        args=SFTConfig(**arguments, max_length=len(rows[0])),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=make_one_word_tokenizer(),
        peft_config=lora,
        callbacks=[clock],
    )


def make_one_word_tokenizer() -> Any:
    """Return a tokenizer of one word, for libraries that require a tokenizer even for tokenized rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence warnings, log messages and progress bars of other libraries."""
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
