"""Tables that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_GAP, _INDENT = "  ", "    "
#: Columns that a name keeps while notes stand beside it, and that a note needs to stand there.
_NAME, _NOTE = 12, 30


def fitted(rows: Sequence[Sequence[str]], align: str, last: str, width: int) -> str:
    """Rows as lines of at most ``width`` characters, a rule below the first, and a closing line.

    Args:
        rows: cells, of which the last is a note: it is wrapped, beside the others where there is room for 30
            characters and otherwise on lines of its own.
        align: "l" or "r" for each cell but the note. Left ones are shortened in their middle, the longest first, as far
            as need be; right ones are numbers and stay whole.
        last: the closing line; wrapped.

    >>> print(fitted([("name", "n", ""), ("a.rather.long.name", "1", "why it is as it is")], "lr", "done", 20))
    name          n
    -------------------
    a.rath….name  1
        why it is as it
        is
    done
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    note = min(max(len(row[-1]) for row in rows), _NOTE)
    _narrow(widths, align, _NAME, width - note - len(_GAP) * bool(note))
    room = width - _taken(widths) - len(_GAP)
    beside = room >= note
    if not beside:
        room = width - len(_INDENT)
        _narrow(widths, align, 3, width)
    lines = []
    for row in rows:
        cells = [_short(cell, size) for cell, size in zip(row, widths, strict=False)]
        line = _GAP.join(
            cell.ljust(size) if side == "l" else cell.rjust(size)
            for cell, size, side in zip(cells, widths, align, strict=True)
        )
        notes = textwrap.wrap(row[-1], room) if row[-1] else []
        if beside:
            lines.append((line + _GAP + notes[0]) if notes else line)
            lines += [" " * (len(line) + len(_GAP)) + more for more in notes[1:]]
        else:
            lines += [line, *(_INDENT + more for more in notes)]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *textwrap.wrap(last, width)])


def _taken(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _narrow(widths: list[int], align: str, least: int, room: int) -> None:
    """Takes from the widest left columns, down to ``least``, until all fit."""
    while _taken(widths) > room:
        able = [i for i, side in enumerate(align) if side == "l" and widths[i] > least]
        if not able:
            return
        widths[max(able, key=lambda i: widths[i])] -= 1


def _short(text: str, width: int) -> str:
    """At most ``width`` characters, without some of its middle.

    >>> _short("decoder.block.conv", 9)
    'deco…conv'
    """
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return text[: width - 1 - end] + "…" + text[len(text) - end :]
