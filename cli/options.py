"""Options and arguments that several commands share, and the reporting of errors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mode.core.files import expand_home

if TYPE_CHECKING:
    from mode.config.run import Run

REPORT_DELAY = 3.0
"""Seconds that other processes wait for the first process to report an error."""


def complete(group: str) -> Callable[[str], list[str]]:
    """Return a completion function for the members of a configuration group."""

    def list_matches(incomplete: str) -> list[str]:
        from mode.config.groups import list_members

        head, comma, last = incomplete.rpartition(",")
        return [f"{head}{comma}{name}" for name in list_members(group) if name.startswith(last)]

    return list_matches


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as train.lr=3e-4 or backbone=tiny."),
]
DomainOption = Annotated[
    str | None,
    typer.Option("--domain", "-d", help="Target domains, separated by commas.", autocompletion=complete("domain")),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Train again although there is a record.")]
SweepOption = Annotated[bool, typer.Option("--sweep", help="A value with commas starts one run per value.")]
PrintOption = Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")]
ConfOption = Annotated[
    Path | None,
    typer.Option("--conf", help="Folder of your own configuration, with the layout of conf/."),
]


def complete_metric(incomplete: str) -> list[str]:
    """Complete the name of a metric."""
    from mode.records.metrics import METRICS

    return [name for name in METRICS if name.startswith(incomplete)]


MetricOption = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Metric to show in the place of the accuracy.", autocompletion=complete_metric),
]


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Report an error in one line on stderr, with exit code 2.

    Ctrl-C, SIGTERM and SIGHUP end the command with code 130 and the hint that the same command continues the run.
    Child processes end too.
    """
    from mode.core import processes
    from mode.core.errors import ConfigError
    from mode.core.interrupts import raising_interrupts

    try:
        with raising_interrupts() if processes.world_size() == 1 else nullcontext():
            yield
    except ConfigError as error:
        if not processes.is_main():  # the launcher ends this process if the first reports the error
            time.sleep(REPORT_DELAY)
        print(f"mode: {format_rank()}{error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("mode: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        if not processes.is_peer_lost(error):
            raise
        time.sleep(REPORT_DELAY)  # the launcher reports the lost process and ends this one
        print(
            f"mode: {format_rank()}lost another process; the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"mode: {place}{error.strerror or error}", file=sys.stderr)
        raise typer.Exit(2) from None


def format_rank() -> str:
    """Return the prefix of messages of this process: its rank, or nothing for the first process.

    >>> format_rank()
    ''
    """
    from mode.core import processes

    return "" if processes.is_main() else f"process {processes.rank()}: "


def add_domains(overrides: Sequence[str], domain: str | None) -> list[str]:
    """Add the domains of --domain as an override. Overrides with other domains are refused.

    >>> add_domains(["seed=1"], "code,math")
    ['targets=[code,math]', 'seed=1']
    """
    from mode.config.quoting import format_value
    from mode.core.errors import ConfigError

    if domain is None:
        return list(overrides)
    names = [name.strip() for name in domain.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--domain {domain}: no domain is named")
    wanted = format_value(names)
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("targets", "domain") and value.strip("[]").replace(" ", "") != ",".join(names):
            raise ConfigError(f"--domain {domain} and {text} must agree: give one of them")
    rest = [text for text in overrides if text.lstrip("+").partition("=")[0] not in ("targets", "domain")]
    return [f"targets={wanted}", *rest]


def add_method(
    overrides: Sequence[str], method: str, command: str, conf: Path | None, *, variants: bool = False
) -> list[str]:
    """Add the method of a command as an override. Overrides and experiments with another method are refused.

    Without this check the method of the command would silently replace the method of an experiment.

    Args:
        overrides: Overrides of the configuration.
        method: Name of the method.
        command: Command, for messages.
        conf: Folder of the user's own configuration.
        variants: Whether an override may choose another YAML file of the same class, such as `mode-anchored` for
            `mode`.

    Raises:
        ConfigError: An override or an experiment chooses another method.
    """
    from mode.config.groups import read_group
    from mode.core.errors import ConfigError

    rest, wanted = [], read_group("method", method, conf).get("_target_") if variants else None
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == "method" and variants and read_group("method", value, conf).get("_target_") == wanted:
            method = value
        elif key == "method" and value != method:
            raise ConfigError(f"`{command}` trains method={method}, not {text}: the two must agree")
        if key == "experiment" and value != "null":
            for name in value.split(","):  # several names in a sweep
                chosen = read_experiment_method(read_group("experiment", name.strip(), conf))
                if chosen not in (None, method):
                    raise ConfigError(
                        f"`{command}` trains method={method}, but {text} chooses method={chosen}: the two must agree"
                    )
        if key != "method":
            rest.append(text)
    return [f"method={method}", *rest]


def read_experiment_method(node: Mapping[str, Any]) -> str | None:
    """Return the method that an experiment's YAML file chooses, or None.

    >>> read_experiment_method({"defaults": [{"override /method": "lora"}]}), read_experiment_method({})
    ('lora', None)
    """
    listed = node.get("defaults")
    defaults = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return next((item["override /method"] for item in defaults if "override /method" in item), None)


def add_fixed(overrides: Sequence[str], fixed: Mapping[str, str], command: str) -> list[str]:
    """Add the settings that a command implies. Overrides with other values are refused.

    >>> add_fixed(["seed=1"], {"method.start": "fresh"}, "mode train expert")
    ['seed=1', 'method.start=fresh']
    """
    from mode.config.compose import parse_overrides
    from mode.core.errors import ConfigError

    rest = []
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if key not in fixed:
            rest.append(text)
        elif parse_overrides([text])[0].value != parse_overrides([f"{key}={fixed[key]}"])[0].value:
            raise ConfigError(f"`{command}` sets {key}={fixed[key]}, not {text}: the two must agree")
    return [*rest, *(f"{key}={value}" for key, value in fixed.items())]


def take_list(overrides: Sequence[str], key: str) -> tuple[list[str], list[int] | None]:
    """Remove a list of integers, such as seeds=[0,1,2], from the overrides, and return both.

    >>> take_list(["seeds=[0,1]", "train.lr=1"], "seeds")
    (['train.lr=1'], [0, 1])
    """
    from mode.core.errors import ConfigError

    rest, values = [], None
    for text in overrides:
        name, _, value = text.partition("=")
        if name != key:
            rest.append(text)
            continue
        try:
            values = [int(part) for part in value.strip("[] ").split(",")]
        except ValueError:
            raise ConfigError(f"{text}: not a list of integers such as {key}=[0,1,2]") from None
        if min(values) < 0 or len(set(values)) != len(values):
            raise ConfigError(f"{text}: seeds must be different non-negative integers")
    return rest, values


def show_config(run: Run) -> None:
    """Print a run's resolved configuration."""
    from mode.config.check import to_yaml

    print(to_yaml(run), end="")


def find_runs_folder(overrides: Sequence[str] | None, conf: Path | None) -> Path:
    """Return the folder of runs of the configuration.

    Raises:
        ConfigError: An override names a folder that does not exist.
    """
    return find_folder("runs", overrides or [], conf)


def find_folder(name: str, overrides: Sequence[str], conf: Path | None) -> Path:
    """Return a folder of the configuration, to read from it.

    Args:
        name: `runs` or `results`.
        overrides: Overrides of the configuration.
        conf: Folder of the user's own configuration.

    Raises:
        ConfigError: An override names a folder that does not exist.
    """
    from mode.config.compose import compose, parse_overrides
    from mode.core.errors import ConfigError

    folder = expand_home(getattr(compose(overrides, conf).paths, name))
    named = any(item.key == f"paths.{name}" for item in parse_overrides(overrides))
    if named and not folder.is_dir():
        raise ConfigError(f"paths.{name}={folder}: no such folder")
    return folder
