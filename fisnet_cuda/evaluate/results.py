"""What an evaluation found: numbers by subset and run, and what they say in a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from . import metrics
from .collect import Collected
from .faithfulness import CURVES, areas
from .metrics import Classification, Estimate
from .swap import BackgroundSwap

__all__ = [
    "Attention",
    "Difference",
    "Insertion",
    "RunResult",
    "SubsetResult",
    "attention",
    "differences",
    "insertion",
    "leaves",
    "verdict",
]

# Names that say what a subset is for. Anything else is compared without a claim about why.
_USUAL = re.compile(r"(^|[^a-z])(biased|iid|in.?distribution|id|internal|seen)($|[^a-z])", re.I)
_BROKEN = re.compile(r"unbiased|confound|conflict|debiased|no.?(bias|shortcut|mark)|without|swap|shuffl|counter|randomi[sz]ed", re.I)


@dataclass(frozen=True)
class Attention:
    """Where the heatmaps of a subset lie.

    Attributes:
        n: images with a mask that has both foreground and background; only these count.
        without_mask, empty, full: images left out: no mask, a mask without foreground, a mask without background.
        share: mean background share of the absolute relevance, 0 to 1.
        area: mean share of the image that is background, what an even heatmap would have.
        quantiles: of the share, "5", "25", "50", "75" and "95" percent of the images lie below.
        histogram: images with a share in [0, 0.1), [0.1, 0.2) ... [0.9, 1].
        zero: heatmaps that are 0 everywhere, left out of the share.
        pointing: hits of the pointing game, share of ``n``; chance: what pointing anywhere would hit.
        without_positive: heatmaps without positive relevance, counted as misses.
    """

    n: int
    without_mask: int
    empty: int
    full: int
    share: Estimate
    area: float
    quantiles: Mapping[str, float]
    histogram: Sequence[int]
    zero: int
    pointing: Estimate
    chance: float
    without_positive: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "n": self.n,
            "left_out": {
                "without_mask": self.without_mask,
                "mask_without_foreground": self.empty,
                "mask_without_background": self.full,
            },
            "background_share": {
                **self.share.to_dict(),
                "even_heatmap": self.area,
                "quantiles": dict(self.quantiles),
                "histogram_of_tenths": list(self.histogram),
                "zero_heatmaps_left_out": self.zero,
            },
            "pointing_game": {**self.pointing.to_dict(), "chance": self.chance, "without_positive_relevance": self.without_positive},
        }

    @property
    def notes(self) -> list[str]:
        """What was left out, in words."""
        left = [
            (self.without_mask, "without a mask"),
            (self.empty, "whose mask has no foreground"),
            (self.full, "whose mask has no background"),
        ]
        lines = [f"{count} images {why} are left out of background share and pointing game" for count, why in left if count]
        if self.zero:
            lines.append(f"{self.zero} heatmaps are 0 everywhere: left out of the background share")
        if self.without_positive:
            lines.append(f"{self.without_positive} heatmaps have no positive relevance: misses of the pointing game")
        return lines


@dataclass(frozen=True)
class Insertion:
    """Insertion and deletion of a sample of a subset, areas from 0 to 1.

    Attributes:
        n: images.
        insertion, deletion: in the heatmap's order; insertion_random, deletion_random: in random order.
        insertion_gain: insertion - insertion_random of the same image; deletion_gain: deletion_random - deletion. Above 0: better
            than random order.
        curves: mean probability against the share of changed pixels, for each of the four.
    """

    n: int
    insertion: Estimate
    deletion: Estimate
    insertion_random: Estimate
    deletion_random: Estimate
    insertion_gain: Estimate
    deletion_gain: Estimate
    curves: Mapping[str, Sequence[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        values = {key: getattr(self, key).to_dict() for key in Insertion.__dataclass_fields__ if key not in ("n", "curves")}
        return {"n": self.n, **values, "mean_curves": {key: list(curve) for key, curve in self.curves.items()}}


@dataclass(frozen=True)
class SubsetResult:
    """All that was measured of one subset; ``attention`` is None without masks, ``insertion`` and ``swap`` without these tests.

    ``identity`` names each sample (a hash, say): runs with the same ones are compared image by image.
    """

    name: str
    classification: Classification
    attention: Attention | None
    insertion: Insertion | None
    collected: Collected = field(repr=False)
    identity: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    swap: BackgroundSwap | None = None

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "classification": self.classification.to_dict(classes),
            "attention": None if self.attention is None else self.attention.to_dict(),
            "insertion_deletion": None if self.insertion is None else self.insertion.to_dict(),
            "background_swap": None if self.swap is None else self.swap.to_dict(),
            "notes": self.all_notes,
        }

    @property
    def all_notes(self) -> list[str]:
        """Everything that a reader of the numbers must know."""
        left = {} if self.swap is None else self.swap.left_out
        return [
            *self.notes,
            *self.classification.notes,
            *([] if self.attention is None else self.attention.notes),
            *(f"{count} images {why} are left out of the background swap" for why, count in left.items()),
        ]


@dataclass(frozen=True)
class RunResult:
    """One network on all subsets.

    Attributes:
        name: what to call it.
        classes: in the order of the logits.
        subsets: by name, in the order of evaluation.
        facts: checkpoint, variant, data and the like, for the report.
    """

    name: str
    classes: tuple[str, ...]
    subsets: Mapping[str, SubsetResult]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "name": self.name,
            **self.facts,
            "classes": list(self.classes),
            "verdict": verdict(self),
            "subsets": {name: subset.to_dict(self.classes) for name, subset in self.subsets.items()},
        }


def attention(found: Collected, resamples: int, seed: int) -> Attention | None:
    """`Attention` of what was collected; None where no sample has a usable mask and none was left out for its mask."""
    counts = {kind: int((found.mask == kind).sum()) for kind in ("none", "empty", "full", "used")}
    if counts["none"] == len(found.mask):
        return None
    used = found.mask == "used"
    shares, strata = found.share[used], found.labels[used]
    zero = np.isnan(shares)
    shares, share_strata = shares[~zero], strata[~zero]
    quantiles = np.quantile(shares, [0.05, 0.25, 0.5, 0.75, 0.95]) if len(shares) else np.full(5, np.nan)
    n = counts["used"]
    return Attention(
        n=n,
        without_mask=counts["none"],
        empty=counts["empty"],
        full=counts["full"],
        share=metrics.mean(shares, share_strata, resamples, seed),
        area=float(found.area[used].mean()) if n else float("nan"),
        quantiles=dict(zip(("5", "25", "50", "75", "95"), map(float, quantiles))),
        histogram=np.histogram(shares, bins=10, range=(0, 1))[0].tolist(),
        zero=int(zero.sum()),
        pointing=metrics.proportion(float(found.hit[used].sum()), n),
        chance=float(found.chance[used].mean()) if n else float("nan"),
        without_positive=int((found.positive[used] == 0).sum()),
    )


def insertion(curves: Mapping[str, Tensor], pixels: int, labels: metrics.Ints, resamples: int, seed: int) -> Insertion:
    """`Insertion` of the four measured curves ``[n, steps + 1]`` of images of ``pixels``, with intervals."""
    values = {key: areas(curves[key], pixels).numpy() for key in CURVES}
    values["insertion_gain"] = values["insertion"] - values["insertion_random"]
    values["deletion_gain"] = values["deletion_random"] - values["deletion"]
    estimates = {key: metrics.mean(area, labels, resamples, seed) for key, area in values.items()}
    return Insertion(n=len(labels), **estimates, curves={key: curves[key].mean(0).tolist() for key in CURVES})


# ---- what it says --------------------------------------------------------------------------------------------------------


def leaves(run: RunResult) -> list[SubsetResult]:
    """Subsets that are not the union of others: "test" is left out beside "test/a" and "test/b"."""
    names = list(run.subsets)
    return [run.subsets[name] for name in names if not any(other.startswith(name + "/") for other in names)]


def reference(subsets: Sequence[SubsetResult]) -> SubsetResult:
    """What the others are compared with: the subset that looks like the training data by its name, else the largest.

    Where no name tells, subsets on which the network does no better than guessing stand back: on a set where the shortcut lies
    a net that has learned nothing else is wrong throughout, and the fall to it is what is to be seen.
    """
    intact = [s for s in subsets if not _BROKEN.search(s.name)]
    usual = [s for s in intact if _USUAL.search(s.name)]
    learned = [s for s in intact or subsets if s.classification.accuracy.low > s.classification.guessing]
    return max(usual or learned or intact or subsets, key=lambda s: s.classification.n)


def verdict(run: RunResult) -> str:
    """One or two sentences on whether the network's answers hold from subset to subset, and where it looks.

    A fall counts if the interval of the difference to the reference leaves out 0, at 95 % over all comparisons (Bonferroni).
    """
    subsets = [s for s in leaves(run) if s.classification.n]
    if not subsets:
        return "no image has a label: nothing to compare."
    base = reference(subsets)
    others = [s for s in subsets if s is not base]
    accuracy, guessing = base.classification.accuracy, base.classification.guessing
    if accuracy.low <= guessing:
        parts = [
            f"accuracy {_pc(accuracy.value)} ({base.name}) is not shown to be better than always answering the most frequent class "
            f"({_pc(guessing)}): there is nothing that could fall."
        ]
    else:
        parts = [_accuracy_text(base, others)]
    fell = parts[0].startswith("accuracy falls")
    look = _attention_text(subsets, base, fell)
    swapped = _swap_text(subsets, base, str(run.facts.get("variant", "")), bool(run.facts.get("swap_background")))
    return " ".join(filter(None, [*parts, look, swapped]))


def _swap_text(subsets: Sequence[SubsetResult], base: SubsetResult, variant: str, trained: bool) -> str:
    """Of the subset that warns the most; where none does, of the one that looks like the training data: its shortcut is intact."""
    seen = [s for s in subsets if s.swap is not None and s.swap.n]
    if not seen:
        return ""
    warned = [s for s in seen if s.swap.warns]
    subset = max(warned, key=lambda s: s.swap.gap.low) if warned else base if base in seen else seen[0]
    share = subset.attention.share.value if subset.attention is not None else float("nan")
    return f"Background swap ({subset.name}, {subset.swap.n} images): {subset.swap.says(share, variant, trained)}"


def _accuracy_text(base: SubsetResult, others: Sequence[SubsetResult]) -> str:
    a = base.classification
    if not others:
        return (
            f"accuracy {_pc(a.accuracy.value)} ({base.name}); one subset alone cannot tell whether the background is used: add one in "
            "which the shortcut is broken (--set)."
        )
    level = 1 - (1 - metrics.LEVEL) / len(others)
    worst = min(others, key=lambda s: s.classification.accuracy.value)
    gap = metrics.difference(_accuracy(a, level), _accuracy(worst.classification, level))
    here, there = f"{_pc(a.accuracy.value)} ({base.name})", f"{_pc(worst.classification.accuracy.value)} ({worst.name})"
    if gap.high < 0:
        text = f"accuracy falls from {here} to {there}"
        if _BROKEN.search(worst.name):
            amount = "uses the background" if gap.value < -0.1 else "uses the background a little"
            return f"{text}: the net {amount} (or whatever else tells {base.name} from {worst.name})."
        return f"{text}: what it learned does not hold there, or these images are harder."
    if gap.value >= 0:
        return f"accuracy holds: {here}, elsewhere at least {there}."
    far = max(0.0, -gap.low)
    if far <= 0.05:
        return f"accuracy holds: {here}, at the lowest {there}; a fall of more than {100 * far:.0f} points is ruled out."
    return f"no fall of accuracy is shown: {here}, at the lowest {there}; with so few images one of {100 * far:.0f} points is possible."


def _accuracy(c: Classification, level: float) -> Estimate:
    return metrics.proportion(int(np.diag(c.confusion).sum()), c.n, level)


def _attention_text(subsets: Sequence[SubsetResult], base: SubsetResult, fell: bool) -> str:
    seen = [s for s in subsets if s.attention is not None and s.attention.share.known]
    if not seen:
        return ""
    subset = base if base in seen else seen[0]
    share, area = subset.attention.share.value, subset.attention.area
    text = f"{_pc(share)} of its relevance lies in the background ({subset.name}; spread evenly it would be {_pc(area)})"
    if fell and share < 0.25 * area:
        return f"{text}: the heatmap is quiet although accuracy falls, so do not take it for proof."
    if share >= 0.9 * area:
        return f"{text}: it looks at the background as much as at the object."
    return f"{text}."


def _pc(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Difference:
    """A run against the first one, on one subset.

    Attributes:
        run, subset: which.
        paired: by image (same images in both); otherwise as independent samples.
        accuracy: difference of accuracies; share: of mean background shares, NaN where one has none.
    """

    run: str
    subset: str
    paired: bool
    accuracy: Estimate
    share: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "run": self.run,
            "subset": self.subset,
            "paired_by_image": self.paired,
            "accuracy": self.accuracy.to_dict(),
            "background_share": self.share.to_dict(),
        }


def differences(first: RunResult, other: RunResult, resamples: int, seed: int) -> list[Difference]:
    """Another run minus the first, on every subset that both have; by image where they saw the same ones."""
    return [_difference(first.subsets[name], other, name, resamples, seed) for name in first.subsets if name in other.subsets]


def _difference(a: SubsetResult, run: RunResult, name: str, resamples: int, seed: int) -> Difference:
    b = run.subsets[name]
    paired = bool(a.identity) and a.identity == b.identity and bool((a.collected.labels == b.collected.labels).all())
    if not paired:
        share = metrics.UNKNOWN
        if a.attention and b.attention and a.attention.share.known and b.attention.share.known:
            share = metrics.difference(a.attention.share, b.attention.share)
        known = a.classification.n and b.classification.n
        accuracy = metrics.difference(a.classification.accuracy, b.classification.accuracy) if known else metrics.UNKNOWN
        return Difference(run.name, name, False, accuracy, share)
    labels = a.collected.labels
    known = labels >= 0
    right = (b.collected.predicted == labels).astype(float) - (a.collected.predicted == labels).astype(float)
    shares = b.collected.share - a.collected.share
    both = ~np.isnan(shares)
    return Difference(
        run.name,
        name,
        True,
        metrics.mean(right[known], labels[known], resamples, seed),
        metrics.mean(shares[both], labels[both], resamples, seed),
    )
