"""Other trainers of a model, each by its own loop, with its own defaults: what `mode bench` compares with."""

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

from mode.backbone.load import load_model, locate
from mode.bench.suites.setup import STEPS, count_weight_bytes
from mode.bench.timing import synchronize

if TYPE_CHECKING:
    from torch import nn

    from mode.bench.suites.setup import Bench
    from mode.config.run import Run

OTHERS = {"Trainer": "accelerate", "SFTTrainer": "trl"}
"""Trainers to compare with, and what has to be installed for each."""


class OtherLoop:
    """Trains a model by another trainer's loop for some steps, and returns their seconds."""

    def __init__(self, other: str, at: Bench, *, compiled: bool = False, liger: bool = False) -> None:
        """Build the model and the trainer.

        Args:
            other: Name of the trainer.
            at: What it trains, and how.
            compiled: Whether it compiles the model.
            liger: Whether it puts Liger's kernels in the place of the model's own.
        """
        from transformers import PrinterCallback, TrainerCallback

        model = load_model(at.run.backbone)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        length = at.run.train.sequence_length
        rows = torch.randint(vocabulary, (STEPS * at.run.train.batch.size, length + 1))[:, :length].tolist()

        class Clock(TrainerCallback):  # type: ignore[misc]
            """From the beginning of the second step to the end of the last."""

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
            model.compile()  # not by the trainer's `torch_compile`: accelerate would compile for all trainers there are
        self.kernels = Kernels(model)
        with silence_libraries(), self.kernels:
            self.trainer = make_trainer(other, model, at.lora, rows, arguments, self.clock)
            self.trainer.remove_callback(PrinterCallback)

    def resident(self) -> int:
        """Return the bytes of weights and of the optimizer's states, which stay from one time to the next."""
        states = (value for state in self.trainer.optimizer.state.values() for value in state.values())
        return count_weight_bytes(self.trainer.model) + sum(int(each.nbytes) for each in states)

    def __call__(self) -> float:
        """Train."""
        with silence_libraries(), self.kernels:
            self.trainer.train()
        self.trainer.args.use_liger_kernel = False  # once: or Liger's forward pass replaces the one made to autocast
        return float(self.clock.end - self.clock.begin)


class Kernels:
    """What a trainer puts into the module of `transformers` that a model is from: there within this context alone.

    Liger exchanges functions and classes for all models of a family, and leaves them exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the module."""
        self.place = vars(sys.modules[type(model).__module__])
        self.own: dict[str, Any] = {}
        self.before: dict[str, Any] = {}

    def __enter__(self) -> None:
        """Put them there."""
        self.before = dict(self.place)
        self.place.update(self.own)

    def __exit__(self, *_: object) -> None:
        """Keep what is other than it was, and put that back."""
        self.own = {name: value for name, value in self.place.items() if value is not self.before.get(name)}
        for name in self.own:
            del self.place[name]
        self.place.update(self.before)


def knows_liger(run: Run) -> bool:
    """Say whether Liger is installed, and has kernels for models like a run's; for others it says nothing."""
    if find_spec("liger_kernel") is None:
        return False
    from transformers import AutoConfig

    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    return AutoConfig.from_pretrained(locate(run.backbone)).model_type in known


def make_arguments(run: Run, precision: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Return the arguments that any of the trainers takes: its defaults, but for what has to be equal."""
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
        processing_class=make_one_word_tokenizer(),
        peft_config=lora,
        callbacks=[clock],
    )


def make_one_word_tokenizer() -> Any:
    """Return a tokenizer for those who want one, though what they are given are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@contextmanager
def silence_libraries() -> Iterator[None]:
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
