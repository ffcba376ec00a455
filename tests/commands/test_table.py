from __future__ import annotations

import click

from p2pmesh.commands.table import Column, coloured, table

COLUMNS = (Column("NAME"), Column("STATE", state=True), Column("SIZE", right=True), Column("WHY"))


def plain(rows: list[tuple[object, ...]], width: int = 0) -> list[str]:
    return click.unstyle(table(COLUMNS, rows, width=width)).splitlines()


def test_cells_are_aligned_and_numbers_set_to_the_right() -> None:
    assert plain([("a", "live", 5, "x"), ("long-name", "dead", 1234, "")]) == [
        "NAME       STATE  SIZE  WHY",
        "a          live      5  x",
        "long-name  dead   1234",
    ]


def test_a_table_without_rows_is_its_head() -> None:
    assert plain([]) == ["NAME  STATE  SIZE  WHY"]


def test_wide_and_combining_characters_keep_the_columns() -> None:
    lines = plain([("世界", "live", 1, "x"), ("e\u0301e", "live", 1, "x")])
    assert lines[1] == "世界  live      1  x"
    assert lines[2] == "e\u0301e    live      1  x"


def test_the_last_column_is_cut_to_the_terminal() -> None:
    lines = plain([("a", "live", 5, "a reason that goes on and on")], width=30)
    assert lines[1] == "a     live      5  a reason t…"
    assert len(lines[1]) <= 30


def test_a_narrow_terminal_keeps_something_of_the_last_column() -> None:
    assert plain([("a" * 40, "live", 5, "a reason")], width=20)[1].endswith("a reason")


def test_only_states_are_coloured() -> None:
    text = table(COLUMNS, [("live", "live", 5, "live")]).splitlines()[1]
    assert text == f"live  {click.style('live ', fg='green')}     5  live"
    assert coloured("not served") == "not served"
    assert click.unstyle(coloured("failed")) == "failed"


def test_cells_cannot_break_out_of_their_line() -> None:
    assert plain([("a\nb\x1b[2J", "live", 1, "x\ry")])[1:] == ["a b[2J  live      1  x y"]
