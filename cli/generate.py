"""mode generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import ConfOption, Overrides, reporting_errors, runs_folder

if TYPE_CHECKING:
    from mode.evaluation.generate import Piece

ANSI = (0, 43, 215, 141, 203, 75, 113, 218)
"""Terminal colours of the branches; the backbone keeps the terminal's own."""


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or the start of it, or a model's folder.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    overrides: Overrides = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to make at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of probability to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    gates: Annotated[bool, typer.Option("--gates", help="Colour every token by the branch its gates chose.")] = False,
    layout: Annotated[
        str, typer.Option("--layout", help="alone, or mpmd: with `mode launch`, every expert in a process of its own.")
    ] = "alone",
    html: Annotated[Path | None, typer.Option(help="Write the text with every token's gates to an HTML file.")] = None,
    conf: ConfOption = None,
) -> None:
    """Continue a text with any run or saved model, streaming.

    Example: mode generate 3f2a "def main():" --gates
    """
    with reporting_errors():
        from mode.artefacts.find import find_model, list_branches
        from mode.core.errors import ConfigError
        from mode.core.files import write_atomic
        from mode.evaluation.generate import Sampling
        from mode.evaluation.generate import generate as stream
        from mode.report.generated_text import Section, to_html

        recalled = find_model(run, runs_folder(overrides, conf))
        names = list_branches(recalled)
        if not names and (gates or html):
            raise ConfigError(f"{run}: has no gates to show; that is for MoDE models")
        if html is not None and not html.parent.is_dir():
            raise ConfigError(f"--html {html}: no folder {html.parent}")
        pieces: list[Piece] = []
        cached = laid_out(recalled.model, layout)
        sampling = Sampling(max_tokens, temperature, top_p, seed)
        print(prompt, end="")
        for piece in stream(recalled.model, recalled.tokenizer, prompt, sampling, cached=cached):
            pieces.append(piece)
            print(paint(piece.text, piece.branch) if gates else piece.text, end="", flush=True)
        print()
        if gates:
            print("branches: " + " ".join(paint(name, number) for number, name in enumerate(names)))
            for name, share in shares(pieces, names).items():
                print(f"  {name:<12} {100 * share:5.1f} % of the weight")
        if html is not None:
            write_atomic(html, to_html(f"mode generate {run}", [Section("Text", prompt, pieces)], names).encode())
            print(f"wrote {html}", file=sys.stderr)


def laid_out(model: Any, layout: str) -> bool:
    """Lay a model's branches out over processes, if asked for, and say whether keys and values can be kept."""
    from mode.core import processes
    from mode.core.errors import ConfigError, suggest

    known = ("alone", "mpmd")
    if layout not in known:
        raise ConfigError(f"--layout {layout}: not one of {', '.join(known)}{suggest(layout, known)}")
    if layout == "mpmd":
        from mode.distributed.mpmd import distribute_branches

        distribute_branches(model)
    elif processes.world_size() > 1:
        raise ConfigError("mode generate on several processes needs --layout mpmd")
    return layout == "alone"


def paint(text: str, branch: int) -> str:
    """Colour a text by its branch, where the output is a terminal."""
    if branch == 0 or not sys.stdout.isatty():
        return text
    return f"\x1b[48;5;{ANSI[branch % len(ANSI)]}m\x1b[30m{text}\x1b[0m"


def shares(pieces: list[Piece], names: tuple[str, ...]) -> dict[str, float]:
    """Return the mean weight of every branch over all tokens and blocks."""
    weights = [block for piece in pieces for block in piece.gates]
    return {name: sum(row[index] for row in weights) / max(1, len(weights)) for index, name in enumerate(names)}
