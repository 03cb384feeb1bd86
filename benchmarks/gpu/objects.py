"""Compiled objects that travel: one archive that a run leaves, and from which a later one starts in seconds.

It holds ddst's libraries and what Triton has compiled. Nothing is taken out of it unchecked: its manifest must name
these sources, this processor and this GPU's architecture, every file must have the digest that the manifest gives, and
all machine code must say itself that it is for that architecture. Triton finds its kernels by a digest of their source,
its own version and its options, so that what does not fit there is never used.

Imports nothing of ddst, whose libraries may not be there yet. An archive holds programs: carry your own only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

FORMAT, MANIFEST = 1, "manifest.json"
MADE_OF = ("csrc", "cmake", "CMakeLists.txt", "setup.py")
NAMES = re.compile(r"(lib|triton/\w+)/\w[\w.+-]*")
#: Of Triton's files: machine code, what is known of it, and the launchers; not the code in between.
OF_TRITON = (".cubin", ".json", ".so")
EM_CUDA, FEATURES = 190, 0x800  # in an ELF header: the machine; up to CUDA 12 the flag of the "a" in sm_90a


class UnfitError(Exception):
    """An archive that is not used; the message says why."""


def architecture_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability; from 9.0 on with the instructions of that very architecture.

    >>> architecture_of((9, 0)), architecture_of((8, 6))
    ('sm_90a', 'sm_86')
    """
    return f"sm_{capability[0]}{capability[1]}{'a' if capability[0] >= 9 else ''}"


def facts_of(root: Path, architecture: str) -> dict[str, str]:
    """What an archive of this tree, for this processor and that GPU architecture, has in its manifest."""
    digest = hashlib.sha256()
    for place in MADE_OF:
        top = root / place
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file():
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {"sources": digest.hexdigest()[:16], "processor": platform.machine(), "architecture": architecture}


def pack(archive: Path, libraries: Path, triton: Path, facts: dict[str, str]) -> int:
    """Writes an archive, whole or not at all, and returns how many bytes it has.

    Args:
        libraries: the folder of ddst's libraries. triton: Triton's cache folder; it need not be there.
    """
    files = {f"lib/{file.name}": file.read_bytes() for file in sorted(libraries.glob("*.so"))}
    for folder in sorted(triton.glob("*/")):
        for file in sorted(folder.iterdir()):
            if file.name.endswith(OF_TRITON):
                files[f"triton/{folder.name}/{file.name}"] = file.read_bytes()
    manifest = {"format": FORMAT, **facts, "files": {name: _digest(content) for name, content in files.items()}}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".part-{archive.name}")
    try:
        with tarfile.open(partial, "w:xz", preset=1) as tar:
            for name, content in {MANIFEST: json.dumps(manifest, indent=1).encode(), **files}.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    return archive.stat().st_size


def unpack(archive: Path, libraries: Path, triton: Path, facts: dict[str, str]) -> dict[str, int]:
    """Puts the files of an archive where :func:`pack` found them; how many libraries and kernels that were.

    Raises:
        UnfitError: the archive is not there, damaged, or of something else; nothing has been written.
    """
    manifest, files = _read(archive)
    for name, expected in {"format": FORMAT, **facts}.items():
        if manifest.get(name) != expected:
            raise UnfitError(f"its {name} is {manifest.get(name)!r}, here it is {expected!r}")
    if "lib/libddst.so" not in files:
        raise UnfitError("it holds no lib/libddst.so")
    for name, content in files.items():
        codes = [content] if name.endswith(".cubin") else []
        if name.endswith("libddst_cuda.so"):
            codes = machine_code(content)
        for said in map(described, codes):
            if said != facts["architecture"]:
                raise UnfitError(f"{name} says that it is for {said}, this GPU is {facts['architecture']}")
    libraries.mkdir(parents=True, exist_ok=True)
    for old in libraries.glob("*.so"):
        old.unlink()  # a running process keeps the one it has mapped
    for name, content in files.items():
        place, _, rest = name.partition("/")
        target = (libraries if place == "lib" else triton) / rest
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_placed(content, target.parent) if target.name.startswith("__grp__") else content)
    return {"libraries": sum(n.startswith("lib/") for n in files), "kernels": sum(n.endswith(".cubin") for n in files)}


def described(cubin: bytes) -> str:
    """The architecture that machine code says it is for, such as "sm_90a".

    From CUDA 13 on the header's flags are the same for sm_90 and sm_90a, but the compiler's note holds its ``-arch``;
    before, the flags tell them apart and there is no note.

    Raises:
        UnfitError: no machine code for a GPU.
    """
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or struct.unpack_from("<H", cubin, 18) != (EM_CUDA,):
        raise UnfitError("what should be a GPU's machine code is none")
    told = re.search(rb"-arch (sm_\d+[a-z]?)\b", cubin)
    if told:
        return told[1].decode()
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return f"sm_{flags & 0xFF}{'a' if flags & FEATURES else ''}"


def machine_code(library: bytes) -> list[bytes]:
    """Every piece of a GPU's machine code in a library, in which it lies compressed.

    Raises:
        UnfitError: there is no cuobjdump, or it finds none.
    """
    program = cuobjdump()
    if program is None:
        raise UnfitError("no cuobjdump is here to look into libddst_cuda.so with")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "library.so").write_bytes(library)
        subprocess.run([program, "-xelf", "all", "library.so"], cwd=folder, capture_output=True, timeout=60)
        found = [file.read_bytes() for file in sorted(Path(folder).glob("*.cubin"))]
    if not found:
        raise UnfitError("libddst_cuda.so holds no machine code for a GPU")
    return found


def cuobjdump() -> str | None:
    """The program, from PATH or out of Triton's package."""
    spec = importlib.util.find_spec("triton")
    inside = [Path(place, "backends", "nvidia", "bin") for place in (spec and spec.submodule_search_locations) or []]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, inside)]))


def _read(archive: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """(the manifest, the other files), whole as the manifest says."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is None or not (member.name == MANIFEST or NAMES.fullmatch(member.name)):
                    raise UnfitError(f"it holds {member.name!r}, which is no file of such an archive")
                files[member.name] = content.read()
        manifest = json.loads(files.pop(MANIFEST))
        digests = manifest["files"]
    except FileNotFoundError as error:
        raise UnfitError("there is none") from error
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UnfitError(f"it cannot be read ({type(error).__name__}: {error})") from error
    if digests != {name: _digest(content) for name, content in files.items()}:
        raise UnfitError("its files are not those that its manifest names")
    return manifest, files


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _placed(group: bytes, folder: Path) -> bytes:
    """A list of Triton's, which names a kernel's files by full paths, for another folder."""
    paths = json.loads(group)["child_paths"]
    kept = {name: str(folder / name) for name in paths if name.endswith(OF_TRITON)}
    return json.dumps({"child_paths": kept}).encode()
