"""What the experiments' figures share: colours and names of the systems, dots of single seeds, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from fisnet_cuda.files import atomic

from .tables import values

__all__ = ["COLOURS", "dots", "draw_sets", "save"]

# Okabe and Ito's palette; baselines that hide the background share one colour, those that lose by attention another
COLOURS = {
    "standard": GREY, "original": VERMILION, "selective": ORANGE, "stochastic": BLUE, "dual": GREEN, "contrast": PURPLE,
    "masked": "#A8A8A8", "segmented": "#A8A8A8", "rrr": SKY, "gradcam": SKY, "hirescam": SKY, "mixed": "#A8A8A8",
    "stochastic_mixed": BLUE, "contrast_mixed": PURPLE,
}  # fmt: skip


def dots(ax: Axes, rows: Sequence[tuple[str, Mapping[str, Sequence[float]]]], styles: Mapping[str, tuple[str, str]]) -> None:
    """One line a system, one marker a seed, a bar at the mean: what a table of means would hide is seen.

    Args:
        ax: where to.
        rows: (system's title, {series: a value a seed}), from the top.
        styles: series -> (colour, marker).
    """
    height = 0.8 / max(len(styles), 1)
    for i, (_, series) in enumerate(rows):
        for j, (name, (colour, marker)) in enumerate(styles.items()):
            numbers = list(series.get(name, ()))
            if not numbers:
                continue
            y = i + (j - (len(styles) - 1) / 2) * height
            mean = sum(numbers) / len(numbers)
            ax.plot(numbers, [y] * len(numbers), marker, color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
            ax.plot([mean, mean], [y - 0.42 * height, y + 0.42 * height], color=colour, linewidth=2.2)
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="#F4F4F4", zorder=0)
    ax.set_yticks(range(len(rows)), [title for title, _ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(left=False)


def draw_sets(
    path: Path, groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], styles: Mapping[str, tuple[str, str]],
    names: Mapping[str, str], xlabel: str, looks_at: str, guess: float | None = None,
) -> Path:  # fmt: skip
    """Dots of every seed on each test set, and beside them the background share: a line a system.

    Args:
        path: of the figure.
        groups: (system's title, its rows), from the top.
        styles: column, in percent -> (colour, marker).
        names: column -> what the legend calls it.
        xlabel: what the columns are, and what is good.
        looks_at: what a net without background share looks at.
        guess: where guessing ends up, marked by a line.
    """
    figure = Figure(figsize=(10, 0.42 * len(groups) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    dots(left, [(title, {name: values(rows, name) for name in styles}) for title, rows in groups], styles)
    dots(right, [(title, {"share": values(rows, "share")}) for title, rows in groups], {"share": ("#6B6B6B", "o")})
    if guess is not None:
        left.axvline(guess, color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    left.set_xlabel(xlabel)
    right.set_xlabel(f"background share, %\n(0: looks at the {looks_at} only)")
    left.set_xlim(-2, 102)
    right.set_xlim(-2, 102)
    for name, (colour, marker) in styles.items():
        left.plot([], [], marker, color=colour, label=names[name])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure, whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    return path
