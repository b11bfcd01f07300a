"""The figures of the benchmarks; colours, names and layout in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from benchmarks.common import Spread

# Okabe and Ito's palette, whose colours differ for every kind of colour vision; orange darkened to be legible.
GREY, VERMILION, ORANGE, BLUE, GREEN, PURPLE, SKY = (
    "#6B6B6B", "#D55E00", "#D08A00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = {
    "plain": GREY,
    "selective": ORANGE,
    "stochastic": BLUE,
    "contrast": SKY,
    "dual": GREEN,
    "original": VERMILION,
    "double_backward": PURPLE,
    "plain_compiled": "#A8A8A8",
    "selective_compiled": "#E3BE6E",
}
TEXTS = {
    "plain": "plain",
    "selective": "Selective",
    "stochastic": "Stochastic",
    "contrast": "Contrast (ours)",
    "dual": "Dual",
    "original": "Original",
    "double_backward": "Selective's maps by\ndouble backward",
    "plain_compiled": "plain, torch.compile",
    "selective_compiled": "Selective, torch.compile",
}
MODEL_TEXTS = {
    "small": "small net", "resnet18": "ResNet-18", "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121", "vgg16_bn": "VGG-16-BN",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One bar: its length, its p20 to p80 as an error bar, and the lines across it.

    Args:
        label: at its left.
        value: what was measured.
        colour: of the bar.
        text: at its right.
        target: a line that the bar should not reach beyond.
        bound: a line that arithmetic does not let it go below.
    """

    label: str
    value: Spread
    colour: str
    text: str
    target: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Panel:
    """The bars of one network."""

    title: str
    items: Sequence[Item]


def bars(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[Panel],
    xlabel: str,
    *,
    log: bool = False,
    target_text: str = "target: at most this",
    bound_text: str = "arithmetic bound",
) -> None:
    """Horizontal bars, a panel for each network, with targets and bounds as lines across the bars.

    Args:
        path: of the PNG.
        title, subtitle: above.
        panels: side by side.
        xlabel: quantity and unit.
        log: logarithmic axis.
        target_text, bound_text: what the legend calls the lines.
    """
    most = max(len(panel.items) for panel in panels)
    size = max(8.0, 1.6 + 5.4 * len(panels)), 2.2 + most * (0.5 if most < 20 else 0.24)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels):
        _panel(ax, panel, xlabel, log)
    _head(figure, title, subtitle)
    handles = [Line2D([], [], color="black", lw=1.2, marker="|", markersize=6, label="p20 to p80")]
    items = [item for panel in panels for item in panel.items]
    if any(item.target for item in items):
        handles.append(Line2D([], [], color="black", lw=2.2, label=target_text))
    if any(item.bound for item in items):
        handles.append(Line2D([], [], color="black", lw=1.4, ls=":", label=bound_text))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=9, frameon=False)
    _save(figure, path)


