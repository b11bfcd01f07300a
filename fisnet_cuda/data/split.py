"""Which samples train, validate and test: `split`, and the manifest that a run keeps of it."""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..files import write_text
from ._paths import missing, near, shown
from .samples import SPLITS, Listing, Sample

__all__ = ["Drift", "ManifestRow", "drift", "read_manifest", "split", "split_notes", "write_manifest"]

_COLUMNS = ("name", "label", "split", "group", "has_mask", "sha256")


def split(listing: Listing, fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0, keep_groups: bool = False) -> list[str]:
    """Assign each sample to "train", "val" or "test", each class (and in it, each group) in the same proportions.

    Splits that the data declare are kept, with two rules for what they leave open. A split of which the data declare no sample is
    carved out of the declared training samples (`split_notes` says so). Samples without a declaration go to training and to splits
    that are not declared: a declared validation or test set never grows. Samples without a label are in no split: "".

    Depends on names, labels, groups, fractions and the seed only: not on the order of the samples.

    Args:
        listing: the samples.
        fractions: shares of train, val and test; sum 1. A split of share 0 stays empty unless it is declared.
        seed: another seed, another draw.
        keep_groups: a group (a patient) is not torn apart but where the data declare it so: all of it goes to one split, the one that
            is declared for any of it. Shares are met as nearly as the groups' sizes allow.

    Returns:
        A split a sample, in the listing's order.

    Raises:
        InputError: fractions that are negative or do not sum to 1.

    Example:
        >>> from pathlib import Path
        >>> samples = tuple(Sample(f"{i}.png", Path(f"{i}.png"), label=i % 2) for i in range(20))
        >>> splits = split(Listing(samples, ("a", "b"), Path(), "folder"), fractions=(0.5, 0.2, 0.3))
        >>> [splits[0::2].count(name) for name in SPLITS], [splits[1::2].count(name) for name in SPLITS]
        ([5, 2, 3], [5, 2, 3])
    """
    shares = _shares(fractions)
    samples = listing.samples
    splits = ["" if sample.label is None else sample.split or "" for sample in samples]
    labelled = [i for i, sample in enumerate(samples) if sample.label is not None]
    declared = {samples[i].split for i in labelled} - {None}
    open_ = [name for name in SPLITS if name not in declared and shares[name] > 0]
    pool = [i for i in labelled if samples[i].split is None]
    if open_ and declared:
        pool += [i for i in labelled if samples[i].split == "train"]
    names = [name for name in SPLITS if name in open_ or (name == "train" and declared and shares[name] > 0)]
    if not names:  # of share 0, all of them
        names = ["train"]
    if keep_groups and declared:
        fixed = _fixed(samples, labelled, open_)
        for i in pool:
            splits[i] = samples[i].split or fixed.get(samples[i].group, "")
        pool = [i for i in pool if samples[i].group not in fixed]
    # names decide, not the order in which samples are listed
    pool.sort(key=lambda i: samples[i].name)
    assigned = _by_groups(samples, pool, names, shares, seed) if keep_groups else _by_class(samples, pool, names, shares, seed)
    for i, name in assigned.items():
        splits[i] = name
    return splits


def _shares(fractions: Sequence[float]) -> dict[str, float]:
    if len(fractions) != len(SPLITS):
        raise InputError(f"fractions must be three numbers (train, val, test), got {len(fractions)}")
    values = [float(fraction) for fraction in fractions]
    if not all(math.isfinite(value) and value >= 0 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise InputError(f"fractions (train, val, test) must be at least 0 and sum to 1, got {', '.join(f'{v:g}' for v in values)}")
    return dict(zip(SPLITS, values))


def _fixed(samples: Sequence[Sample], labelled: Sequence[int], open_: Sequence[str]) -> dict[str | None, str]:
    """Groups that a declaration binds. "train" binds nothing as long as other splits are carved out of it."""
    fixed: dict[str | None, str] = {}
    for i in labelled:
        sample = samples[i]
        if sample.group is not None and sample.split is not None and not (open_ and sample.split == "train"):
            first = fixed.get(sample.group)
            # declared in several: what is trained on must not come back in a test
            fixed[sample.group] = sample.split if first is None or first == "train" else first
    return fixed


def _generator(seed: int, *keys: object) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(keys).encode("utf-8", "backslashreplace"))])


