"""Images, masks and labels that lie in arrays: HDF5, npz and MNIST's idx files."""

from __future__ import annotations

import functools
import gzip
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ._found import Entry, Found
from ._paths import SPLIT_NAMES, first_few, names_in, natural, near, shown
from ._tables import label_text
from .samples import ArrayItem

ARRAY_SUFFIXES = {
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5"),
    "npz": (".npz",),
    "idx": ("-ubyte", "-ubyte.gz", ".idx", ".idx.gz", ".ubyte", ".ubyte.gz"),
}
# what arrays are usually called, by what they hold
KEYS: dict[str, tuple[str, ...]] = {
    "image": ("images", "image", "imgs", "img", "x", "data"),
    "mask": ("masks", "mask", "segmentations", "segmentation", "segs", "seg", "m"),
    "label": ("labels", "label", "y", "targets", "target"),
    "split": ("splits", "split"),
    "group": ("groups", "group", "site", "sites"),
    "classes": ("classes", "class_names", "label_names"),
}
WHOLE = -1  # `ArrayItem.index` of an array that is one image
NONZERO = "\0nonzero"  # ends the `ArrayItem.key` of a mask that is made of an image; no name in a file holds a zero byte
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)


def nonzero(image: Path | ArrayItem) -> ArrayItem:
    """The mask of an image's pixels above 0."""
    if isinstance(image, ArrayItem):
        return image._replace(key=image.key + NONZERO)
    return ArrayItem(image, NONZERO, WHOLE)


