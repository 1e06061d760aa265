"""Launchers of a table's runs: local processes, jobs of submitit, and so of Slurm, or tasks of Ray.

A remote job has the interface of a process: alive or not, with an exit code. Its progress is read from its training
curve, so runs and records must be in folders that all machines share.
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
"""Exit code of a job that ended without a result."""


GROUP = "launcher"


@settings(frozen=True, kw_only=True, config=STRICT)
class Launcher:
    """Settings of a launcher.

    Attributes:
        kind: `local`: processes of this machine; `submitit` or `ray`.
        retries: Times that a run is started again, from its checkpoint, after its job died. A run that fails with an
            error is not.
        nproc: Processes of a job, which share the run (`mode launch`).
        cluster: For submitit: `local`, `slurm`, or null for the one that is available.
        address: For Ray: address of a cluster; null starts one on this machine.
        parameters: For submitit: parameters of its executor, such as timeout_min or slurm_partition; for Ray: options
            of a task, such as num_cpus.
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
        ConfigError: There is no such launcher, its settings are wrong, or its library is not installed.
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
    """A run in a remote job, with the interface of a process that `run_all` needs."""

    def __init__(self, run: Run, run_id: str, messages: Any) -> None:
        """Start to follow the run's curve."""
        self.run_id, self.messages = run_id, messages
        self.curve = Path(run.paths.runs).expanduser() / run_id / CURVE
        self.seen, self.train = len(read_curve(self.curve)), run.train
        self.exitcode: int | None = None

    def over(self) -> bool:
        """Say whether the job has ended."""
        raise NotImplementedError

    def result(self) -> str | None:
        """Return the error of the run in one line, if any.

        Raises:
            RuntimeError: The job died without a result.
        """
        raise NotImplementedError

    def terminate(self) -> None:
        """End the job."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        """Send new points of the curve and, at the end, the run's error; say whether the job still runs."""
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
        """Set the exit code, and send the run's error, if any."""
        try:
            error_line = self.result()
        except RuntimeError:
            self.exitcode = DIED
            return
        self.exitcode = 0
        if error_line is not None:
            self.messages.put((self.run_id, "error", error_line))

    def join(self) -> None:
        """Return at once: the job has ended."""


class SubmititJob(RemoteJob):
    """A job of submitit."""

    def __init__(self, executor: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit the job.

        Raises:
            ConfigError: The cluster refuses it.
        """
        super().__init__(run, run_id, messages)
        try:
            self.job = executor.submit(execute_yaml, to_yaml(run), run_id, nproc)
        except Exception as error:  # submitit has no error class of its own for a refused job
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"launcher of submitit: {reason}") from error

    def over(self) -> bool:
        """Say whether the job has ended."""
        return bool(self.job.done())

    def result(self) -> str | None:
        """Return the error of the run in one line, if any.

        Raises:
            RuntimeError: The job died without a result.
        """
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            error_line: str | None = self.job.result()
        except FailedJobError as error:  # a subclass of UncompletedJobError
            return str(error).strip().splitlines()[-1]
        except UncompletedJobError as error:
            raise RuntimeError(str(error)) from error
        return error_line

    def terminate(self) -> None:
        """Cancel the job."""
        self.job.cancel()


class RayJob(RemoteJob):
    """A task of Ray."""

    def __init__(self, task: Any, nproc: int, run: Run, run_id: str, messages: Any) -> None:
        """Submit the task."""
        super().__init__(run, run_id, messages)
        self.reference = task.remote(to_yaml(run), run_id, nproc)

    def over(self) -> bool:
        """Say whether the job has ended."""
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> str | None:
        """Return the error of the run in one line, if any.

        Raises:
            RuntimeError: The job died without a result.
        """
        import ray

        try:
            error_line: str | None = ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            return str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            raise RuntimeError(str(error)) from error
        return error_line

    def terminate(self) -> None:
        """Cancel the job."""
        import ray

        ray.cancel(self.reference, force=True)


def make_starter(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return a function that starts a run as a job.

    Args:
        launcher: Settings of the launcher.
        folder: Folder of submitit's logs.

    Raises:
        ConfigError: There is no such cluster, or the library does not know a parameter.
    """
    try:
        return choose_start(launcher, folder)
    except Exception as error:  # the libraries have no error class of their own for wrong parameters
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"launcher of {launcher.kind}: {reason}") from error


def choose_start(launcher: Launcher, folder: Path) -> Callable[[Run, str, Any], RemoteJob]:
    """Return a function that starts a run as a job, or raise the library's error."""
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
