"""Command `mode launch`: run a command in several processes."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import reporting_errors

ABLE = ("train", "compose", "generate")
"""Commands that several processes can share."""


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="Command, such as train baseline sft --domain code."),
    ],
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Number of processes; with GPUs, one per GPU.")] = 2,
) -> None:
    """Run a command in several processes of this machine.

    The processes of `mode train` and `mode compose` share every step. `mode generate ... --layout mpmd` runs every
    expert in its own process.

    The command is equivalent to `torchrun --nproc-per-node K -m cli COMMAND`, but reports an error in one line. Options
    of `launch` come before the command.

    Example: mode launch --nproc 2 train baseline sft --domain code
    """
    with reporting_errors():
        from mode.core.errors import ConfigError, suggest

        if command[0] not in ABLE:
            raise ConfigError(f"launch {command[0]}: not one of {', '.join(ABLE)}{suggest(command[0], ABLE)}")
        from mode.launch.elastic import launch_processes as start

        code = start(command, nproc)
    raise typer.Exit(code)