class _Arrays(NamedTuple):
    """What a file holds, by name: shapes are known, values come when asked for."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    values: Callable[[str], np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# Listing


def list_npz(path: Path, keys: Mapping[str, str]) -> Found:
    """Samples in the arrays of an npz file."""
    try:
        shapes = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        shapes[name.removesuffix(".npy")] = _npy_shape(file)
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise InputError(f"{shown(path)} is no npz file, or damaged: {shown(error)}") from None
    return _list_arrays(_Arrays(path, shapes, lambda key: array(path, key)), "npz", keys)


def _npy_shape(file: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def list_hdf5(path: Path, keys: Mapping[str, str]) -> Found:
    """Samples in an HDF5 file: arrays, arrays in one group a split, a group a sample, or an array a sample."""
    h5py = h5py_module()
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            shapes[name] = item.shape

    try:
        with h5py.File(path, "r") as file:
            file.visititems(see)
            single = _single_images(shapes, keys)
            if single:
                return _list_single(path, file, shapes, keys, single)
            found = _list_arrays(_Arrays(path, shapes, lambda key: array(path, key)), "hdf5", keys)
            if found.classes is None and "classes" in file.attrs:
                found.classes = _class_names(file.attrs["classes"], found.entries, shown(path))
            return found
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{shown(path)} is no HDF5 file, or damaged: {shown(error)}") from None


def _role(own: str, keys: Mapping[str, str]) -> str | None:
    """What an array of this name holds."""
    for role in KEYS:
        if own.casefold() in [name.casefold() for name in ([keys[role]] if role in keys else KEYS[role])]:
            return role
    return None


def _single_images(shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]) -> dict[str, str]:
    """Arrays that are one image each -> the name of their sample: "17/image" or "images/17"."""
    parts = {name: name.split("/") for name in shapes}
    in_groups = {
        name: "/".join(p[:-1])
        for name, p in parts.items()
        if len(p) > 1 and p[-2].lower() not in SPLIT_NAMES and _role(p[-1], keys) == "image"
    }
    alone = {name: p[-1] for name, p in parts.items() if len(p) == 2 and _role(p[0], keys) == "image"}
    found = in_groups or alone
    stacked = any(_role(p[-1], keys) == "image" and name not in in_groups for name, p in parts.items())
    # one group around one array is a folder around stacked images
    return {} if stacked or (len(in_groups) == 1 and len(shapes[next(iter(in_groups))]) > 2) else found


def _list_single(
    path: Path, file: Any, shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str], single: Mapping[str, str]
) -> Found:
    used = set(single)
    entries = []
    for image, sample in sorted(single.items(), key=lambda item: natural(item[1])):
        folder, _, own = image.rpartition("/")
        values: dict[str, Any] = {}
        if _role(own, keys) == "image":  # "17/image"
            named = {_role(name.rpartition("/")[2], keys): name for name in shapes if name.rpartition("/")[0] == folder}
            attributes = {_role(key, keys): value for key, value in file[folder].attrs.items()}
        else:  # "images/17", "masks/17"
            named = {_role(name.split("/")[0], keys): name for name in shapes if name.split("/")[1:] == [own]}
            attributes = {_role(key, keys): value for key, value in file[image].attrs.items()}
        for role in ("label", "split", "group"):
            if role in named:
                used.add(named[role])
                values[role] = file[named[role]][()]
            elif role in attributes:
                values[role] = attributes[role]
        where = f"{shown(path)}, {shown(sample)}"
        mask = named.get("mask")
        if mask:
            used.add(mask)
        read = {role: _one_text(value, f"{where}: {role}") for role, value in values.items()}
        split = read.get("split") or next((p for p in sample.split("/")[:-1] if p.lower() in SPLIT_NAMES), None)
        entries.append(
            Entry(
                f"{shown(path.name)}:{shown(sample)}",
                ArrayItem(path, image, WHOLE),
                ArrayItem(path, mask, WHOLE) if mask else None,
                read.get("label"),
                _split_name(split, where),
                read.get("group"),
            )
        )
    ignored = [f"{shown(path.name)}:{shown(name)}: belongs to no image" for name in sorted(shapes) if name not in used]
    return Found(entries, path.parent, "hdf5", None, [], ignored)


def _list_arrays(arrays: _Arrays, form: str, keys: Mapping[str, str]) -> Found:
    """Samples along the first axis of arrays; "train_images", "images_train" and "train/images" are those of a split."""
    source = shown(arrays.file)
    roles: dict[str | None, dict[str, str]] = {}
    ignored = []
    for name in arrays.shapes:
        split, role = _split_role(name, keys)
        if role is None:
            ignored.append(f"{shown(arrays.file.name)}:{shown(name)}: an array of unknown meaning")
        elif role in roles.setdefault(split, {}):
            raise InputError(
                f"{source} holds two arrays for the {role}, {shown(roles[split][role])} and {shown(name)}: "
                f"name one with keys={{{role!r}: ...}}"
            )
        else:
            roles[split][role] = name
    for role, wanted in keys.items():
        if not any(role in found for found in roles.values()):
            raise InputError(
                f"{source} holds no array {shown(wanted)!r} for the {role}: it holds {first_few(sorted(arrays.shapes), 8) or 'nothing'}"
                f"{near(wanted, arrays.shapes)}"
            )
    with_images = [split for split in roles if "image" in roles[split]]
    if not with_images:
        raise InputError(
            f"{source} holds no array of images: it holds {first_few(sorted(arrays.shapes), 8) or 'nothing'}; "
            f"name one with keys={{'image': ...}}"
        )
    entries: list[Entry] = []
    several = len(with_images) > 1
    for split in sorted(with_images, key=lambda s: ("train", "val", "test", None).index(s)):
        entries += _list_stack(arrays, roles[split], split, several, source)
    for split in roles.keys() - set(with_images):
        for role, name in roles[split].items():
            if role != "classes":
                ignored.append(f"{shown(arrays.file.name)}:{shown(name)}: there are no images that it belongs to")
    named = roles.get(None, {}).get("classes")
    classes = _class_names(arrays.values(named), entries, source) if named else None
    return Found(entries, arrays.file.parent, form, classes, [], sorted(ignored))


def _split_role(name: str, keys: Mapping[str, str]) -> tuple[str | None, str | None]:
    role = _role(name, keys)
    if role is not None:
        return None, role
    folder, _, own = name.rpartition("/")
    split = SPLIT_NAMES.get(folder.rpartition("/")[2].lower())
    if _role(own, keys) is not None:
        return split, _role(own, keys)
    for pattern, split_first in ((r"([a-z]+)[_-](.+)", True), (r"(.+)[_-]([a-z]+)", False)):
        found = re.fullmatch(pattern, own, re.I)
        if found:
            first, second = found.groups()
            word, rest = (first, second) if split_first else (second, first)
            if word.lower() in SPLIT_NAMES and _role(rest, keys) is not None:
                return SPLIT_NAMES[word.lower()], _role(rest, keys)
    return None, None


def _list_stack(arrays: _Arrays, roles: Mapping[str, str], split: str | None, several: bool, source: str) -> list[Entry]:
    key = roles["image"]
    shape = arrays.shapes[key]
    if len(shape) not in (3, 4):
        raise InputError(
            f"{source}: {shown(key)} must be images [n, height, width], with channels last or second if there are any, "
            f"got {list(shape)}"
        )
    n = shape[0]
    for role, name in roles.items():
        if role != "classes" and (arrays.shapes[name] or (0,))[0] != n:
            raise InputError(
                f"{source}: {shown(name)} has the shape {list(arrays.shapes[name])}, and there are {n:,} images in {shown(key)}"
            )
    columns: dict[str, Sequence[str | None]] = {
        role: _texts(arrays.values(roles[role]), f"{source}: {shown(roles[role])}") if role in roles else [None] * n
        for role in ("label", "split", "group")
    }
    name = f"{shown(arrays.file.name)}:{shown(key)}" if several else shown(arrays.file.name)
    mask = roles.get("mask")
    return [
        Entry(
            f"{name}:{i}",
            ArrayItem(arrays.file, key, i),
            ArrayItem(arrays.file, mask, i) if mask else None,
            columns["label"][i],
            split or _split_name(columns["split"][i], f"{source}, sample {i}"),
            columns["group"][i],
        )
        for i in range(n)
    ]


def _split_name(name: str | None, where: str) -> str | None:
    if name is None:
        return None
    if name.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: split {shown(name)!r} is none of train, val, test{near(name, SPLIT_NAMES)}")
    return SPLIT_NAMES[name.lower()]


def _texts(values: Any, where: str) -> list[str | None]:
    """Names from numbers, texts or bytes [n] or [n, 1], or from one-hot rows [n, classes]; None where there is none."""
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] > 1:
        numbers = values.astype(float) if values.dtype.kind in "biuf" else np.full(values.shape, np.nan)
        if not (np.isin(numbers, (0, 1)).all() and (numbers.sum(1) == 1).all()):
            raise InputError(
                f"{where} has the shape {list(values.shape)}: one label an image is needed (a number, a text or a one-hot row)"
            )
        values = numbers.argmax(1)
    if values.size != len(values):
        raise InputError(f"{where} has the shape {list(values.shape)}: one label an image is needed")
    return [_one_text(value, where) for value in values.reshape(-1).tolist()]


def _one_text(value: Any, where: str) -> str | None:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.size != 1:
            raise InputError(f"{where} must be one number or text, got the shape {list(value.shape)}")
        value = value.reshape(-1)[0].item() if isinstance(value, np.ndarray) else value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where} holds {value!r}, which is not UTF-8") from None
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise InputError(f"{where} must hold numbers or texts, got {type(value).__name__}")
    text = label_text(str(value))
    return None if text.casefold() in ("", "nan") else text


def _class_names(values: Any, entries: Sequence[Entry], source: str) -> tuple[str, ...] | None:
    """Names of classes that a file holds, where its labels are numbers of them, or these names."""
    names = _texts(np.atleast_1d(np.asarray(values)), f"{source}: the names of classes")
    labels = {entry.label for entry in entries if entry.label is not None}
    if None in names or not labels:
        return None
    fits = labels <= set(names) or all(label.isdecimal() and int(label) < len(names) for label in labels)
    return tuple(names) if fits else None  # type: ignore[arg-type]


_IDX_NAME = re.compile(r"(.*?)(train|test|t10k)[-_.]images[-_.]idx3[-_.]ubyte(\.gz)?", re.I)


def idx_files(folder: Path) -> list[str]:
    """Names of MNIST's files of images in a folder."""
    return [name for name in names_in(folder) if _IDX_NAME.fullmatch(name)]


