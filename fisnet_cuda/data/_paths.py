"""File names: which files are images, what folders are called, and how names are shown in one line."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from ..errors import InputError

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in "png jpg jpeg jpe jfif bmp dib tif tiff gif webp pgm ppm pbm pnm jp2 j2k npy".split()  # noqa: SIM905
)
IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img"))
MASK_FOLDERS = frozenset(("masks", "mask", "segmentations", "segmentation", "segs", "seg", "annotations"))
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_CLUTTER = frozenset(("__macosx", "thumbs.db", "desktop.ini"))
_MOST_NAMES = 20_000  # beyond this, looking for similar names takes seconds and the error message can do without


class File(NamedTuple):
    """A file below a folder: its path, and the folders between the two."""

    path: Path
    folders: tuple[str, ...]


def shown(name: object) -> str:
    """A name as one printable line: control characters and bytes that are no UTF-8 are escaped.

    >>> shown("a\\nb"), shown("r\\u00f6ntgen.png"), shown("\\udcff.png")
    ('a\\\\x0ab', 'röntgen.png', '\\\\xff.png')
    """
    text = name.as_posix() if isinstance(name, PurePath) else str(name)
    if text.isprintable():
        return text
    text = os.fsencode(text).decode("utf-8", "backslashreplace") if _encodable(text) else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that no file name can hold
        return False
    return True


def near(name: str, options: Iterable[str]) -> str:
    """A question to end an error message with, "; did you mean 'b'?", or "" where nothing is similar."""
    options = [option for _, option in zip(range(_MOST_NAMES), options)]
    folded = {option.casefold(): option for option in reversed(options)}
    found = difflib.get_close_matches(name.casefold(), folded, 1, 0.6)
    return f"; did you mean {shown(folded[found[0]])!r}?" if found else ""


def names_in(folder: Path) -> list[str]:
    """Names of what the folder holds, [] where it cannot be read; for suggestions."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def first_few(names: Sequence[object], most: int = 3) -> str:
    """ "a, b, c and 4 more"."""
    text = ", ".join(shown(name) for name in names[:most])
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")


def missing(path: Path, what: str = "path") -> InputError:
    """The error for a path that does not exist; names the part that is missing and what is similar."""
    there = path
    while not os.path.lexists(there) and there.parent != there:
        there, last = there.parent, there.name
    if there == path:
        return InputError(f"{what} {shown(path)} is a link to nothing")
    if not there.is_dir():
        return InputError(f"{what} {shown(path)} does not exist: {shown(there)} is a file")
    held = "" if there / last == path else f" ({shown(there)} holds no {shown(last)!r})"
    return InputError(f"{what} {shown(path)} does not exist{held}{near(last, names_in(there))}")


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def plain(name: str) -> str:
    """What names are compared by: macOS writes "é" as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def natural(text: str) -> tuple:
    """Sorts "2" before "10", and "class2" before "class10"."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


def walk(root: Path, leave_out: Path | None = None) -> tuple[list[File], list[str]]:
    """All image files below ``root`` in a fixed order, and the other files with the reason why they are left out.

    Links to folders are followed, each folder once. ``leave_out``: a folder that is not looked into.
    """
    files: list[File] = []
    ignored: list[str] = []
    seen: set[tuple[int, int]] = set()

    def look(folder: Path, folders: tuple[str, ...]) -> None:
        try:
            status = folder.stat()
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"cannot read the folder {shown(folder)}: {error.strerror}") from None
        if (status.st_dev, status.st_ino) in seen:
            ignored.append(f"{shown('/'.join(folders))}: a link to a folder that is read already")
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = "/".join((*folders, entry.name))
            hidden = entry.name.startswith(".") or entry.name.lower() in _CLUTTER
            if entry.is_dir():
                path = folder / entry.name
                if hidden:
                    ignored.append(f"{shown(name)}: hidden")
                elif leave_out is None or not same(path, leave_out):
                    look(path, (*folders, entry.name))
            elif hidden:
                ignored.append(f"{shown(name)}: hidden")
            elif not is_image(entry.name):
                suffix = os.path.splitext(entry.name)[1]
                ignored.append(f"{shown(name)}: not an image ({shown(suffix) if suffix else 'no suffix'})")
            elif not entry.is_file():
                ignored.append(f"{shown(name)}: {'a link to nothing' if entry.is_symlink() else 'not a file'}")
            else:
                files.append(File(folder / entry.name, folders))

    look(root, ())
    return files, ignored


def same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
