"""Suite `sharding`: a training step in two processes of this machine under DDP, FSDP and MPMD, with predictions."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, distributed, nn

from mode.backbone.load import load_model
from mode.backbone.shape import divide_layers, read_shape
from mode.bench.timing import Case
from mode.config.check import check_run, replace_settings, to_yaml
from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.files import write_atomic
from mode.distributed.choose import choose_layout
from mode.distributed.layout import DDP
from mode.methods.base import Material
from mode.planning.layouts import Slots, estimate_ddp, estimate_fsdp, estimate_mpmd
from mode.planning.machine import Device, Link
from mode.planning.work import WHOLE, Work, describe_work
from mode.train.loop import forward_backward
from mode.train.objective import Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_batch import StepBatch
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

PROCESSES = 2
"""Number of processes."""


ROWS = ((4, 256), (4, 64), (4, 16))
"""Rows of a step and tokens of a row. With fewer tokens, traffic takes a larger share of the time."""


WIDTHS = (1, 2)
"""Factors of the hidden size, for backbones with random weights."""


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "copies": {},
    "in shards": {"parallelism.strategy": "fsdp"},
    "side by side": {"parallelism.strategy": "mpmd"},
    "side by side, two in flight": {"parallelism.strategy": "mpmd", "parallelism.microbatches_in_flight": 2},
}
"""Training settings of every layout, by its name in records: one process, DDP, FSDP, and MPMD."""


ALONE = next(iter(LAYOUTS))
"""The layout in which only the first process makes a step."""


EACH = "each alone"
"""A layout for calibration: every process makes the whole step, at the same time and without communication."""


DRIFT = 20.0
"""Seconds after which the machine is measured again, since its speed changes with other load."""


APART: Slots = (((0,), 1), ((1,), 1))
"""Placement of MPMD: the backbone in one process, the expert in the other."""


ELEMENTS = (16_000_000, 1_000, 1_000_000)
"""Elements of the collectives that measure bandwidth and latency, and of a layer in all-gather and reduce-scatter."""


def prepare_sharding(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that time a step under every layout, each with its predicted time.

    The predictions use measurements of this machine that are at most `DRIFT` seconds old: steps of two independent
    processes at the first width, with the most and the fewest tokens, and the time of collectives.

    Args:
        run: Run with the backbone. The rows are the suite's own.
        method: Method with the number of blocks. The suite uses one expert, with half the layers of a block.
        device: Not used. The processes run on the CPU.
        folder: Folder for the settings of the runs.

    Raises:
        ConfigError: MPMD does not support the method.
    """
    if method.head_rank or method.gate.reads == "output":
        raise ConfigError(
            "suite `sharding` goes with method.head_rank=0 and method.gate.reads=input: layout mpmd needs both"
        )
    team = ProcessTeam(folder)
    jobs = {name: team.write_settings(variant) for name, variant in list_variants(run, method).items()}
    work = {name: replace(describe_work(variant), half=WHOLE) for name, variant in list_variants(run, method).items()}
    predictor = Predictor(team, jobs, work)
    cases = []
    for name, file in jobs.items():
        for layout in LAYOUTS:
            step = partial(team.time_step, file, layout)
            cases.append(Case(name, layout, step, tokens=work[name].tokens))
            if layout != ALONE:
                predict = partial(predictor.predict_seconds, layout, name)
                cases.append(Case(name, f"{layout}, planned", predict, tokens=work[name].tokens))
    return cases, {}


class Predictor:
    """Predictions of a step from the latest measurement of the machine and its link."""

    def __init__(self, team: ProcessTeam, jobs: Mapping[str, str], work: Mapping[str, Work]) -> None:
        """Keep the processes and the steps, without a measurement.

        Args:
            team: The processes.
            jobs: File with the settings of every job, by job.
            work: Work of a step, by job.
        """
        self.team, self.jobs, self.work = team, jobs, work
        self.known: tuple[Device, Link] | None = None
        self.when = 0.0

    def predict_seconds(self, layout: str, name: str) -> float:
        """Return the predicted seconds of a job's step under a layout."""
        if self.known is None or time.monotonic() - self.when > DRIFT:
            self.known = measure_machine(self.team, self.jobs, self.work, 3), measure_link(self.team, 3)
            self.when = time.monotonic()
        work, (machine, link) = self.work[name], self.known
        if layout == "copies":
            return estimate_ddp(work, PROCESSES, machine, link).seconds
        if layout == "in shards":
            return estimate_fsdp(work, PROCESSES, machine, link).seconds
        return estimate_mpmd(
            work, APART, LAYOUTS[layout].get("parallelism.microbatches_in_flight", 1), machine, link
        ).seconds


