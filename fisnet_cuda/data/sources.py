"""What images, masks and labels there are: `list_samples` for every form in which people keep them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ._arrays import ARRAY_SUFFIXES, KEYS, idx_files, list_hdf5, list_idx, list_npz, nonzero
from ._folders import list_folder
from ._found import Entry, Found
from ._paths import SPLIT_NAMES, first_few, is_image, missing, names_in, natural, near, shown
from ._tables import ROLES, has_columns, list_csv, list_items, list_json
from .samples import Listing, Sample

__all__ = ["FORMS", "list_samples"]

FORMS = ("auto", "folder", "csv", "suffix", "list", "hdf5", "npz", "idx")
_MEDICAL = (".dcm", ".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")


def list_samples(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    masks: str | os.PathLike[str] | None = None,
    form: str = "auto",
    *,
    mask_suffix: str = "_mask",
    columns: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
    mask_from: str | None = None,
    classes: Sequence[str] | None = None,
    labels: bool = True,
) -> Listing:
    """List the images of a data set with their masks and labels; no pixel is read.

    Forms, and what "auto" takes for them:

    - "folder": ``path/<class>/x.png``, masks of the same name (any extension) in a parallel folder: ``masks``, or ``path/masks``
      beside ``path/images``. Splits may be folders, too: ``path/train/<class>/x.png``, ``path/train/images/<class>/x.png``. Images
      in no folder have no label.
    - "suffix": as "folder", but the mask lies beside its image: ``x.png``, ``x_mask.png``. Auto: some image has such a mask.
    - "csv": a table with a header, columns image, mask, label, split, group; files relative to it, or to the folders images and
      masks beside it. Without a column of masks, masks are found by name in that folder. Auto: a .csv file, or a folder that holds
      one such table.
    - "list": a list of dicts with these keys, as in MONAI ("seg" or a "label" that is an image file are masks), or a .json file.
    - "hdf5": arrays images, masks, labels [, group, split]; one such group a split, or a group a sample.
    - "npz": images, masks, labels; or x_train, y_train, x_test, y_test (MNIST), train_images, train_labels, ... (MedMNIST).
    - "idx": MNIST's four files, packed or not, in one folder; or one file of images beside its labels.

    Args:
        path: folder, file, or list of dicts.
        masks: folder of the masks, where it is not beside the images.
        form: one of `FORMS`.
        mask_suffix: what a mask's name has more than its image's; "" for nothing.
        columns: names of columns (of keys in a list of dicts) for "image", "mask", "label", "split", "group", where they are
            called otherwise. A column that is named here must exist.
        keys: names of arrays for "image", "mask", "label", "split", "group", "classes" in HDF5 and npz files, where they are called
            otherwise.
        mask_from: "nonzero": the pixels above 0 are the foreground of images that have no mask (MNIST).
        classes: names of the classes in the order of the logits. Where labels are numbers and these names are not, label i means
            ``classes[i]``. None: the names found, sorted, numbers as numbers.
        labels: False leaves labels unknown, whatever folders or columns say (for prediction).

    Returns:
        The samples in a fixed order, and what did not fit.

    Raises:
        InputError: something is missing, ambiguous or malformed; names the file and, in tables, the line.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("images/TB/a.png", "images/normal/b.png", "masks/TB/a.png"):
        ...     (root / name).parent.mkdir(parents=True, exist_ok=True)
        ...     (root / name).touch()
        >>> listing = list_samples(root)
        >>> listing.classes, [sample.name for sample in listing.samples], listing.images_without_mask
        (('TB', 'normal'), ['images/TB/a.png', 'images/normal/b.png'], ('images/normal/b.png',))
    """
    _check_options(form, mask_from, columns, keys)
    columns, keys = dict(columns or {}), dict(keys or {})
    mask_folder = None if masks is None else Path(masks).expanduser()
    if isinstance(path, (str, os.PathLike)):
        found = _list_path(Path(path).expanduser(), mask_folder, form, mask_suffix, columns, keys, mask_from)
    else:
        if form not in ("auto", "list"):
            raise InputError(f"form={form!r} needs a path, and path is a {type(path).__name__}: leave form out")
        if not isinstance(path, (Sequence, Mapping)):
            raise InputError(f"path must be a path or a list of dicts, got {type(path).__name__}")
        found = list_items(path, Path(), "the list", mask_folder, mask_suffix, columns, mask_from)
    if mask_from == "nonzero":
        for entry in found.entries:
            entry.mask = entry.mask or nonzero(entry.image)
    return _listing(found, classes, labels)


def _check_options(form: str, mask_from: str | None, columns: Mapping[str, str] | None, keys: Mapping[str, str] | None) -> None:
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}{near(str(form), FORMS)}")
    if mask_from not in (None, "nonzero"):
        raise InputError(f"mask_from must be None or 'nonzero', got {mask_from!r}")
    for name, given, known in (("columns", columns, ROLES), ("keys", keys, tuple(KEYS))):
        for role in given or {}:
            if role not in known:
                raise InputError(f"{name} has no {role!r}: it takes {', '.join(known)}{near(str(role), known)}")


def _list_path(
    path: Path, masks: Path | None, form: str, suffix: str, columns: dict[str, str], keys: dict[str, str], mask_from: str | None
) -> Found:
    if not path.exists():
        raise missing(path)
    if form == "auto":
        form, path = _guess(path, columns)
    if form in ("folder", "suffix", "auto"):
        if not path.is_dir():
            raise InputError(f"{shown(path)} is a file, and form={form!r} needs a folder")
        return list_folder(path, masks, suffix, form)
    if path.is_dir() and form != "idx":
        files = [name for name in names_in(path) if name.lower().endswith({"list": (".json",), **ARRAY_SUFFIXES}.get(form, ".csv"))]
        if len(files) != 1:
            raise InputError(
                f"{shown(path)} is a folder, and form={form!r} needs a file: name one{': ' + first_few(files) if files else ''}"
            )
        path = path / files[0]
    if form == "csv":
        return list_csv(path, masks, suffix, columns, mask_from)
    if form == "list":
        return list_json(path, masks, suffix, columns, mask_from)
    if masks is not None:
        raise InputError(f"masks= is a folder of mask files, and {shown(path)} holds arrays: name its masks with keys={{'mask': ...}}")
    if form == "idx":
        return list_idx(path)
    return list_hdf5(path, keys) if form == "hdf5" else list_npz(path, keys)


def _guess(path: Path, columns: Mapping[str, str]) -> tuple[str, Path]:
    """The form of what lies at a path, and the file that is meant where the path is the folder around it."""
    if path.is_dir():
        if idx_files(path):
            return "idx", path
        tables = [path / name for name in names_in(path) if name.lower().endswith((".csv", ".tsv")) and not name.startswith(".")]
        fitting = {table: has_columns(table, columns) for table in tables}
        fitting = {table: has_label for table, (has_image, has_label) in fitting.items() if has_image}
        if len(fitting) > 1:
            raise InputError(
                f"{shown(path)} holds several tables of images ({first_few([t.name for t in fitting])}): name the one to read, "
                f"or form='folder' for none"
            )
        if any(fitting.values()) or (fitting and not _has_images_in_folders(path)):
            return "csv", next(iter(fitting))
        return "auto", path
    name = path.name.lower()
    if name.endswith((".csv", ".tsv")):
        return "csv", path
    if name.endswith(".json"):
        return "list", path
    for form, suffixes in ARRAY_SUFFIXES.items():
        if name.endswith(suffixes):
            return form, path
    if name.endswith(_MEDICAL):
        raise InputError(f"{shown(path)}: DICOM, NIfTI and the like are not read: convert them to 16-bit PNG, npy or HDF5 first")
    if is_image(path.name):
        raise InputError(f"{shown(path)} is one image, not a data set: give its folder, or a list [{{'image': ...}}]")
    suffix = path.suffix or "none"
    raise InputError(
        f"{shown(path)}: a folder, or a file .csv, .json, .h5, .npz or idx-ubyte is needed (its suffix is {shown(suffix)}); "
        f"say what it is with form="
    )


def _has_images_in_folders(path: Path) -> bool:
    """Whether the images lie in folders that could be classes, so that a table beside them may be about something else."""
    return any(
        is_image(name)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for below in (folder, *(p for p in sorted(folder.iterdir()) if p.is_dir()))
        if below.parent != path or folder.name.lower() not in ("images", *SPLIT_NAMES)
        for name in names_in(below)[:50]
    )


def _listing(found: Found, classes: Sequence[str] | None, labels: bool) -> Listing:
    entries = sorted(found.entries, key=lambda entry: natural(entry.name)) if found.form in ("folder", "suffix") else found.entries
    if not labels:
        for entry in entries:
            entry.label = None
    names = _classes(entries, classes if classes is not None else found.classes, found)
    number = {name: i for i, name in enumerate(names)}
    samples = tuple(Sample(e.name, e.image, e.mask, None if e.label is None else number[e.label], e.split, e.group) for e in entries)
    return Listing(
        samples,
        names,
        found.root,
        found.form,
        tuple(sample.name for sample in samples if sample.mask is None),
        tuple(found.masks_without_image),
        tuple(found.ignored),
    )


def _classes(entries: list[Entry], given: Sequence[str] | None, found: Found) -> tuple[str, ...]:
    """Names in the order of the logits; labels that are numbers of given names become these names."""
    counts = Counter(entry.label for entry in entries if entry.label is not None)
    if given is None:
        try:
            return tuple(sorted(counts, key=lambda name: (float(name), name)))
        except ValueError:
            return tuple(sorted(counts, key=natural))
    if isinstance(given, str):
        raise InputError(f"classes must be a list of names, got {given!r}")
    names = tuple(str(name) for name in given)
    if len(set(names)) < len(names):
        raise InputError(f"classes names {next(n for n, c in Counter(names).items() if c > 1)!r} twice")
    if counts and not set(counts) & set(names) and all(c.isdecimal() and int(c) < len(names) for c in counts):
        for entry in entries:
            entry.label = None if entry.label is None else names[int(entry.label)]
        return names
    for label, count in counts.items():
        if label not in names:
            raise InputError(
                f"{shown(found.root)}: {count:,} images are of the class {shown(label)!r}, which is not among the classes "
                f"{', '.join(map(shown, names))}{near(label, names)}"
            )
    return names
