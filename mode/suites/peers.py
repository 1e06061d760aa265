"""The suite `loops`, and parts of others: other trainers of the same model on the same rows, each by its own loop."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode import config
from mode.backbone import load_model
from mode.cost import layers_per_block, shape_of
from mode.method import Adaptation, Material
from mode.objective import precision_of
from mode.timing import Case, wait
from mode.train import Job, train

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from mode.modular_method import MoDE
    from mode.settings import Run

STEPS = 4
"""Optimizer steps that a loop makes each time. The first, in which an optimizer's states may be made, is not timed."""
SILENT = {"log_every": 1000, "checkpoint_every": 1000, "validate_every": 0}
"""No points of the curve, validations or checkpoints in the steps that are timed."""
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
            at = Bench(run, method, device, folder, precision)
            cases += [at.case(job, other, OtherLoop(other, at)) for other in others]
            cases.append(at.case(job, "mode", OwnLoop(at)))
            if precision == "fp32":
                cases.append(at.case(job, "mode, compiled layers", OwnLoop(at, compiled=True)))
            if precision == "fp32" and can_bf16(device):
                half = replace(at, precision="bf16")
                cases.append(half.case(job, "mode, bf16", OwnLoop(half)))
                cases.append(half.case(job, "mode, bf16, compiled layers", OwnLoop(half, compiled=True)))
    return cases