def list_idx(path: Path) -> Found:
    """Samples in MNIST's files: all of a folder, or one file of images with its labels beside it."""
    folder = path if path.is_dir() else path.parent
    names = idx_files(path) if path.is_dir() else [path.name]
    if not names:
        raise InputError(f"{shown(path)} holds none of MNIST's files, such as train-images-idx3-ubyte or t10k-images-idx3-ubyte.gz")
    parsed = {name: _IDX_NAME.fullmatch(name) for name in names}
    splits = [None if m is None else "train" if m[2].lower() == "train" else "test" for m in parsed.values()]
    if len(names) > 1 and len(set(splits)) < len(names):
        raise InputError(f"{shown(path)} holds several sets of images ({first_few(names)}): keep one in a folder of its own")
    entries: list[Entry] = []
    for name, split in sorted(zip(names, splits), key=lambda pair: pair[1] != "train"):
        images = array(folder / name, "")
        if images.ndim != 3:
            raise InputError(f"{shown(folder / name)} has the shape {list(images.shape)}: images [n, height, width] are needed")
        beside = _labels_of(name, names_in(folder))
        labels: Sequence[str | None] = [None] * len(images)
        if beside is not None:
            values = array(folder / beside, "")
            if values.shape != (len(images),):
                raise InputError(
                    f"{shown(folder / beside)} has the shape {list(values.shape)}, and {shown(name)} holds {len(images):,} images"
                )
            labels = _texts(values, shown(folder / beside))
        entries += [Entry(f"{shown(name)}:{i}", ArrayItem(folder / name, "", i), None, labels[i], split) for i in range(len(images))]
    return Found(entries, folder, "idx")


