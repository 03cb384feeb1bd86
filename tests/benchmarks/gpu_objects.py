"""What is compiled travels in an archive, and only what fits is taken out of it; what is proven stands in a journal."""

from __future__ import annotations

import json
import lzma
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from ddst.benchmarks.gpu import journal, objects
from ddst.benchmarks.gpu.journal import SOURCES, Journal
from ddst.benchmarks.gpu.objects import UnfitError, architecture_of, described, pack, unpack
from ddst.benchmarks.gpu.run import PHASES
from helpers.dry_run import CUOBJDUMP, cubin

FACTS = {"sources": "abc", "processor": "x86_64", "architecture": "sm_90a"}
KEY = "K3Y"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of two libraries and one kernel."""
    program = tmp_path / "bin" / "cuobjdump"
    program.parent.mkdir()
    program.write_text(CUOBJDUMP)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    libraries, kernel = tmp_path / "lib", tmp_path / "triton" / KEY
    libraries.mkdir()
    kernel.mkdir(parents=True)
    (libraries / "libddst.so").write_bytes(b"cpu")
    (libraries / "libddst_cuda.so").write_bytes(cubin("sm_90a"))
    paths = {name: str(kernel / name) for name in ("f.json", "f.cubin", "f.ttir")}
    for name, content in {"f.json": b"{}", "f.cubin": cubin("sm_90a", note=False), "f.ttir": b"text"}.items():
        (kernel / name).write_bytes(content)
    (kernel / "__grp__f.json").write_text(json.dumps({"child_paths": paths}))
    pack(tmp_path / "objects.tar.xz", libraries, tmp_path / "triton", FACTS)
    return tmp_path / "objects.tar.xz"


def test_objects_come_back_where_they_are_looked_for(packed: Path, tmp_path: Path) -> None:
    libraries, triton = tmp_path / "there" / "lib", tmp_path / "there" / "triton"
    libraries.mkdir(parents=True)
    (libraries / "old.so").write_bytes(b"of another Python")
    assert unpack(packed, libraries, triton, FACTS) == {"libraries": 2, "kernels": 1}
    assert sorted(p.name for p in libraries.iterdir()) == ["libddst.so", "libddst_cuda.so"]
    assert sorted(p.name for p in (triton / KEY).iterdir()) == ["__grp__f.json", "f.cubin", "f.json"]
    group = json.loads((triton / KEY / "__grp__f.json").read_text())["child_paths"]
    assert group == {name: str(triton / KEY / name) for name in ("f.json", "f.cubin")}
    assert b"libddst" not in packed.read_bytes()  # it is compressed


def test_machine_code_says_what_it_is_for() -> None:
    assert [described(cubin(a, note)) for a in ("sm_90", "sm_90a") for note in (True, False)] == [
        "sm_90", "sm_90", "sm_90a", "sm_90a",
    ]  # fmt: skip
    assert architecture_of((9, 0)) == "sm_90a" and architecture_of((8, 0)) == "sm_80"
    for nothing in (b"", b"\x7fELF" + bytes(80)):
        with pytest.raises(UnfitError, match="should be a GPU's machine code is none"):
            described(nothing)


def altered(archive: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with other files, which its manifest does not know of."""
    with tarfile.open(archive) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    change(files)
    with tarfile.open(archive, "w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return archive


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda files: files.update({"lib/libddst.so": b"other"}), "not those that its manifest names"),
        (lambda files: files.pop("lib/libddst.so"), "not those that its manifest names"),
        (lambda files: files.update({"../escaped.so": b""}), "no file of such an archive"),
        (lambda files: files.update({"manifest.json": b"[]"}), "cannot be read"),
        (lambda files: files.pop("manifest.json"), "cannot be read"),
    ],
)
def test_a_changed_archive_is_not_used(packed: Path, tmp_path: Path, change: Any, why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        unpack(altered(packed, change), tmp_path / "there", tmp_path / "too", FACTS)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("fact, other", [("sources", "xyz"), ("processor", "aarch64"), ("architecture", "sm_80")])
def test_objects_of_something_else_are_not_used(packed: Path, tmp_path: Path, fact: str, other: str) -> None:
    with pytest.raises(UnfitError, match=f"its {fact} is .*, here it is '{other}'"):
        unpack(packed, tmp_path / "there", tmp_path / "too", {**FACTS, fact: other})


def test_machine_code_for_another_gpu_is_not_used(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries, triton = tmp_path / "lib", tmp_path / "triton"

    def refused(why: str) -> None:
        pack(packed, libraries, triton, FACTS)
        with pytest.raises(UnfitError, match=why):
            unpack(packed, tmp_path / "there", tmp_path / "too", FACTS)

    (triton / KEY / "f.cubin").write_bytes(cubin("sm_90"))
    refused("f.cubin says that it is for sm_90, this GPU is sm_90a")
    (triton / KEY / "f.cubin").unlink()
    (libraries / "libddst_cuda.so").write_bytes(cubin("sm_100a"))
    refused("libddst_cuda.so says that it is for sm_100a")
    (tmp_path / "bin" / "cuobjdump").write_text("#!/bin/sh\n")
    refused("libddst_cuda.so holds no machine code")
    monkeypatch.setattr(objects, "cuobjdump", lambda: None)
    refused("no cuobjdump is here")
    (libraries / "libddst_cuda.so").unlink()
    (libraries / "libddst.so").unlink()
    refused("it holds no lib/libddst.so")


def test_no_archive_and_a_damaged_one_are_said(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="there is none"):
        unpack(tmp_path / "nothing.tar.xz", tmp_path, tmp_path, FACTS)
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"text", lzma.compress(b"no tar")):
        packed.write_bytes(damaged)
        with pytest.raises(UnfitError, match="cannot be read"):
            unpack(packed, tmp_path, tmp_path, FACTS)


def test_the_sources_of_an_archive_are_those_that_are_compiled(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    before = objects.facts_of(tmp_path, "sm_90a")
    (tmp_path / "csrc" / "a.cu").write_text("one")
    after = objects.facts_of(tmp_path, "sm_90a")
    assert before["sources"] != after["sources"] and before["processor"] == after["processor"]
    (tmp_path / "setup.py").write_text("")
    assert objects.facts_of(tmp_path, "sm_90a")["sources"] != after["sources"]


# --- the journal ------------------------------------------------------------------------------------------------------


def test_what_was_right_holds_until_its_sources_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, told = tmp_path / "journal.jsonl", []
    first = Journal(file, {"torch": "2.11"}, "today, abc")
    part: dict[str, Any] = {"rows": []}
    progress = first.of("kernels", told.append)
    assert progress.earlier("a") is None
    progress.keep("a", [{"ms": 1.23456}], part)
    progress.keep("b", [{"ms": 2.0}], part, right=False)
    first.of("host", told.append).keep("host", {"seconds": {}}, part)
    assert told == [part] * 3
    with file.open("a") as lines:
        lines.write('{"part": "kernels", "ke')  # cut off
    again = Journal(file, {"torch": "2.11"}, "later")
    assert again.earlier("kernels", "a") == [{"ms": 1.235, "earlier": "today, abc"}]
    assert again.earlier("host", "host") == {"seconds": {}, "earlier": "today, abc"}
    assert again.earlier("kernels", "b") is None
    again.add("kernels", "a", [{"ms": 3.0}], False)
    assert Journal(file, {"torch": "2.11"}, "").earlier("kernels", "a") is None, "the newest word counts"
    again.add("kernels", "a", [{"ms": 3.0}], True)
    assert Journal(file, {"torch": "2.11"}, "").earlier("kernels", "a") == [{"ms": 3.0, "earlier": "later"}]
    assert Journal(file, {"torch": "2.13"}, "").earlier("kernels", "a") is None
    assert Journal(file, {"torch": "2.11"}, "", anew=True).earlier("kernels", "a") is None
    file.write_text(file.read_text() + "3\n[]\n{}\n")
    assert Journal(file, {"torch": "2.11"}, "").earlier("kernels", "a") is not None


def test_digests_are_of_all_that_results_come_from(tmp_path: Path) -> None:
    assert set(SOURCES) == set(PHASES)
    for name in ("csrc/cuda/device", "kernels", "ddst/ops", "benchmarks/gpu"):
        (tmp_path / name).mkdir(parents=True)

    def digests() -> dict[str, str]:
        return {part: journal.digest_of(part, {}, tmp_path) for part in PHASES}

    before = digests()
    (tmp_path / "ddst" / "ops" / "conv2d.py").write_text("changed")
    changed = {part for part, digest in digests().items() if digest != before[part]}
    assert changed == {"correctness", "kernels", "iteration", "host", "train"}
    for patterns in SOURCES.values():
        assert all(list(journal.ROOT.glob(p)) for p in patterns if p != "kernels/tables"), "names of files that exist"
