"""Generated text as an HTML page with the gates of every token."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.evaluation.generate import Piece

COLOURS = ("#d9d9d9", "#8dd3c7", "#fdb462", "#bebada", "#fb8072", "#80b1d3", "#b3de69", "#fccde5")
"""Colours of branches, the backbone's first. They repeat after the last one."""


@dataclass(frozen=True)
class Section:
    """A text on the page.

    Attributes:
        heading: Heading.
        prompt: Text before the tokens.
        pieces: Tokens with their gate weights.
    """

    heading: str
    prompt: str
    pieces: Sequence[Piece]


def to_html(title: str, sections: Sequence[Section], branches: Sequence[str]) -> str:
    """Return a self-contained HTML page. The colour of a token is that of the branch with the largest weight.

    Args:
        title: Title of the page.
        sections: Texts. The weights of a token are its tooltip.
        branches: Names of the branches, the backbone's first.
    """
    legend = " ".join(
        f'<span style="background:{COLOURS[index % len(COLOURS)]}">&nbsp;{html.escape(name)}&nbsp;</span>'
        for index, name in enumerate(branches)
    )
    texts = [
        f'<h2>{html.escape(section.heading)}</h2>\n<pre style="white-space:pre-wrap">{html.escape(section.prompt)}'
        f"{''.join(render_token(piece, branches) for piece in section.pieces)}</pre>\n"
        for section in sections
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
        f'<body style="font-family:sans-serif;max-width:60em;margin:2em auto"><h1>{html.escape(title)}</h1>\n'
        f"<p>{legend}</p>\n{''.join(texts)}</body></html>\n"
    )


def render_token(piece: Piece, branches: Sequence[str]) -> str:
    """Return a token as HTML."""
    text = html.escape(piece.text)
    if not piece.gates:
        return text
    rows = [f"block {number}: {format_gates(weights, branches)}" for number, weights in enumerate(piece.gates)]
    colour = COLOURS[piece.branch % len(COLOURS)]
    return f'<span style="background:{colour}" title="{html.escape(chr(10).join(rows))}">{text}</span>'


def format_gates(weights: Sequence[float], branches: Sequence[str]) -> str:
    """Return the weights of a block as text.

    >>> format_gates((0.25, 0.75), ("backbone", "code"))
    'backbone 0.25, code 0.75'
    """
    return ", ".join(f"{name} {weight:.2f}" for name, weight in zip(branches, weights, strict=True))
