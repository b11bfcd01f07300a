"""What the experiments' figures share: colours and names of the systems, dots of single seeds, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from fisnet_cuda.files import atomic

__all__ = ["COLOURS", "dots", "save"]

# Okabe and Ito's palette; baselines that hide the background share one colour, those that lose by attention another
COLOURS = {
    "standard": GREY, "original": VERMILION, "selective": ORANGE, "stochastic": BLUE, "dual": GREEN, "contrast": PURPLE,
    "masked": "#A8A8A8", "segmented": "#A8A8A8", "rrr": SKY, "gradcam": SKY, "hirescam": SKY,
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


def save(figure: Figure, path: Path) -> Path:
    """Write the figure, whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    return path
