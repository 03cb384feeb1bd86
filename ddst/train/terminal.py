"""What a run says: lines that stay lines, on streams that may be closed, full or of another encoding."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def one_line(text: str) -> str:
    """The text with everything that does not print, line breaks included, as an escape.

    Example:
        >>> one_line("runs/a\\nb is no folder")
        'runs/a\\\\nb is no folder'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OneLineError(Exception):
    """An error whose message is one line, whatever names stand in it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class _Lenient:
    """A text stream that drops what cannot be written: a report nobody can see must not end the run it is about."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # What is buffered would be written again, and fail again, when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Inside the block standard output and standard error may be closed, on a full disk or read by nobody."""
    # Files opened later would otherwise get the numbers of the closed streams, and what C code prints with them.
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(lowest)
    with contextlib.ExitStack() as stack:
        streams: list[Any] = [sys.stdout, sys.stderr]
        for i, stream in enumerate(streams):
            if stream is None:
                streams[i] = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        out, err = (_Lenient(stream) for stream in streams)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        yield
        out.flush()
        err.flush()
