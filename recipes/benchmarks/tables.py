"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> list[str]:
    """Lay out cells in Markdown: the first column is words, the others are numbers and stand at the right.

    Args:
        heading: the columns.
        rows: the cells.
        words: further columns that are words.

    Returns:
        The lines.
    """

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    sides = ["---" if index == 0 or name in words else "---:" for index, name in enumerate(heading)]
    return [line(heading), line(sides), *map(line, rows)]