def loops(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[Iterator[list[Case]], dict[str, int]]:
    """Return what to time where models are large: groups that are measured, and forgotten, one after the other.

    All train by whole loops, in the precision of the device: full fine-tuning and LoRA beside other trainers, and MoDE
    beside full fine-tuning. With `train.compile=true` there are compiled variants too.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: For what the loops write.
    """
    bench = partial(Bench, run, device=device, folder=folder, precision=precision_of(run.train, device))

    def groups() -> Iterator[list[Case]]:
        for name in ("sft", "lora"):
            yield beside_trainers(bench(known(name)), "full fine-tuning" if name == "sft" else "LoRA")
        yield beside_full_fine_tuning(bench, run, method)

    return groups(), {}


def beside_trainers(at: Bench, name: str) -> list[Case]:
    """Return what to time of a method: other trainers, and this project's loop."""
    others = [other for other, package in OTHERS.items() if find_spec(package)]
    job, own = f"{name}, loops", OwnLoop(at)
    made = [at.case(job, other, OtherLoop(other, at), counted=True) for other in others]
    compiled = at.run.train.compile is True
    if compiled and "Trainer" in others and low_rank(at.run, at.method) is None:  # a minute and more each
        made.append(at.case(job, "Trainer, compiled", OtherLoop("Trainer", at, compiled=True), counted=True))
    made.append(at.case(job, "mode", own, counted=True))
    if compiled:
        made.append(at.case(job, "mode, compiled layers", own.twin(compiled=True), counted=True))
    return made


def beside_full_fine_tuning(bench: Callable[[Adaptation], Bench], run: Run, method: MoDE) -> list[Case]:
    """Return what to time of MoDE: one expert, of some depths, and two."""
    fresh = partial(config.replace, method, start="fresh", experts=(), num_experts=1)
    half = layers_per_block(len(shape_of(run.backbone).layers), method.num_blocks) // 2
    models: dict[str, Adaptation] = {"full fine-tuning": known("sft"), "one expert": fresh()}
    if half > method.expert_layers:
        models["one expert of half a block"] = fresh(expert_layers=half)
    models["two experts"] = fresh(num_experts=2)
    made = []
    for name, each in models.items():
        at = bench(each)
        made.append(at.case("MoDE beside full fine-tuning", name, OwnLoop(at), counted=True))
    return made


def known(name: str) -> Any:
    """Return a method of the project as its YAML describes it."""
    return config.build_method(config.read_group("method", name))


@dataclass(frozen=True)
class Bench:
    """What a loop trains, and how.

    Attributes:
        run: Names backbone, rows and their length.
        method: The method.
        device: Where it trains.
        folder: For what loops write.
        precision: Of its products of matrices.
    """

    run: Run
    method: Adaptation
    device: torch.device
    folder: Path
    precision: str

    def case(self, job: str, variant: str, loop: OwnLoop | OtherLoop, *, counted: bool = False) -> Case:
        """Return what to time."""
        tokens = (STEPS - 1) * self.run.train.batch_size * self.run.train.sequence_length
        cost = self.method.cost(config.replace(self.run, method=self.method))
        flops = tokens * cost.flops.total if cost else 0.0
        return Case(
            job,
            variant,
            loop,
            tokens=tokens,
            flops=flops,
            precision=self.precision,
            resident=loop.resident,
            counted=counted,
        )


def can_bf16(device: torch.device) -> bool:
    """Say whether a device has instructions for bf16."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


class EnoughError(Exception):
    """Ends a loop that has made the steps to time, before it writes anything."""


class Rows:
    """The same rows at every step, and a clock: from the beginning of the second step to the end of the last.

    Attributes:
        seconds: What it showed.
    """

    def __init__(self, run: Run, vocabulary: int) -> None:
        """Draw them."""
        shape = (run.train.batch_size, run.train.sequence_length + 1)
        self.rows: NDArray[np.int64] = torch.randint(vocabulary, shape).numpy()
        self.begin = self.seconds = 0.0

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step, (B, S + 1)."""
        if step in (1, STEPS):
            wait()
        if step == 1:
            self.begin = time.perf_counter()
        if step == STEPS:
            self.seconds = time.perf_counter() - self.begin
            raise EnoughError
        return self.rows


class OwnLoop:
    """Trains a model by this project's loop for some steps, and returns their seconds."""

    def __init__(self, at: Bench, *, compiled: bool = False, model: nn.Module | None = None) -> None:
        """Build the model, unless there is one.

        Args:
            at: What it trains, and how.
            compiled: Whether decoder layers are compiled.
            model: A model that another loop trains too.
        """
        self.at = at
        changes = {**SILENT, "precision": at.precision, "compile": compiled}
        self.settings = config.replace(at.run.train, **changes)
        asked = config.replace(at.run, method=at.method, train=self.settings)
        load = partial(load_model, at.run.backbone)
        self.model = at.method.build(asked, Material(backbone=load)).to(at.device) if model is None else model

    def twin(self, *, compiled: bool) -> OwnLoop:
        """Return a loop over the same model."""
        return OwnLoop(self.at, compiled=compiled, model=self.model)

    def resident(self) -> int:
        """Return the bytes of weights, which stay from one time to the next."""
        return weight_bytes(self.model)

    def __call__(self) -> float:
        """Train."""
        rows = Rows(self.at.run, self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        with tempfile.TemporaryDirectory(dir=self.at.folder) as place:
            job = Job(settings=self.settings, steps=STEPS + 1, lr=1e-6, folder=Path(place), validate=dict)
            with suppress(EnoughError):
                train(self.model, rows, job)  # type: ignore[arg-type]  # all that the loop asks of batches
        self.model.zero_grad(set_to_none=True)
        return rows.seconds


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights."""
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))


class OtherLoop:
    """Trains a model by another trainer's loop for some steps, and returns their seconds."""

    def __init__(self, other: str, at: Bench, *, compiled: bool = False) -> None:
        """Build the model and the trainer.

        Args:
            other: Name of the trainer.
            at: What it trains, and how.
            compiled: Whether it compiles the model.
        """
        from transformers import PrinterCallback, TrainerCallback

        model = load_model(at.run.backbone)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        length = at.run.train.sequence_length
        rows = torch.randint(vocabulary, (STEPS * at.run.train.batch_size, length + 1))[:, :length].tolist()

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

        self.clock = Clock()
        arguments = settings(at.run, at.precision, at.device, at.folder)
        if compiled:
            model.compile()  # not by the trainer's `torch_compile`: accelerate would compile for all trainers there are
        with hushed():
            self.trainer = make_trainer(other, model, low_rank(at.run, at.method), rows, arguments, self.clock)
            self.trainer.remove_callback(PrinterCallback)

    def resident(self) -> int:
        """Return the bytes of weights and of the optimizer's states, which stay from one time to the next."""
        states = (value for state in self.trainer.optimizer.state.values() for value in state.values())
        return weight_bytes(self.trainer.model) + sum(int(each.nbytes) for each in states)

    def __call__(self) -> float:
        """Train."""
        with hushed():
            self.trainer.train()
        return float(self.clock.end - self.clock.begin)


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
