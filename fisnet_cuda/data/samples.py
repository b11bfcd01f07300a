"""What lies on the disk, before anything of it is read: `Sample`, and `Listing`, all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["SPLITS", "ArrayItem", "Listing", "Sample"]

SPLITS = ("train", "val", "test")


class ArrayItem(NamedTuple):
    """Entry ``index`` of the array ``key`` in an HDF5, npz or idx file."""

    file: Path
    key: str
    index: int


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    Attributes:
        name: unique, for people and manifests: the path relative to the data, or "file.h5:17".
        image: where it is.
        mask: where its mask is; None: it has none.
        label: index into `Listing.classes`; None where the label is not known (prediction only).
        split: "train", "val" or "test" where the data say so.
        group: what results are told apart by (a site, a subset: "biased", "unbiased"), and what is never torn apart by a split
            if `keep_groups` asks for it (a patient).
    """

    name: str
    image: Path | ArrayItem
    mask: Path | ArrayItem | None = None
    label: int | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Listing:
    """All samples of a data set and what did not fit.

    Attributes:
        samples: in a fixed order that does not depend on the file system.
        classes: names, in the order of the logits; numbers are sorted as numbers.
        root: what names are relative to.
        form: "folder", "csv", "suffix", "list", "hdf5", "npz" or "idx".
        images_without_mask: names; allowed, and reported.
        masks_without_image: paths; reported.
        ignored: files that are neither, with the reason in words.
    """

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    root: Path
    form: str
    images_without_mask: tuple[str, ...] = ()
    masks_without_image: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())
