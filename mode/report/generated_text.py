"""Generated text as a page that shows which expert was heard."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.evaluation.generate import Piece

COLOURS = ("#d9d9d9", "#8dd3c7", "#fdb462", "#bebada", "#fb8072", "#80b1d3", "#b3de69", "#fccde5")
"""One per branch, the backbone's first; they repeat after the last."""


@dataclass(frozen=True)
class Section:
    """A text on a page: a heading, what comes before the tokens, and the tokens."""

    heading: str
    prompt: str
    pieces: Sequence[Piece]


def to_html(title: str, sections: Sequence[Section], branches: Sequence[str]) -> str:
    """Render texts as a self-contained page that colours every token by the branch with the largest weight.

    Args:
        title: Title of the page.
        sections: Texts; a token's weights show when it is pointed at.
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
    """Render a token."""
    text = html.escape(piece.text)
    if not piece.gates:
        return text
    rows = [f"block {number}: {format_gates(weights, branches)}" for number, weights in enumerate(piece.gates)]
    colour = COLOURS[piece.branch % len(COLOURS)]
    return f'<span style="background:{colour}" title="{html.escape(chr(10).join(rows))}">{text}</span>'


def format_gates(weights: Sequence[float], branches: Sequence[str]) -> str:
    """Phrase a block's weights.

    >>> format_gates((0.25, 0.75), ("backbone", "code"))
    'backbone 0.25, code 0.75'
    """
    return ", ".join(f"{name} {weight:.2f}" for name, weight in zip(branches, weights, strict=True))
