"""The figure of an evaluation: subsets from top to bottom, one panel a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..files import atomic
from .metrics import Estimate
from .results import RunResult, SubsetResult

__all__ = ["evaluation_figure"]

# Okabe and Ito's palette, orange and yellow left out or darkened for thin lines on white; each run has a marker of its own, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#D08A00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "0.45"

Value = Callable[[SubsetResult], Estimate | None]


def evaluation_figure(runs: Sequence[RunResult], path: str | Path) -> Path:
    """Draws accuracy, AUC, background share, and insertion and deletion against random order, with their 95 % intervals.

    Args:
        runs: one or several networks, drawn beside each other.
        path: where to write the PNG.

    Returns:
        ``path``.
    """
    with atomic(path) as temporary:
        draw(runs).savefig(temporary, dpi=130, format="png")
    return Path(path)


def draw(runs: Sequence[RunResult]) -> Figure:
    """The figure itself."""
    names = list(dict.fromkeys(name for run in runs for name in run.subsets))
    panels = [panel for panel, value in _PANELS if any(_any(value, run) for run in runs)]
    row = 0.3 + 0.2 * len(runs)  # inches a subset
    labels = 0.35 + 0.085 * max(len(line) for name in names for line in _label(name, runs).split("\n"))
    top, bottom = 1.3 + 0.24 * ((len(runs) + 2) // 3 if len(runs) > 1 else 0), 0.62
    width, height = labels + 2.95 * len(panels), max(0.8, row * len(names)) + top + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=labels / width, right=1 - 0.2 / width, top=1 - top / height, bottom=bottom / height, wspace=0.14)
    for ax, panel in zip(axes, panels):
        panel(ax, runs, names)
        _frame(ax, names)
    axes[0].set_yticks(range(len(names)), [_label(name, runs) for name in names], fontsize=10)
    axes[0].set_ylim(len(names) - 0.5, -0.5)

    left = 0.12 / width
    title = f"{runs[0].name} on {len(names)} test set{'s' * (len(names) > 1)}" if len(runs) == 1 else "The networks beside each other"
    figure.text(left, 1 - 0.12 / height, title, ha="left", va="top", fontsize=14, fontweight="bold")
    figure.text(
        left,
        1 - 0.46 / height,
        "Good: accuracy high and equal in all rows, little relevance in the background. Bars: 95 % intervals.",
        ha="left",
        va="top",
        fontsize=9.5,
        color="0.3",
    )
    if len(runs) > 1:
        keys = [Line2D([], [], color=_colour(i), marker=_marker(i), ls="", ms=7, label=run.name) for i, run in enumerate(runs)]
        figure.legend(
            handles=keys,
            loc="upper left",
            bbox_to_anchor=(left, 1 - 0.66 / height),
            ncols=3,
            frameon=False,
            fontsize=10,
            borderaxespad=0,
        )
    return figure


def _accuracy(ax: Axes, runs: Sequence[RunResult], names: Sequence[str]) -> None:
    _dots(ax, runs, names, lambda s: s.classification.accuracy, 100)
    for y, name in enumerate(names):
        subset = next(run.subsets[name] for run in runs if name in run.subsets)
        _level(ax, y, 100 * subset.classification.guessing)
    _titles(ax, "Accuracy", "percent; more is better →", "¦ always the most frequent class")
    ax.set_xlim(0, 103)


def _auc(ax: Axes, runs: Sequence[RunResult], names: Sequence[str]) -> None:
    _dots(ax, runs, names, lambda s: s.classification.auc_macro, 100)
    for y in range(len(names)):
        _level(ax, y, 50)
    _titles(ax, "AUC, mean of classes", "percent; more is better →", "¦ guessing")
    ax.set_xlim(0, 103)


def _share(ax: Axes, runs: Sequence[RunResult], names: Sequence[str]) -> None:
    _dots(ax, runs, names, lambda s: None if s.attention is None else s.attention.share, 100)
    for y, name in enumerate(names):
        seen = [run.subsets[name].attention for run in runs if name in run.subsets and run.subsets[name].attention is not None]
        if seen and seen[0].n:
            _level(ax, y, 100 * seen[0].area)
    _titles(ax, "Relevance in the background", "percent of all; ← less is better", "¦ spread evenly over the image")
    ax.set_xlim(0, 103)


def _faithful(ax: Axes, runs: Sequence[RunResult], names: Sequence[str]) -> None:
    _dots(ax, runs, names, lambda s: None if s.insertion is None else s.insertion.insertion_gain, 1, -0.24)
    _dots(ax, runs, names, lambda s: None if s.insertion is None else s.insertion.deletion_gain, 1, 0.24, hollow=True)
    ax.axvline(0, color=_GREY, lw=1.2, ls=(0, (2, 2)), zorder=1)
    _titles(ax, "Faithfulness of the heatmaps", "gain over random; more is better →", "filled: insertion, hollow: deletion")
    ax.margins(x=0.12)
    ax.locator_params(axis="x", nbins=5)


_PANELS: tuple[tuple[Callable[[Axes, Sequence[RunResult], Sequence[str]], None], Value], ...] = (
    (_accuracy, lambda s: s.classification.accuracy),
    (_auc, lambda s: s.classification.auc_macro),
    (_share, lambda s: None if s.attention is None else s.attention.share),
    (_faithful, lambda s: None if s.insertion is None else s.insertion.insertion_gain),
)


def _any(value: Value, run: RunResult) -> bool:
    return any(e is not None and e.known for e in map(value, run.subsets.values()))


def _dots(
    ax: Axes, runs: Sequence[RunResult], names: Sequence[str], value: Value, scale: float, shift: float = 0.0, hollow: bool = False
) -> None:
    """A dot and an interval for each subset and run; runs lie below each other in a subset's row."""
    gap = 0.8 / len(runs) if len(runs) > 1 else 0.6
    for i, run in enumerate(runs):
        for y, name in enumerate(names):
            estimate = value(run.subsets[name]) if name in run.subsets else None
            place = y + (i - (len(runs) - 1) / 2 + shift) * gap
            if estimate is None or not estimate.known:
                if not hollow:
                    ax.annotate("not defined", (0.02, place), xycoords=("axes fraction", "data"), fontsize=8, color=_GREY, va="center")
                continue
            colour = _colour(i)
            if estimate.low == estimate.low:
                ax.plot(
                    [scale * estimate.low, scale * estimate.high],
                    [place, place],
                    color=colour,
                    lw=2.2 if not hollow else 1.2,
                    zorder=3,
                    solid_capstyle="butt",
                )
            ax.plot(
                scale * estimate.value,
                place,
                marker=_marker(i),
                ms=6.5,
                color=colour,
                mfc="white" if hollow else colour,
                mew=1.4,
                zorder=4,
            )
            if scale == 100:
                _number(ax, estimate, place, len(runs))


