"""Options and arguments that several commands share, and how mistakes are told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from mode.config.run import Run

Result = TypeVar("Result")
SECOND_OPINION = 3.0
"""Seconds that a process waits for the first to tell a mistake."""


def complete(group: str) -> Callable[[str], list[str]]:
    """Return a completion over the members of a configuration group, listed from its folder."""

    def members(incomplete: str) -> list[str]:
        from mode.config.groups import list_members

        head, comma, last = incomplete.rpartition(",")
        return [f"{head}{comma}{name}" for name in list_members(group) if name.startswith(last)]

    return members


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as train.lr=3e-4 or backbone=tiny."),
]
DomainOption = Annotated[
    str | None,
    typer.Option("--domain", "-d", help="Domains to adapt to, by comma.", autocompletion=complete("domain")),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Train anew although there is a record.")]
SweepOption = Annotated[bool, typer.Option("--sweep", help="Commas in a value mean one run each.")]
PrintOption = Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")]
ConfOption = Annotated[
    Path | None,
    typer.Option("--conf", help="Folder of your own configuration, laid out as conf/ is."),
]


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Tell a mistake in one line on stderr, exit code 2; Ctrl-C says that the run goes on where it stopped.

    So does SIGTERM, which schedulers send, and what was started for it ends with it.
    """
    from mode.core import processes
    from mode.core.errors import ConfigError

    try:
        with interrupted_by_sigterm() if processes.world_size() == 1 else nullcontext():
            yield
    except ConfigError as error:
        if not processes.is_main():  # what the first says too is said once: whoever launched them ends this one first
            time.sleep(SECOND_OPINION)
        print(f"mode: {who()}{error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("mode: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        if not processes.is_peer_lost(error):
            raise
        time.sleep(SECOND_OPINION)  # whoever launched them knows which, and ends this one first
        print(
            f"mode: {who()}lost another process; the same command continues from the last checkpoint", file=sys.stderr
        )
        raise typer.Exit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"mode: {place}{error.strerror or error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C for a while."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def who() -> str:
    """Say which of several processes speaks, if it is not the first.

    >>> who()
    ''
    """
    from mode.core import processes

    return "" if processes.is_main() else f"process {processes.rank()}: "


def with_domains(overrides: Sequence[str], domain: str | None) -> list[str]:
    """Turn domains named by comma into an override, refusing one that says something else.

    >>> with_domains(["seed=1"], "code,math")
    ['targets=[code,math]', 'seed=1']
    """
    from mode.core.errors import ConfigError

    if domain is None:
        return list(overrides)
    names = [name.strip() for name in domain.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--domain {domain}: no domain is named")
    wanted = f"[{','.join(names)}]"
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("targets", "domain") and value.strip("[]").replace(" ", "") != ",".join(names):
            raise ConfigError(f"the domain {domain} and {text} must agree; give one of them")
    rest = [text for text in overrides if text.lstrip("+").partition("=")[0] not in ("targets", "domain")]
    return [f"targets={wanted}", *rest]


def with_method(
    overrides: Sequence[str], method: str, command: str, conf: Path | None, *, variants: bool = False
) -> list[str]:
    """Choose the method that a command trains, refusing an override or an experiment that chooses another.

    A group choice on the command line silently beats an experiment's own, so the two have to agree. With `variants` an
    override may choose other settings of the same method, such as `mode-anchored` for `mode`.
    """
    from mode.config.groups import read_group
    from mode.core.errors import ConfigError

    rest, wanted = [], read_group("method", method, conf)["_target_"] if variants else None
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == "method" and variants and read_group("method", value, conf)["_target_"] == wanted:
            method = value
        elif key == "method" and value != method:
            raise ConfigError(f"`{command}` trains method={method}, not {text}: the two must agree")
        if key == "experiment" and value != "null":
            for name in value.split(","):  # several in a sweep
                chosen = experiment_method(read_group("experiment", name.strip(), conf))
                if chosen not in (None, method):
                    raise ConfigError(
                        f"`{command}` trains method={method}, but {text} chooses method={chosen}: the two must agree"
                    )
        if key != "method":
            rest.append(text)
    return [f"method={method}", *rest]


def experiment_method(node: Mapping[str, Any]) -> str | None:
    """Return the method that an experiment's YAML chooses, if it does.

    >>> experiment_method({"defaults": [{"override /method": "lora"}]}), experiment_method({})
    ('lora', None)
    """
    defaults = [item for item in node.get("defaults") or [] if isinstance(item, dict)]
    return next((item["override /method"] for item in defaults if "override /method" in item), None)


def with_fixed(overrides: Sequence[str], fixed: Mapping[str, str], command: str) -> list[str]:
    """Add the settings that a command stands for, refusing an override that says something else.

    >>> with_fixed(["seed=1"], {"method.start": "fresh"}, "mode train expert")
    ['seed=1', 'method.start=fresh']
    """
    from mode.core.errors import ConfigError

    rest = []
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key not in fixed:
            rest.append(text)
        elif value != fixed[key]:
            raise ConfigError(f"`{command}` means {key}={fixed[key]}, not {text}: the two must agree")
    return [*rest, *(f"{key}={value}" for key, value in fixed.items())]


def take_list(overrides: Sequence[str], key: str) -> tuple[list[str], list[int] | None]:
    """Take a list of whole numbers such as seeds=[0,1,2] out of the overrides.

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
            raise ConfigError(f"{text}: a list of whole numbers is meant, such as {key}=[0,1,2]") from None
        if min(values) < 0 or len(set(values)) != len(values):
            raise ConfigError(f"{text}: seeds are different numbers from 0 up")
    return rest, values


def show_config(run: Run) -> None:
    """Print a run's resolved configuration."""
    from mode.config.check import to_yaml

    print(to_yaml(run), end="")


def runs_folder(overrides: Sequence[str] | None, conf: Path | None) -> Path:
    """Return the folder of runs that the settings name."""
    from mode.config.compose import compose

    return Path(compose(overrides or [], conf).paths.runs).expanduser()
