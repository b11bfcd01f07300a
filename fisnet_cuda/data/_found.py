"""What every form of data is brought to before it becomes a `Listing`: entries whose labels are still names."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ._paths import first_few, near, plain, shown
from .samples import ArrayItem


@dataclass
class Entry:
    """A `Sample` whose label is still the name of its class. ``folders`` and ``split`` also help to find its mask."""

    name: str
    image: Path | ArrayItem
    mask: Path | ArrayItem | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    folders: tuple[str, ...] = ()


@dataclass
class Found:
    """What lies in one source."""

    entries: list[Entry]
    root: Path
    form: str
    classes: tuple[str, ...] | None = None  # where the source itself names them
    masks_without_image: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass
class MaskFile:
    """A file that is a mask; ``folders`` and ``split`` as those of `Entry`, empty where the tree of masks is flatter."""

    path: Path
    name: str
    folders: tuple[str, ...] = ()
    split: str | None = None


def match(entries: Sequence[Entry], masks: Sequence[MaskFile], suffix: str) -> list[str]:
    """Give each entry the mask of its name, and return the masks that no entry took.

    Names are compared whole first ("x.png" with "x.png"), then without their extension, then with ``suffix`` cut off the mask's.
    Folders are compared as far as the mask has any: masks may all lie in one folder where that is unambiguous.

    Raises:
        InputError: a mask fits several images, or several masks fit one image equally well.
    """
    by_file = {id(mask): mask for mask in masks}
    tables: dict[Hashable, dict[Hashable, list[Entry]]] = {}
    stems = (_whole, _stem, lambda name: _cut(_stem(name), suffix))
    for step, mask_key in enumerate(stems):
        image_key = _whole if step == 0 else _stem
        taken: dict[int, MaskFile] = {}
        for mask in list(by_file.values()):
            key = mask_key(mask.path.name)
            if key is None:
                continue
            table = _table(tables, entries, image_key, bool(mask.split), bool(mask.folders))
            fit = table.get((mask.split, mask.folders, key), [])
            free = [entry for entry in fit if entry.mask is None or id(entry) in taken]
            if len(free) > 1:
                raise InputError(
                    f"mask {shown(mask.name)} fits several images ({first_few([e.name for e in free])}): lay masks out in folders "
                    f"like those of the images, or list the pairs in a CSV"
                )
            if free:
                if id(free[0]) in taken:
                    both = first_few([taken[id(free[0])].name, mask.name])
                    raise InputError(f"image {shown(free[0].name)} has several masks ({both}): keep one, or list the pairs in a CSV")
                free[0].mask = mask.path
                taken[id(free[0])] = mask
                del by_file[id(mask)]
    return [shown(mask.name) for mask in by_file.values()]


def _table(
    tables: dict[Hashable, dict[Hashable, list[Entry]]],
    entries: Sequence[Entry],
    key: Callable[[str], str],
    by_split: bool,
    by_folder: bool,
) -> dict[Hashable, list[Entry]]:
    kind = (key, by_split, by_folder)
    if kind not in tables:
        table = tables[kind] = defaultdict(list)
        for entry in entries:
            if isinstance(entry.image, Path):
                name = key(entry.image.name)
                folders = tuple(map(plain, entry.folders)) if by_folder else ()
                table[entry.split if by_split else None, folders, name].append(entry)
    return tables[kind]


def _whole(name: str) -> str:
    return plain(name)


def _stem(name: str) -> str:
    return plain(os.path.splitext(name)[0])


def _cut(stem: str, suffix: str) -> str | None:
    suffix = plain(suffix)
    return stem[: -len(suffix)] if suffix and stem.endswith(suffix) and stem != suffix else None


def nothing_matched(found: Sequence[Entry], masks: Sequence[MaskFile], folder: Path) -> InputError:
    """The error where there are images and masks and not one pair."""
    wanted = next(entry for entry in found if isinstance(entry.image, Path))
    hint = near("/".join((*wanted.folders, wanted.image.name)), ["/".join((*m.folders, m.path.name)) for m in masks])
    return InputError(
        f"none of the {len(masks):,} masks in {shown(folder)} has the name of an image: "
        f"image {shown(wanted.name)}, first mask {shown(masks[0].name)}{hint}"
    )