def _number(ax: Axes, estimate: Estimate, place: float, runs: int) -> None:
    """The value in percent beside its interval, on the side with room."""
    value, low, high = (100 * v for v in estimate)
    low, high = (value, value) if low != low else (low, high)
    text = f"{value:.0f}" if value < 99.5 or value == 100 else f"{value:.1f}"
    right = high < 80
    ax.annotate(
        text,
        (high if right else low, place),
        (7 if right else -7, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=9 if runs == 1 else 8,
        color="0.25",
        zorder=5,
    )


def _level(ax: Axes, y: int, value: float) -> None:
    if value == value:
        ax.plot([value, value], [y - 0.36, y + 0.36], color=_GREY, lw=1.2, ls=(0, (2, 2)), zorder=1)


def _titles(ax: Axes, title: str, unit: str, level: str) -> None:
    ax.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=22)
    ax.text(0, 1, level, transform=ax.transAxes, fontsize=8.5, color=_GREY, va="bottom", ha="left")
    ax.set_xlabel(unit, fontsize=10)


def _frame(ax: Axes, names: Sequence[str]) -> None:
    for y in range(0, len(names), 2):
        ax.axhspan(y - 0.5, y + 0.5, color="0.965", zorder=0, lw=0)
    ax.grid(axis="x", color="0.88", lw=0.8, zorder=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _label(name: str, runs: Sequence[RunResult]) -> str:
    n = max(run.subsets[name].classification.n for run in runs if name in run.subsets)
    return f"{_wrap(name)}\n{n} images"


def _wrap(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]