def calibrate(run: Run, method: MoDE, conf: Path, name: str) -> list[Path]:
    """Measure the speed of this machine's processes and of their link, and write both as YAML files for `mode plan`.

    Args:
        run: Run with the backbone. The rows are the suite's own.
        method: Method with the number of blocks.
        conf: Folder of configuration. The files are `device/NAME.yaml` and `link/NAME.yaml`.
        name: Name of the device and of the link.

    Returns:
        The paths of both files.
    """
    variants = {job: one for job, one in list_variants(run, method).items() if job.startswith("width 1,")}
    work = {job: replace(describe_work(one), half=WHOLE) for job, one in variants.items()}
    paths = [conf / group / f"{name}.yaml" for group in ("device", "link")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)  # fails before any work if the folder is not writable
    with tempfile.TemporaryDirectory() as folder:
        team = ProcessTeam(Path(folder))
        machine, link = (
            measure_machine(team, {job: team.write_settings(one) for job, one in variants.items()}, work, 5),
            measure_link(team, 5),
        )
        team.stop()
    machine = replace(machine, memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / PROCESSES))
    about = f"# Measured on this machine: {PROCESSES} processes of one thread, {run.backbone.name} in fp32.\n"
    for path, plain in zip(paths, (asdict(machine), asdict(link)), strict=True):
        write_atomic(path, (about + yaml.safe_dump(plain, sort_keys=False)).encode())
    return paths


def measure_machine(team: ProcessTeam, jobs: Mapping[str, str], work: Mapping[str, Work], times: int) -> Device:
    """Return the speed of a process while the other does the same, from steps with the most and the fewest tokens."""
    names = list(jobs)
    most, least = names[0], names[len(ROWS) - 1]
    spent = [statistics.median(team.time_step(jobs[name], EACH) for _ in range(times)) for name in (most, least)]
    totals = [work[name].tokens * work[name].whole.flops.total for name in (most, least)]
    rate = (totals[0] - totals[1]) / (spent[0] - spent[1])
    return Device(flops=rate, memory=1e12, layer=max(0.0, (spent[1] - totals[1] / rate) / work[least].whole.layers))


def measure_link(team: ProcessTeam, times: int) -> Link:
    """Return the bandwidth and latency of the link between the processes, measured by collectives."""

    def measure(kind: str, count: int) -> float:
        return statistics.median(team.run_command(kind, count) for _ in range(times))

    large, small = (measure("sum", count) for count in ELEMENTS[:2])
    sent = 2 * WHOLE * ELEMENTS[0] * (PROCESSES - 1) / PROCESSES
    latency = small / (2 * (PROCESSES - 1))
    # FSDP gathers the weights of a layer twice and scatters its gradients once.
    both = 2 * measure("gather", ELEMENTS[2]) + measure("scatter", ELEMENTS[2])
    gathering = 3 * WHOLE * ELEMENTS[2] * (PROCESSES - 1) / PROCESSES / both
    # The same processor computes and sends, so computing and traffic do not overlap.
    return Link(bandwidth=sent / large, gathering=gathering, latency=latency, overlap=0.0)


