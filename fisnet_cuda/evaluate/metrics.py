"""How well a classifier answers, with intervals that say how sure that is: numbers from logits and labels, in NumPy.

Intervals hold the true value in 95 % of all test sets of the same make-up (``level`` changes that):

* proportions (accuracy, the pointing game): Wilson's score interval (Wilson 1927), which stays honest near 0 and 1, where a
  bootstrap of a faultless test set would claim certainty;
* balanced accuracy: Wilson's interval of each class's recall, combined by MOVER (Zou and Donner 2008);
* macro-F1, AUC, means over images: percentiles of a bootstrap that is stratified by class (Efron and Tibshirani 1993, ch. 13):
  every resample has as many images of each class as the test set has. Where all resamples agree (a faultless test set), there
  is no interval.

deviates: a bootstrap for everything would be one method less to explain, but a net that is right in 97 % of all cases makes no
mistake on 60 images once in six times, and the bootstrap of such a test set says "100 to 100 %".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Classification", "Estimate", "auc", "auc_scores", "balanced_accuracy", "bootstrap_weights", "classification", "difference",
    "macro_f1", "mean", "paired_difference", "proportion",
]  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95
_BLOCK = 2_000_000  # bootstrap weights held at once
_AUC_BUDGET = 4_000_000_000  # resamples x samples x classes of one AUC bootstrap; some ten seconds


class Estimate(NamedTuple):
    """A number and its confidence interval; NaN where there is none.

    Example:
        >>> Estimate(0.5, 0.4, 0.6).percent()
        '50.0 (40.0–60.0)'
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def known(self) -> bool:
        """Whether there is a value at all."""
        return self.value == self.value

    def percent(self, digits: int = 1) -> str:
        """As percent, ``value (low–high)``."""
        return self.text(digits, 100.0)

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """``value (low–high)``; "-" where it is not defined."""
        if not self.known:
            return "-"
        value, low, high = (f"{scale * v:.{digits}f}" for v in self)
        dash = " to " if self.low < 0 else "–"
        return value if self.low != self.low else f"{value} ({low}{dash}{high})"

    def to_dict(self) -> dict[str, float]:
        """``{"value", "low", "high"}``."""
        return self._asdict()


UNKNOWN = Estimate(float("nan"))


# ---- proportions ---------------------------------------------------------------------------------------------------------


def proportion(hits: float, n: int, level: float = LEVEL) -> Estimate:
    """A share of ``n`` cases with Wilson's score interval (Wilson 1927, eq. 4).

    Args:
        hits: how many of them, 0 to n.
        n: how many cases.
        level: of the interval.

    Returns:
        The share; NaN for n = 0.

    Example:
        >>> proportion(10, 10).text(2)
        '1.00 (0.72–1.00)'
    """
    if n == 0:
        return UNKNOWN
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(float(p), float(min(p, max(0.0, middle - half))), float(max(p, min(1.0, middle + half))))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """``b - a`` of two independent estimates, its interval by MOVER (Newcombe 1998, method 10; Zou and Donner 2008).

    Example:
        >>> difference(proportion(97, 100), proportion(55, 100)).text(2)
        '-0.42 (-0.52 to -0.31)'
    """
    d = b.value - a.value
    down = np.hypot(b.value - b.low, a.high - a.value)
    up = np.hypot(b.high - b.value, a.value - a.low)
    return Estimate(float(d), float(d - down), float(d + up))


def paired_difference(both: int, only_first: int, only_second: int, n: int, level: float = LEVEL) -> Estimate:
    """First minus second share, of two yes-or-no answers about the same ``n`` cases (Newcombe 1998, "Improved confidence intervals
    for the difference between binomial proportions based on paired data", Statistics in Medicine 17, method 10).

    Wilson's intervals of both shares, combined with the correlation of the answers: a closed form, honest where all cases agree,
    of which McNemar's test and a bootstrap make certainty.

    Args:
        both: cases with two yes.
        only_first, only_second: cases with one.
        n: all cases.
        level: of the interval.

    Returns:
        The difference; NaN for n = 0.

    Example:
        >>> paired_difference(36, 12, 2, 50).text(4)  # Newcombe's example (b)
        '0.2000 (0.0569–0.3404)'
        >>> paired_difference(0, 20, 0, 20).text(2)
        '1.00 (0.77–1.00)'
    """
    if n == 0:
        return UNKNOWN
    neither = n - both - only_first - only_second
    first, second = proportion(both + only_first, n, level), proportion(both + only_second, n, level)
    # phi with Newcombe's correction for continuity, 0 where a share is 0 or 1
    product = float(both * neither - only_first * only_second)
    product = max(product - n / 2, 0.0) if product > 0 else product
    margins = (both + only_first) * (neither + only_second) * (both + only_second) * (neither + only_first)
    phi = product / float(np.sqrt(float(margins))) if margins else 0.0
    d = (only_first - only_second) / n
    low = _correlated(first.value - first.low, second.high - second.value, phi)
    high = _correlated(first.high - first.value, second.value - second.low, phi)
    return Estimate(d, max(-1.0, d - low), min(1.0, d + high))