def _panel(ax: Axes, panel: Panel, xlabel: str, log: bool) -> None:
    places = range(len(panel.items))
    largest = max(max(item.value.p80, item.target or 0) for item in panel.items)
    for y, item in zip(places, panel.items):
        v = item.value
        ax.barh(y, v.p50, 0.64, color=item.colour)
        ax.errorbar(v.p50, y, xerr=[[v.p50 - v.p20], [v.p80 - v.p50]], color="black", lw=1.2, capsize=3, zorder=3)
        for at, style in ((item.bound, {"lw": 1.4, "ls": ":"}), (item.target, {"lw": 2.2})):
            if at:
                ax.plot([at, at], [y - 0.42, y + 0.42], color="black", zorder=4, **style)
        # the text stands at the end of the bar, or behind the target where that would run through it
        behind = item.target and v.p80 < item.target < v.p80 + 0.4 * largest
        end = item.target if behind else v.p80
        ax.annotate(item.text, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(places, [item.label for item in panel.items], fontsize=9)
    ax.set_ylim(len(panel.items) - 0.4, -0.6)
    if log:
        ax.set_xscale("log")
        ax.set_xlim(0.5 * min(item.value.p20 for item in panel.items), 4 * largest)
        ax.xaxis.set_major_formatter("{x:g}")
    else:
        ax.set_xlim(0, 1.32 * largest)
    ax.set_xlabel(xlabel)
    ax.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Line:
    """Measurements along the number of classes."""

    label: str
    classes: Sequence[int]
    values: Sequence[Spread]
    colour: str
    dashed: bool = False


def growth(path: Path, title: str, subtitle: str, panels: Mapping[str, Sequence[Line]], ylabel: str) -> None:
    """Time against the number of classes, both axes logarithmic; p20 to p80 as error bars.

    Args:
        path: of the PNG.
        title, subtitle: above.
        panels: title of a panel -> its lines.
        ylabel: quantity and unit.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 + 5.6 * len(panels), 5.4), squeeze=False, layout="constrained")
    for ax, (name, lines) in zip(axes[0], panels.items()):
        counts = sorted({c for line in lines for c in line.classes})
        for line in lines:
            middle = [v.p50 for v in line.values]
            error = [[v.p50 - v.p20 for v in line.values], [v.p80 - v.p50 for v in line.values]]
            ax.errorbar(
                line.classes, middle, yerr=error, color=line.colour, lw=2, marker="o", ms=5, capsize=3,
                ls="--" if line.dashed else "-", label=line.label,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="number of classes", ylabel=ylabel)
        ax.set_xticks(counts, [f"{c:,}" for c in counts])
        low = min(v.p20 for line in lines for v in line.values) / 1.5
        high = max(v.p80 for line in lines for v in line.values) * 1.5
        ticks = [m * 10.0**e for e in range(-3, 8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        ax.set_yticks(ticks, [f"{t:,g}" for t in ticks])
        ax.set_ylim(low, high)
        ax.minorticks_off()
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(name, fontsize=11, loc="left", fontweight="bold")
        ax.legend(frameon=False, fontsize=9)
    _head(figure, title, subtitle)
    _save(figure, path)


@dataclass(frozen=True)
class Dot:
    """A kernel's time over another's: p50 with p20 to p80; ``chosen`` ones are filled."""

    label: str
    value: Spread
    chosen: bool


def dots(
    path: Path, title: str, subtitle: str, panels: Mapping[str, Sequence[Dot]], xlabel: str, chosen_text: str, other_text: str,
) -> None:  # fmt: skip
    """A dot for each label, sorted by value, with a line at 1; a panel below the other.

    Args:
        path: of the PNG.
        title, subtitle: above.
        panels: title of a panel -> its dots.
        xlabel: the ratio.
        chosen_text, other_text: what the legend calls filled and hollow dots.
    """
    counts = [len(found) for found in panels.values()]
    heights = [0.9 + 0.19 * count for count in counts]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(12, 1.3 + sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    values = [dot.value for found in panels.values() for dot in found]
    low, high = min([0.9, *(v.p20 for v in values)]), max([1.1, *(v.p80 for v in values)])
    high = min(high, 2.0)  # a kernel that is far too slow is an arrow at the edge
    for ax, (name, found) in zip(axes[:, 0], panels.items()):
        found = sorted(found, key=lambda dot: dot.value.p50)
        for y, dot in enumerate(found):
            v, colour = dot.value, BLUE if dot.chosen else GREY
            ax.plot([v.p20, min(v.p80, high)], [y, y], color=colour, lw=1.2)
            ax.plot(
                min(v.p50, high), y, marker="o" if v.p50 <= high else ">", ms=5, color=colour,
                markerfacecolor=colour if dot.chosen else "white",
            )  # fmt: skip
        ax.axvline(1, color="black", lw=1.2)
        ax.set_yticks(range(len(found)), [dot.label for dot in found], fontsize=7)
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.set_xlim(low - 0.03, high + 0.03)
        ax.set_xlabel(xlabel, fontsize=9)
        ax.grid(color="0.93")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(name, fontsize=11, loc="left", fontweight="bold")
    _head(figure, title, subtitle)
    handles = [
        Line2D([], [], color=BLUE, lw=1.2, marker="o", ms=5, label=chosen_text),
        Line2D([], [], color=GREY, lw=1.2, marker="o", ms=5, markerfacecolor="white", label=other_text),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9, frameon=False)
    _save(figure, path)


def machine(environment: Mapping[str, Any]) -> str:
    """Where and with what the numbers were taken, in one line."""
    e = environment
    versions = f"torch {e['torch']}, fisnet_cuda {e['fisnet_cuda']} at {e['commit']}"
    return f"{e['device']}, threads: {e['threads']}; {versions}; {e['date'][:10]}"


def model_title(row: Mapping[str, Any]) -> str:
    """The network and its input."""
    name = MODEL_TEXTS.get(row["model"], row["model"])
    return f"{name}, {row['batch']} images of 3x{row['size']}x{row['size']}"


def _head(figure: Figure, title: str, subtitle: str) -> None:
    # the line breaks keep room for the subtitle, which is smaller than the title
    figure.suptitle(f"{title}\n\n", fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 1 - 0.42 / figure.get_figheight(), subtitle, fontsize=9, color="0.35", va="top")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