def list_variants(run: Run, method: MoDE) -> dict[str, Run]:
    """Return the runs whose steps are timed, by job."""
    per_block = divide_layers(len(read_shape(run.backbone).layers), method.num_blocks)
    half = max(1, per_block // 2)
    one = replace_settings(method, start="fresh", num_experts=1, experts=(), expert_layers=half, train_experts=True)
    variants = {}
    for factor in WIDTHS if run.backbone.random else (1,):
        backbone = run.backbone
        if backbone.random:
            shape = dict(backbone.random.config)
            shape |= {key: factor * int(shape[key]) for key in ("hidden_size", "intermediate_size") if key in shape}
            backbone = replace_settings(backbone, random=replace_settings(backbone.random, config=shape))
        for rows, length in ROWS:
            train = replace_settings(
                run.train,
                sequence_length=length,
                precision="fp32",
                **{"batch.size": rows, "batch.gradient_accumulation_steps": 1},
            )
            name = f"width {factor}, {rows * length} tokens"
            variants[name] = replace_settings(run, backbone=backbone, method=one, train=train)
    return variants


class ProcessTeam:
    """Processes that execute commands from their standard input and answer with the seconds of each.

    A command is `step` with a file of settings and a layout, or a collective (`sum`, `gather`, `scatter`) with a number
    of elements.
    """

    def __init__(self, folder: Path) -> None:
        """Start the processes."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.folder = folder
        self.members = [
            subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(PROCESSES)
        ]

    def write_settings(self, run: Run) -> str:
        """Write a run's settings to a file, and return its path."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.yaml"
        path.write_text(to_yaml(run), encoding="utf-8")
        return str(path)

    def stop(self) -> None:
        """Close the input of all processes and wait for their end."""
        for member in self.members:
            member.communicate()

    def run_command(self, *words: str | int) -> float:
        """Run a command in all processes, and return the seconds that the first process measured.

        Raises:
            ConfigError: A process has ended. Its error is on its standard error.
        """
        answers = [""]
        with suppress(BrokenPipeError):
            for member in self.members:
                assert member.stdin is not None
                member.stdin.write(json.dumps(words) + "\n")
                member.stdin.flush()
            answers = [member.stdout.readline() for member in self.members if member.stdout is not None]
        if not all(answers):
            raise ConfigError(f"a process of suite `sharding` ended during the command {' '.join(map(str, words))}")
        return float(answers[0])

    def time_step(self, file: str, layout: str) -> float:
        """Run one step in all processes, and return its seconds."""
        return self.run_command("step", file, layout)


def serve_member() -> None:
    """Execute the commands from standard input, as one of the processes."""
    torch.set_num_threads(1)
    processes.ensure_initialized()
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    action: Callable[[], object]
    for line in sys.stdin:
        kind, *words = json.loads(line)
        if kind != "step":
            action = make_collective(kind, words[0])
        else:
            file, layout = words
            action = steps[file, layout] = steps.get((file, layout)) or make_step(Path(file), layout)
        distributed.barrier()
        begin = time.perf_counter()
        action()
        distributed.barrier()
        print(time.perf_counter() - begin, flush=True)


def make_collective(kind: str, count: int) -> Callable[[], object]:
    """Return a collective over the processes: all-reduce, all-gather or reduce-scatter of `count` elements."""
    whole, part = torch.ones(count), torch.ones(count // PROCESSES)
    return {
        "sum": partial(distributed.all_reduce, whole),
        "gather": partial(distributed.all_gather_single, whole, part),
        "scatter": partial(distributed.reduce_scatter_single, part, whole),
    }[kind]


class Independent(DDP):
    """A layout in which every process trains its own model, without communication."""

    def select_rows(self, values: Tensor) -> Tensor:
        """Return all rows."""
        return values

    def wrap(self, objective: nn.Module, make_optimizer: Any) -> tuple[nn.Module, Any]:
        """Return the objective as it is, and its optimizer."""
        return objective, make_optimizer(self.model)


def make_step(file: Path, layout: str) -> Callable[[], None]:
    """Return an action that makes an optimizer step under a layout, as the training loop does."""
    if layout == ALONE and not processes.is_main():
        return lambda: None
    run = check_run(yaml.safe_load(file.read_text("utf-8")))
    method: Any = run.method
    model: nn.Module = method.build(run, Material(backbone=partial(load_model, run.backbone))).train()
    train = replace_settings(run.train, **LAYOUTS.get(layout, {}))
    device = torch.device("cpu")
    placed = Independent(model) if layout in (ALONE, EACH) else choose_layout(model, train, device, anchored=False)
    plain = Objective(model, train, None, placed.select_loss_rows)
    objective, optimizer = placed.wrap(plain, partial(make_optimizer, lr=1e-6, scales={}, settings=train))
    options = StepOptions(placed.model, train)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    shape = (train.batch.size, train.sequence_length + 1)
    rows = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    batch = StepBatch(placed.select_rows(rows))

    def step() -> None:
        with options, placed.enter_step():
            forward_backward(objective, batch, 1, slots=placed.slots)
        placed.clip_gradients(train.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    serve_member()
