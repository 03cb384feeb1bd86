"""Which files of a folder count as images, and what was left out and why."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

#: Endings of the files that are read, in any case. What they hold is found from their contents.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
HIDDEN, UNREADABLE, AGAIN = "hidden", "unreadable", "linked to a folder read already or above"
BROKEN, SPECIAL = "broken link", "no regular file"


@dataclass
class ImageFiles:
    """What :func:`find_images` found.

    Attributes:
        files: the images, in the order of their paths.
        left_out: reason -> how many files or folders; for files of other kinds the reason is their ending.
        examples: reason -> the first of them, relative to the folder.
        others: files of other kinds, relative to the folder.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, name: str, why: str = "") -> None:
        """Counts something that is not read."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, shown(name) + (f": {why}" if why else ""))

    def leave_out_other(self, name: str) -> None:
        """Counts a file of another kind, by its ending."""
        self.leave_out(os.path.splitext(name)[1].lower() or "without an ending", name)
        self.others.append(name)

    def put_back(self, name: str) -> None:
        """Takes back a file that was left out by its ending and is read after all, for something else."""
        ending = os.path.splitext(name)[1].lower()
        self.left_out[ending] -= 1
        if not self.left_out[ending]:
            del self.left_out[ending], self.examples[ending]

    def __str__(self) -> str:
        """One line, empty where nothing was left out.

        >>> found = ImageFiles()
        >>> found.leave_out(HIDDEN, "._a.png")
        >>> print(found)
        1 hidden (._a.png)
        """
        return "; ".join(f"{n} {reason} ({self.examples[reason]})" for reason, n in self.left_out.most_common())


def find_images(folder: Path) -> ImageFiles:
    """Every regular file below ``folder`` that is not hidden and whose name ends like an image's, at every depth.

    * The ending is one of :data:`IMAGE_SUFFIXES`, in upper or lower case.
    * A file or folder whose name begins with a dot is hidden and left out, with all that is in it: macOS's ``._a.png``,
      ``.ipynb_checkpoints``. The name of ``folder`` itself does not count.
    * Links are followed, to files and to folders. Every folder is read once, by its own path where that lies below
      ``folder``; a link to a folder that is read already, or to one above ``folder``, is left out, so circles end.
    * What is left out is counted by reason, folders that cannot be read included.

    Raises:
        OSError: ``folder`` itself cannot be read.

    Cost: one system call a file.
    """
    found = ImageFiles()
    seen = {_identity(above.stat()) for above in folder.resolve(strict=True).parents}
    waiting, links = deque([""]), deque[str]()  # folders below this one, and links to folders, which come after them
    while waiting or links:
        inside = waiting.popleft() if waiting else links.popleft()
        try:
            identity = _identity((folder / inside).stat())
            if identity in seen:
                found.leave_out(AGAIN, inside)
                continue
            seen.add(identity)
            with os.scandir(folder / inside) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            found.leave_out(UNREADABLE, inside, error.strerror or str(error))
            continue
        for entry in entries:
            name = os.path.join(inside, entry.name)
            if entry.name.startswith("."):
                found.leave_out(HIDDEN, name)
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:  # a link to nothing or to itself, or a folder that may be listed and not entered
                found.leave_out(BROKEN if entry.is_symlink() else UNREADABLE, name, error.strerror or str(error))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else waiting).append(name)
            elif not stat.S_ISREG(mode):
                found.leave_out(SPECIAL, name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                found.files.append(folder / name)
            else:
                found.leave_out_other(name)
    found.files.sort()
    return found


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def shown(name: object) -> str:
    r"""A path as one printable line: line breaks and bytes that are no text are escaped.

    >>> shown("a\nb.png")
    'a\\nb.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