def _correlated(a: float, b: float, phi: float) -> float:
    return float(np.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)))


def balanced_accuracy(confusion: Ints, level: float = LEVEL) -> Estimate:
    """Mean recall over the classes that occur, ``mean over c of confusion[c, c] / n_c``; its interval by MOVER.

    Args:
        confusion: ``[C, C]``, rows are true classes and columns predicted ones.
        level: of the interval.

    Example:
        >>> balanced_accuracy(np.array([[90, 10], [5, 5]])).text(2)
        '0.70 (0.56–0.83)'
    """
    counts = confusion.sum(1)
    recalls = [proportion(confusion[c, c], int(counts[c]), level) for c in np.flatnonzero(counts)]
    if not recalls:
        return UNKNOWN
    values, lows, highs = np.array(recalls).T
    k = len(recalls)
    middle = values.mean()
    return Estimate(
        float(middle),
        float(middle - np.sqrt(((values - lows) ** 2).sum()) / k),
        float(middle + np.sqrt(((highs - values) ** 2).sum()) / k),
    )


# ---- the bootstrap -------------------------------------------------------------------------------------------------------


def bootstrap_weights(strata: Ints, resamples: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """How often each sample is drawn in each resample, in blocks that fit into memory.

    Args:
        strata: ``[n]``: what is drawn with replacement stays within its stratum, as many as it has.
        resamples: how many, over all blocks.
        seed: of the draws.

    Yields:
        ``[block, n]`` float32; blocks add up to ``resamples``.

    Example:
        >>> w = next(bootstrap_weights(np.array([0, 0, 1, 0, 1]), 4, 0))
        >>> w.shape, w[:, [0, 1, 3]].sum(1).tolist(), w[:, [2, 4]].sum(1).tolist()
        ((4, 5), [3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0])
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    left = resamples
    while left > 0:
        block = min(left, max(1, _BLOCK // max(len(strata), 1)))
        weights = np.empty((block, len(strata)), np.float32)
        for places in members:
            m = len(places)
            drawn = rng.integers(0, m, (block, m)) + m * np.arange(block)[:, None]
            weights[:, places] = np.bincount(drawn.ravel(), minlength=block * m).reshape(block, m)
        yield weights
        left -= block


def mean(values: Floats, strata: Ints, resamples: int = 2000, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of one number a sample, with a stratified bootstrap interval.

    Args:
        values: ``[n]``, finite.
        strata: ``[n]``, class of each sample.
        resamples, seed: of the bootstrap.
        level: of the interval.

    Example:
        >>> mean(np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4, int)).value
        0.25
    """
    if len(values) == 0:
        return UNKNOWN
    means = np.concatenate([w @ values.astype(np.float64) / len(values) for w in bootstrap_weights(strata, resamples, seed)])
    return _interval(float(np.mean(values)), means, level)


def _interval(value: float, resampled: Floats, level: float) -> Estimate:
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) == 0 or value != value:
        return Estimate(value)
    low, high = np.quantile(resampled, [0.5 - level / 2, 0.5 + level / 2])
    if low == high:
        return Estimate(value)  # all resamples alike: nothing that an interval could come from
    return Estimate(value, float(low), float(high))


# ---- F1 and AUC ----------------------------------------------------------------------------------------------------------


def macro_f1(hits: Floats, predicted: Floats, true: Floats) -> Floats:
    """Mean over classes of ``F1 = 2 TP / (n_true + n_predicted)``; classes that are neither true nor predicted do not count.

    Args:
        hits, predicted, true: ``[..., C]``: right answers, answers and samples of each class.

    Returns:
        ``[...]``; NaN without samples.

    Example:
        >>> float(macro_f1(np.array([1.0, 1, 0]), np.array([1.0, 2, 0]), np.array([2.0, 1, 0])))
        0.6666666666666666
    """
    size = true + predicted
    occurs = size > 0
    f1 = 2 * hits / np.where(occurs, size, 1)
    classes = occurs.sum(-1)
    return np.where(classes > 0, (f1 * occurs).sum(-1) / np.maximum(classes, 1), np.nan)


