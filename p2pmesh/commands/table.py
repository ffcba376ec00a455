"""Tables on a terminal: aligned, cleaned, coloured by state where colours are shown.

Pure: `click.echo` takes the colours out when the output is no terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import click

from p2pmesh.commands.formatting import line

GAP = "  "
LAST_WIDTH_MIN = 8  # narrower than that nothing can be read; the terminal wraps instead
COLOURS = {
    "live": "green",
    "ready": "green",
    "ok": "green",
    "suspect": "yellow",
    "loading": "yellow",
    "warn": "yellow",
    "dead": "red",
    "failed": "red",
    "fail": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column.

    Attributes:
        right: Numbers are set to the right.
        state: Its cells are states, shown in their colours.
    """

    title: str
    right: bool = False
    state: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, width: int = 0) -> str:
    """Lines of aligned cells under their titles; cells of the last column may be cut.

    Args:
        columns: As many as each row has cells.
        rows: Cells of any kind, shown as one clean line each.
        width: Characters in a line of the terminal; 0 cuts nothing.
    """
    titles = [column.title for column in columns]
    cells = [[line(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(titles, *cells, strict=True)]
    if width:
        before = sum(widths[:-1]) + len(GAP) * (len(columns) - 1)
        widths[-1] = max(min(widths[-1], width - before), LAST_WIDTH_MIN)
    head = GAP.join(_padded(*each) for each in zip(titles, columns, widths, strict=True))
    lines = [click.style(head.rstrip(), dim=True)]
    lines += [
        GAP.join(_styled(*each) for each in zip(row, columns, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def coloured(state: str, text: str | None = None) -> str:
    """A state, or `text` that stands for it, in the state's colour."""
    colour = COLOURS.get(state)
    shown = state if text is None else text
    return shown if colour is None else click.style(shown, fg=colour)


def _styled(cell: str, column: Column, width: int) -> str:
    padded = _padded(cell, column, width)
    return coloured(cell, padded) if column.state else padded


def _padded(cell: str, column: Column, width: int) -> str:
    cell = _cut(cell, width)
    space = " " * (width - _width(cell))
    return space + cell if column.right else cell + space


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def _width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
