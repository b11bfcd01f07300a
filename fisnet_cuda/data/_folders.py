"""Folders of image files: a folder a class, masks in a parallel folder or beside the images."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from ..errors import InputError
from ._found import Entry, Found, MaskFile, match, nothing_matched
from ._paths import IMAGE_FOLDERS, MASK_FOLDERS, SPLIT_NAMES, File, first_few, missing, plain, same, shown, walk


def list_folder(root: Path, masks: Path | None, mask_suffix: str, form: str) -> Found:
    """Images below ``root``; ``form`` "folder", "suffix", or "auto" for whichever of these two it is."""
    if masks is not None:
        if form == "suffix":
            raise InputError(f"masks={shown(masks)} and form='suffix' exclude each other: leave one out")
        if not masks.is_dir():
            raise missing(masks, "masks folder") if not masks.exists() else InputError(f"masks {shown(masks)} is not a folder")
        if same(masks, root):
            raise InputError(f"masks and images lie in one folder, {shown(root)}: use form='suffix' (x.png, x{mask_suffix}.png)")
    files, ignored = walk(root, leave_out=masks)
    tree = _Tree(files)
    entries, mask_files = [], []
    perhaps: list[tuple[Entry, MaskFile]] = []  # in a folder called masks which may yet be a class of that name
    for file in files:
        name = "/".join((*file.folders, file.path.name))
        place = tree.place(file.folders)
        if isinstance(place, str):
            ignored.append(f"{shown(name)}: {place}")
            continue
        entry = Entry(shown(name), file.path, None, None, place.split, None, place.rest)
        mask = MaskFile(file.path, name, tuple(map(plain, place.rest)), place.split)
        if place.kind == "mask":
            mask_files.append(mask)
        elif place.kind == "mask?":
            mask.folders = mask.folders[1:]
            perhaps.append((entry, mask))
        else:
            entries.append(entry)
    if perhaps and masks is None and form != "suffix":
        known = {(entry.split, tuple(map(plain, entry.folders)), _stem(entry.image)) for entry in entries}
        stems = {(m.split, m.folders, stem) for _, m in perhaps for stem in (_stem(m.path), _stem(m.path, mask_suffix))}
        if known & stems:
            mask_files += [mask for _, mask in perhaps]
            perhaps = []
    entries += [entry for entry, _ in perhaps]

    where = root
    if masks is None and not mask_files and root.name.lower() in IMAGE_FOLDERS and form != "suffix":
        beside = [folder for folder in sorted(root.parent.iterdir()) if folder.name.lower() in MASK_FOLDERS and folder.is_dir()]
        if len(beside) > 1:
            raise InputError(f"{shown(root)} has several folders of masks beside it ({first_few(beside)}): name one with masks=")
        masks = beside[0] if beside else None
    if masks is not None:
        where = masks
        found, more = walk(masks)
        ignored += [f"{shown(masks.name)}/{line}" for line in more]
        trees = _Tree(found)
        for file in found:
            place = trees.place(file.folders)
            rest, split = (file.folders, None) if isinstance(place, str) else (place.rest, place.split)
            name = "/".join((masks.name, *file.folders, file.path.name))
            mask_files.append(MaskFile(file.path, name, tuple(map(plain, rest)), split))
    if form == "auto":
        form = "folder" if mask_files or not _has_suffix(entries, mask_suffix) else "suffix"
    beside, entries, further = _beside(entries, mask_suffix, form == "suffix")
    ignored += further
    if form == "suffix":
        mask_files = beside
    else:
        ignored += [f"{shown(mask.name)}: named as a mask, but the masks come from a folder" for mask in beside if mask_files]
        if beside and not mask_files:
            raise InputError(
                f"{shown(beside[0].name)} is named as a mask beside its image: use form='suffix', or name the masks' folder with masks="
            )
    _check(entries, root, form)
    for entry in entries:
        entry.label = entry.folders[0] if entry.folders else None
    left = match(entries, mask_files, mask_suffix)
    if mask_files and all(entry.mask is None for entry in entries):
        raise nothing_matched(entries, mask_files, where)
    return Found(entries, root, form, None, left, ignored)


def _check(entries: list[Entry], root: Path, form: str) -> None:
    if not entries:
        kinds = "PNG, JPEG, TIFF, BMP, GIF, WebP, PNM, JPEG 2000 or npy"
        raise InputError(f"no image ({kinds}) in {shown(root)} nor in the folders below it")
    loose = [entry.name for entry in entries if not entry.folders]
    if loose and len(loose) < len(entries):
        raise InputError(
            f"{len(loose):,} of the {len(entries):,} images in {shown(root)} lie in no class folder ({first_few(loose)}), the others "
            f"do: move them into one or away, or list the images in a CSV"
        )


class _Place:
    def __init__(self, split: str | None, kind: str, rest: tuple[str, ...]) -> None:
        self.split, self.kind, self.rest = split, kind, rest


class _Tree:
    """Which folders stand for splits, which for images and masks, and where the classes begin."""

    def __init__(self, files: list[File]) -> None:
        self.below: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for file in files:
            for depth, name in enumerate(file.folders):
                self.below[file.folders[:depth]].add(name.lower())
        self.cache: dict[tuple[str, ...], _Place | str] = {}

    def place(self, folders: tuple[str, ...]) -> _Place | str:
        """What a file in these folders is; or, in words, why it is nothing."""
        if folders not in self.cache:
            self.cache[folders] = self._place(folders)
        return self.cache[folders]

    def _place(self, folders: tuple[str, ...]) -> _Place | str:
        split, kind, depth = None, None, 0
        while True:
            names = self.below.get(folders[:depth], set())
            name = folders[depth].lower() if depth < len(folders) else None
            if split is None and (names <= SPLIT_NAMES.keys() or "train" in names) and names:
                if name not in SPLIT_NAMES:
                    return "beside the folders of the splits, in none of them"
                split = SPLIT_NAMES[name]
            elif kind is None and names & IMAGE_FOLDERS and (names & MASK_FOLDERS or len(names) == 1):
                if name not in IMAGE_FOLDERS | MASK_FOLDERS:
                    return "beside the folders of images and masks, in none of them"
                kind = "image" if name in IMAGE_FOLDERS else "mask"
            else:
                break
            depth += 1
        rest = folders[depth:]
        inner = self.below.get(folders[: depth + 1], set()) if rest else set()
        if kind is None and inner & IMAGE_FOLDERS and inner & MASK_FOLDERS:  # <class>/images/x.png and <class>/masks/x.png
            name = rest[1].lower() if len(rest) > 1 else None
            if name not in IMAGE_FOLDERS | MASK_FOLDERS:
                return "beside the folders of images and masks, in none of them"
            kind, rest = "image" if name in IMAGE_FOLDERS else "mask", (rest[0], *rest[2:])
        elif kind is None and rest and rest[0].lower() in MASK_FOLDERS:
            kind = "mask?"
        return _Place(split, kind or "image", rest)


def _stem(path: Path, suffix: str = "") -> str:
    return plain(os.path.splitext(path.name)[0]).removesuffix(plain(suffix))


def _has_suffix(entries: list[Entry], suffix: str) -> bool:
    stems = {(entry.split, entry.folders, _stem(entry.image)) for entry in entries}
    return bool(suffix) and any((split, folders, stem + plain(suffix)) in stems for split, folders, stem in stems)


def _beside(entries: list[Entry], suffix: str, always: bool) -> tuple[list[MaskFile], list[Entry], list[str]]:
    """Split files into masks ("x_mask.png") and images; further masks of one image ("x_mask_1.png") are left out and named.

    Unless ``always``, an image may itself be called "x_mask" as long as no image has its mask beside it.
    """
    if not suffix or not (always or _has_suffix(entries, suffix)):
        return [], entries, []
    suffix = plain(suffix)
    stems = {(entry.split, entry.folders, _stem(entry.image)) for entry in entries}
    numbered = re.compile(re.escape(suffix) + r"[_-]?\d+$")
    masks, images, further = [], [], []
    for entry in entries:
        stem = _stem(entry.image)
        base = numbered.sub("", stem)
        if base != stem and (entry.split, entry.folders, base) in stems:
            further.append(f"{entry.name}: a further mask of an image (one an image is read: merge them)")
        elif stem.endswith(suffix) and stem != suffix:
            masks.append(MaskFile(entry.image, entry.name, tuple(map(plain, entry.folders)), entry.split))
        else:
            images.append(entry)
    return masks, images, further