def _by_class(
    samples: Sequence[Sample], pool: Sequence[int], names: Sequence[str], shares: dict[str, float], seed: int
) -> dict[int, str]:
    total = sum(shares[name] for name in names) or 1.0
    goal = {name: shares[name] / total if sum(shares[n] for n in names) else 1.0 for name in names}
    strata: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i in pool:
        strata[samples[i].label, samples[i].group or ""].append(i)
    assigned: dict[int, str] = {}
    overall: Counter[str] = Counter()
    for label in sorted({label for label, _ in strata}):
        here: Counter[str] = Counter()
        for key in sorted(key for key in strata if key[0] == label):
            members = strata[key]
            own: Counter[str] = Counter()
            for place, pick in enumerate(_generator(seed, *key).permutation(len(members))):
                # what is furthest behind its share: in the class, then in the group, then in all
                done = sum(here.values()) + 1
                behind = {
                    name: (
                        round(goal[name] * done - here[name], 9),
                        round(goal[name] * (place + 1) - own[name], 9),
                        round(goal[name] * (sum(overall.values()) + 1) - overall[name], 9),
                    )
                    for name in names
                }
                best = max(names, key=lambda name: behind[name])
                assigned[members[pick]] = best
                here[best] += 1
                own[best] += 1
                overall[best] += 1
    _fill(samples, pool, [[i] for i in pool], names, assigned, seed)
    return assigned


def _by_groups(
    samples: Sequence[Sample], pool: Sequence[int], names: Sequence[str], shares: dict[str, float], seed: int
) -> dict[int, str]:
    """Largest groups first, each to the split that is furthest behind its share of the group's classes."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in pool:
        group = samples[i].group
        groups[f"group {group}" if group is not None else f"sample {samples[i].name}"].append(i)
    total = sum(shares[name] for name in names)
    sizes = Counter(samples[i].label for i in pool)
    left = {(name, label): n * (shares[name] / total if total else 1.0) for name in names for label, n in sizes.items()}
    keys = sorted(groups)
    keys = [keys[k] for k in _generator(seed, "groups").permutation(len(keys))]
    assigned: dict[int, str] = {}
    for key in sorted(keys, key=lambda key: -len(groups[key])):
        counts = Counter(samples[i].label for i in groups[key])

        def change(name: str, counts: Counter = counts) -> float:
            """By how much the squared distance from the shares grows, classes weighing the same."""
            return sum(((left[name, c] - n) ** 2 - left[name, c] ** 2) / sizes[c] for c, n in counts.items())

        best = min(names, key=lambda name: round(change(name), 9))
        for i in groups[key]:
            assigned[i] = best
            left[best, samples[i].label] -= 1
    _fill(samples, pool, list(groups.values()), names, assigned, seed)
    return assigned


def _fill(
    samples: Sequence[Sample],
    pool: Sequence[int],
    units: Sequence[Sequence[int]],
    names: Sequence[str],
    assigned: dict[int, str],
    seed: int,
) -> None:
    """A split whose share is below one sample gets one all the same, while the largest can spare one."""
    for name in names:
        if name in assigned.values():
            continue
        held: dict[str, list[Sequence[int]]] = defaultdict(list)
        for unit in units:
            held[assigned[unit[0]]].append(unit)
        largest = max(held, key=lambda other: (len(held[other]), other == "train"), default=None)
        if largest is None or len(held[largest]) < 2:
            continue
        classes = Counter(samples[i].label for i, other in assigned.items() if other == largest)
        spare = min(held[largest], key=lambda unit: (len(unit), -classes[samples[unit[0]].label], samples[unit[0]].name))
        for i in spare:
            assigned[i] = name


def split_notes(listing: Listing, splits: Sequence[str]) -> list[str]:
    """What `split` did beyond what the data declare, in sentences for people; [] where it did nothing.

    Example:
        >>> from pathlib import Path
        >>> samples = tuple(Sample(f"{i}.png", Path(f"{i}.png"), label=i % 2, split="train" if i < 16 else "test") for i in range(20))
        >>> listing = Listing(samples, ("a", "b"), Path(), "folder")
        >>> split_notes(listing, split(listing))
        ['the data declare train and test only: 2 of 16 training images were taken for val']
    """
    samples = listing.samples
    declared = [name for name in SPLITS if any(s.split == name and s.label is not None for s in samples)]
    notes = []
    for name in SPLITS:
        taken = sum(s.split == "train" and after == name != "train" for s, after in zip(samples, splits))
        if taken and name not in declared:
            of = sum(s.split == "train" and s.label is not None for s in samples)
            notes.append(f"the data declare {' and '.join(declared)} only: {taken:,} of {of:,} training images were taken for {name}")
    free = Counter(after for s, after in zip(samples, splits) if s.split is None and s.label is not None and after in SPLITS)
    if declared and free:
        to = ", ".join(f"{free[name]:,} to {name}" for name in SPLITS if free[name])
        notes.append(f"{sum(free.values()):,} images have no declared split: {to}")
    return notes


class ManifestRow(NamedTuple):
    """A line of a manifest: label is the class's name; None where it is not known, as for the others."""

    label: str | None
    split: str | None
    group: str | None
    has_mask: bool
    sha256: str | None


