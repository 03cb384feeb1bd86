"""Which lines of some files run: those in functions and classes that the interpreter says it comes to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class Executed:
    """Lines that ran, by file."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.lines: dict[str, set[int]] = {str(file): set() for file in files}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the lines that run in the block, in every thread that begins in it, too."""
        before = sys.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(before)  # type: ignore[arg-type]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        seen = self.lines.get(frame.f_code.co_filename)
        if seen is None:
            return None
        seen.add(frame.f_lineno)

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                seen.add(frame.f_lineno)
            return trace

        return trace

    def missed(self) -> list[str]:
        """``file:line: text`` of every line inside functions that did not run."""
        found = []
        for name, seen in self.lines.items():
            text = Path(name).read_text().splitlines()
            inside = _lines_in_functions(compile("\n".join(text), name, "exec"))
            found += [f"{Path(name).name}:{n}: {text[n - 1].strip()}" for n in sorted(inside - seen)]
        return found


def _lines_in_functions(code: CodeType, within: bool = False) -> set[int]:
    lines = {n for _, _, n in code.co_lines() if n} - {code.co_firstlineno} if within else set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            # What a module or a class comprehends has run when it was imported.
            begins = constant.co_flags & 2 != 0 and not constant.co_name.startswith("<")
            lines |= _lines_in_functions(constant, within or begins)
    return lines
