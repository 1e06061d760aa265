"""The suite `loops`, and parts of others: other trainers of the same model on the same rows, each by its own loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mode.backbone.load import load_model
from mode.backbone.shape import divide_layers, read_shape
from mode.bench.suites.setup import STEPS, Bench, count_weight_bytes, load_method
from mode.bench.suites.trainers import OTHERS, OtherLoop, knows_liger
from mode.bench.timing import Case, synchronize
from mode.config.check import replace_settings
from mode.methods.anchored import Adaptation
from mode.methods.base import Material
from mode.train.cuda_graph import WARM_UP, check_cuda
from mode.train.loop import TrainJob, train

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from mode.config.run import Run
    from mode.methods.mode import MoDE

SILENT = {"log_every": 1000, "checkpoint_every": 1000, "validate_every": 0}
"""No points of the curve, validations or checkpoints in the steps that are timed."""


def list_peers(run: Run, methods: Mapping[str, Adaptation], device: torch.device, folder: Path) -> list[Case]:
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
            if precision == "fp32" and supports_bf16(device):
                half = replace(at, precision="bf16")
                cases.append(half.case(job, "mode, bf16", OwnLoop(half)))
                cases.append(half.case(job, "mode, bf16, compiled layers", OwnLoop(half, compiled=True)))
    return cases


def loops(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[Iterator[list[Case]], dict[str, int]]:
    """Return what to time where models are large: groups that are measured, and forgotten, one after the other.

    All train by whole loops, in the precision of the device: full fine-tuning and LoRA beside other trainers, and MoDE
    beside full fine-tuning. With `train.kernels.compile=true` there are compiled variants too, with
    `train.kernels.cuda_graph=true` such as are one CUDA graph, and on a GPU Trainer with Liger's kernels where those
    are installed.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: For what the loops write.

    Raises:
        ConfigError: A graph is asked for where there can be none.
    """
    if run.train.kernels.cuda_graph:
        check_cuda(device)
    bench = partial(Bench, run, device=device, folder=folder, precision=run.train.precision)

    def groups() -> Iterator[list[Case]]:
        for name in ("sft", "lora"):
            yield compare_trainers(bench(load_method(name)), "full fine-tuning" if name == "sft" else "LoRA")
        yield compare_full_fine_tuning(bench, run, method)

    return groups(), {}


def compare_trainers(at: Bench, name: str) -> list[Case]:
    """Return what to time of a method: other trainers, and this project's loop."""
    job = f"{name}, loops"
    ways: dict[str, dict[str, bool]] = {other: {} for other, package in OTHERS.items() if find_spec(package)}
    if "Trainer" in ways and at.device.type == "cuda" and knows_liger(at.run):
        ways["Trainer, Liger"] = {"liger": True}
    if "Trainer" in ways and at.run.train.kernels.compile is True and at.lora is None:  # a minute and more each
        ways["Trainer, compiled"] = {"compiled": True}
    cases = [
        at.case(job, way, OtherLoop(way.partition(",")[0], at, **options), counted=True)
        for way, options in ways.items()
    ]
    return cases + [at.case(job, f"mode{way}", loop, counted=True) for way, loop in list_own_loops(at).items()]


def compare_full_fine_tuning(bench: Callable[[Adaptation], Bench], run: Run, method: MoDE) -> list[Case]:
    """Return what to time of MoDE: one expert, of some depths, and two."""
    fresh = partial(replace_settings, method, start="fresh", experts=(), num_experts=1)
    half = divide_layers(len(read_shape(run.backbone).layers), method.num_blocks) // 2
    models: dict[str, Adaptation] = {"full fine-tuning": load_method("sft"), "one expert": fresh()}
    if half > method.expert_layers:
        models["one expert of half a block"] = fresh(expert_layers=half)
    models["two experts"] = fresh(num_experts=2)
    cases: dict[str, list[Case]] = {}
    for name, each in models.items():
        at = bench(each)
        for way, loop in list_own_loops(at).items():
            job = f"MoDE beside full fine-tuning{way}"
            cases.setdefault(way, []).append(at.case(job, name, loop, counted=True))
    return [case for some in cases.values() for case in some]


def list_own_loops(at: Bench) -> dict[str, OwnLoop]:
    """Return this project's loop over one model, as it is and in the ways that the settings ask for, by name."""
    plain, asked = OwnLoop(at), at.run.train
    ways = {"": plain}
    if asked.kernels.compile is True:
        ways[", compiled layers"] = plain.twin(compiled=True)
    if asked.kernels.cuda_graph:
        ways[", one graph"] = plain.twin(graph=True)
    if asked.kernels.compile is True and asked.kernels.cuda_graph:
        ways[", compiled layers, one graph"] = plain.twin(compiled=True, graph=True)
    return ways


def supports_bf16(device: torch.device) -> bool:
    """Say whether a device has instructions for bf16."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


class EnoughError(Exception):
    """Ends a loop that has made the steps to time, before it writes anything."""


class Rows:
    """The same rows at every step, and a clock: from the beginning of the first step to time to the end of the last.

    Attributes:
        first: Number of the step that is the first to time, from 0.
        seconds: What it showed.
    """

    def __init__(self, run: Run, vocabulary: int, first: int) -> None:
        """Draw them."""
        self.first = first
        shape = (run.train.batch.size, run.train.sequence_length + 1)
        self.rows: NDArray[np.int64] = torch.randint(vocabulary, shape).numpy()
        self.begin = self.seconds = 0.0

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step, (B, S + 1)."""
        last = self.first + STEPS - 1
        if step in (self.first, last):
            synchronize()
        if step == self.first:
            self.begin = time.perf_counter()
        if step == last:
            self.seconds = time.perf_counter() - self.begin
            raise EnoughError
        return self.rows


class OwnLoop:
    """Trains a model by this project's loop for some steps, and returns their seconds."""

    def __init__(
        self, at: Bench, *, compiled: bool = False, graph: bool = False, model: nn.Module | None = None
    ) -> None:
        """Build the model, unless there is one.

        Args:
            at: What it trains, and how.
            compiled: Whether decoder layers are compiled.
            graph: Whether the passes of a step are one CUDA graph; steps up to its recording are not timed.
            model: A model that another loop trains too.
        """
        self.at, self.first = at, WARM_UP + 1 if graph else 1
        changes = {**SILENT, "precision": at.precision, "kernels.compile": compiled, "kernels.cuda_graph": graph}
        self.settings = replace_settings(at.run.train, **changes)
        asked = replace_settings(at.run, method=at.method, train=self.settings)
        load = partial(load_model, at.run.backbone)
        self.model = at.method.build(asked, Material(backbone=load)).to(at.device) if model is None else model

    def twin(self, **ways: bool) -> OwnLoop:
        """Return a loop over the same model."""
        return OwnLoop(self.at, model=self.model, **ways)

    def resident(self) -> int:
        """Return the bytes of weights, which stay from one time to the next."""
        return count_weight_bytes(self.model)

    def __call__(self) -> float:
        """Train."""
        rows = Rows(self.at.run, self.model.get_output_embeddings().weight.shape[0], self.first)  # type: ignore[operator]
        with tempfile.TemporaryDirectory(dir=self.at.folder) as place:
            job = TrainJob(settings=self.settings, steps=self.first + STEPS, lr=1e-6, folder=Path(place), validate=dict)
            with suppress(EnoughError):
                train(self.model, rows, job)  # type: ignore[arg-type]  # all that the loop asks of batches
        self.model.zero_grad(set_to_none=True)
        return rows.seconds