def write_manifest(path: str | Path, listing: Listing, splits: Sequence[str], hashes: Sequence[str] = ()) -> Path:
    """Write which sample was in which split: CSV with the columns name, label, split, group, has_mask, sha256.

    Args:
        path: the file.
        listing: the samples.
        splits: a split (or test set) a sample.
        hashes: of the decoded images, a sample each; or none.

    Raises:
        InputError: the file cannot be written.
    """
    n = len(listing.samples)
    for name, values in (("splits", splits), ("hashes", hashes)):
        if len(values) != n and not (name == "hashes" and not len(values)):
            raise InputError(f"{name} must have an entry for each of the {n:,} samples, got {len(values):,}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for i, sample in enumerate(listing.samples):
        label = "" if sample.label is None else listing.classes[sample.label]
        row = (sample.name, label, splits[i], sample.group or "", int(sample.mask is not None), hashes[i] if len(hashes) else "")
        writer.writerow(row)
    return write_text(path, manifest_name(text.getvalue()))


def read_manifest(path: str | Path) -> dict[str, ManifestRow]:
    """What `write_manifest` wrote: name -> row.

    Raises:
        InputError: there is no such file, or it is no manifest; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise missing(path, "manifest") if not path.exists() else InputError(f"manifest {shown(path)} is a folder")
    rows: dict[str, ManifestRow] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            for column in _COLUMNS[:-1]:
                if column not in header:
                    raise InputError(f"{shown(path)} is no manifest: it has no column {column!r}{near(column, header)}")
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise InputError(f"{shown(path)}, line {lines.line_num}: {len(cells)} fields, but the header has {len(header)}")
                row = dict(zip(header, cells))
                if row["name"] in rows:
                    raise InputError(f"{shown(path)}, line {lines.line_num}: {shown(row['name'])} is there twice")
                if row["has_mask"] not in ("0", "1"):
                    raise InputError(f"{shown(path)}, line {lines.line_num}: has_mask must be 0 or 1, got {shown(row['has_mask'])!r}")
                rows[row["name"]] = ManifestRow(
                    row["label"] or None, row["split"] or None, row["group"] or None, row["has_mask"] == "1", row.get("sha256") or None
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the manifest {shown(path)}: {shown(error)}") from None
    return rows


class Drift(NamedTuple):
    """Names of samples that are ``new``, ``gone``, ``moved`` to another split, or of other pixels (``changed``) than in a manifest."""

    new: tuple[str, ...]
    gone: tuple[str, ...]
    moved: tuple[str, ...]
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (("new", self.new), ("gone", self.gone), ("in another split", self.moved), ("with other pixels", self.changed))
        return ", ".join(f"{len(names):,} {what} (such as {shown(names[0])})" for what, names in parts if names) or "no difference"


def drift(rows: Mapping[str, ManifestRow], listing: Listing, splits: Sequence[str], hashes: Sequence[str] = ()) -> Drift:
    """Compare what is in train, val, test and in no split with a manifest; further test sets do not count.

    `split` depends on all samples: with a few files more or fewer than in training, others change their place, and images that a
    network has learned from would be in its test.

    Args:
        rows: from `read_manifest`.
        listing: the samples of now.
        splits: a split (or test set) a sample.
        hashes: of the decoded images, where pixels shall be compared, too.

    Example:
        >>> from pathlib import Path
        >>> rows = {"a": ManifestRow("x", "train", None, True, None), "b": ManifestRow("x", "test", None, True, None)}
        >>> samples = tuple(Sample(name, Path(name), label=0) for name in "ac")
        >>> str(drift(rows, Listing(samples, ("x",), Path(), "folder"), ["test", "train"]))
        '1 new (such as c), 1 gone (such as b), 1 in another split (such as a)'
    """
    before = {name: row.split or "" for name, row in rows.items() if row.split is None or row.split in SPLITS}
    now = {manifest_name(sample.name): name for sample, name in zip(listing.samples, splits) if name in ("", *SPLITS)}
    known = {name: row.sha256 for name, row in rows.items() if row.sha256}
    pixels = {manifest_name(sample.name): sha for sample, sha in zip(listing.samples, hashes)}
    return Drift(
        tuple(name for name in now if name not in rows),
        tuple(name for name in before if name not in now),
        tuple(name for name in now if before.get(name, now[name]) != now[name]),
        tuple(name for name, sha in pixels.items() if name in now and known.get(name, sha) != sha),
    )


def manifest_name(name: str) -> str:
    """A sample's name as a manifest holds it: one that came from elsewhere may have a lone surrogate, which no UTF-8 file can."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
