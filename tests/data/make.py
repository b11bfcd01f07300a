"""Small real data sets for tests: files as people have them, of bright shapes that tell the class.

An image is noise with one bright shape, a disc (class 0), a square (class 1) or a cross (class 2), which is also its mask; with
``mark``, a square in a corner gives the class away as well, and is not in the mask.
"""

import csv
import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disc", "square", "cross")


def arrays(n: int = 24, size: int = 32, classes: int = 2, seed: int = 0, mark: bool = False, colour: bool = False):
    """Images uint8 [n, size, size] (or [n, size, size, 3]), masks uint8 0/255 [n, size, size], labels int64 [n], classes in turn."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = rng.integers(0, 60, (n, size, size), dtype=np.uint8)
    masks = np.zeros((n, size, size), np.uint8)
    labels = np.arange(n) % classes
    for i, label in enumerate(labels):
        radius = size / 5 + rng.uniform(0, size / 20)
        y, x = rng.uniform(radius + size / 8, size - radius - size / 8, 2)
        dy, dx = abs(rows - y), abs(columns - x)
        shape = (dy**2 + dx**2 < radius**2, np.maximum(dy, dx) < radius, np.minimum(dy, dx) * 3 + np.maximum(dy, dx) < radius * 1.5)
        masks[i][shape[label]] = 255
        images[i][shape[label]] += 150
        if mark:
            images[i][: size // 10 + 1, label * size // classes : label * size // classes + size // 10 + 1] = 255
    if colour:
        images = np.stack([images, images // 2, 255 - images], 3)
    return images, masks, labels


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    """Write an image file (its suffix says which kind), its folder too; ``mode``: converted to this mode of PIL first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def folder(
    root: Path, n: int = 24, size: int = 32, classes: int = 2, *, parallel: bool = True, mask_suffix: str = "", **options
) -> Path:
    """``images/<class>/003.png`` and ``masks/<class>/003.png``; ``parallel=False``: images/ only."""
    images, masks, labels = arrays(n, size, classes, **options)
    for i, label in enumerate(labels):
        save(root / "images" / CLASSES[label] / f"{i:03}.png", images[i])
        if parallel:
            save(root / "masks" / CLASSES[label] / f"{i:03}{mask_suffix}.png", masks[i], "1")
    return root


def suffix(root: Path, n: int = 24, size: int = 32, classes: int = 2, *, mask_suffix: str = "_mask", **options) -> Path:
    """``<class>/003.png`` with ``<class>/003_mask.png`` beside it."""
    images, masks, labels = arrays(n, size, classes, **options)
    for i, label in enumerate(labels):
        save(root / CLASSES[label] / f"{i:03}.png", images[i])
        save(root / CLASSES[label] / f"{i:03}{mask_suffix}.png", masks[i])
    return root


def table(
    root: Path, n: int = 24, size: int = 32, classes: int = 2, *, splits: bool = False, groups: int = 0, mask: bool = True, **options
) -> Path:
    """``data.csv`` with the columns image, mask, label [, split, group] over images/ and masks/; returns the path of the CSV."""
    images, masks, labels = arrays(n, size, classes, **options)
    header = ["image", *["mask"] * mask, "label", *["split"] * splits, *["group"] * bool(groups)]
    lines = []
    for i, label in enumerate(labels):
        save(root / "images" / f"{i:03}.png", images[i])
        if mask:
            save(root / "masks" / f"{i:03}.png", masks[i])
        cells = {"image": f"images/{i:03}.png", "mask": f"masks/{i:03}.png", "label": CLASSES[label]}
        cells |= {"split": ("train", "train", "val", "test")[i // classes % 4], "group": f"g{i // classes % max(groups, 1)}"}
        lines.append([cells[name] for name in header])
    with open(root / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return root / "data.csv"


def hdf5(path: Path, n: int = 24, size: int = 32, classes: int = 2, *, per_sample: bool = False, **options) -> Path:
    """Arrays images, masks, labels (texts), or a group a sample with image, mask and an attribute label."""
    import h5py

    images, masks, labels = arrays(n, size, classes, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if not per_sample:
            file["images"], file["masks"] = images, masks
            file["labels"] = [CLASSES[label] for label in labels]
            return path
        for i, label in enumerate(labels):
            group = file.create_group(f"case{i}")
            group["image"], group["mask"] = images[i], masks[i]
            group.attrs["label"] = CLASSES[label]
    return path


def npz(path: Path, n: int = 24, size: int = 32, classes: int = 2, *, mnist: bool = False, **options) -> Path:
    """Arrays images, masks, labels (numbers); ``mnist``: x_train, y_train, x_test, y_test instead, a quarter of them test."""
    images, masks, labels = arrays(n, size, classes, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    if mnist:
        cut = n - n // 4
        np.savez_compressed(path, x_train=images[:cut], y_train=labels[:cut], x_test=images[cut:], y_test=labels[cut:])
    else:
        np.savez_compressed(path, images=images, masks=masks, labels=labels)
    return path


def idx(root: Path, n: int = 24, size: int = 32, classes: int = 2, *, packed: bool = False, **options) -> Path:
    """MNIST's four files, a quarter of the images in t10k."""
    images, _, labels = arrays(n, size, classes, **options)
    cut = n - n // 4
    root.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", slice(0, cut)), ("t10k", slice(cut, n))):
        _write_idx(root / f"{name}-images-idx3-ubyte", images[part], packed)
        _write_idx(root / f"{name}-labels-idx1-ubyte", labels[part].astype(np.uint8), packed)
    return root


def _write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    if packed:
        path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
    path.write_bytes(content)
