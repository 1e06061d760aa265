"""Where the runs of a table are executed: as jobs of submitit, and so of Slurm, or of Ray, beside the local processes.

A job that is there looks to the table like a process: alive or not, with an exit code. What it learns on the way is
read from its training curve, so runs and records have to be in folders that all machines share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from mode.config.base import STRICT
from mode.config.check import to_yaml
from mode.config.groups import list_members, read_group
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.core.files import CURVE
from mode.launch.worker import execute_yaml
from mode.train.curve import compute_throughput, read_curve

DIED = 1
"""Exit code of a job that is gone without a word."""


GROUP = "launcher"


@settings(frozen=True, kw_only=True, config=STRICT)
class Launcher:
    """How jobs are started.

    Attributes:
        kind: `local`: processes of this machine; `submitit` or `ray`.
        retries: Times that a run whose job dies is started again, from its checkpoint. One that fails is not.
        nproc: Processes of a job, which share the rows of every step (`mode launch`).
        cluster: Of submitit: `local`, `slurm`, or null for what there is.
        address: Of Ray: a cluster's address; null starts one on this machine.
        parameters: Of submitit: what its executor is told, such as timeout_min or slurm_partition; of Ray: what a task
            is told, such as num_cpus.
    """

    kind: Literal["local", "submitit", "ray"]
    retries: Annotated[int, Field(ge=0)] = 1
    nproc: Annotated[int, Field(ge=1)] = 1
    cluster: str | None = None
    address: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind == "local" and (self.nproc > 1 or self.parameters):
            raise ValueError("nproc and parameters go with submitit and ray")


def read_launcher(name: str, extra: Path | None = None) -> Launcher:
    """Read a launcher from its YAML.

    Raises:
        ConfigError: There is none of that name, it does not say what it should, or its library is not installed.
    """
    known = list_members(GROUP, extra)
    if name not in known:
        raise ConfigError(f"--launcher {name}: not one of {', '.join(known)}{suggest(name, known)}")
    try:
        found: Launcher = TypeAdapter(Launcher).validate_python(read_group(GROUP, name, extra))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ConfigError(f"{GROUP}/{name}.yaml: {where + ': ' if where else ''}{wrong['msg']}") from error
    if found.kind != "local" and find_spec(found.kind) is None:
        raise ConfigError(f"--launcher {name} needs {found.kind}: `pip install {found.kind}` once")
    return found


class RemoteJob:
    """A run at work elsewhere, with what the table asks of a process."""

    def __init__(self, run: Run, run_id: str, messages: Any) -> None:
        """Begin to follow its curve."""
        self.run_id, self.messages = run_id, messages
        self.curve = Path(run.paths.runs).expanduser() / run_id / CURVE
        self.seen, self.train = len(read_curve(self.curve)), run.train
        self.exitcode: int | None = None

    def over(self) -> bool:
        """Say whether it has ended."""
        raise NotImplementedError

    def result(self) -> str | None:
        """Return the mistake that it made, if it made one.

        Raises:
            RuntimeError: It is gone without a word.
        """
        raise NotImplementedError

    def terminate(self) -> None:
        """End it."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        """Pass on what is new in its curve, and at its end its mistake, and say whether it goes on."""
        if self.exitcode is not None:
            return False
        over = self.over()
        points = read_curve(self.curve)
        for number in range(self.seen, len(points)):
            speed = {"tokens_per_second": compute_throughput(points[: number + 1], self.train)}
            self.messages.put((self.run_id, "point", points[number] | speed))
        self.seen = max(self.seen, len(points)) if points else 0
        if over:
            self.end()
        return not over

    def end(self) -> None:
        """Note how it ended."""
        try:
            mistake = self.result()
        except RuntimeError:
            self.exitcode = DIED
            return
        self.exitcode = 0
        if mistake is not None:
            self.messages.put((self.run_id, "error", mistake))

    def join(self) -> None:
        """Return at once: it has ended."""


class SubmititJob(RemoteJob):
    """A job of submitit."""

    def __init__(self, executor: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit it.

        Raises:
            ConfigError: It is refused.
        """
        super().__init__(run, run_id, messages)
        try:
            self.job = executor.submit(execute_yaml, to_yaml(run), run_id, nproc)
        except Exception as error:  # submitit has no class of its own for all that a cluster refuses
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"launcher of submitit: {reason}") from error

    def over(self) -> bool:
        """Say whether it has ended."""
        return bool(self.job.done())

    def result(self) -> str | None:
        """Return the mistake that it made, if it made one.

        Raises:
            RuntimeError: It is gone without a word.
        """
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            mistake: str | None = self.job.result()
        except FailedJobError as error:  # a kind of the other
            return str(error).strip().splitlines()[-1]
        except UncompletedJobError as error:
            raise RuntimeError(str(error)) from error
        return mistake

    def terminate(self) -> None:
        """Cancel it."""
        self.job.cancel()


class RayJob(RemoteJob):
    """A task of Ray."""

    def __init__(self, task: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit it."""
        super().__init__(run, run_id, messages)
        self.reference = task.remote(to_yaml(run), run_id, nproc)

    def over(self) -> bool:
        """Say whether it has ended."""
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> str | None:
        """Return the mistake that it made, if it made one.

        Raises:
            RuntimeError: It is gone without a word.
        """
        import ray

        try:
            mistake: str | None = ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            return str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            raise RuntimeError(str(error)) from error
        return mistake

    def terminate(self) -> None:
        """Cancel it."""
        import ray

        ray.cancel(self.reference, force=True)


def make_starter(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return what starts a run as a job.

    Args:
        launcher: How.
        folder: For what submitit writes of its jobs.

    Raises:
        ConfigError: There is no such cluster here, or its library does not know a parameter.
    """
    try:
        return choose_start(launcher, folder)
    except Exception as error:  # the libraries have no class of their own for a mistake in what they are told
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"launcher of {launcher.kind}: {reason}") from error


def choose_start(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return what starts a run as a job, or raise what the library raises."""
    if launcher.kind == "submitit":
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster=launcher.cluster)
        executor.update_parameters(**launcher.parameters)
        return lambda run, run_id, messages: SubmititJob(executor, launcher.nproc, run, run_id, messages)
    import ray

    if not ray.is_initialized():
        ray.init(address=launcher.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(execute_yaml).options(max_retries=0, **launcher.parameters)
    return lambda run, run_id, messages: RayJob(task, launcher.nproc, run, run_id, messages)
