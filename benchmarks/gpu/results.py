"""What a run leaves behind, rewritten whole after every result, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddst.benchmarks.report import rounded

RESULTS, TABLE = "results.json", "table.md"
Part = dict[str, Any]
Draw = Callable[[dict[str, Part], Path], None]


class Results:
    """The parts that are done, and the files made of them.

    Args:
        folder: where the files go; made if it is not there.
        table: makes the Markdown table of the parts. pictures: name of a part -> (file name, what draws it of all
            parts, or raises ValueError where they hold nothing to draw).
        device: whose figures these are; every row says so.

    A part is a dict that may hold ``wrong``: a list of reasons, which make the run fail.
    """

    def __init__(
        self,
        folder: Path,
        table: Callable[[dict[str, Part]], str],
        pictures: Mapping[str, tuple[str, Draw]],
        device: str = "",
    ) -> None:
        self.folder, self.parts = folder, {}  # type: Path, dict[str, Part]
        self._device = device
        self._table, self._pictures = table, pictures
        self.drawing_failed: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, part: Part) -> None:
        """Adds a part that is done, and rewrites every file."""
        self.tell(name, part)
        if name in self._pictures:
            self._draw(*self._pictures[name])
            self._write()

    def tell(self, name: str, part: Part) -> None:
        """A part as far as it has come: rewrites the files, but draws nothing."""
        self.parts[name] = part
        for row in [part, *part.get("rows", []), *part.get("chosen", []), *part.get("groups", [])]:
            row.setdefault("device", self._device)
        self._write()

    def _write(self) -> None:
        everything = {**self.parts, **({"pictures": {"missing": self.drawing_failed}} if self.drawing_failed else {})}
        write_whole(self.folder / RESULTS, json.dumps(rounded(everything), indent=1, default=str) + "\n")
        write_whole(self.folder / TABLE, self._table(everything) + "\n")

    def _draw(self, file: str, draw: Draw) -> None:
        temporary = self.folder / f".part-{file}"
        try:
            draw(self.parts, temporary)
            os.replace(temporary, self.folder / file)
            self.drawing_failed.pop(file, None)
        except ValueError:
            pass  # nothing to draw
        except ImportError as error:
            self.drawing_failed[file] = f"not drawn: {error}"
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def wrong(self) -> list[str]:
        """Every wrong or unchecked result, named by its part."""
        return [f"{name}: {why}" for name, part in self.parts.items() for why in part.get("wrong", [])]


def in_a_line(error: Exception) -> str:
    """An error's kind and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".part-", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    path.chmod(0o644)