def auc_scores(logits: Floats) -> Floats:
    """Scores ``[n, C]`` that sort samples as ``P_c = softmax(logits)_c`` does: ``log P_c - log(1 - P_c)``, which does not saturate.

    Example:
        >>> auc_scores(np.array([[100.0, 0.0], [90.0, 0.0]]))[:, 0].tolist()  # P_0 is 1.0 for both
        [100.0, 90.0]
    """
    classes = logits.shape[1]
    if classes == 1:
        return logits.copy()
    scores = np.empty_like(logits)
    for c in range(classes):
        # sorted, and relative to the largest first: equal probabilities get equal scores, down to the last bit
        others = np.sort(np.delete(logits, c, 1), 1)
        top = others[:, -1:]
        scores[:, c] = (logits[:, c] - top[:, 0]) - np.log(np.exp(others - top).sum(1))
    return scores


def auc(scores: Floats, positive: NDArray[np.bool_], weights: NDArray[np.float32] | None = None) -> Floats:
    """Area under the ROC curve, P(score of a positive > score of a negative) + 1/2 P(equal) (Hanley and McNeil 1982), of many
    resamples at once.

    Args:
        scores: ``[n]``.
        positive: ``[n]``.
        weights: how often each sample counts, ``[B, n]``; once by default.

    Returns:
        ``[B]`` (B = 1 without weights); NaN without positives or without negatives.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).tolist()
        [0.75]
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    w = np.ones((1, len(scores)), np.float32) if weights is None else weights
    w = w[:, order]
    truth = positive[order]
    up, down = np.where(truth, w, 0), np.where(truth, 0, w)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, int)
    if len(starts) < len(ordered):  # ties: equal scores become one
        up, down = np.add.reduceat(up, starts, 1), np.add.reduceat(down, starts, 1)
    below = np.cumsum(down, 1, dtype=np.float64)
    pairs = np.einsum("bn,bn->b", up, below) - np.einsum("bn,bn->b", up, down) / 2
    size = up.sum(1, dtype=np.float64) * down.sum(1, dtype=np.float64)
    return np.where(size > 0, pairs / np.where(size > 0, size, 1), np.nan)


# ---- all of them ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classification:
    """How well a subset is answered.

    Attributes:
        n: samples with a known label; unlabelled: those without, which none of this counts.
        accuracy, balanced_accuracy, macro_f1, auc_macro: shares, 0 to 1.
        auc: one-vs-rest, for each class; NaN where a class or its contrary does not occur.
        confusion: ``[C, C]``: rows are true classes, columns predicted ones.
        guessing: accuracy of always answering the most frequent class of the subset.
        notes: what could not be computed, and why.
    """

    n: int
    unlabelled: int
    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    auc_macro: Estimate
    auc: tuple[Estimate, ...]
    confusion: Ints
    guessing: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "n": self.n,
            "unlabelled": self.unlabelled,
            "accuracy": self.accuracy.to_dict(),
            "accuracy_of_guessing": self.guessing,
            "balanced_accuracy": self.balanced_accuracy.to_dict(),
            "macro_f1": self.macro_f1.to_dict(),
            "auc_macro": self.auc_macro.to_dict(),
            "auc": {name: value.to_dict() for name, value in zip(classes, self.auc)},
            "confusion": {"rows": "true", "columns": "predicted", "classes": list(classes), "counts": self.confusion.tolist()},
            "notes": list(self.notes),
        }


def classification(
    logits: Floats,
    labels: Ints,
    classes: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Classification:
    """Accuracy, balanced accuracy, macro-F1, AUC and the confusion matrix, with intervals.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]``; -1 where it is not known.
        classes: ``C`` names.
        resamples: of the bootstrap; 0 leaves out the intervals of macro-F1 and AUC.
        seed: of the bootstrap.
        level: of the intervals.

    Returns:
        A `Classification`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 2, 200)
        >>> result = classification(rng.normal(size=(200, 2)) + np.eye(2)[labels], labels, ("normal", "TB"))
        >>> 0.6 < result.accuracy.low < result.accuracy.value < result.accuracy.high < 0.9
        True
    """
    known = labels >= 0
    unlabelled = int((~known).sum())
    logits, labels = np.asarray(logits[known], np.float64), np.asarray(labels[known], np.int64)
    n, C = len(labels), len(classes)
    notes: list[str] = []
    predicted = logits.argmax(1) if n else np.zeros(0, np.int64)
    confusion = np.bincount(labels * C + predicted, minlength=C * C).reshape(C, C)
    true = confusion.sum(1)
    absent = [classes[c] for c in range(C) if true[c] == 0]
    if unlabelled:
        notes.append(f"{unlabelled} images without a label are left out")
    if n and absent:
        notes.append(f"no image of class {_some(absent)}: balanced accuracy and AUC are those of the other classes")
    few = [f"{classes[c]} ({true[c]})" for c in range(C) if 0 < true[c] < 10]
    if few:
        notes.append(f"few images of class {_some(few)}: intervals are rough")

    scores = auc_scores(logits)
    defined = [c for c in range(C) if 0 < true[c] < n]
    if n and not defined:
        notes.append(f"AUC is not defined: all images are of one class ({classes[int(true.argmax())]})")
    points = {c: float(auc(scores[:, c], labels == c)[0]) for c in defined}
    macro = float(np.mean(list(points.values()))) if defined else float("nan")
    f1 = float(macro_f1(np.diag(confusion).astype(float), confusion.sum(0).astype(float), true.astype(float))) if n else float("nan")

    auc_resamples = resamples
    if resamples * n * max(len(defined), 1) > _AUC_BUDGET:
        auc_resamples = max(100, _AUC_BUDGET // (n * len(defined)))
        if auc_resamples < resamples:
            notes.append(f"intervals of AUC from {auc_resamples} resamples instead of {resamples}: there are many images and classes")
        auc_resamples = min(auc_resamples, resamples)
    f1s, aucs = (
        _resampled(labels, predicted, scores, defined, C, resamples, auc_resamples, seed) if n else (np.zeros(0), np.zeros((0, 0)))
    )
    per_class = dict(zip(defined, aucs.T))
    same = [text for text, seen in (("macro-F1", f1s), ("AUC", aucs)) if seen.size and np.ptp(seen) == 0]
    if same:
        why = "all answers are right" if macro == 1 and f1 == 1 else "all resamples agree"
        notes.append(f"{' and '.join(same)} without an interval: {why}, which tells a bootstrap nothing (see that of accuracy)")
    return Classification(
        n=n,
        unlabelled=unlabelled,
        accuracy=proportion(int(np.diag(confusion).sum()), n, level),
        balanced_accuracy=balanced_accuracy(confusion, level),
        macro_f1=_interval(f1, f1s, level),
        auc_macro=_interval(macro, aucs.mean(1) if defined else np.zeros(0), level),
        auc=tuple(_interval(points[c], per_class[c], level) if c in points else UNKNOWN for c in range(C)),
        confusion=confusion,
        guessing=float(true.max() / n) if n else float("nan"),
        notes=tuple(notes),
    )


def _resampled(
    labels: Ints, predicted: Ints, scores: Floats, defined: list[int], C: int, resamples: int, auc_resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Macro-F1 ``[resamples]`` and AUC ``[auc_resamples, len(defined)]`` of the resamples."""
    f1s: list[Floats] = []
    aucs: list[Floats] = []
    true = np.bincount(labels, minlength=C).astype(np.float64)
    done = 0
    hit = labels == predicted
    for w in bootstrap_weights(labels, resamples, seed):
        answers, hits = _by_class(w, predicted, C), _by_class(np.where(hit, w, 0), predicted, C)
        f1s.append(macro_f1(hits, answers, true))
        part = w[: max(0, auc_resamples - done)]
        if len(part):
            aucs.append(np.stack([auc(scores[:, c], labels == c, part) for c in defined], 1) if defined else np.zeros((len(part), 0)))
        done += len(w)
    return (np.concatenate(f1s) if f1s else np.zeros(0)), (np.concatenate(aucs) if aucs else np.zeros((0, len(defined))))


def _by_class(w: NDArray[np.float32], classes: Ints, C: int) -> Floats:
    """Sums of ``w [B, n]`` over the samples of each class, ``[B, C]``."""
    order = np.argsort(classes, kind="stable")
    present, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(w), C))
    sums[:, present] = np.add.reduceat(w[:, order], starts, 1)
    return sums


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
