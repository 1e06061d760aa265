"""The suite `sharding`: a step on two processes of this machine: copies, shards, side by side; measured and planned."""

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


ROWS = ((4, 256), (4, 64), (4, 16))
"""Rows of a step and tokens of each: what is sent weighs more and more."""


WIDTHS = (1, 2)
"""Factors on the hidden size, where weights are random."""


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "copies": {},
    "in shards": {"parallelism.strategy": "fsdp"},
    "side by side": {"parallelism.strategy": "mpmd"},
    "side by side, two in flight": {"parallelism.strategy": "mpmd", "parallelism.microbatches_in_flight": 2},
}


ALONE = next(iter(LAYOUTS))


EACH = "each alone"
"""Every process makes the step of one, at the same time: what a process does while the others use the machine too."""


DRIFT = 20.0
"""Seconds after which the machine is measured anew for the predictions: its speed changes with its neighbours."""


APART: Slots = (((0,), 1), ((1,), 1))
"""The backbone in one slot of a process, the expert in the other."""


NUMBERS = (16_000_000, 1_000, 1_000_000)
"""Numbers that are summed over processes to see what a link does, and what a message costs; and those of a layer."""


def sharding(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time: one process, copies, shards, and branches side by side, each with its prediction.

    The predictions know of this machine what each of two processes that do the same takes at the first width, with the
    most and the fewest tokens, and what summing, gathering and scattering take, as measured less than a minute before.

    Args:
        run: Names the backbone; rows are the suite's own.
        method: Shape of blocks and experts: one expert, of half a block where that has several layers.
        device: Not used: processes are on the CPU.
        folder: For the runs' settings.

    Raises:
        ConfigError: The method is one that does not run branches side by side.
    """
    if method.head_rank or method.gate.reads == "output":
        raise ConfigError(
            "suite `sharding` goes with method.head_rank=0 and method.gate.reads=input, as layout mpmd does"
        )
    team = Team(folder)
    jobs = {name: team.settle(each) for name, each in list_variants(run, method).items()}
    shape = {name: replace(describe_work(each), half=WHOLE) for name, each in list_variants(run, method).items()}
    latest = Latest(team, jobs, shape)
    cases = []
    for name, file in jobs.items():
        for layout in LAYOUTS:
            step = partial(team.seconds, file, layout)
            cases.append(Case(name, layout, step, tokens=shape[name].tokens))
            if layout != ALONE:
                told = partial(latest.planned, layout, name)
                cases.append(Case(name, f"{layout}, planned", told, tokens=shape[name].tokens))
    return cases, {}


class Latest:
    """What the machine and its link did when last measured, and what is planned from that."""

    def __init__(self, team: Team, jobs: Mapping[str, str], shape: Mapping[str, Work]) -> None:
        """Have nothing measured yet.

        Args:
            team: The processes.
            jobs: Settings of every job.
            shape: Its step.
        """
        self.team, self.jobs, self.shape = team, jobs, shape
        self.known: tuple[Device, Link] | None = None
        self.when = 0.0

    def planned(self, layout: str, name: str) -> float:
        """Return the predicted seconds of a step."""
        if self.known is None or time.monotonic() - self.when > DRIFT:
            self.known = measure_machine(self.team, self.jobs, self.shape, 3), measure_link(self.team, 3)
            self.when = time.monotonic()
        work, (machine, link) = self.shape[name], self.known
        if layout == "copies":
            return estimate_ddp(work, PROCESSES, machine, link).seconds
        if layout == "in shards":
            return estimate_fsdp(work, PROCESSES, machine, link).seconds
        return estimate_mpmd(
            work, APART, LAYOUTS[layout].get("parallelism.microbatches_in_flight", 1), machine, link
        ).seconds


def calibrate(run: Run, method: MoDE, conf: Path, name: str) -> list[Path]:
    """Measure what a process of this machine does and what connects two, and write both for `mode plan`.

    Args:
        run: Names the backbone; rows are the suite's own.
        method: Shape of blocks and experts.
        conf: Folder of configuration, which gets `device/NAME.yaml` and `link/NAME.yaml`.
        name: What they are called.

    Returns:
        Their paths.
    """
    each = {job: one for job, one in list_variants(run, method).items() if job.startswith("width 1,")}
    shape = {job: replace(describe_work(one), half=WHOLE) for job, one in each.items()}
    paths = [conf / group / f"{name}.yaml" for group in ("device", "link")]
    for path in paths:
        path.parent.mkdir(
            parents=True, exist_ok=True
        )  # now, so that a place where nothing can be written costs no time
    with tempfile.TemporaryDirectory() as folder:
        team = Team(Path(folder))
        machine, link = (
            measure_machine(team, {job: team.settle(one) for job, one in each.items()}, shape, 5),
            measure_link(team, 5),
        )
        team.end()
    machine = replace(machine, memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / PROCESSES))
    about = f"# Measured on this machine: {PROCESSES} processes of one thread, {run.backbone.name} in fp32.\n"
    for path, plain in zip(paths, (asdict(machine), asdict(link)), strict=True):
        write_atomic(path, (about + yaml.safe_dump(plain, sort_keys=False)).encode())
    return paths


def measure_machine(team: Team, jobs: Mapping[str, str], shape: Mapping[str, Work], times: int) -> Device:
    """Return what a process does while the other does the same, from steps with the most and the fewest tokens."""
    names = list(jobs)
    most, least = names[0], names[len(ROWS) - 1]
    spent = [statistics.median(team.seconds(jobs[name], EACH) for _ in range(times)) for name in (most, least)]
    totals = [shape[name].tokens * shape[name].whole.flops.total for name in (most, least)]
    rate = (totals[0] - totals[1]) / (spent[0] - spent[1])
    return Device(flops=rate, memory=1e12, layer=max(0.0, (spent[1] - totals[1] / rate) / shape[least].whole.layers))


def measure_link(team: Team, times: int) -> Link:
    """Return what summing, gathering and scattering over the processes shows of their link."""

    def median(kind: str, count: int) -> float:
        return statistics.median(team.ask(kind, count) for _ in range(times))

    large, small = (median("sum", count) for count in NUMBERS[:2])
    sent = 2 * WHOLE * NUMBERS[0] * (PROCESSES - 1) / PROCESSES
    latency = small / (2 * (PROCESSES - 1))
    # A layer in shards is gathered twice and its gradients scattered once, as often as not.
    both = 2 * median("gather", NUMBERS[2]) + median("scatter", NUMBERS[2])
    gathering = 3 * WHOLE * NUMBERS[2] * (PROCESSES - 1) / PROCESSES / both
    # The processor that computes is the one that sends, so nothing hides.
    return Link(bandwidth=sent / large, gathering=gathering, latency=latency, overlap=0.0)


def list_variants(run: Run, method: MoDE) -> dict[str, Run]:
    """Return the runs whose steps are timed, by job."""
    per_block = divide_layers(len(read_shape(run.backbone).layers), method.num_blocks)
    half = max(1, per_block // 2)
    one = replace_settings(method, start="fresh", num_experts=1, experts=(), expert_layers=half, train_experts=True)
    found = {}
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
            found[name] = replace_settings(run, backbone=backbone, method=one, train=train)
    return found


class Team:
    """Processes that wait for what to do, told on their standard input; the first answers with seconds.

    They make steps, or `sum`, `gather` or `scatter` numbers.
    """

    def __init__(self, folder: Path) -> None:
        """Start them."""
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

    def settle(self, run: Run) -> str:
        """Write a run's settings to a file, and return its path."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.yaml"
        path.write_text(to_yaml(run), encoding="utf-8")
        return str(path)

    def end(self) -> None:
        """Let all go."""
        for one in self.members:
            one.communicate()

    def ask(self, *words: str | int) -> float:
        """Let all do something, and return the seconds that it took.

        Raises:
            ConfigError: One of them has ended, and has said why on its standard error.
        """
        answers = [""]
        with suppress(BrokenPipeError):
            for member in self.members:
                assert member.stdin is not None
                member.stdin.write(json.dumps(words) + "\n")
                member.stdin.flush()
            answers = [member.stdout.readline() for member in self.members if member.stdout is not None]
        if not all(answers):
            raise ConfigError(f"a process of suite `sharding` ended before it answered {' '.join(map(str, words))}")
        return float(answers[0])

    def seconds(self, file: str, layout: str) -> float:
        """Return the seconds of a step."""
        return self.ask("step", file, layout)


def serve_member() -> None:
    """Do what is asked on standard input, as one of the processes."""
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
    """Return what sums, gathers or scatters so many numbers over the processes."""
    whole, part = torch.ones(count), torch.ones(count // PROCESSES)
    return {
        "sum": partial(distributed.all_reduce, whole),
        "gather": partial(distributed.all_gather_single, whole, part),
        "scatter": partial(distributed.reduce_scatter_single, part, whole),
    }[kind]


class Alone(DDP):
    """The layout of one process among several that does not communicate with the others."""

    def select_rows(self, values: Tensor) -> Tensor:
        """Return all rows."""
        return values

    def wrap(self, objective: nn.Module, make_optimizer: Any) -> tuple[nn.Module, Any]:
        """Return the objective as it is, and its optimizer."""
        return objective, make_optimizer(self.model)


def make_step(file: Path, layout: str) -> Callable[[], None]:
    """Return an optimizer step, as the loop makes it, under a layout; alone it is the first process's, or each's."""
    if layout == ALONE and not processes.is_main():
        return lambda: None
    run = check_run(yaml.safe_load(file.read_text("utf-8")))
    method: Any = run.method
    model: nn.Module = method.build(run, Material(backbone=partial(load_model, run.backbone))).train()
    train = replace_settings(run.train, **LAYOUTS.get(layout, {}))
    device = torch.device("cpu")
    placed = Alone(model) if layout in (ALONE, EACH) else choose_layout(model, train, device, anchored=False)
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
