"""Command `mode generate`: continue a text with a run or a saved model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import ConfOption, Overrides, find_runs_folder, reporting_errors

if TYPE_CHECKING:
    from mode.evaluation.generate import Piece

ANSI = (0, 43, 215, 141, 203, 75, 113, 218)
"""Terminal colours of the branches. The backbone has no colour."""


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run or its start, or folder of a model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    overrides: Overrides = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    gates: Annotated[bool, typer.Option("--gates", help="Colour tokens by the branch of the largest gate.")] = False,
    layout: Annotated[
        str, typer.Option("--layout", help="alone, or mpmd: under `mode launch`, every expert in its own process.")
    ] = "alone",
    html: Annotated[Path | None, typer.Option(help="Write the text with its gates to this HTML file.")] = None,
    conf: ConfOption = None,
) -> None:
    """Continue a text with a run or a saved model.

    Tokens are printed as they are generated.

    Example: mode generate 3f2a "def main():" --gates
    """
    with reporting_errors():
        from mode.artefacts.find import find_model, list_branches
        from mode.core.errors import ConfigError
        from mode.core.files import write_atomic
        from mode.evaluation.generate import Sampling
        from mode.evaluation.generate import generate as stream
        from mode.report.generated_text import Section, to_html

        prompt = decode_prompt(prompt)
        source = find_model(run, find_runs_folder(overrides, conf))
        names = list_branches(source)
        if not names and (gates or html):
            raise ConfigError(f"{run}: has no gates to show: only MoDE models have gates")
        if html is not None and not html.parent.is_dir():
            raise ConfigError(f"--html {html}: no folder {html.parent}")
        sampling, cached = Sampling(max_tokens, temperature, top_p, seed), spread_branches(source.model, layout)
        continuation = stream(source.model, source.tokenizer, prompt, sampling, cached=cached)
        print(prompt, end="")
        pieces = print_pieces(continuation, gates=gates)
        if gates:
            print("branches: " + " ".join(paint(name, number) for number, name in enumerate(names)))
            for name, share in compute_shares(pieces, names).items():
                print(f"  {name:<12} {100 * share:5.1f} % of the weight")
        if html is not None:
            write_atomic(html, to_html(f"mode generate {run}", [Section("Text", prompt, pieces)], names).encode())
            print(f"wrote {html}", file=sys.stderr)


def print_pieces(continuation: Iterable[Piece], *, gates: bool) -> list[Piece]:
    """Print tokens as they are generated, painted by branch with `gates`, and return them."""
    pieces = []
    for piece in continuation:
        pieces.append(piece)
        print(paint(piece.text, piece.branch) if gates else piece.text, end="", flush=True)
    print()
    return pieces


def decode_prompt(prompt: str) -> str:
    """Return a prompt as text, from the UTF-8 that the shell passed, also where Python has read it as ASCII.

    Raises:
        ConfigError: The prompt is not UTF-8.
    """
    from mode.core.errors import ConfigError

    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        before = ascii(error.object[: error.start].decode("utf-8")[-20:])
    except UnicodeEncodeError as error:
        before = ascii(prompt[: error.start][-20:])
    raise ConfigError(f"PROMPT: not UTF-8 text after {before}; write the prompt in UTF-8")


def spread_branches(model: Any, layout: str) -> bool:
    """Spread a model's branches over processes if `layout` is `mpmd`.

    Returns:
        Whether the model can use a key-value cache.

    Raises:
        ConfigError: There is no such layout, or it does not fit the number of processes.
    """
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
    """Colour a text by its branch if the output is a terminal."""
    if branch == 0 or not sys.stdout.isatty():
        return text
    return f"\x1b[48;5;{ANSI[branch % len(ANSI)]}m\x1b[30m{text}\x1b[0m"


def compute_shares(pieces: list[Piece], names: tuple[str, ...]) -> dict[str, float]:
    """Return the mean weight of every branch over all tokens and blocks."""
    weights = [block for piece in pieces for block in piece.gates]
    return {name: sum(row[index] for row in weights) / max(1, len(weights)) for index, name in enumerate(names)}
