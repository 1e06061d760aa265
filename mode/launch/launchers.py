"""Launchers: run the runs of a table as jobs of submitit (such as on Slurm) or Ray instead of local processes.

A job has the interface of a process: it is alive or not, and has an exit code. Its progress is read from its training
curve, so all machines must share the folders of runs and records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.config.base import STRICT
from mode.config.check import to_yaml, validate_member
from mode.config.groups import list_members
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.core.files import CURVE, expand_home
from mode.launch.worker import execute_yaml
from mode.train.curve import compute_throughput, read_curve

DIED = 1
"""Exit code of a job that died without an error message."""


GROUP = "launcher"
"""Configuration group of launchers."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Launcher:
    """Settings of a launcher.

    Attributes:
        kind: `local` for processes of this machine, `submitit` or `ray`.
        retries: How often a run is restarted from its checkpoint after its job died. A run that fails with an error is
            not restarted.
        nproc: Number of processes of a job. They share the rows of every step, as under `mode launch`.
        cluster: submitit only: `local`, `slurm`, or null to detect the cluster.
        address: Ray only: address of a cluster; null starts Ray on this machine.
        parameters: Parameters of submitit's executor, such as timeout_min or slurm_partition, or options of a Ray task,
            such as num_cpus.
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
    """Read a launcher from its YAML file.

    Raises:
        ConfigError: There is no launcher of that name, a setting is not valid, or the library is not installed.
    """
    known = list_members(GROUP, extra)
    if name not in known:
        raise ConfigError(f"--launcher {name}: not one of {', '.join(known)}{suggest(name, known)}")
    launcher: Launcher = validate_member(Launcher, GROUP, name, extra)
    if launcher.kind != "local" and find_spec(launcher.kind) is None:
        raise ConfigError(f"--launcher {name} needs {launcher.kind}: `pip install {launcher.kind}` once")
    return launcher


class RemoteJob:
    """A run that executes as a job, with the interface of a process.

    Attributes:
        run_id: Id of the run.
        messages: Queue of (run id, kind, value), where kind is `point` or `error`.
        curve: File of the run's training curve.
        seen: Number of points that were put into the queue.
        train: Training settings of the run.
        exitcode: None while the job is alive, 0 after it ended, `DIED` if it died.
    """

    def __init__(self, run: Run, run_id: str, messages: Any) -> None:
        """Start to follow the training curve. Points that already exist are skipped."""
        self.run_id, self.messages = run_id, messages
        self.curve = expand_home(run.paths.runs) / run_id / CURVE
        self.seen, self.train = len(read_curve(self.curve)), run.train
        self.exitcode: int | None = None

    def has_ended(self) -> bool:
        """Return whether the job has ended."""
        raise NotImplementedError

    def fetch_error(self) -> str | None:
        """Return the error message of the run, or None if it succeeded.

        Raises:
            RuntimeError: The job died without an error message.
        """
        raise NotImplementedError

    def terminate(self) -> None:
        """Cancel the job."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        """Put new points of the training curve, and a final error, into the queue; return whether the job runs."""
        if self.exitcode is not None:
            return False
        ended = self.has_ended()
        points = read_curve(self.curve)
        for number in range(self.seen, len(points)):
            speed = {"tokens_per_second": compute_throughput(points[: number + 1], self.train)}
            self.messages.put((self.run_id, "point", points[number] | speed))
        self.seen = max(self.seen, len(points)) if points else 0
        if ended:
            self.finish()
        return not ended

    def finish(self) -> None:
        """Set the exit code, and put an error message into the queue."""
        try:
            message = self.fetch_error()
        except RuntimeError:
            self.exitcode = DIED
            return
        self.exitcode = 0
        if message is not None:
            self.messages.put((self.run_id, "error", message))

    def join(self) -> None:
        """Return at once: `join` is called only after the job has ended."""


class SubmititJob(RemoteJob):
    """A job of submitit."""

    def __init__(self, executor: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit the job.

        Raises:
            ConfigError: The cluster refuses the job.
        """
        super().__init__(run, run_id, messages)
        try:
            self.job = executor.submit(execute_yaml, to_yaml(run), run_id, nproc)
        except Exception as error:  # submitit has no common class for refusals of a cluster
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"launcher of submitit: {reason}") from error

    def has_ended(self) -> bool:
        """Return whether the job has ended."""
        return bool(self.job.done())

    def fetch_error(self) -> str | None:
        """Return the error message of the run, or None if it succeeded.

        Raises:
            RuntimeError: The job died without an error message.
        """
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            message: str | None = self.job.result()
        except FailedJobError as error:  # a subclass of UncompletedJobError, so it comes first
            return str(error).strip().splitlines()[-1]
        except UncompletedJobError as error:
            raise RuntimeError(str(error)) from error
        return message

    def terminate(self) -> None:
        """Cancel the job."""
        self.job.cancel()


class RayJob(RemoteJob):
    """A task of Ray."""

    def __init__(self, task: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit the task."""
        super().__init__(run, run_id, messages)
        self.reference = task.remote(to_yaml(run), run_id, nproc)

    def has_ended(self) -> bool:
        """Return whether the task has ended."""
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def fetch_error(self) -> str | None:
        """Return the error message of the run, or None if it succeeded.

        Raises:
            RuntimeError: The task died without an error message.
        """
        import ray

        try:
            message: str | None = ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            return str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            raise RuntimeError(str(error)) from error
        return message

    def terminate(self) -> None:
        """Cancel the task."""
        import ray

        ray.cancel(self.reference, force=True)


def make_starter(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return a function that starts a run as a job.

    Args:
        launcher: Settings of the launcher.
        folder: Folder for submitit's files.

    Returns:
        A function of a run, its id and a queue of messages.

    Raises:
        ConfigError: The cluster is not available, or the library does not know a parameter.
    """
    try:
        return connect_launcher(launcher, folder)
    except Exception as error:  # the libraries have no common class for wrong parameters
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"launcher of {launcher.kind}: {reason}") from error


def connect_launcher(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return a function that starts a run as a job. Exceptions of the library are not converted."""
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