def _labels_of(name: str, beside: Sequence[str]) -> str | None:
    stem = re.sub(r"images", "labels", name.removesuffix(".gz"), flags=re.I).replace("idx3", "idx1")
    return next((other for other in beside if other.removesuffix(".gz") == stem and other != name), None)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_item(item: ArrayItem) -> np.ndarray:
    """The values of one entry; the key's mark for `nonzero` is the caller's business.

    Raises:
        InputError: the file is gone, damaged, or has changed.
    """
    try:
        if item.file.name.lower().endswith(ARRAY_SUFFIXES["hdf5"]) or _is_hdf5(item.file):
            file = _open_hdf5(*_stamp(item.file))
            dataset = file[item.key]
            return np.asarray(dataset[()] if item.index == WHOLE else dataset[item.index])
        values = array(item.file, item.key)
        return values if item.index == WHOLE else values[item.index]
    except InputError:
        raise
    except (*_DAMAGE, IndexError) as error:
        raise InputError(f"cannot read entry {item.index} of {shown(item.key)!r} in {shown(item.file)}: {shown(error)}") from None


def array(path: Path, key: str) -> np.ndarray:
    """A whole array of an npz, HDF5 or idx file. Those of npz and idx files are kept until `close_files`.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if _is_hdf5(path):
            return np.asarray(_open_hdf5(*_stamp(path))[key][()])
        return _load(*_stamp(path), key)
    except InputError:
        raise
    except _DAMAGE as error:
        hint = " (arrays of Python objects are not read: save them as numbers)" if "allow_pickle" in str(error) else ""
        problem = hint or f": {shown(error)}"
        raise InputError(f"cannot read {shown(key) + ' of ' if key else ''}{shown(path)}{problem}") from None


def close_files() -> None:
    """Close the files and forget the arrays that reading has kept open in this process."""
    _open_hdf5.cache_clear()
    _load.cache_clear()
    _is_hdf5.cache_clear()


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What a file is kept open under: a file that has changed is opened anew, and so is one in a forked process, since HDF5's
    handles must not be shared."""
    status = os.stat(path)
    return str(path), status.st_mtime_ns, status.st_size, os.getpid()


@functools.lru_cache(maxsize=64)
def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


@functools.lru_cache(maxsize=4)
def _open_hdf5(path: str, changed: int, size: int, process: int) -> Any:
    return h5py_module().File(path, "r", rdcc_nbytes=64 * 2**20)


@functools.lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int, process: int, key: str) -> np.ndarray:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:2] == b"PK":
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    return _load_idx(path)


def _load_idx(path: str) -> np.ndarray:
    """The array of an idx file: two zero bytes, the type's code, the number of axes, their lengths (big endian), values."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        content = file.read()
    kinds = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in kinds:
        raise ValueError("no idx file")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError("the file is cut off")
    shape = struct.unpack(f">{axes}I", content[4:start])
    kind = np.dtype(kinds[content[2]])
    wanted = int(np.prod(shape, dtype=object)) * kind.itemsize
    if len(content) - start != wanted:
        raise ValueError(
            f"{len(content) - start:,} bytes of values where {list(shape)} needs {wanted:,}: the file is cut off or too long"
        )
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def h5py_module() -> Any:
    """h5py, or the error that says how to get it."""
    try:
        import h5py
    except ImportError:
        raise InputError("reading HDF5 needs h5py: pip install 'fisnet_cuda[train]'") from None
    return h5py
