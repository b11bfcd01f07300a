"""`Evaluation`: all numbers of one or several runs, as JSON, as Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import make_folder, write_json, write_text
from .results import Difference, RunResult, SubsetResult, differences, verdict
from .swap import BackgroundSwap

__all__ = ["Evaluation"]

_MOST_CLASSES = 12  # in tables by class; more are in the JSON only

METHODS = {
    "accuracy": "share of right answers; 95 % interval: Wilson's score interval (Wilson 1927)",
    "balanced accuracy": "mean recall of the classes that occur; interval: Wilson's of each recall, combined by MOVER "
    "(Zou and Donner 2008)",
    "macro-F1": "mean over classes of 2 TP / (true + predicted), classes that are neither true nor predicted left out; "
    "interval: bootstrap",
    "AUC": "one class against the rest, P(a positive scores higher than a negative) + 1/2 P(equal) (Hanley and McNeil 1982); "
    "macro: mean of the classes for which it is defined; interval: bootstrap",
    "background share": "sum |R| (1 - M) / sum |R| over channels and pixels, R = relevance of the predicted class's logit by the "
    "net's own LRP rules, M = mask; mean over images; interval: bootstrap",
    "pointing game": "share of images whose pixel of largest positive relevance lies in the mask (Zhang et al. 2018); chance: mean "
    "share of the image that would be a hit; interval: Wilson's",
    "insertion, deletion": "area under the probability of the predicted class while pixels are put into a blurred image, or taken "
    "away, the most relevant first (RISE: Petsiuk et al. 2018); random: the same in random order; interval: bootstrap",
    "background swap": "x' = M x + (1 - M) b: accuracy of each image's foreground on the background of another image of the same "
    "class (the control: pasting disturbs by itself) and of another class, both donors' objects filled in from the background around "
    "them; gap: same - other, interval: paired (Newcombe 1998, method 10); follows: answers that are the donor's class; chance: "
    "answers that are that class on a background of the same class. Tests nothing that lies inside the mask",
    "bootstrap": "percentiles of resamples drawn with replacement within each class (stratified; Efron and Tibshirani 1993)",
    "differences between runs": "by image (bootstrap of the differences) where both saw the same images, otherwise MOVER "
    "(Newcombe 1998)",
}

READING = (
    "↑ more is better, ↓ less is better; in brackets the 95 % interval. Good: accuracy that is high and *the same in every row*, and "
    "little relevance in the background. Bad: accuracy that falls where the shortcut is broken: then the net has learned the "
    "shortcut, whatever its heatmaps look like."
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        runs: one or several networks; the first is what the others are compared with.
        settings: how it was measured.
        versions: of the libraries.

    Example:
        >>> Evaluation((), {}, {}).to_dict()["runs"]
        []
    """

    runs: tuple[RunResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def beside(self, *others: Evaluation) -> Evaluation:
        """One evaluation of all runs, this one's first."""
        return Evaluation((*self.runs, *(run for other in others for run in other.runs)), self.settings, self.versions)

    def differences(self) -> list[Difference]:
        """Each further run minus the first."""
        resamples, seed = self.settings.get("bootstrap", 2000), self.settings.get("seed", 0)
        return [d for run in self.runs[1:] for d in differences(self.runs[0], run, resamples, seed)]

    def verdicts(self) -> list[str]:
        """One line a run."""
        return [f"{run.name}: {verdict(run)}" for run in self.runs]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers, texts and lists."""
        return {
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "methods": METHODS,
            "runs": [run.to_dict() for run in self.runs],
            "differences_to_the_first_run": [d.to_dict() for d in self.differences()],
        }

    def markdown(self) -> str:
        """The report: a verdict, one table, then what lies behind it."""
        several = len(self.runs) > 1
        parts = [
            f"# Evaluation of {', '.join(run.name for run in self.runs)}",
            "\n".join(f"**{run.name}**: {verdict(run)}\n" for run in self.runs).rstrip(),
            READING,
            _main_table(self.runs),
        ]
        swaps = _swap_table(self.runs)
        parts += ["## Background swap", swaps] if swaps else []
        if several:
            parts += [f"## Against {self.runs[0].name}", _difference_table(self.differences(), self.runs[0].name)]
        notes = _notes(self.runs)
        if notes:
            parts += ["## To know", notes]
        for run in self.runs:
            parts += _by_class(run, several)
        parts += ["## How it was measured", _methods(self)]
        return "\n\n".join(parts) + "\n"

    def summary(self) -> str:
        """The verdict and the main numbers, narrow enough for a terminal."""
        swap = any(s.swap is not None and s.swap.n for run in self.runs for s in run.subsets.values())
        head = ["subset", "run", "n", "accuracy % ↑", "AUC % ↑", "background share % ↓", *(["swap gap, points ↓"] if swap else [])]
        rows = [
            [
                name,
                run.name,
                str(s.classification.n),
                s.classification.accuracy.percent(),
                s.classification.auc_macro.percent(),
                _share(s),
                *([_signed(s.swap.gap) if s.swap is not None and s.swap.n else "-"] if swap else []),
            ]
            for name in dict.fromkeys(name for run in self.runs for name in run.subsets)
            for run in self.runs
            if (s := run.subsets.get(name)) is not None
        ]
        if len(self.runs) == 1:
            head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
        return "\n\n".join([table(head, rows, len(head) - 4 - swap), *self.verdicts()])

    def figure(self, path: str | Path) -> Path:
        """Draws accuracy, AUC, background share and insertion / deletion of every subset and run as a PNG."""
        from .figure import evaluation_figure

        return evaluation_figure(self.runs, path)

    def write(self, folder: str | Path) -> dict[str, Path]:
        """Writes ``evaluation.json``, ``evaluation.md`` and ``evaluation.png``; returns their paths."""
        folder = make_folder(folder)
        return {
            "json": write_json(folder / "evaluation.json", self.to_dict()),
            "markdown": write_text(folder / "evaluation.md", self.markdown()),
            "figure": self.figure(folder / "evaluation.png"),
        }


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table whose columns line up in plain text as well.

    Example:
        >>> print(table(["set", "n"], [["test", "12"]]))
        | set  |  n |
        |:-----|---:|
        | test | 12 |
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [
        max(3, *(len(row[i]) for row in cells)) if i < text_columns else max(2, *(len(row[i]) for row in cells))
        for i in range(len(head))
    ]
    lines = [
        "| " + " | ".join(cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
        for row in cells
    ]
    rule = "|" + "|".join(":" + "-" * (w + 1) if i < text_columns else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _main_table(runs: Sequence[RunResult]) -> str:
    several = len(runs) > 1
    subsets = [s for run in runs for s in run.subsets.values()]
    masks, faithful = any(s.attention for s in subsets), any(s.insertion for s in subsets)
    head = ["subset", *(["run"] if several else []), "n", "accuracy % ↑", "balanced % ↑", "macro-F1 % ↑", "AUC % ↑"]
    head += ["background share % ↓", "even", "pointing % ↑", "chance"] if masks else []
    head += ["insertion ↑", "random", "deletion ↓", "random"] if faithful else []
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.subsets):
        for run in runs:
            if name in run.subsets:
                rows.append([name, *([run.name] if several else []), *_main_row(run.subsets[name], masks, faithful)])
    text = table(head, rows, 2 if several else 1)
    under = []
    if masks:
        under.append("*even*: background share of a heatmap that is equal everywhere; *chance*: hits of pointing anywhere.")
    if faithful:
        n = sorted({s.insertion.n for s in subsets if s.insertion})
        images = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
        under.append(
            f"Insertion and deletion from {images} images a subset; *random*: pixels in random order. They tell how well heatmaps "
            "explain the answers, not whether the reasons are good ones."
        )
    return text + ("\n\n" + " ".join(under) if under else "")


def _main_row(s: SubsetResult, masks: bool, faithful: bool) -> list[str]:
    c = s.classification
    row = [str(c.n), c.accuracy.percent(), c.balanced_accuracy.percent(), c.macro_f1.percent(), c.auc_macro.percent()]
    if masks:
        a = s.attention
        row += ["-"] * 4 if a is None or not a.n else [a.share.percent(), _percent(a.area), a.pointing.percent(), _percent(a.chance)]
    if faithful:
        i = s.insertion
        row += (
            ["-"] * 4
            if i is None
            else [i.insertion.text(2), f"{i.insertion_random.value:.2f}", i.deletion.text(2), f"{i.deletion_random.value:.2f}"]
        )
    return row


def _swap_table(runs: Sequence[RunResult]) -> str:
    """Accuracy on backgrounds of the same and of another class; empty where it was not tested."""
    several = len(runs) > 1
    names = dict.fromkeys(name for run in runs for name in run.subsets)
    pairs = [(run, run.subsets[name]) for name in names for run in runs if name in run.subsets]
    pairs = [(run, s) for run, s in pairs if s.swap is not None and s.swap.n]
    if not pairs:
        return ""
    head = ["subset", *(["run"] if several else []), "n", "as they are %", "same class %", "other class % ↑", "gap, points ↓"]
    head += ["follows % ↓", "chance", "shift % ↓"]
    rows = [[s.name, *([run.name] if several else []), *_swap_row(s.swap)] for run, s in pairs]
    shown = sorted({round(100 * s.swap.shown) for _, s in pairs})
    share = f"{shown[0]}" if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
    reading = (
        "Accuracy of each foreground on the background of another image, of the same class and of another. Good: both alike, a gap "
        "whose interval holds 0. Bad: a gap: the background has a hold on the answers, whatever the heatmap shows. No set in which the "
        "shortcut is broken is needed for that, but one in which it is intact: images like those of the training."
    )
    under = (
        "*follows*: answers that are the class of the image that gave the background; *chance*: the same answers on a background of "
        f"the own class; *shift*: how far the probabilities move (total variation). {share} % of a composite is the other image's "
        "background, the rest object and filling."
    )
    return "\n\n".join([reading, table(head, rows, 2 if several else 1), under])


def _swap_row(swap: BackgroundSwap) -> list[str]:
    values = [str(swap.n), swap.plain.percent(), swap.same.percent(), swap.other.percent(), _signed(swap.gap)]
    return [*values, swap.follows.percent(), _percent(swap.chance), _percent(swap.shift)]


def _share(s: SubsetResult) -> str:
    return "-" if s.attention is None else s.attention.share.percent()


def _difference_table(rows: Sequence[Difference], first: str) -> str:
    head = ["subset", "run", "accuracy, points ↑", "background share, points ↓", "compared"]
    cells = [
        [d.subset, d.run, _signed(d.accuracy), _signed(d.share), "image by image" if d.paired else "as separate samples"] for d in rows
    ]
    lines = f"Run minus {first}, in percentage points; an interval without 0 is a difference beyond chance."
    return lines + "\n\n" + table(head, cells, 2)


def _signed(e: Any) -> str:
    if not e.known:
        return "-"
    interval = f" ({100 * e.low:+.1f} to {100 * e.high:+.1f})" if e.low == e.low else ""
    return f"{100 * e.value:+.1f}{interval}"


def _notes(runs: Sequence[RunResult]) -> str:
    """Notes of all subsets; those that hold for several subsets or runs once."""
    where: dict[str, list[str]] = {}
    for run in runs:
        for subset in run.subsets.values():
            for note in subset.all_notes:
                where.setdefault(note, []).append(subset.name if len(runs) == 1 else f"{subset.name} ({run.name})")
    return "\n".join(f"- {', '.join(dict.fromkeys(places))}: {note}." for note, places in where.items())


def _by_class(run: RunResult, several: bool) -> list[str]:
    title = f"{run.name}: by class" if several else "By class"
    if len(run.classes) > _MOST_CLASSES:
        return [f"## {title}", f"AUC by class and confusion matrices of {len(run.classes)} classes are in evaluation.json."]
    named = [s for s in run.subsets.values() if s.classification.n]
    aucs = table(["AUC %", *run.classes], [[s.name, *(e.percent() for e in s.classification.auc)] for s in named])
    parts = [f"## {title}", aucs, "Confusion: images of the class in the row that were answered with the class in the column."]
    for s in named:
        counts = s.classification.confusion
        rows = [[name, *map(str, row), str(sum(row))] for name, row in zip(run.classes, counts.tolist())]
        parts.append(table([s.name, *run.classes, "n"], rows))
    return parts


def _methods(evaluation: Evaluation) -> str:
    lines = [f"- {name}: {text}." for name, text in METHODS.items() if len(evaluation.runs) > 1 or "between runs" not in name]
    lines += [
        f"- run {run.name}: " + ", ".join(f"{key} {value}" for key, value in run.facts.items() if value not in (None, ""))
        for run in evaluation.runs
        if run.facts
    ]
    lines += ["- settings: " + ", ".join(f"{key} {value}" for key, value in evaluation.settings.items())] if evaluation.settings else []
    lines += ["- versions: " + ", ".join(f"{key} {value}" for key, value in evaluation.versions.items())] if evaluation.versions else []
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"
