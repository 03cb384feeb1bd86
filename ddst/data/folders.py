"""Image files in folders and in a zip: their pixels, and the classes that folders, ``dataset.json`` or a list give."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import re
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from ddst.data.cifar import cifar_of
from ddst.data.files import HIDDEN, IMAGE_SUFFIXES, ImageFiles, find_images, shown
from ddst.data.image_set import DataError
from ddst.data.pixels import FORMATS, read_pixels
from ddst.data.source import Pixels, Source, as_labels
from ddst.data.stl10 import STL_10

#: Where StyleGAN's data sets keep their labels, in a folder or a zip.
STATED = "dataset.json"
_LARGEST_MEMBER = 2**30  # bytes of an image unpacked from a zip
_WNIDS, _ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
#: What each line of TinyImageNet's lists is.
_LISTS = {_WNIDS: "a wnid like n01443537", _ANNOTATIONS: "the name of an image, a tab and its wnid"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_WHOLE_IMAGE = f"expected a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_STATED_FORM = '{"labels": [["00000/img00000000.png", 0], ...]} or {"labels": null}'


def image_folder(path: Path, held_out: bool) -> Source:
    """Every image file under `path`, in the order of their paths.

    Labels are, by what lies there:

    * those of ``dataset.json``, as in StyleGAN's data sets: ``{"labels": [["00000/img00000000.png", 0], ...]}``;
      its classes are those that occur, from 0 on in the order of the file's numbers;
    * where every image lies in a folder in `path`, and those are two or more: the number of the folder in the order of
      their names, as in torchvision's ``ImageFolder``;
    * else none.

    Raises:
        DataError: the folder cannot be read, holds no image, or, without ``dataset.json``, a published data set or
            splits (``train`` beside ``val``) at any depth; ``dataset.json`` does not fit; when it is read: an image
            cannot be.
    """
    try:
        found = find_images(path)
    except OSError as error:
        raise DataError(f"data folder {shown(path)} cannot be read: {error.strerror or error}") from error
    where, stated = f"data folder {shown(path)}", path / STATED
    listed = stated.is_file()
    if not listed:
        _no_data_sets(found, where, "give {}")
    _no_held_out(held_out, path)
    if not found.files:
        raise _no_images(where, found)
    names = [file.relative_to(path).as_posix() for file in found.files]
    labels, classes, made_of = None, "without labels", found.files
    if listed:
        found.put_back(STATED)
        labels, classes = _stated(_bytes_of(stated), names, shown(stated))
        made_of = [*made_of, stated]
    else:
        _no_splits(names, where, "give one of them")
        tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
        folders = sorted({str(top) for top in tops}) if None not in tops else []
        if len(folders) > 1:
            labels = as_labels([folders.index(str(top)) for top in tops])
            classes = f"{len(folders)} class folders, {shown(folders[0])} to {shown(folders[-1])}"
        elif folders:
            classes = f"without labels (all in one folder, {shown(folders[0])}, which makes no classes)"
    return Source(f"folder of image files, {classes}", made_of, _reader(found.files, labels), found)


def image_zip(path: Path, held_out: bool) -> Source:
    """Every image in a zip, in the order of their names, with the labels of its ``dataset.json`` where it has one.

    Which names count is as in folders: :func:`ddst.data.files.find_images`. Nothing is unpacked to the disk. A zip with
    TinyImageNet's lists in it, or in its one folder, is that data set as it is published: :func:`tiny_imagenet`.

    Raises:
        DataError: it is no zip, holds no image, or, without ``dataset.json``, another published data set or splits
            (``train`` beside ``val``) at any depth; ``dataset.json`` does not fit; when it is read: an image cannot be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(held := {info.filename for info in archive.infolist() if not info.is_dir()})
            for root in sorted({"", *(name.split("/", 1)[0] + "/" for name in names if "/" in name)}):
                if any(f"{root}{name}" in held for name in _LISTS):
                    return _tiny_imagenet(_Zip(path, archive, names, root), held_out)
            stated = archive.read(STATED) if STATED in held else None
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # RuntimeError: a password
        raise DataError(f"cannot read {shown(path)} as a zip of images: {shown(error)}") from error
    kept, found = _sorted_out(name for name in names if name != STATED)
    if stated is None:
        _no_data_sets(found, f"zip {shown(path)}", "unpack it and give {}")
    _no_held_out(held_out, path)
    if not kept:
        raise _no_images(f"data {shown(path)}", found)
    labels, classes = None, "without labels"
    if stated is not None:
        labels, classes = _stated(stated, kept, f"{STATED} in {shown(path)}")
    else:
        _no_splits(kept, f"zip {shown(path)}", "unpack it and give one of them")
    return Source(f"zip of image files, {classes}", [path], _zip_reader(path, kept, labels), found)


