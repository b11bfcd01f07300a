"""The two figures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.text import Text

from fisnet_cuda.demo.classes import PLAIN, VARIANTS, StepTime
from fisnet_cuda.demo.digits import CLASSES, Batch, Marks
from fisnet_cuda.demo.train import Trained, explain, predict
from fisnet_cuda.files import atomic

# Okabe and Ito's palette: its colours differ for every kind of colour vision. Orange is darkened, for text.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#D08A00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
RIGHT, WRONG = BLUE, VERMILION
KIND_COLOURS = {
    PLAIN: "#4D4D4D",
    "original": VERMILION,
    "selective": ORANGE,
    "stochastic": BLUE,
    "contrast": PURPLE,
    "dual": GREEN,
}
KIND_TEXTS = {
    PLAIN: "plain training, no heatmap",
    "original": "Original, a heatmap per class",
    "selective": "Selective, 1 heatmap",
    "stochastic": "Stochastic, 1 heatmap",
    "contrast": "Contrast (ours), 1 heatmap",
    "dual": "Dual, 2 heatmaps",
}
MARK_COLOURS: dict[Marks, str] = {"biased": "#BDBDBD", "unbiased": SKY, "confounded": PURPLE}
MARK_TEXTS: dict[Marks, str] = {
    "biased": "biased: square at the true class",
    "unbiased": "unbiased: no square",
    "confounded": "confounded: square at a wrong class",
}


def heatmaps_figure(nets: Sequence[Trained], tests: dict[Marks, Batch], path: Path) -> Path:
    """Draws test images with the heatmaps of each net, and the accuracy of each net below.

    The images are the first test scans of four different digits, not chosen by what the nets make of them.

    Args:
        nets: the trained nets, the standard classifier first.
        tests: the test sets.
        path: where to write the PNG.

    Returns:
        ``path``.
    """
    order: list[Marks] = ["biased", "unbiased", "confounded", "confounded"]
    rows = [_take(tests[marks], _first_of_class(tests[marks], c)) for marks, c in zip(order, (3, 5, 8, 0))]

    figure = Figure(figsize=(3.0 + 2.1 * len(nets), 11.4))
    images, bars = figure.subfigures(2, 1, height_ratios=[3.5, 1])
    axes = images.subplots(
        len(rows),
        1 + len(nets),
        gridspec_kw={
            "left": 0.17,
            "right": 0.87,
            "top": 0.86,
            "bottom": 0.02,
            "hspace": 0.16,
            "wspace": 0.06,
        },
    )
    images.suptitle("What does each net look at to tell the digit?", fontsize=15, fontweight="bold", y=0.992)
    images.text(
        0.5,
        0.933,
        "Trained on images in which a small square on the left betrays the class.\n"
        "Good: colour only on the digit, inside the outline, and the right answer whatever the square says.",
        ha="center",
        va="center",
        fontsize=10,
    )
    for ax, title in zip(axes[0], ["input", *(net.name for net in nets)]):
        ax.annotate(title, (0.5, 1.19), xycoords="axes fraction", ha="center", fontsize=11, fontweight="bold")
    for row, batch in zip(axes, rows):
        row[0].imshow(batch.images[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        _outline(row[0], batch.masks[0, 0], "white")
        row[0].set_ylabel(_row_text(batch), rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
        for ax, net in zip(row[1:], nets):
            heatmap, predicted = explain(net.model, batch)[0], predict(net.model, batch).item()
            ax.imshow((heatmap / heatmap.abs().max().clamp(min=1e-12)).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
            _outline(ax, batch.masks[0, 0], "0.45")
            correct = predicted == batch.labels.item()
            ax.set_title(
                f"says {predicted}: {'right' if correct else 'WRONG'}",
                fontsize=10,
                pad=3,
                color=RIGHT if correct else WRONG,
                fontweight="normal" if correct else "bold",
            )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    scale = images.colorbar(
        ScalarMappable(Normalize(-1, 1), cmap="RdBu_r"),
        cax=images.add_axes((0.895, 0.2, 0.018, 0.5)),
        ticks=[-1, 0, 1],
    )
    scale.ax.set_yticklabels(["against", "0", "for"])
    scale.set_label("relevance for the answer given, each heatmap over its largest value", fontsize=9)
    _accuracy_bars(bars, nets)
    return _save(figure, path)


def classes_figure(times: Sequence[StepTime], path: Path) -> Path:
    """Draws the time of a training step against the number of classes, both axes logarithmic.

    Args:
        times: what `fisnet_cuda.demo.classes.measure` returned.
        path: where to write the PNG.

    Returns:
        ``path``.
    """
    # this layout measures all texts and gives the axes what they leave: nothing is cut, whatever the numbers
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    ax = figure.subplots()
    plain = {row.classes: row.p50 for row in times if row.kind == PLAIN}
    counts = sorted(plain)
    labels = []
    for kind in (PLAIN, *VARIANTS):
        rows = sorted((row for row in times if row.kind == kind), key=lambda row: row.classes)
        x, y, colour = [row.classes for row in rows], [row.p50 for row in rows], KIND_COLOURS[kind]
        band = [row.p20 for row in rows], [row.p80 for row in rows]
        ax.fill_between(x, *band, color=colour, alpha=0.2, lw=0)
        ax.plot(x, y, color=colour, marker="o", lw=2.2, ms=5, ls="--" if kind == PLAIN else "-")
        text = KIND_TEXTS[kind]
        if kind != PLAIN:
            ratio = y[-1] / plain[x[-1]]
            text += f", {ratio:,.{1 if ratio < 10 else 0}f}x plain"
        if x[-1] < counts[-1]:
            text += f"\nat {x[-1]:,} classes; not measured beyond"
        labels.append(EndLabel(x[-1], y[-1], text, colour))
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="number of classes",
        ylabel="time of one training step, milliseconds",
        xticks=counts,
        xticklabels=[f"{count:,}" for count in counts],
        xlim=(counts[0] / 1.2, counts[-1] * 1.2),
    )
    ax.minorticks_off()
    low, high = min(row.p20 for row in times) / 1.4, max(row.p80 for row in times) * 1.6
    ticks = [t * 10.0**e for e in range(-2, 7) for t in (1, 2, 5) if low <= t * 10.0**e <= high]
    ax.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    ax.set_ylim(low, high)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(
        "Low is good, and flat is good: then more classes cost no more.\n"
        "Line: median; band: 20th to 80th percentile. One CPU thread.",
        loc="left", fontsize=10, pad=14,
    )  # fmt: skip
    ax.annotate(
        "What do heatmaps cost in training?", (0, 1), (0, 52), "axes fraction", "offset points", fontsize=14, fontweight="bold"
    )
    _end_labels(ax, labels)
    return _save(figure, path)


def _first_of_class(batch: Batch, label: int) -> int:
    return int(torch.nonzero(batch.labels == label)[0])


def _take(batch: Batch, i: int) -> Batch:
    return Batch(*(field[i : i + 1] for field in (batch.images, batch.labels, batch.masks, batch.marks)))


def _row_text(batch: Batch) -> str:
    digit, mark = batch.labels.item(), batch.marks.item()
    square = "no square" if mark < 0 else f"square says {mark}" + ("" if mark == digit else ",\na lie")
    return f"digit {digit},\n{square}"


def _outline(ax: Axes, mask: torch.Tensor, colour: str) -> None:
    ax.contour(mask.numpy(), levels=[0.5], colors=[colour], linewidths=1.0)


def _accuracy_bars(figure: Figure, nets: Sequence[Trained]) -> None:
    ax = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.92, "top": 0.76, "bottom": 0.11})
    width = 0.26
    for offset, (marks, colour) in zip((-width, 0, width), MARK_COLOURS.items()):
        values = [net.accuracy[marks] for net in nets]
        places = [i + offset for i in range(len(nets))]
        ax.bar(places, values, width * 0.94, color=colour, label=MARK_TEXTS[marks])
        for place, value in zip(places, values):
            # a white edge: legible where the line of guessing passes
            outline = [Stroke(linewidth=2.5, foreground="white"), Normal()]
            ax.text(place, value + 1.5, f"{value:.0f}", ha="center", fontsize=9, path_effects=outline)
    ax.axhline(100 / CLASSES, color="0.4", lw=1, ls=":")
    ax.text(1.005, 100 / CLASSES, "guessing", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color="0.3")
    ax.set(
        ylim=(0, 112),
        yticks=range(0, 101, 25),
        ylabel="right answers, percent",
        xlim=(-0.5, len(nets) - 0.5),
        xticks=range(len(nets)),
        xticklabels=[net.name for net in nets],
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Accuracy on test digits. Good: three equal, tall bars", fontsize=12, fontweight="bold", pad=30)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=3, fontsize=9, frameon=False)


@dataclass(frozen=True)
class EndLabel:
    """What is written beside the last point ``(x, y)`` of a line."""

    x: float
    y: float
    text: str
    colour: str


def _end_labels(ax: Axes, labels: Sequence[EndLabel]) -> None:
    """Writes each line's name right of the axes at the height of its end, apart from each other, with a thin line to the end."""
    labels = sorted(labels, key=lambda label: label.y)
    texts = []
    for label in labels:
        line = {"arrowstyle": "-", "color": label.colour, "lw": 0.8, "alpha": 0.6, "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)}
        style = {"color": label.colour, "va": "center", "fontsize": 9.5, "fontweight": "bold", "linespacing": 1.1}
        texts.append(ax.annotate(label.text, (label.x, label.y), (1.05, 0.5), "data", "axes fraction", line, **style))
    ax.figure.draw_without_rendering()  # lays out; the heights of texts and axes are known from here on
    box = ax.get_window_extent()
    wanted = [(ax.transData.transform((label.x, label.y))[1] - box.y0) / box.height for label in labels]
    heights = [1.2 * Text.get_window_extent(text).height / box.height for text in texts]
    for text, height in zip(texts, spread(wanted, heights)):
        text.set_y(height)


def spread(wanted: Sequence[float], heights: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[float]:
    """Middles of boxes of given heights that do not overlap, keep their order and lie as near as can be to where they are wanted.

    The least sum of squared moves: isotonic regression of what is left of the middles when the boxes below are taken off, by pooling
    neighbours that collide; then cut to the range.

    Args:
        wanted: middles, ascending.
        heights: of the boxes.
        low, high: where the boxes may be; grown upwards where they do not fit.

    Returns:
        The middles.

    Example:
        >>> spread([0.25, 0.25, 0.75], [0.125, 0.125, 0.125]), spread([0.0, 1.0], [0.5, 0.25])
        ([0.1875, 0.3125, 0.75], [0.25, 0.875])
    """
    below = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for place, taken in zip(wanted, below):
        mean, count = place - taken, 1
        while pools and pools[-1][0] > mean:
            other, n = pools.pop()
            mean, count = (mean * count + other * n) / (count + n), count + n
        pools.append((mean, count))
    high = max(high - sum(heights), low)
    starts = [min(max(mean, low), high) for mean, count in pools for _ in range(count)]
    return [start + taken for start, taken in zip(starts, below)]


def _save(figure: Figure, path: Path) -> Path:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path
