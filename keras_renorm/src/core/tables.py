"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), total: bool = False) -> str:
    """Lines of aligned columns under a header and a rule.

    Args:
        header: one text a column.
        rows: the cells, as texts.
        right: the columns that are aligned to the right.
        total: whether there is a rule before the last row.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "  ".join(
            text.rjust(width) if index in right else text.ljust(width) for index, (text, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in (header, *rows)
    ]
    rule = "-" * max(map(len, lines))
    body = lines[1:]
    return "\n".join([lines[0], rule, *body[:-1], *([rule] if total else []), *body[-1:]])
