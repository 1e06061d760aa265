"""Suite `loops`: whole training loops of this project and of other libraries on the same model and rows."""

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
from mode.bench.suites.trainers import OTHERS, OtherLoop, supports_liger
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
"""Settings without curve points, validations and checkpoints in the timed steps."""


def list_peers(run: Run, methods: Mapping[str, Adaptation], device: torch.device, folder: Path) -> list[Case]:
    """Return cases that time loops: first the other trainers that are installed, then this project's.

    Args:
        run: Run with the backbone, the batch size and the sequence length.
        methods: Methods to train, by name. The other trainers use PEFT for a low-rank method.
        device: Device of the models.
        folder: Folder for files of the loops.
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


def prepare_loops(
    run: Run, method: MoDE, device: torch.device, folder: Path
) -> tuple[Iterator[list[Case]], dict[str, int]]:
    """Return groups of cases that time whole loops. The models of a group are freed before the next group.

    Full fine-tuning and LoRA are compared with other trainers, and MoDE with full fine-tuning, in the precision of the
    device. `train.kernels.compile=true` adds compiled variants, and `train.kernels.cuda_graph=true` adds variants with
    one CUDA graph. On a GPU, Trainer with Liger's kernels is added if Liger is installed.

    Args:
        run: Run with the backbone, the batch size and the sequence length.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Folder for files of the loops.

    Raises:
        ConfigError: `train.kernels.cuda_graph=true` without a CUDA device.
    """
    if run.train.kernels.cuda_graph:
        check_cuda(device)
    bench = partial(Bench, run, device=device, folder=folder, precision=run.train.precision)

    def groups() -> Iterator[list[Case]]:
        for name in ("sft", "lora"):
            yield compare_trainers(bench(load_method(name)), "full fine-tuning" if name == "sft" else "LoRA")
        yield compare_modular(bench, run, method)

    return groups(), {}


def compare_trainers(at: Bench, name: str) -> list[Case]:
    """Return cases that train one method with other trainers and with this project's loop."""
    job = f"{name}, loops"
    ways: dict[str, dict[str, bool]] = {other: {} for other, package in OTHERS.items() if find_spec(package)}
    if "Trainer" in ways and at.device.type == "cuda" and supports_liger(at.run):
        ways["Trainer, Liger"] = {"liger": True}
    if "Trainer" in ways and at.run.train.kernels.compile is True and at.lora is None:  # takes over a minute each
        ways["Trainer, compiled"] = {"compiled": True}
    cases = [
        at.case(job, way, OtherLoop(way.partition(",")[0], at, **options), counted=True)
        for way, options in ways.items()
    ]
    return cases + [at.case(job, f"mode{way}", loop, counted=True) for way, loop in list_own_loops(at).items()]


def compare_modular(bench: Callable[[Adaptation], Bench], run: Run, method: MoDE) -> list[Case]:
    """Return cases that compare full fine-tuning with MoDE of one expert, a smaller expert and two experts."""
    fresh = partial(replace_settings, method, start="fresh", experts=(), num_experts=1)
    half = divide_layers(len(read_shape(run.backbone).layers), method.num_blocks) // 2
    models: dict[str, Adaptation] = {"full fine-tuning": load_method("sft"), "one expert": fresh()}
    if half > method.expert_layers:
        models["one expert of half a block"] = fresh(expert_layers=half)
    models["two experts"] = fresh(num_experts=2)
    cases: dict[str, list[Case]] = {}
    for name, settings in models.items():
        at = bench(settings)
        for way, loop in list_own_loops(at).items():
            job = f"MoDE beside full fine-tuning{way}"
            cases.setdefault(way, []).append(at.case(job, name, loop, counted=True))
    return [case for group in cases.values() for case in group]


def list_own_loops(at: Bench) -> dict[str, OwnLoop]:
    """Return this project's loops over one model: plain, compiled and as a CUDA graph, as the settings ask, by name."""
    plain, asked = OwnLoop(at), at.run.train
    ways = {"": plain}
    if asked.kernels.compile is True:
        ways[", compiled layers"] = plain.make_twin(compiled=True)
    if asked.kernels.cuda_graph:
        ways[", one graph"] = plain.make_twin(graph=True)
    if asked.kernels.compile is True and asked.kernels.cuda_graph:
        ways[", compiled layers, one graph"] = plain.make_twin(compiled=True, graph=True)
    return ways


def supports_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bf16."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


class EnoughError(Exception):
    """Ends a loop after the timed steps, before it writes anything."""


class Rows:
    """Batches of the same rows at every step, with a clock.

    The clock measures from the beginning of the first timed step to the end of the last.

    Attributes:
        first: Number of the first timed step, from 0.
        seconds: Seconds of the timed steps.
    """

    def __init__(self, run: Run, vocabulary: int, first: int) -> None:
        """Draw random rows."""
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
    """Trains a model with this project's loop, and returns the seconds of the timed steps."""

    def __init__(
        self, at: Bench, *, compiled: bool = False, graph: bool = False, model: nn.Module | None = None
    ) -> None:
        """Build the model, unless one is given.

        Args:
            at: Run, method, device and precision.
            compiled: Whether decoder layers are compiled.
            graph: Whether a step is one CUDA graph. The steps before it is recorded are not timed.
            model: A model to share with another loop.
        """
        self.at, self.first = at, WARM_UP + 1 if graph else 1
        changes = {**SILENT, "precision": at.precision, "kernels.compile": compiled, "kernels.cuda_graph": graph}
        self.settings = replace_settings(at.run.train, **changes)
        asked = replace_settings(at.run, method=at.method, train=self.settings)
        load = partial(load_model, at.run.backbone)
        self.model = at.method.build(asked, Material(backbone=load)).to(at.device) if model is None else model

    def make_twin(self, **ways: bool) -> OwnLoop:
        """Return a loop over the same model."""
        return OwnLoop(self.at, model=self.model, **ways)

    def resident(self) -> int:
        """Return the bytes of weights, which stay allocated between calls."""
        return count_weight_bytes(self.model)

    def __call__(self) -> float:
        """Train, and return seconds."""
        rows = Rows(self.at.run, self.model.get_output_embeddings().weight.shape[0], self.first)  # type: ignore[operator]
        with tempfile.TemporaryDirectory(dir=self.at.folder) as place:
            job = TrainJob(settings=self.settings, steps=self.first + STEPS, lr=1e-6, folder=Path(place), validate=dict)
            with suppress(EnoughError):
                train(self.model, rows, job)  # type: ignore[arg-type]  # the loop uses only this method of batches
        self.model.zero_grad(set_to_none=True)
        return rows.seconds