def _sorted_out(names: Iterable[str]) -> tuple[list[str], ImageFiles]:
    """The images among names in a zip, and what was left out, as by :func:`find_images` of files."""
    images, found = [], ImageFiles()
    for name in names:
        ending = PurePosixPath(name).suffix.lower()
        if any(part.startswith(".") for part in name.split("/")):
            found.leave_out(HIDDEN, name)
        elif ending in IMAGE_SUFFIXES:
            images.append(name)
        else:
            found.leave_out_other(name)
    return images, found


def tiny_imagenet(path: Path, held_out: bool) -> Source | None:
    """The TinyImageNet that lies in a folder, by its ``wnids.txt`` or its list of ``val``; None where none does.

    Read are ``train/<wnid>/images``; held out are ``val/images``, with the labels of ``val/val_annotations.txt``. A
    label is the number of the wnid in sorted order, as ``ImageFolder`` gives it. Grey files become grey RGB.

    Raises:
        DataError: a folder or list is missing or does not fit; when it is read: an image cannot be.
    """
    there = any((path / name).is_file() for name in _LISTS)
    return _tiny_imagenet(_Folder(path), held_out) if there else None


@dataclass(frozen=True)
class _Folder:
    """Where TinyImageNet lies: in a folder."""

    path: Path

    def shown(self, name: str) -> str:
        return shown(self.path / name)

    def text(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def images(self, inside: str) -> ImageFiles:
        return find_images(self.path / inside)

    def source(self, took: str, lists: Sequence[str], found: ImageFiles, labels: Tensor) -> Source:
        files = [*(self.path / name for name in lists), *found.files]
        return Source(took, files, _reader(found.files, labels), found)


@dataclass(frozen=True)
class _Zip:
    """Where TinyImageNet lies: in a zip, below `root`; `names` are sorted."""

    path: Path
    archive: zipfile.ZipFile
    names: Sequence[str]
    root: str

    def shown(self, name: str) -> str:
        return f"{shown(self.root + name)} in {shown(self.path)}"

    def text(self, name: str) -> bytes:
        if self.root + name not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self.archive.read(self.root + name)

    def images(self, inside: str) -> ImageFiles:
        # "0" is the character after "/".
        start, end = (bisect_left(self.names, f"{self.root}{inside}{character}") for character in "/0")
        if start == end:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        names, found = _sorted_out(self.names[start:end])
        found.files = [Path(name) for name in names]
        return found

    def source(self, took: str, lists: Sequence[str], found: ImageFiles, labels: Tensor) -> Source:
        names = [str(file) for file in found.files]
        return Source(f"{took}, in a zip", [self.path], _zip_reader(self.path, names, labels), found)


def _tiny_imagenet(place: _Folder | _Zip, held_out: bool) -> Source:
    wnids_file = place.shown(_WNIDS)
    wnids = sorted(set(_lines(place, _WNIDS)))
    for wnid in wnids:
        if not re.fullmatch(r"\w+", wnid):  # It becomes part of a path.
            raise DataError(f"{wnids_file} is damaged: expected a line like n01443537 each, got {shown(wnid)}")
    if not wnids:
        raise DataError(f"{wnids_file} is damaged: expected a line like n01443537 for each class, got none")
    found = ImageFiles()
    lists = [_WNIDS]
    if held_out:
        classes = _annotated(place, {wnid: i for i, wnid in enumerate(wnids)})
        _add_images(found, place, "val/images")
        unlisted = next((file for file in found.files if file.name not in classes), None)
        if unlisted is not None:
            raise DataError(f"{place.shown(_ANNOTATIONS)} is damaged: it has no line for {shown(unlisted.name)}")
        if len(found.files) != len(classes):
            there = {file.name for file in found.files}
            missing = next(name for name in classes if name not in there)
            raise DataError(f"data {shown(place.path)} is TinyImageNet, without val/images/{shown(missing)}")
        labels = as_labels([classes[file.name] for file in found.files])
        lists.append(_ANNOTATIONS)
    else:
        counts = [_add_images(found, place, f"train/{wnid}/images") for wnid in wnids]
        labels = as_labels([i for i, count in enumerate(counts) for _ in range(count)])
    return place.source(f"TinyImageNet {'val' if held_out else 'train'}, {len(wnids)} classes", lists, found, labels)


def _add_images(found: ImageFiles, place: _Folder | _Zip, folder: str) -> int:
    """Adds the images of a folder of TinyImageNet, which must be there; how many there are."""
    try:
        inside = place.images(folder)
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(
            f"TinyImageNet cannot be read: {place.shown(folder)}: {why}; expected image files there"
        ) from error
    if not inside.files:
        raise _no_images(f"folder {place.shown(folder)} of TinyImageNet", inside)
    found.files += inside.files
    for reason, count in inside.left_out.items():
        found.left_out[reason] += count
        found.examples.setdefault(reason, inside.examples[reason])
    return len(inside.files)


def _annotated(place: _Folder | _Zip, classes: dict[str, int]) -> dict[str, int]:
    """Name of an image -> its class; the lines are name, wnid and four numbers, separated by tabs."""
    labels: dict[str, int] = {}
    for number, line in enumerate(_lines(place, _ANNOTATIONS), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in classes or name in labels:
            raise DataError(
                f"{place.shown(_ANNOTATIONS)} is damaged: line {number}: expected {_LISTS[_ANNOTATIONS]}, "
                f"got {shown(line[:80])}"
            )
        labels[name] = classes[wnid]
    return labels


def _lines(place: _Folder | _Zip, name: str) -> list[str]:
    try:
        text = place.text(name).decode(errors="replace")
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(
            f"TinyImageNet cannot be read: {place.shown(name)}: {why}; expected lines there, each {_LISTS[name]}"
        ) from error
    return [line for line in text.splitlines() if line.strip()]


def _no_data_sets(found: ImageFiles, where: str, advice: str) -> None:
    """Raises DataError where published data sets lie deeper: as image files they would be none, or of no class."""
    inside, folders = {}, dict[str, set[str]]()
    for name in found.others:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
        for listing in _LISTS:
            if f"/{name}".endswith(f"/{listing}"):
                inside[name.removesuffix(listing).rstrip("/")] = "TinyImageNet"
    for folder, names in folders.items():
        form = cifar_of(names) or ("" if names.isdisjoint(STL_10) else "STL-10")
        if form:
            inside[folder] = form
    if inside:
        places = [f"{form} in {shown(folder)}" if folder else form for folder, form in sorted(inside.items())]
        what = "that folder" if len(places) == 1 else "one of these folders"
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        raise DataError(f"{where} holds {', '.join(places[:3])}{more}: {advice.format(what)}")


def _no_splits(names: Iterable[str], where: str, advice: str) -> None:
    """Raises DataError where images lie in folders for training and, beside these, for tests, at any depth."""
    folders: set[PurePosixPath] = set()
    for inside in {name.rpartition("/")[0] for name in names}:
        folders |= {PurePosixPath(inside), *PurePosixPath(inside).parents}
    splits: dict[PurePosixPath, list[str]] = {}
    for folder in sorted(folders):
        if folder.name.lower() in _SPLITS:
            splits.setdefault(folder.parent, []).append(shown(folder))
    several = next((found for found in splits.values() if len(found) > 1), None)
    if several is not None:
        raise DataError(f"{where} holds the splits {', '.join(several)}, which are no classes: {advice}")


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {shown(file)}: {error.strerror or error}") from error


def _stated(text: bytes, names: Sequence[str], where: str) -> tuple[Tensor | None, str]:
    """The labels that a ``dataset.json`` states for these images, and what is said of them."""
    try:
        stated: Any = json.loads(text)
        pairs = stated["labels"]
        if pairs is None:
            return None, f"without labels ({STATED} says null)"
        classes = dict(pairs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{where} is damaged: expected {_STATED_FORM}") from error
    for name in names:
        label = classes.get(name)
        if type(label) is not int or not 0 <= label < 2**31:
            got = "none" if label is None else shown(repr(label)[:80])
            raise DataError(f"{where} must give {shown(name)} a class, a whole number from 0 on, got {got}")
    theirs, labels = torch.unique(as_labels([classes[name] for name in names]), return_inverse=True)
    numbers = ", ".join(map(str, theirs.tolist()))
    renumbered = "" if len(theirs) == theirs[-1] + 1 else f" (its {numbers[:80]} from 0 on)"
    return labels, f"{len(theirs)} classes by {STATED}{renumbered}"


def _reader(files: Sequence[Path], labels: Tensor | None) -> Callable[[int], Pixels]:
    def read(resolution: int) -> Pixels:
        return _pixels(((shown(file), functools.partial(Path, file)) for file in files), len(files), labels, resolution)

    return read


def _zip_reader(path: Path, names: Sequence[str], labels: Tensor | None) -> Callable[[int], Pixels]:
    def read(resolution: int) -> Pixels:
        with zipfile.ZipFile(path) as archive:
            members = ((f"{shown(name)} in {shown(path)}", functools.partial(_member, archive, name)) for name in names)
            return _pixels(members, len(names), labels, resolution)

    return read


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A file of a zip, unpacked and its checksum compared."""
    size = archive.getinfo(name).file_size
    if size > _LARGEST_MEMBER:
        raise ValueError(f"unpacked it has {size:,} bytes, expected at most {_LARGEST_MEMBER:,}")
    return io.BytesIO(archive.read(name))


def _pixels(
    images: Iterable[tuple[str, Callable[[], Path | IO[bytes]]]], count: int, labels: Tensor | None, resolution: int
) -> Pixels:
    stored = torch.empty(count, 3, resolution, resolution, dtype=torch.uint8)
    over_white = 0
    for i, (name, file) in enumerate(images):
        try:
            pixels, transparent = read_pixels(file(), resolution)
        except Exception as error:  # Pillow's decoders raise many types on damaged files, the same to the user.
            why = shown(" ".join(str(error).split()))
            if isinstance(error, UnidentifiedImageError):
                why = "cannot identify image file by its contents"
            # A ValueError says itself what was expected.
            expected = "" if type(error) is ValueError else f"; {_WHOLE_IMAGE}"
            raise DataError(f"cannot read image {name}: {why}{expected}") from error
        stored[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        over_white += transparent
    return Pixels(stored, labels, over_white)


def _no_held_out(held_out: bool, path: Path) -> None:
    if held_out:
        raise DataError(f"data {shown(path)} sets no images aside, only CIFAR, STL-10 and TinyImageNet do")


def _no_images(where: str, found: ImageFiles) -> DataError:
    there = f"; there is: {found}" if found.left_out else ""
    return DataError(f"{where} holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))}){there}")
