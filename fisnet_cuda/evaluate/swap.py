"""The background swap: does a classifier use the background, asked without data in which the shortcut is broken.

A heatmap can be quiet while the classifier is not clean: an activation far below epsilon keeps its effect on the logits and loses its
relevance. So the question is put to the logits. Every image's foreground is pasted onto the background of another image,

    x' = M x + (1 - M) b,      b = the other image with its own object filled in,

once of an image of the *same* class (the control: pasting disturbs by itself) and once of *another* class (the test). What a classifier
that ignores the background answers is the same in both; one that uses it follows the foreign background.

Limits: what lies inside the mask is never tested. Composites have seams and filled holes, which a classifier may dislike; that is
what the control is for, and where pasting alone costs much accuracy the test is blunt; where one class's images are brighter than
another's, its seams are stronger than the control's, and the gap may be theirs: then ``follows`` does not exceed ``chance`` (with two
classes this cannot be told, a wrong answer is the donor's class). It needs masks, at least two classes with at least two images, and
a shortcut that varies between the classes: a hint that is the same for all classes is not seen. What reaches over the mask (the
object's shadow, say) counts as background. And a background may be evidence, not bias (a boat on water): the number says that it is
used, not that this is wrong.

Relatives: Xiao et al. 2021, "Noise or signal: the role of image backgrounds in object recognition" (mixed-same, mixed-rand; the
"BG-gap" is their difference) on ImageNet-9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.backgrounds import (
    EMPTY,
    FULL,
    NONE,
    USED,
    check_composite,
    default_margin,
    dilate,
    fill_foreground,
    mask_kinds,
    swap_backgrounds,
)
from ..errors import InputError
from . import metrics
from .metrics import Estimate

__all__ = [
    "BackgroundSwap", "SwapPlan", "background_swap", "choose_donors", "choose_images", "fill_foreground", "mask_kinds", "plan_swap",
    "swap_backgrounds", "swap_sums",
]  # fmt: skip

# When a gap counts as a hold of the background on the decision. One place: everything that warns asks `BackgroundSwap.warns`.
GAP = 0.05  # the gap itself must exceed this, and
GAP_LOW = 0.02  # the lower end of its 95 % interval this
GAP_HIGH = 0.10  # "holds" is said where the upper end is below this: few images that all agree prove little
QUIET = 0.05  # background share of the heatmap below which it shows nothing of it
BLUNT = 0.10  # accuracy that pasting alone may cost before the test is called blunt

LEFT_OUT = ("without a mask", "whose mask has no foreground", "whose mask has no background", "without a label", "alone in their class",
            "without an image of another class")  # fmt: skip

Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]


# ---- who gives a background to whom --------------------------------------------------------------------------------------


def choose_donors(labels: Tensor, usable: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """For every image one of the same class and one of another, a function of the arguments alone.

    Same class: a random cycle through the class, so that nobody is its own donor and everybody gives once. Another class: uniform
    over the other classes, then over their images.

    Args:
        labels: classes ``[N]``, ints.
        usable: bool ``[N]``: which images take part.
        seed: of the draws.

    Returns:
        ``same``, ``other``: int64 ``[N]`` positions, -1 where there is none or the image does not take part.

    Example:
        >>> same, other = choose_donors(torch.tensor([0, 0, 1, 1, 2]), torch.ones(5, dtype=torch.bool))
        >>> same.tolist(), [int(i) for i in other[:2] >= 2]
        ([1, 0, 3, 2, -1], [1, 1])
    """
    rng = np.random.default_rng([seed, 0x5A])
    y, places = labels.cpu().numpy(), np.flatnonzero(usable.cpu().numpy())
    same, other = np.full(len(y), -1), np.full(len(y), -1)
    classes = np.unique(y[places])
    members = [rng.permutation(places[y[places] == c]) for c in classes]
    for of_class in members:
        if len(of_class) > 1:
            same[of_class] = np.roll(of_class, 1)
    if len(classes) > 1:
        mine = np.searchsorted(classes, y[places])
        theirs = rng.integers(0, len(classes) - 1, len(places))
        theirs += theirs >= mine
        counts = np.array([len(of_class) for of_class in members])
        which = np.minimum((rng.random(len(places)) * counts[theirs]).astype(int), counts[theirs] - 1)
        other[places] = [members[c][k] for c, k in zip(theirs, which)]
    return torch.as_tensor(same), torch.as_tensor(other)


def choose_images(labels: Tensor, usable: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most ``count`` usable images, drawn at random in pairs of a class, so that with many classes none stays without a donor.

    Args:
        labels: classes ``[N]``, ints.
        usable: bool ``[N]``.
        count: how many; one less where the last pair does not fit.
        seed: of the draw.

    Returns:
        Positions, int64, ascending.

    Example:
        >>> drawn = choose_images(torch.arange(200) % 100, torch.ones(200, dtype=torch.bool), 40)
        >>> len(drawn), len((drawn % 100).unique())
        (40, 20)
    """
    y, mask = labels.cpu().numpy(), usable.cpu().numpy()
    order = np.random.default_rng([seed, 0x1A]).permutation(np.flatnonzero(mask))
    if len(order) <= count:
        return torch.as_tensor(np.sort(order))
    seen: dict[int, int] = {}
    pairs: dict[tuple[int, int], list[int]] = {}  # in the order of their first images
    for place in order.tolist():
        c = int(y[place])
        seen[c] = seen.get(c, -1) + 1
        pairs.setdefault((c, seen[c] // 2), []).append(place)
    drawn: list[int] = []
    for pair in pairs.values():
        if len(drawn) + len(pair) <= count:
            drawn += pair
    return torch.as_tensor(sorted(drawn), dtype=torch.int64)


@dataclass(frozen=True)
class SwapPlan:
    """Which images take which backgrounds.

    Attributes:
        rows: positions of the images that are tested, int64 ``[n]``.
        labels: their classes; same, other: positions of their donors; donor_labels: classes of the other-class donors; all ``[n]``.
        left_out: why -> how many images are not tested.
        guessing: accuracy of always answering the most frequent class.
    """

    rows: Tensor
    labels: Tensor
    same: Tensor
    other: Tensor
    donor_labels: Tensor
    left_out: Mapping[str, int]
    guessing: float


def plan_swap(labels: Tensor, kinds: Tensor, seed: int = 0) -> SwapPlan:
    """A `SwapPlan` of images with ``labels [N]`` (-1: unknown) and masks of the kinds (`mask_kinds`) ``[N]``."""
    labels, kinds = labels.cpu().long(), kinds.cpu()
    usable = (kinds == USED) & (labels >= 0)
    same, other = choose_donors(labels, usable, seed)
    tested = usable & (same >= 0) & (other >= 0)
    single = usable & (other < 0)
    reasons = [kinds == NONE, kinds == EMPTY, kinds == FULL, (kinds == USED) & (labels < 0), usable & (same < 0) & ~single, single]
    rows = tested.nonzero()[:, 0]
    chosen = labels[rows]
    guessing = float(chosen.bincount().max()) / len(rows) if len(rows) else math.nan
    left_out = {why: int(which.sum()) for why, which in zip(LEFT_OUT, reasons) if which.any()}
    return SwapPlan(rows, chosen, same[rows], other[rows], labels[other[rows]], left_out, guessing)


# ---- measuring -----------------------------------------------------------------------------------------------------------

_SUMS = ("n", "plain", "same", "other", "both", "follows", "chance", "shift", "shown")


@torch.no_grad()
def swap_sums(
    predict: Callable[[Tensor], Tensor],
    fetch: Fetch,
    plan: SwapPlan,
    *,
    part: slice = slice(None),
    batch_size: int = 64,
    margin: int | None = None,
    device: torch.device | str | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """The sums that a `BackgroundSwap` is made of; those of the parts of a plan add up to those of the whole.

    Args:
        predict: prepared images to logits.
        fetch: positions (int64, ascending or not) to images and masks.
        plan: see `plan_swap`.
        part: of the plan's rows, so that several processes share the work.
        batch_size: images a call of ``predict``.
        margin: of `default_margin`.
        device: where ``predict`` wants the images; None: where they are.
        logits: of all images as they are ``[N, C]``, where they are known; saves a third of the work.

    Returns:
        float64 ``[9]``, on the CPU.
    """
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    places = torch.arange(len(plan.rows))[part]
    for at in places.split(batch_size) if len(places) else ():  # a process may have none; no network need take an empty batch
        rows, labels = plan.rows[at], plan.labels[at]
        x, M = _fetched(fetch, rows, device)
        same, same_M = _fetched(fetch, plan.same[at], device)
        other, other_M = _fetched(fetch, plan.other[at], device)
        hole = _common_hole(same_M, other_M, default_margin(M.shape[-2:]) if margin is None else margin)
        plain = predict(x) if logits is None else logits[rows]
        on_same = predict(swap_backgrounds(x, M, same, hole[0])).cpu().double()
        on_other = predict(swap_backgrounds(x, M, other, hole[1])).cpu().double()
        right, kept = on_same.argmax(1) == labels, on_other.argmax(1) == labels
        donor = plan.donor_labels[at]
        shown = ((M <= 0) & (hole[1] <= 0)).cpu().double().mean((1, 2, 3))
        found = (
            torch.ones(len(at)), plain.argmax(1).cpu() == labels, right, kept, right & kept, on_other.argmax(1) == donor,
            on_same.argmax(1) == donor, (on_other.softmax(1) - on_same.softmax(1)).abs().sum(1) / 2, shown,
        )  # fmt: skip
        sums += torch.stack([values.double().sum() for values in found])
    return sums


def _fetched(fetch: Fetch, places: Tensor, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    x, M = fetch(places)
    M = M.to(x.dtype) if not M.is_floating_point() else M
    return (x, M) if device is None else (x.to(device), M.to(device))


def _common_hole(same: Tensor, other: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """What is filled in the two donors: in both the objects of both.

    A hole has its object's outline, and on a textured background its filling is seen. Filled each by itself, the test would show the
    outline of another class's object and the control that of the same class: a classifier that knows objects by their outlines could
    follow them. With the same holes in both, what differs is the background alone. Where no background would be left, each its own.
    """
    same, other = dilate(same > 0, margin), dilate(other > 0, margin)
    common = same | other
    nothing = common.flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(nothing, same, common).float(), torch.where(nothing, other, common).float()


@dataclass(frozen=True)
class BackgroundSwap:
    """What a background swap found; shares with 95 % intervals.

    Attributes:
        n: images tested.
        plain: accuracy on them as they are.
        same: accuracy with the background of another image of the same class.
        other: accuracy with the background of an image of another class.
        gap: ``same - other`` in [-1, 1], the background's hold on the decision; interval: paired (`metrics.paired_difference`).
        follows: share of the other-class swaps that are answered with exactly the donor's class.
        chance: share of the same-class swaps answered with that class: what ``follows`` would be if the background did nothing.
        shift: mean total variation distance between the probabilities with the other and the same background, in [0, 1].
        shown: mean share of a composite that is the donor's own background, neither object nor filling.
        guessing: accuracy of always answering the most frequent class.
        left_out: why -> images that are not tested.

    Example:
        >>> result = BackgroundSwap.of([100, 99, 97, 57, 57, 40, 1, 38.0, 70.0], 0.5)
        >>> result.gap.text(2), result.warns
        ('0.40 (0.30–0.50)', True)
    """

    n: int
    plain: Estimate
    same: Estimate
    other: Estimate
    gap: Estimate
    follows: Estimate
    chance: float
    shift: float
    shown: float
    guessing: float
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: Any, guessing: float, left_out: Mapping[str, int] | None = None) -> BackgroundSwap:
        """From the sums of `swap_sums`."""
        given = dict(zip(_SUMS, (float(value) for value in sums)))
        n, right, kept, both = (round(given[name]) for name in ("n", "same", "other", "both"))
        share = {name: given[name] / n if n else math.nan for name in ("chance", "shift", "shown")}
        return cls(
            n=n,
            plain=metrics.proportion(round(given["plain"]), n),
            same=metrics.proportion(right, n),
            other=metrics.proportion(kept, n),
            gap=metrics.paired_difference(both, right - both, kept - both, n),
            follows=metrics.proportion(round(given["follows"]), n),
            **share,
            guessing=guessing,
            left_out=dict(left_out or {}),
        )

    @property
    def warns(self) -> bool:
        """The background has a hold on the decision: the gap exceeds `GAP`, and the lower end of its interval `GAP_LOW`."""
        return self.gap.known and self.gap.value > GAP and self.gap.low > GAP_LOW

    @property
    def learned(self) -> bool:
        """With a background of the same class the answers are better than guessing: there is something that could fall."""
        return self.n > 0 and self.same.low > self.guessing

    @property
    def blunt(self) -> bool:
        """Pasting alone costs more than `BLUNT` of the accuracy: a hold of the background may go unseen."""
        return self.n > 0 and self.plain.value - self.same.value > BLUNT

    def says(self, share: float = math.nan, variant: str = "", trained: bool = False) -> str:
        """What it means, in a sentence or three.

        Args:
            share: background share of the heatmaps of the same network, where it is known: crossed with what is found here.
            variant: how the network was trained, for the advice.
            trained: backgrounds were swapped in training, too: then this is a test of what was trained.

        Example:
            >>> print(BackgroundSwap.of([200, 198, 194, 193, 193, 1, 1, 2.0, 140.0], 0.1).says())
            accuracy holds: 97 % with another image's background of the same class, 96 % with one of another class (gap 0.5 points,
            95 % interval -1.6 to 2.8).
        """
        if not self.n:
            why = ", ".join(f"{count} images {reason}" for reason, count in self.left_out.items()) or "no images"
            return f"nothing could be tested ({why})."
        own = " Backgrounds were swapped in training, too: this is no independent witness." if trained else ""
        blunt = (
            f" Pasting alone costs {100 * (self.plain.value - self.same.value):.0f} points: a hold of the background may go unseen."
            if self.blunt
            else ""
        )
        if not self.learned and not self.warns:
            return (
                f"accuracy {_pc(self.same)} with another image's background of the same class is not shown to be better than guessing "
                f"({100 * self.guessing:.0f} %): there is nothing that could fall.{blunt}"
            )
        told = (
            f"{_pc(self.same)} with another image's background of the same class, {_pc(self.other)} with one of another class (gap "
            f"{100 * self.gap.value:.1f} points, 95 % interval {100 * self.gap.low:.1f} to {100 * self.gap.high:.1f})"
        )
        if self.warns:
            follow = f"{_pc(self.follows)} of the answers follow the foreign background, {100 * self.chance:.0f} % by chance"
            return f"the classifier uses the background: accuracy {told}; {follow}.{_advice(share, variant, trained)}"
        if self.gap.value > GAP or self.gap.high > GAP_HIGH:
            return f"not decided, too few images ({self.n}): accuracy {told}.{blunt}"
        return f"accuracy holds: {told}.{blunt}{own}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "n": self.n,
            "left_out": dict(self.left_out),
            "accuracy_as_they_are": self.plain.to_dict(),
            "accuracy_with_background_of_same_class": self.same.to_dict(),
            "accuracy_with_background_of_other_class": self.other.to_dict(),
            "gap": self.gap.to_dict(),
            "follows_the_background": {**self.follows.to_dict(), "chance": self.chance},
            "shift": self.shift,
            "share_of_image_swapped": self.shown,
            "accuracy_of_guessing": self.guessing,
            "warns": self.warns,
        }


def _pc(share: Estimate) -> str:
    return f"{100 * share.value:.0f} %"


def _advice(share: float, variant: str, trained: bool) -> str:
    """What to do about a hold of the background; ``share``: what the heatmap shows of it; ``trained``: on swapped backgrounds."""
    known = share == share
    swap = "" if trained else ", or swap backgrounds in training (--data.swap_background 0.5)"
    if variant == "standard":
        return f" An ISNet is trained against that (--variant stochastic){swap}."
    if not known:
        return ""
    if share >= QUIET:
        looks = f" The heatmap shows it, too ({100 * share:.0f} % of its relevance in the background)"
        return f"{looks}: train longer, or raise --model.P{swap}."
    others = [name for name in ("stochastic", "contrast", "original") if name != variant]
    return (
        f" The heatmap is quiet ({100 * share:.1f} % of its relevance in the background) but the classifier is not clean: below "
        "epsilon, and in units that the background switches off, relevance vanishes and the effect does not. Train with --preset "
        f"steady; if that was so, raise --model.w1, or take another variant ({', '.join(others)}){swap}."
    )


def background_swap(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    masks: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    has_mask: Tensor | None = None,
    batch_size: int = 64,
    margin: int | None = None,
    device: torch.device | str | None = None,
    logits: Tensor | None = None,
) -> BackgroundSwap:
    """Accuracy with the background of the same and of another class, and their difference (see the module's text).

    Deterministic, and without gradients; the random state is not touched. Three forwards an image, two where ``logits`` are given.

    Args:
        predict: prepared images ``[B, C, H, W]`` to logits ``[B, classes]``: a network in eval mode (that is the caller's to set).
        images: prepared (normalised) images ``[N, C, H, W]``.
        masks: ``[N, 1, H, W]`` in [0, 1] or bool, 1 = foreground.
        labels: classes, int64 ``[N]``; -1: unknown, left out.
        seed: of the donors; the same for all networks and epochs that are to be compared.
        has_mask: bool ``[N]``, where some images have none.
        batch_size: images a call of ``predict``.
        margin: pixels by which holes in the donors are wider than their masks; None: 1 for each 112 pixels, at least 1.
        device: where ``predict`` wants the images; None: where they are.
        logits: of the images as they are ``[N, classes]``, where they are known already.

    Returns:
        A `BackgroundSwap`; ``n = 0`` and NaN where no image can be tested, ``left_out`` tells why.

    Raises:
        InputError: shapes or dtypes do not fit.

    Example:
        >>> x, y, M = torch.rand(40, 1, 8, 8), torch.arange(40) % 2, torch.zeros(40, 1, 8, 8)
        >>> M[:, :, 2:6, 2:6] = 1
        >>> x[:, 0, 0, 0] = y.float()  # the class stands in the background
        >>> reads_it = lambda x: torch.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], 1)
        >>> result = background_swap(reads_it, x, M, y)
        >>> result.plain.value, result.same.value, result.other.value, result.gap.value, result.follows.value
        (1.0, 1.0, 0.0, 1.0, 1.0)
    """
    if not len(images) == len(masks) == len(labels):
        raise InputError(f"images, masks and labels must be as many, got {len(images)}, {len(masks)} and {len(labels)}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if len(images):
        check_composite(images[:1], masks[:1])
    has = has_mask.split(batch_size) if has_mask is not None else [None] * math.ceil(len(masks) / batch_size)
    kinds = [mask_kinds(M, h, margin) for M, h in zip(masks.split(batch_size), has)]
    plan = plan_swap(labels, torch.cat([labels.new_zeros(0).cpu(), *kinds]), seed)

    def fetch(places: Tensor) -> tuple[Tensor, Tensor]:
        return images[places.to(images.device)], masks[places.to(masks.device)]

    sums = swap_sums(predict, fetch, plan, batch_size=batch_size, margin=margin, device=device, logits=logits)
    return BackgroundSwap.of(sums, plan.guessing, plan.left_out)
