"""The program `ddst`: installed as the module `run_ddst`, outside the package, to be there before torch is.

Importing `ddst` imports torch, which takes seconds. Whatever catches Ctrl-C in them must stand outside the package.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


def main() -> int:
    """Import `ddst.cli` and run its `main`. Ctrl-C during the import ends the process with one line and code 130."""
    # An exception would not do: importing C code may swallow it or turn it into another one.
    caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if caught:
        signal.signal(signal.SIGINT, _leave)
    # torch reads it once, while it is imported: ddst.keep_freed_memory says what it mends.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        from ddst.cli import main as command
    finally:
        if caught:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _leave(number: int, frame: FrameType | None) -> Any:
    try:
        os.write(2, b"ddst: interrupted\n")
    finally:
        os._exit(128 + number)
