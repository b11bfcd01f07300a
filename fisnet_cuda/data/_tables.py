"""Lists of samples: CSV files, JSON files and lists of dicts as in MONAI."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ._found import Entry, Found, MaskFile, match, nothing_matched
from ._paths import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    SPLIT_NAMES,
    File,
    first_few,
    is_image,
    missing,
    names_in,
    near,
    plain,
    shown,
    walk,
)  # fmt: skip

ROLES = ("image", "mask", "label", "split", "group")
_UNKNOWN = frozenset(("", "nan"))  # how tables, and pandas, write a label that is not known
_MASK_KEYS = ("mask", "seg", "segmentation")


class _Row(NamedTuple):
    where: str  # "line 7", "item 3"
    image: str
    mask: str
    label: str
    split: str
    group: str


def list_csv(path: Path, masks: Path | None, mask_suffix: str, columns: Mapping[str, str], mask_from: str | None) -> Found:
    """Samples that a CSV file names, one a line below the header."""
    text = _read_text(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, columns.get("image", "image")))
    try:
        header = next((row for row in lines if any(cell.strip() for cell in row)), None)
        if header is None:
            raise InputError(f"{shown(path)} is empty: it needs a header (image,mask,label) and a line for each image")
        where = _columns(path, header, columns)
        rows = []
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
                raise InputError(
                    f"{shown(path)}, line {lines.line_num}: {len(cells)} fields, but the header has {len(header)}: "
                    f"put fields that hold a separator in quotes"
                )
            rows.append(_Row(f"line {lines.line_num}", *(cells[where[role]].strip() if role in where else "" for role in ROLES)))
    except csv.Error as error:
        raise InputError(f"{shown(path)}, line {lines.line_num}: {error}") from None
    return _resolve(rows, path.parent, shown(path), shown(path.name), "csv", masks, mask_suffix, mask_from, "mask" in where)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror}") from None
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # what Excel calls "Unicode text"
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{shown(path)}, line {line}: not UTF-8: save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{shown(path)} is no text file")
    return text


def _delimiter(text: str, image: str) -> str:
    """The separator that gives the header the image's column; else the one that gives the most columns."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    cells = {d: [cell.strip().casefold() for cell in next(csv.reader([line], delimiter=d), [])] for d in ",;\t|"}
    return max(cells, key=lambda d: (image.casefold() in cells[d], len(cells[d])))


