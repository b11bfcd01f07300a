"""What was found in a data set, before anything is trained on it: `DataReport`."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

from ..isnet.loss import MaskReport
from ._paths import first_few, natural, shown
from .samples import SPLITS, Listing
from .split import split_notes

__all__ = ["DataReport"]

_MOST_GROUPS = 12  # rows of the table of groups
_WIDTH = 100


class _Read(Protocol):
    """What the report needs of a `Store`."""

    facts: Sequence[Any]
    hashes: Sequence[str]


@dataclass(frozen=True)
class DataReport:
    """Pairs, classes, splits, masks and duplicates of a data set; ``print`` it, or see `problems` for what needs a look.

    Attributes:
        root, form: where the data lie, and how.
        classes: names, in the order of the logits.
        images: how many.
        pairs: images with a mask.
        counts: split (or test set; "" for none) -> class -> images. The class "" stands for images without a label.
        groups: group -> split -> images; empty where the data name no groups.
        groups_by_class: group -> class -> images in the training split: a group that holds one class is a shortcut.
        sizes: (height, width) of the files -> images.
        modes: how pixels are stored -> images.
        images_without_mask, masks_without_image, ignored: see `Listing`.
        mask_kinds: see `fisnet_cuda.data.images.MASK_KINDS`; kind -> masks.
        foreground: smallest, median and largest share of the area that is foreground, in [0, 1]; None without masks.
        bad_masks: "empty", "full", "inverted", "lost", and "other" for a shape that is not its image's -> names of the samples.
        scaled_masks: masks of another size than their image's, but its shape.
        leaks: images (by decoded pixels) that are in more than one split: tuples of (split, name).
        repeats: the same images more than once in one split; tuples of names.
        contradictions: the same image with different labels; tuples of (class, name).
        torn_groups: groups with images in several splits; only counted against the data where ``keep_groups`` was asked for.
        notes: what was decided for the user, in sentences.
        kept_groups: whether groups were to be kept whole.

    Example:
        >>> from pathlib import Path
        >>> from fisnet_cuda.data.images import Facts
        >>> from fisnet_cuda.data.samples import Sample
        >>> samples = tuple(Sample(f"{i}.png", Path(f"{i}.png"), None, i % 2) for i in range(4))
        >>> listing = Listing(samples, ("normal", "TB"), Path("xrays"), "folder", tuple(s.name for s in samples))
        >>> report = DataReport.make(listing, ["train", "train", "test", "test"], [Facts("abab"[i], 64, 64, "L") for i in range(4)])
        >>> report.counts["train"], report.leaks[0]
        ({'normal': 1, 'TB': 1}, (('train', '0.png'), ('test', '2.png')))
    """

    root: str
    form: str
    classes: tuple[str, ...]
    images: int
    pairs: int
    counts: dict[str, dict[str, int]]
    groups: dict[str, dict[str, int]]
    groups_by_class: dict[str, dict[str, int]]
    sizes: dict[tuple[int, int], int]
    modes: dict[str, int]
    images_without_mask: tuple[str, ...] = ()
    masks_without_image: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    mask_kinds: dict[str, int] = field(default_factory=dict)
    foreground: tuple[float, float, float] | None = None
    bad_masks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scaled_masks: int = 0
    leaks: tuple[tuple[tuple[str, str], ...], ...] = ()
    repeats: tuple[tuple[str, ...], ...] = ()
    contradictions: tuple[tuple[tuple[str, str], ...], ...] = ()
    torn_groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kept_groups: bool = False

    @classmethod
    def of(cls, listing: Listing, splits: Sequence[str], store: _Read, keep_groups: bool = False) -> DataReport:
        """The report of a store: ``store.facts`` (`Facts`, or dicts of these) and ``store.hashes``, in the listing's order."""
        return cls.make(listing, splits, store.facts, store.hashes, keep_groups)

    @classmethod
    def make(
        cls,
        listing: Listing,
        splits: Sequence[str],
        facts: Sequence[Any],
        hashes: Sequence[str] | None = None,
        keep_groups: bool = False,
    ) -> DataReport:
        """The report of a listing, of its splits, and of what was found when its files were read.

        Args:
            listing: the samples.
            splits: a split or test set a sample; "" for none.
            facts: `Facts` a sample, or dicts of these.
            hashes: of the decoded images; None: those of ``facts``.
            keep_groups: groups were to be kept whole, and are a problem where they are not.
        """
        samples = listing.samples
        found = [fact if isinstance(fact, Mapping) else fact._asdict() for fact in facts]
        hashes = [fact["sha256"] for fact in found] if hashes is None else hashes
        for name, values in (("splits", splits), ("facts", facts), ("hashes", hashes)):
            if len(values) != len(samples):
                raise ValueError(f"{name} must have an entry for each of the {len(samples)} samples, got {len(values)}")
        labels = ["" if sample.label is None else listing.classes[sample.label] for sample in samples]
        counts = {name: dict.fromkeys(listing.classes, 0) for name in _ordered(splits)}
        groups: dict[str, dict[str, int]] = {}
        by_class: dict[str, dict[str, int]] = {}
        any_groups = any(sample.group is not None for sample in samples)
        for sample, name, label in zip(samples, splits, labels):
            counts[name][label] = counts[name].get(label, 0) + 1
            if any_groups:
                row = groups.setdefault(sample.group or "", {})
                row[name] = row.get(name, 0) + 1
                if name == "train" and label:
                    row = by_class.setdefault(sample.group or "", dict.fromkeys(listing.classes, 0))
                    row[label] += 1
        masked = [(sample, fact) for sample, fact in zip(samples, found) if sample.mask is not None]
        shares = [fact["share"] for _, fact in masked if fact["share"] is not None]
        bad: dict[str, tuple[str, ...]] = {}
        for state in ("empty", "full", "inverted", "lost"):
            bad[state] = tuple(sample.name for sample, fact in masked if fact["mask_state"] == state)
        bad["other"] = tuple(sample.name for sample, fact in masked if fact["mask_size"] == "other")
        leaks, repeats, contradictions = _duplicates([sample.name for sample in samples], splits, labels, hashes)
        torn = [group for group, row in groups.items() if group and len([name for name in row if name in SPLITS]) > 1]
        return cls(
            root=shown(listing.root),
            form=listing.form,
            classes=listing.classes,
            images=len(samples),
            pairs=len(masked),
            counts=counts,
            groups=dict(sorted(groups.items(), key=lambda item: natural(item[0]))),
            groups_by_class=dict(sorted(by_class.items(), key=lambda item: natural(item[0]))),
            sizes=dict(Counter((fact["height"], fact["width"]) for fact in found).most_common()),
            modes=dict(Counter(fact["mode"] for fact in found).most_common()),
            images_without_mask=listing.images_without_mask,
            masks_without_image=listing.masks_without_image,
            ignored=listing.ignored,
            mask_kinds=dict(Counter(fact["mask_kind"] for _, fact in masked).most_common()),
            foreground=(min(shares), statistics.median(shares), max(shares)) if shares else None,
            bad_masks={state: names for state, names in bad.items() if names},
            scaled_masks=sum(fact["mask_size"] == "scaled" for _, fact in masked),
            leaks=leaks,
            repeats=repeats,
            contradictions=contradictions,
            torn_groups=tuple(sorted(torn, key=natural)),
            notes=tuple(split_notes(listing, splits)),
            kept_groups=keep_groups,
        )

    @property
    def mask_report(self) -> MaskReport:
        """The counts of `fisnet_cuda.check_masks`, taken in the masks' own resolution."""
        count = {state: len(self.bad_masks.get(state, ())) for state in ("empty", "full", "inverted")}
        return MaskReport(self.images, self.images - self.pairs, **count)

    def problems(self) -> list[str]:
        """What needs a look before training, the worst first, each in a sentence that says what to do; [] is good."""
        return [
            *self._duplicate_problems(),
            *self._class_problems(),
            *self._mask_problems(),
            *self._file_problems(),
        ]

    def _duplicate_problems(self) -> list[str]:
        problems = []
        if self.leaks:
            pairs = Counter(pair for leak in self.leaks for pair in combinations(_ordered({split for split, _ in leak}), 2))
            between = ", ".join(f"{a or 'no split'} and {b or 'no split'}: {n:,}" for (a, b), n in pairs.items())
            names = [" = ".join(f"{name} ({split or 'no split'})" for split, name in leak[:2]) for leak in self.leaks]
            problems.append(
                f"LEAK: {_are(len(self.leaks), 'image')} in more than one split ({between}): {first_few(names)}. Results on "
                f"these are not to be trusted: remove the copies, or give them one group and keep groups whole."
            )
        if self.kept_groups and self.torn_groups:
            problems.append(
                f"LEAK: {_are(len(self.torn_groups), 'group')} in more than one split, because the data declare it so: "
                f"{first_few(self.torn_groups)}. Correct the declared splits."
            )
        if self.contradictions:
            names = [" = ".join(f"{name} ({label or 'no label'})" for label, name in one[:2]) for one in self.contradictions]
            n = len(self.contradictions)
            problems.append(
                f"{n:,} {_s(n, 'image')} {'has a copy' if n == 1 else 'have copies'} of another class: {first_few(names)}. "
                f"Correct the labels."
            )
        if self.repeats:
            copies = sum(len(one) - 1 for one in self.repeats)
            names = [" = ".join(one[:2]) for one in self.repeats]
            repeat = "repeats" if copies == 1 else "repeat"
            problems.append(f"{copies:,} {_s(copies, 'image')} {repeat} another one of the same split: {first_few(names)}.")
        return problems

    def _class_problems(self) -> list[str]:
        problems = []
        folded = defaultdict(list)
        for name in self.classes:
            folded[name.casefold().strip()].append(name)
        for names in folded.values():
            if len(names) > 1:
                problems.append(f"classes {' and '.join(map(repr, map(shown, names)))} differ by case only: are they one class?")
        labelled = [name for name in SPLITS if any(n for label, n in self.counts.get(name, {}).items() if label)]
        for name in labelled:
            gone = [shown(label) for label in self.classes if not self.counts[name].get(label)]
            if gone:
                what = "it cannot be learned" if name == "train" else "its results there are not defined"
                problems.append(f"{name} has no image of {first_few(gone)}: {what}.")
        train = [self.counts.get("train", {}).get(label, 0) for label in self.classes]
        if len(train) > 1 and min(train) > 0 and max(train) >= 10 * min(train):
            low, high = self.classes[train.index(min(train))], self.classes[train.index(max(train))]
            problems.append(
                f"classes are unequal: {max(train):,} training images of {shown(high)}, {min(train):,} of {shown(low)}. Consider "
                f"balanced sampling or class weights, and look at balanced accuracy."
            )
        rows = {group: row for group, row in self.groups_by_class.items() if group}
        pure = [group for group, row in rows.items() if sum(row.values()) >= 5 and sum(n > 0 for n in row.values()) == 1]
        if 1 < len(rows) <= _MOST_GROUPS and pure and len(self.classes) > 1:  # more groups are patients, who have one class each
            names = [f"{shown(group)} ({next(label for label, n in rows[group].items() if n)})" for group in pure]
            problems.append(
                f"SHORTCUT: training images of a group are all of one class: {first_few(names)}. What tells the groups "
                f"apart tells the class, too: masks and a test set without this coupling matter here."
            )
        if self.counts.get("", {}).get("", 0):
            n = self.counts[""][""]
            problems.append(f"{_are(n, 'image')} without a label: left out of training and evaluation, prediction reads them.")
        return problems

    def _mask_problems(self) -> list[str]:
        problems = []
        advice = {
            "empty": ("empty (nothing is foreground)", "Such masks raise the loss and teach nothing: leave them away."),
            "full": ("without background", "Such masks teach the network nothing about it."),
            "inverted": ("apparently inverted (white along the border, less inside)", "Invert the masks if white means background."),
            "lost": (
                "empty after resizing",
                "The foreground is too small for the network's input: use a larger size, a lower mask threshold or soft masks.",
            ),
            "other": (
                "of another shape than the image",
                "Masks are stretched to their images: see that they lie on what they should.",
            ),
        }
        for state, (what, todo) in advice.items():
            names = self.bad_masks.get(state, ())
            if names:
                problems.append(f"{self._of_masks(len(names))} {'is' if len(names) == 1 else 'are'} {what}: {first_few(names)}. {todo}")
        grey = self.mask_kinds.get("soft", 0)
        if grey:
            problems.append(f"{self._of_masks(grey)} {_hold(grey)} grey levels: look at a few, and at the threshold.")
        labels = sum(self.mask_kinds.get(kind, 0) for kind in ("labels", "palette", "colour"))
        if labels:
            problems.append(
                f"{self._of_masks(labels)} {_hold(labels)} labels or colours: all but 0 (black) is taken as foreground. Name the "
                f"values that are foreground if that is wrong."
            )
        if self.pairs and self.images_without_mask:
            n = len(self.images_without_mask)
            names = first_few(self.images_without_mask)
            problems.append(f"{_are(n, 'image')} without a mask: {names}. The heatmap loss leaves {'it' if n == 1 else 'them'} out.")
        if self.masks_without_image:
            n = len(self.masks_without_image)
            problems.append(f"{_are(n, 'mask')} without an image: {first_few(self.masks_without_image)}.")
        return problems

    def _of_masks(self, n: int) -> str:
        return f"{n:,} of {self.pairs:,} {_s(self.pairs, 'mask')}"

    def _file_problems(self) -> list[str]:
        problems = []
        reasons = defaultdict(list)
        for line in self.ignored:
            name, _, reason = line.rpartition(": ")
            if reason != "hidden" and not reason.startswith("not an image"):  # as expected; counted in the table
                reasons[reason].append(name)
        for reason, names in reasons.items():
            problems.append(f"{len(names):,} {_s(len(names), 'file')} left out, {reason}: {first_few(names)}.")
        bits = [mode for mode in self.modes if mode.startswith(("I", "int", "uint16", "uint32", "F", "float"))]
        if len(self.modes) > 1 and bits and len(bits) < len(self.modes):
            problems.append("files of 8 bits and of more are mixed: see that black and white mean the same in them (window).")
        return problems

    # ------------------------------------------------------------------------------------------------------------------
    # For people, and for files

    def __str__(self) -> str:
        classes = f"{len(self.classes):,} {'class' if len(self.classes) == 1 else 'classes'}" if self.classes else "no labels"
        lines = [f"Data     {self.root} ({self.form}): {_images(self.images)}, {classes}", ""]
        lines += self._split_table()
        if self.groups:
            lines += ["", *self._group_table()]
        lines += ["", *self._about()]
        problems = self.problems()
        lines += ["", *_wrap(f"Note     {note}." for note in self.notes)]
        if not problems:
            masks = ", no empty, full or inverted mask, every image has one" if self.pairs else ""
            lines.append(f"Checks   nothing wrong: no copy of an image in another split or class{masks}")
        else:
            lines.append(f"Look at  {len(problems)} {_s(len(problems), 'thing')} before training:")
            lines += _wrap(f"   {i}. {problem}" for i, problem in enumerate(problems, 1))
        return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"

    def _split_table(self) -> list[str]:
        columns = list(self.counts)
        labels = [*self.classes, *([""] if any("" in row for row in self.counts.values()) else [])]
        rows = [[shown(label) if label else "(no label)", *(self.counts[name].get(label, 0) for name in columns)] for label in labels]
        return _table("class", [name or "(no split)" for name in columns], rows)

    def _group_table(self) -> list[str]:
        columns = list(self.counts)
        if len(self.groups) > _MOST_GROUPS:
            sizes = [sum(row.values()) for row in self.groups.values()]
            size = f"{min(sizes):,} to {max(sizes):,} images each" if min(sizes) < max(sizes) else f"{_images(sizes[0])} each"
            return [f"Groups   {len(self.groups):,}, {size}; {self._torn()}"]
        rows = [
            [shown(group) if group else "(no group)", *(row.get(name, 0) for name in columns)] for group, row in self.groups.items()
        ]
        return _table("group", [name or "(no split)" for name in columns], rows, total=False)

    def _torn(self) -> str:
        if not self.torn_groups:
            return "each in one split"
        n = len(self.torn_groups)
        return f"{n:,} of them in several splits" + ("" if self.kept_groups else " (keep_groups keeps patients or the like whole)")

    def _about(self) -> list[str]:
        sizes = [f"{w} x {h}" for h, w in self.sizes]
        if len(sizes) == 1:
            size = f"all {sizes[0]}"
        elif len(sizes) <= 3:
            size = ", ".join(f"{text} ({n:,})" for text, n in zip(sizes, self.sizes.values()))
        else:
            h, w = ([size[k] for size in self.sizes] for k in (0, 1))
            size = f"{len(sizes):,} sizes, {min(w):,} to {max(w):,} wide, {min(h):,} to {max(h):,} high"
        kinds = ", ".join(f"{kind} ({n:,})" if len(self.mask_kinds) > 1 else str(kind) for kind, n in self.mask_kinds.items())
        modes = ", ".join(f"{mode} ({n:,})" if len(self.modes) > 1 else mode for mode, n in self.modes.items())
        lines = [f"Images   {size} pixels; stored as {modes}"]
        if not self.pairs:
            lines.append("Masks    none: a standard classifier can be trained, an ISNet needs masks")
        else:
            of = "all" if self.pairs == self.images else f"{self.pairs:,} of {self.images:,}"
            scaled = f"; {self.scaled_masks:,} scaled to their image" if self.scaled_masks else ""
            lines.append(f"Masks    {of} images have one; {kinds}{scaled}")
            if self.foreground:
                low, middle, high = (_percent(share) for share in self.foreground)
                lines.append(f"         foreground: {middle} of the area in the median, from {low} to {high}")
        if self.ignored:
            reasons = Counter(line.rpartition(": ")[2] for line in self.ignored)
            few = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(4)) + (", ..." if len(reasons) > 4 else "")
            lines.append(f"Ignored  {len(self.ignored):,} {_s(len(self.ignored), 'file')}: {few}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, for JSON."""
        return {
            "root": self.root,
            "form": self.form,
            "classes": list(self.classes),
            "images": self.images,
            "pairs": self.pairs,
            "counts": self.counts,
            "groups": self.groups,
            "training_groups_by_class": self.groups_by_class,
            "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in self.sizes.items()],
            "modes": self.modes,
            "images_without_mask": list(self.images_without_mask),
            "masks_without_image": list(self.masks_without_image),
            "ignored": list(self.ignored),
            "mask_kinds": self.mask_kinds,
            "foreground": dict(zip(("min", "median", "max"), self.foreground)) if self.foreground else None,
            "bad_masks": {state: list(names) for state, names in self.bad_masks.items()},
            "scaled_masks": self.scaled_masks,
            "duplicates_across_splits": [[{"split": split, "name": name} for split, name in leak] for leak in self.leaks],
            "duplicates_within_a_split": [list(names) for names in self.repeats],
            "contradicting_labels": [[{"class": label, "name": name} for label, name in one] for one in self.contradictions],
            "groups_in_several_splits": list(self.torn_groups),
            "notes": list(self.notes),
            "problems": self.problems(),
        }


def _ordered(splits: Any) -> list[str]:
    """train, val, test, then other test sets in order of their names, "" last."""
    known = set(splits)
    return [*(name for name in SPLITS if name in known), *sorted(known - {*SPLITS, ""}), *([""] if "" in known else [])]


def _duplicates(
    names: Sequence[str], splits: Sequence[str], labels: Sequence[str], hashes: Sequence[str]
) -> tuple[tuple, tuple, tuple]:
    same: dict[str, list[int]] = defaultdict(list)
    for i, sha in enumerate(hashes):
        if sha:
            same[sha].append(i)
    leaks, repeats, contradictions = [], [], []
    for members in same.values():
        if len(members) < 2:
            continue
        by_split: dict[str, list[int]] = defaultdict(list)
        for i in members:
            by_split[splits[i]].append(i)
        if len([name for name in by_split if name]) > 1:
            one = [(name, names[by_split[name][0]]) for name in _ordered(by_split) if name]
            leaks.append(tuple(one + [(splits[i], names[i]) for i in members if splits[i] and (splits[i], names[i]) not in one]))
        repeats += [tuple(names[i] for i in inside) for inside in by_split.values() if len(inside) > 1]
        known = {labels[i]: i for i in reversed(members) if labels[i]}
        if len(known) > 1:
            contradictions.append(tuple((label, names[i]) for label, i in sorted(known.items(), key=lambda item: item[1])))
    return tuple(leaks), tuple(repeats), tuple(contradictions)


def _table(head: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], total: bool = True) -> list[str]:
    """Aligned columns of counts with a last column of sums, and a last row of sums; zeros are shown as "-"."""
    body = [[*row, sum(row[1:])] for row in rows]
    if total and len(rows) > 1:
        body.append(["all", *(sum(row[k] for row in body) for k in range(1, len(columns) + 2))])
    texts = [[head, *columns, "all"], *([str(row[0]), *(f"{n:,}" if n else "-" for n in row[1:])] for row in body)]
    wide = max(9, *(len(row[0]) for row in texts))
    widths = [max(7, *(len(row[k]) for row in texts)) for k in range(1, len(columns) + 2)]
    lines = ["  ".join([row[0].ljust(wide), *(text.rjust(width) for text, width in zip(row[1:], widths))]).rstrip() for row in texts]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _wrap(lines: Any) -> list[str]:
    """Lines broken at spaces, the rest indented as the first word's text is."""
    out = []
    for line in lines:
        indent = " " * (line.index(". ") + 2 if line.startswith("   ") else 9)
        while len(line) > _WIDTH:
            cut = line.rfind(" ", len(indent) + 1, _WIDTH + 1)
            if cut < 0:
                break
            out.append(line[:cut])
            line = indent + line[cut + 1 :]
        out.append(line)
    return out


def _s(n: int, noun: str) -> str:
    return noun if n == 1 else noun + "s"


def _images(n: int) -> str:
    return f"{n:,} {_s(n, 'image')}"


def _hold(n: int) -> str:
    return "holds" if n == 1 else "hold"


def _are(n: int, noun: str) -> str:
    return f"{n:,} {_s(n, noun)} {'is' if n == 1 else 'are'}"


def _percent(share: float) -> str:
    """Two digits that count: 0.034 %, 3.4 %, 34 %."""
    value = 100 * share
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f} %"
    return f"{value:.{max(0, min(3, 1 - math.floor(math.log10(value))))}f} %"
