"""A file that a command is told to write: what cannot be one is refused before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from ddst.train.options import ConfigError


def check_target(option: str, path: Path, *endings: str) -> None:
    """Raises ConfigError where no file could be written at `path`, or its name says that it is of another kind.

    Args:
        option: that names it. endings: what its name may end in, in any case; none: anything.
    """
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{option} must end in {' or '.join(endings)}, got {path}")
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path} is a folder, expected a file")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{option} {path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path} cannot be written: nothing may be made in {path.parent}")