def _columns(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Role -> place in a row. A column that is named must exist; the usual names may be missing, but for the image's."""
    names = [cell.strip() for cell in header]
    places = {}
    for role in ROLES:
        wanted = columns.get(role, role)
        found = [i for i, name in enumerate(names) if name == wanted]
        found = found or [i for i, name in enumerate(names) if name.casefold() == wanted.casefold()]
        if len(found) > 1:
            raise InputError(f"{shown(path)} has {len(found)} columns called {shown(wanted)!r}: rename all but one")
        if found:
            places[role] = found[0]
        elif role in columns or role == "image":
            raise InputError(
                f"{shown(path)} has no column {shown(wanted)!r} for the {role}: it has {', '.join(map(shown, names))}; "
                f"name one with columns={{{role!r}: ...}}{near(wanted, names)}"
            )
    return places


def has_columns(path: Path, columns: Mapping[str, str]) -> tuple[bool, bool]:
    """Whether a CSV file has the image's column, and the label's; for finding out what a folder is."""
    try:
        text = _read_text(path)
    except InputError:
        return False, False
    line = next((line for line in text.splitlines() if line.strip()), "")
    cells = next(csv.reader([line], delimiter=_delimiter(text, columns.get("image", "image"))), [])
    names = {cell.strip().casefold() for cell in cells}
    return columns.get("image", "image").casefold() in names, columns.get("label", "label").casefold() in names


def list_items(
    items: Any, root: Path, source: str, masks: Path | None, mask_suffix: str, columns: Mapping[str, str], mask_from: str | None
) -> Found:
    """Samples that a list of dicts names. A "label" that is an image file is a mask, as in MONAI's segmentation tasks."""
    split_of: list[tuple[Any, str | None]] = []
    if isinstance(items, Mapping):  # {"training": [...], "validation": [...], "test": [...]}, the Decathlon's
        kept = {key: value for key, value in items.items() if str(key).lower() in SPLIT_NAMES and isinstance(value, Sequence)}
        if not kept:
            raise InputError(f"{source} holds no list of samples: it must be a list of dicts, or lists by training, validation, test")
        for key, value in kept.items():
            split_of += [(item, SPLIT_NAMES[key.lower()]) for item in value]
    else:
        split_of = [(item, None) for item in items]
    keys = {role: columns.get(role, role) for role in ROLES}
    rows, any_masks = [], False
    for number, (item, split) in enumerate(split_of):
        where = f"item {number}"
        if isinstance(item, (str, os.PathLike)):
            item = {keys["image"]: item}
        if not isinstance(item, Mapping):
            raise InputError(f"{source}, {where}: a dict like {{'image': ..., 'label': ...}} is needed, got {type(item).__name__}")
        cells = dict.fromkeys(ROLES, "")
        for role in ROLES:
            cells[role] = _cell(item.get(keys[role]), role, f"{source}, {where}")
        if not cells["image"]:
            names = [str(key) for key in item]
            raise InputError(
                f"{source}, {where} has no {keys['image']!r}: it has {', '.join(map(shown, names)) or 'nothing'}; "
                f"name the key with columns={{'image': ...}}{near(keys['image'], names)}"
            )
        if not cells["mask"] and "mask" not in columns:
            found = [key for key in _MASK_KEYS if item.get(key) not in (None, "")]
            if found:
                cells["mask"] = _cell(item[found[0]], "mask", f"{source}, {where}")
        if is_image(cells["label"]):
            if cells["mask"]:
                raise InputError(f"{source}, {where}: both its label and its mask are image files: leave one out")
            cells["mask"], cells["label"] = cells["label"], _cell(item.get("class"), "label", f"{source}, {where}")
        cells["split"] = cells["split"] or split or ""
        any_masks = any_masks or bool(cells["mask"])
        rows.append(_Row(where, **cells))
    if not rows:
        raise InputError(f"{source} names no images")
    return _resolve(rows, root, source, source, "list", masks, mask_suffix, mask_from, any_masks)


def _cell(value: Any, role: str, where: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # NumPy's numbers
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise InputError(f"{where}: {role} must be a text or a number, got {type(value).__name__}")
    return str(value).strip()


def list_json(path: Path, masks: Path | None, mask_suffix: str, columns: Mapping[str, str], mask_from: str | None) -> Found:
    """`list_items` of a JSON file; paths are relative to it."""
    try:
        items = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{shown(path)}, line {error.lineno}: no JSON: {error.msg}") from None
    if not isinstance(items, (list, dict)):
        raise InputError(f"{shown(path)} must hold a list of dicts, got {type(items).__name__}")
    return list_items(items, path.parent, shown(path), masks, mask_suffix, columns, mask_from)


def _resolve(
    rows: list[_Row],
    root: Path,
    source: str,
    short: str,
    form: str,
    masks: Path | None,
    mask_suffix: str,
    mask_from: str | None,
    masks_named: bool,
) -> Found:
    """Files from the names in rows: relative to ``root``, or to its folders of images and masks."""
    if not rows:
        raise InputError(f"{source} names no images: it has a header and nothing below it")
    below = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    image_roots = [root, *(root / name for name in below if name.lower() in IMAGE_FOLDERS)]
    mask_folders = [root / name for name in below if name.lower() in MASK_FOLDERS]
    mask_roots = [masks] if masks is not None else [root, *mask_folders]
    if masks is not None and not masks.is_dir():
        raise missing(masks, "masks folder") if not masks.exists() else InputError(f"masks {shown(masks)} is not a folder")
    entries: list[Entry] = []
    first: dict[str, str] = {}
    lost: list[tuple[_Row, str, str, list[Path]]] = []
    for row in rows:
        if not row.image:
            raise InputError(f"{source}, {row.where}: no image is named")
        image = _find(row.image, image_roots)
        if image is None:
            lost.append((row, "image", row.image, image_roots))
            continue
        key = os.path.normpath(image)
        if key in first:
            raise InputError(f"{source}, {row.where} names {shown(row.image)} again, after {first[key]}: keep one of them")
        first[key] = row.where
        mask = None
        if row.mask.casefold() not in _UNKNOWN:
            mask = _find(row.mask, mask_roots)
            if mask is None:
                lost.append((row, "mask", row.mask, mask_roots))
                continue
        split = row.split.casefold()
        if split in _UNKNOWN:
            split = None
        elif split not in SPLIT_NAMES:
            raise InputError(
                f"{source}, {row.where}: split {shown(row.split)!r} is none of train, val, test{near(row.split, SPLIT_NAMES)}"
            )
        label = None if row.label.casefold() in _UNKNOWN else label_text(row.label)
        group = None if row.group.casefold() in _UNKNOWN else label_text(row.group)
        folders, name = _relative(image, image_roots)
        entries.append(Entry(name, image, mask, label, SPLIT_NAMES.get(split), group, folders))
    if lost:
        raise _lost(lost, source)
    _unique(entries)
    left: list[str] = []
    ignored: list[str] = []
    if not masks_named and mask_from is None:
        folders = [masks] if masks is not None else mask_folders
        if len(folders) > 1:
            raise InputError(f"beside {short} there are several folders of masks ({first_few(folders)}): name one with masks=")
        if folders:
            left, ignored = _match_folder(entries, folders[0], image_roots, mask_suffix)
    return Found(entries, root, form, None, left, ignored)


def _match_folder(entries: list[Entry], folder: Path, image_roots: list[Path], mask_suffix: str) -> tuple[list[str], list[str]]:
    files, ignored = walk(folder)
    mask_files = [_mask_file(folder, file) for file in files]
    if not mask_files:
        raise InputError(f"masks folder {shown(folder)} holds no image")
    left = set(match(entries, mask_files, mask_suffix))
    if all(entry.mask is None for entry in entries):
        raise nothing_matched(entries, mask_files, folder)
    # a table may list a part of the images only: masks of the other images are nothing to report
    stems = {plain(os.path.splitext(name)[0]) for root in image_roots for name in names_in(root) if is_image(name)}
    kept = []
    for mask in mask_files:
        stem = plain(os.path.splitext(mask.path.name)[0])
        if shown(mask.name) in left and not {stem, stem.removesuffix(plain(mask_suffix))} & stems:
            kept.append(shown(mask.name))
    return kept, [f"{shown(folder.name)}/{line}" for line in ignored]


def _mask_file(folder: Path, file: File) -> MaskFile:
    return MaskFile(file.path, "/".join((folder.name, *file.folders, file.path.name)), tuple(map(plain, file.folders)))


def _find(name: str, roots: Sequence[Path]) -> Path | None:
    spellings = [name] if "\\" not in name else [name, name.replace("\\", "/")]
    for spelling in spellings:
        path = Path(spelling).expanduser() if spelling.startswith("~") else Path(spelling)
        for folder in roots:
            try:
                if (folder / path).is_file():
                    return folder / path
            except (OSError, ValueError):  # a name that is too long, or holds a zero byte
                return None
    return None


def _relative(image: Path, roots: Sequence[Path]) -> tuple[tuple[str, ...], str]:
    """Folders between the image and its root (for matching masks) and its name (relative to the first root)."""
    whole = Path(os.path.normpath(image))
    folders: tuple[str, ...] = ()
    for folder in reversed(roots):  # the folder of images first
        if whole.is_relative_to(folder):
            folders = whole.relative_to(folder).parts[:-1]
            break
    root = Path(os.path.normpath(roots[0]))
    return folders, shown(whole.relative_to(root) if whole.is_relative_to(root) else whole)


def _unique(entries: Sequence[Entry]) -> None:
    """Names of different files are different paths; two spellings of one file were refused before."""
    seen: dict[str, int] = {}
    for entry in entries:
        count = seen[entry.name] = seen.get(entry.name, 0) + 1
        if count > 1:
            entry.name = f"{entry.name} ({count})"


def _lost(lost: list[tuple[_Row, str, str, list[Path]]], source: str) -> InputError:
    row, role, name, roots = lost[0]
    folder, _ = os.path.split(name)
    options = [os.path.join(folder, other) for root in roots for other in names_in(root / folder)]
    more = f", nor are {len(lost) - 1:,} more" if len(lost) > 2 else ", nor is one more" if len(lost) == 2 else ""
    where = "" if os.path.isabs(name) else f" in {' or '.join(shown(root) for root in roots)}"
    return InputError(f"{source}, {row.where}: {role} {shown(name)} not found{where}{more}{near(name, options)}")


def label_text(label: str) -> str:
    """The name of a class; "1.0" is what tables with gaps make of 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label.strip())
