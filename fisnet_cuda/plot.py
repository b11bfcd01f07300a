"""Heatmaps as figures: input, mask contour, and symmetric red-blue heatmaps with their scale; needs matplotlib (extra ``train``)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from .errors import InputError
from .files import atomic

__all__ = ["SCALES", "Row", "background_share", "heatmap_grid"]

SCALES = ("each", "shared")
Map: TypeAlias = "Tensor | np.ndarray"

# Okabe and Ito's palette: its colours differ for every kind of colour vision
BLUE, VERMILION = "#0072B2", "#D55E00"  # right and wrong, in demo/figures.py, too
COLOURS = "RdBu_r"  # red: for; blue: against; white: zero
NOT_FINITE = "#999999"
DPI = 120

# sizes in inches
MARGIN, TEXT, GAP, BAR, BAR_TEXT, LINE = 0.2, 1.75, 0.16, 0.09, 0.52, 0.19
AREA_SIDE, LONGEST = 2.1, 4.2  # a panel has AREA_SIDE^2 square inches and no side above LONGEST


@dataclass(frozen=True)
class Row:
    """One image and what explains it.

    Args:
        image: ``[C, H, W]`` in [0, 1]; 1 channel is shown in grey, 3 in colour, others by their mean.
        mask: ``[H, W]`` in [0, 1], 1 = foreground; None: there is none.
        heatmaps: title -> relevance ``[H, W]`` or ``[C, H, W]`` (channels are summed for showing); inner maps may be smaller
            than the image and are drawn over the same area.
        text: what stands on the left: the file, the true class, what the net says.
        correct: whether the net is right; None where that is not known.
    """

    image: Map
    mask: Map | None = None
    heatmaps: Mapping[str, Map] = field(default_factory=dict)
    text: str = ""
    correct: bool | None = None


def background_share(heatmap: Map, mask: Map) -> float:
    """The part of a map's absolute relevance that lies outside the mask: sum of ``|R| (1 - M)`` over the sum of ``|R|``.

    Args:
        heatmap: ``[H, W]`` or ``[C, H, W]``.
        mask: ``[H, W]`` in [0, 1], 1 = foreground, of the heatmap's size.

    Returns:
        In [0, 1]; NaN for a map that is zero everywhere or not finite somewhere.

    Example:
        >>> background_share(np.array([[3.0, -1.0]]), np.array([[1, 0]]))
        0.25
    """
    size = np.abs(_array(heatmap))
    inside = _array(mask)
    if inside.shape != size.shape[-2:]:
        raise ValueError(f"mask must have the heatmap's size {size.shape[-2:]}, got {inside.shape}")
    total = float(size.sum())
    return float((size * (1 - inside)).sum() / total) if math.isfinite(total) and total > 0 else math.nan


def heatmap_grid(
    path: str | Path,
    rows: Sequence[Row],
    *,
    title: str | None = None,
    scale: str = "each",
    percentile: float = 99.5,
    overlay: bool = False,
    unit: str = "logit",
) -> Path:
    """Draws one row an image: the input with the contour of its mask, then its heatmaps in red (for) and blue (against).

    White is zero, and the scale is symmetric: a colour bar says which relevance the darkest colours stand for. Beside each map
    stands the share of its absolute relevance in the background. Maps that are all zero, and values that are not finite (grey), are
    named.

    Args:
        path: the figure, ``.png`` (or ``.pdf``, ``.svg``); written whole or not at all.
        rows: 1 to about 16; each with up to about 5 heatmaps.
        title: above everything.
        scale: "each" map has its own, or one "shared" by all.
        percentile: of the absolute relevance of the pixels, which gets the darkest colour; everything beyond has it, too, and
            the colour bar then ends in arrows. 100: the largest value.
        overlay: the map lies over the image in grey, more opaque where there is more relevance (zero is transparent).
        unit: what relevance sums up to: "logit", or "eta" for Selective's own start.

    Returns:
        ``path``.

    Raises:
        InputError: the file cannot be written, or its suffix is none that can be drawn.
        ValueError: no rows, shapes that do not fit together, an unknown ``scale``; names the row.

    Example:
        >>> import tempfile, torch
        >>> row = Row(torch.rand(1, 8, 8), torch.ones(8, 8), {"TB": torch.randn(1, 8, 8)}, "a.png: TB, 93 %", correct=True)
        >>> heatmap_grid(Path(tempfile.mkdtemp()) / "maps.png", [row]).name
        'maps.png'
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"{path}: a figure's name must end in .png, .pdf or .svg")
    if scale not in SCALES:
        raise ValueError(f"scale must be 'each' or 'shared', got {scale!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
    panels = [_Panels(row, i) for i, row in enumerate(rows)]
    if not panels:
        raise ValueError("rows must hold at least one Row, got none")
    figure = _Sheet(panels, title, scale, percentile, overlay, unit).draw()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return path


class _Panels:
    """A `Row` as arrays, checked, with what is said below each map."""

    def __init__(self, row: Row, index: int) -> None:
        image = np.clip(np.nan_to_num(_array(row.image)), 0, 1)
        if image.ndim != 3 or not image.size:
            raise ValueError(f"rows[{index}].image must be [C, H, W], got {image.shape}")
        self.image = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
        self.height, self.width = image.shape[1:]
        self.mask = None if row.mask is None else np.nan_to_num(_array(row.mask))
        if self.mask is not None and self.mask.shape != image.shape[1:]:
            raise ValueError(f"rows[{index}].mask must be [H, W] = {image.shape[1:]}, got {self.mask.shape}")
        self.text, self.correct = row.text, row.correct
        self.titles = list(row.heatmaps)
        self.maps: list[np.ndarray] = []  # [H, W]
        self.notes: list[list[tuple[str, str]]] = []  # of each map: (text, colour)
        for name, given in row.heatmaps.items():
            heatmap = _array(given)
            if heatmap.ndim not in (2, 3) or not heatmap.size:
                raise ValueError(f"rows[{index}].heatmaps[{name!r}] must be [H, W] or [C, H, W], got {heatmap.shape}")
            self.notes.append(self._note(heatmap))
            self.maps.append(heatmap if heatmap.ndim == 2 else heatmap.sum(0))

    def _note(self, heatmap: np.ndarray) -> list[tuple[str, str]]:
        pixels = heatmap.shape[-2] * heatmap.shape[-1]
        bad = int((~np.isfinite(heatmap)).reshape(-1, pixels).any(0).sum())
        if bad:
            return [(f"{bad:,} of {pixels:,} pixels\nare NaN or infinite", VERMILION)]
        if not heatmap.any():
            return [("zero everywhere", VERMILION)]
        if self.mask is None:
            return [("no mask", "0.45")]
        if heatmap.shape[-2:] != self.mask.shape:
            return [("", "black")]  # an inner map: its pixels are not the mask's
        share = background_share(heatmap, self.mask)
        notes = [(f"in background: {100 * share:.{1 if share < 0.0995 else 0}f} %", "black")]
        return notes if self.mask.any() else [("mask is empty: all is background", VERMILION)]


class _Sheet:
    """The figure's layout, in inches from the upper left corner."""

    def __init__(
        self, rows: list[_Panels], title: str | None, scale: str, percentile: float, overlay: bool, unit: str
    ) -> None:
        self.rows, self.scale, self.percentile, self.overlay, self.unit = rows, scale, percentile, overlay, unit
        self.columns = max(len(row.maps) for row in rows)
        self.same_titles = all(row.titles == rows[0].titles for row in rows)
        sizes = [self._panel(row) for row in rows]
        self.panel_width = max(width for width, _ in sizes)
        self.sizes = sizes
        self.text_width = TEXT if any(row.text or row.correct is not None for row in rows) else 0.0
        each = scale == "each"
        self.pitch = self.panel_width + GAP + (BAR + BAR_TEXT + 0.04 if each else 0.0)
        self.maps_left = MARGIN + self.text_width + self.panel_width + GAP
        self.shared_left = self.maps_left + self.columns * self.pitch  # of the shared colour bar
        width = self.shared_left + MARGIN - (GAP if each else 0.0) + (0.0 if each or not self.columns else 0.95)
        self.width = max(width, 5.6)
        self.limits = self._limits()

        self.title = _wrap(title, self._letters(13), bold=True) if title else []
        self.reading = textwrap.wrap(self._reading(), self._letters(8.5)) if self.columns else []
        self.legend_rows = math.ceil(len(self._handles()) / self._legend_columns()) if self._handles() else 0
        self.top = MARGIN + 0.26 * len(self.title) + 0.165 * len(self.reading) + 0.24 * self.legend_rows + 0.1
        # input and, if they are the same in all rows, the maps' names once, above the first row
        self.name_lines = max(len(self._name(t).split("\n")) for row in rows for t in (*row.titles, "input"))
        self.heights = [self._row_height(row, size[1]) for row, size in zip(rows, sizes)]
        self.height = self.top + LINE * self.name_lines + 0.04 + sum(self.heights) + 0.5 * MARGIN
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(self.figure)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _panel(self, row: _Panels) -> tuple[float, float]:
        side = AREA_SIDE if len(self.rows) <= 8 else 0.85 * AREA_SIDE
        aspect = row.width / row.height
        width, height = side * math.sqrt(aspect), side / math.sqrt(aspect)
        shrink = min(1.0, LONGEST / max(width, height))
        return max(width * shrink, 0.25), max(height * shrink, 0.25)

    def _row_height(self, row: _Panels, panel: float) -> float:
        note = max((note.count("\n") + 1 for notes in row.notes for note, _ in notes), default=0)
        above = 0.0 if self.same_titles or row is self.rows[0] else LINE * self.name_lines + 0.04
        text = 0.175 * len(self._row_lines(row))
        return above + max(panel + 0.17 * note + 0.05, text) + 0.14

    def _letters(self, points: float, inches: float | None = None) -> int:
        """How many letters of a size fit into a line: in DejaVu Sans a letter is about 0.56 of its size wide."""
        inches = self.width - 2 * MARGIN if inches is None else inches
        return max(8, int(inches * 72 / (0.56 * points)))

    def _limits(self) -> list[list[float]]:
        """The relevance that gets the darkest colour, by row and map; 0: there is none but zero."""
        if self.scale == "each":
            return [[_limit([m], self.percentile) for m in row.maps] for row in self.rows]
        one = _limit([m for row in self.rows for m in row.maps], self.percentile)
        return [[one] * len(row.maps) for row in self.rows]

    # ---- texts -------------------------------------------------------------------------------------------------------

    def _name(self, title: str) -> str:
        return "\n".join(_wrap(title, self._letters(9.5, self.pitch - 0.1), bold=True)) or " "

    def _row_lines(self, row: _Panels) -> list[str]:
        width = self._letters(8.5, TEXT - 0.1)
        lines = [part for line in row.text.split("\n") for part in _wrap(line, width)] if row.text else []
        return lines if row.correct is None else [*lines, "right" if row.correct else "WRONG"]

    def _reading(self) -> str:
        sentences = []
        if any(row.mask is not None for row in self.rows):
            sentences.append("Good: colour inside the outline; bad: colour in the background, outside it.")
        whose = "every map has its own scale" if self.scale == "each" else "all maps share one scale"
        sentences.append(f"Numbers at the colours: relevance of a pixel in the unit of a {self.unit}; {whose}.")
        if self._clipped():
            sentences.append(f"The darkest colour starts at the {self.percentile:g}th percentile of |relevance| (arrows: more exists).")
        return " ".join(sentences)

    def _clipped(self) -> bool:
        pairs = [(m, limit) for row, limits in zip(self.rows, self.limits) for m, limit in zip(row.maps, limits)]
        return any(_beyond(m, limit) for m, limit in pairs)

    def _handles(self) -> list[Any]:
        handles: list[Any] = []
        if self.columns:
            colours = colormaps[COLOURS]
            zero = "image in grey: no say" if self.overlay else "white: no say"
            handles = [
                Patch(facecolor=colours(0.88), label="red: for the class"),
                Patch(facecolor=colours(0.12), label="blue: against it"),
                Patch(facecolor="0.8" if self.overlay else "white", edgecolor="0.5", label=zero),
            ]
        if any((~np.isfinite(m)).any() for row in self.rows for m in row.maps):
            handles.append(Patch(facecolor=NOT_FINITE, label="grey: not a number" if not self.overlay else "hole: not a number"))
        if any(row.mask is not None for row in self.rows):
            handles.append(Line2D([], [], color="black", lw=1.1, path_effects=_halo(), label="outline of the mask (foreground)"))
        return handles

    def _legend_columns(self) -> int:
        labels = [handle.get_label() for handle in self._handles()]
        inches = sum(0.48 + 0.068 * len(label) for label in labels)
        return len(labels) if inches < self.width - MARGIN else 2

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def draw(self) -> Figure:
        y = MARGIN
        for line in self.title:
            self._text(MARGIN, y + 0.13, line, fontsize=13, fontweight="bold", va="center")
            y += 0.26
        for line in self.reading:
            self._text(MARGIN, y + 0.08, line, fontsize=8.5, va="center", color="0.25")
            y += 0.165
        if self.legend_rows:
            self.figure.legend(
                handles=self._handles(), ncols=self._legend_columns(), loc="upper left", frameon=False, fontsize=8.5,
                bbox_to_anchor=(MARGIN / self.width, 1 - (y + 0.02) / self.height), borderpad=0, borderaxespad=0,
                handlelength=1.4, columnspacing=1.4,
            )  # fmt: skip
        y = self.top + LINE * self.name_lines + 0.04
        for index, (row, size) in enumerate(zip(self.rows, self.sizes)):
            first = index == 0
            if not first and not self.same_titles:
                y += LINE * self.name_lines + 0.04
            self._row(index, row, size, y, first)
            y += self.heights[index] - (0.0 if first or self.same_titles else LINE * self.name_lines + 0.04)
        if self.scale == "shared" and self.columns:
            self._shared_bar()
        return self.figure

    def _row(self, index: int, row: _Panels, size: tuple[float, float], y: float, first: bool) -> None:
        width, height = size
        left = MARGIN + self.text_width + (self.panel_width - width) / 2
        ax = self._axes(left, y, width, height)
        ax.imshow(row.image, cmap="gray", vmin=0, vmax=1, aspect="auto", extent=_extent(row))
        self._outline(ax, row)
        if first:
            self._heading(left + width / 2, y, "input")
        self._row_text(row, y)
        for k, (heatmap, name, notes) in enumerate(zip(row.maps, row.titles, row.notes)):
            left = self.maps_left + k * self.pitch + (self.panel_width - width) / 2
            limit = self.limits[index][k]
            ax = self._axes(left, y, width, height)
            self._heatmap(ax, row, heatmap, limit)
            self._outline(ax, row)
            if first or not self.same_titles:
                self._heading(left + width / 2, y, self._name(name))
            for note, colour in notes:
                self._text(left + width / 2, y + height + 0.04, note, fontsize=8, ha="center", va="top", color=colour)
            if self.scale == "each" and limit:
                bar = self._axes(left + width + 0.05, y, BAR, height)
                self._bar(bar, limit, _beyond(heatmap, limit), short=height < 0.55)

    def _row_text(self, row: _Panels, y: float) -> None:
        lines = self._row_lines(row)
        for i, line in enumerate(lines):
            verdict = row.correct is not None and i == len(lines) - 1
            colour = "black" if not verdict else BLUE if row.correct else VERMILION
            self._text(MARGIN, y + 0.175 * i, line, fontsize=8.5, va="top", color=colour, fontweight="bold" if verdict else "normal")

    def _heatmap(self, ax: Axes, row: _Panels, heatmap: np.ndarray, limit: float) -> None:
        norm = Normalize(-(limit or 1.0), limit or 1.0)
        if not self.overlay:
            colours = colormaps[COLOURS].with_extremes(bad=NOT_FINITE)
            shown = np.ma.masked_invalid(heatmap)
            ax.imshow(shown, cmap=colours, norm=norm, aspect="auto", extent=_extent(row))
            return
        grey = row.image if row.image.ndim == 2 else row.image.mean(2)
        ax.imshow(grey, cmap="gray", vmin=-0.6, vmax=1.1, aspect="auto", extent=_extent(row))
        colours = np.array(colormaps[COLOURS](norm(np.nan_to_num(heatmap, posinf=limit, neginf=-limit))))
        strength = np.abs(np.nan_to_num(heatmap, posinf=0.0, neginf=0.0)) / (limit or 1.0)
        colours[..., 3] = np.clip(strength, 0, 1) ** 0.6  # weak relevance stays visible over the image
        ax.imshow(colours, aspect="auto", extent=_extent(row))

    def _outline(self, ax: Axes, row: _Panels) -> None:
        ax.set(xlim=(-0.5, row.width - 0.5), ylim=(row.height - 0.5, -0.5))
        if row.mask is None or not (row.mask >= 0.5).any():
            return
        closed = np.pad(row.mask, 1)  # a mask that touches the border is outlined there, too
        x, y = np.arange(-1, row.width + 1), np.arange(-1, row.height + 1)
        lines = ax.contour(x, y, closed, levels=[0.5], colors="black", linewidths=1.0)
        lines.set_path_effects(_halo())

    def _bar(self, ax: Axes, limit: float, beyond: bool, *, short: bool = False) -> None:
        bar = self.figure.colorbar(
            ScalarMappable(Normalize(-limit, limit), cmap=COLOURS), cax=ax, extend="both" if beyond else "neither",
            extendfrac=0.06, ticks=[-limit, limit] if short else [-limit, 0, limit],
        )  # fmt: skip
        bar.ax.set_yticklabels([f"−{_number(limit)}", *([] if short else ["0"]), f"+{_number(limit)}"], fontsize=7)
        bar.ax.tick_params(length=2, pad=1.5)
        bar.outline.set_linewidth(0.5)

    def _shared_bar(self) -> None:
        limit = max((limit for limits in self.limits for limit in limits), default=0.0)
        if not limit:
            return
        y = self.top + LINE * self.name_lines + 0.04
        height = min(sum(self.heights) - 0.3, 4.0)
        ax = self._axes(self.shared_left + 0.02, y, 0.14, height)
        self._bar(ax, limit, self._clipped())
        ax.set_ylabel(f"relevance of a pixel, unit of a {self.unit}", fontsize=8, labelpad=2)

    def _heading(self, x: float, y: float, text: str) -> None:
        self._text(x, y - 0.06, text, fontsize=9.5, fontweight="bold", ha="center", va="bottom")

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        ax = self.figure.add_axes(box)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(linewidth=0.6, color="0.6")
        return ax

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        # parse_math: file and class names may hold dollar signs
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)


def _array(value: Map) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _extent(row: _Panels) -> tuple[float, float, float, float]:
    return (-0.5, row.width - 0.5, row.height - 0.5, -0.5)


def _limit(maps: Sequence[np.ndarray], percentile: float) -> float:
    """The percentile of the finite absolute values; the largest where that is zero (a map of a few pixels)."""
    size = np.concatenate([np.abs(m[np.isfinite(m)]).ravel() for m in maps]) if maps else np.empty(0)
    return float(np.percentile(size, percentile) or size.max()) if size.size else 0.0


def _beyond(heatmap: np.ndarray, limit: float) -> bool:
    return bool((np.abs(heatmap[np.isfinite(heatmap)]) > limit * (1 + 1e-9)).any()) and limit > 0


def _halo() -> list[Any]:
    """A white rim that keeps a black line visible on dark images."""
    return [Stroke(linewidth=2.4, foreground="white"), Normal()]


def _wrap(text: str, width: int, *, bold: bool = False) -> list[str]:
    """Lines of at most ``width`` letters (bold ones are wider), broken after blanks, slashes, hyphens and underscores first."""
    width = int(0.87 * width) if bold else width
    lines = [""]
    for piece in re.findall(r"[^ /_-]*[ /_-]?", text):
        while len(lines[-1]) + len(piece.rstrip()) > width:
            if lines[-1]:
                lines.append("")
                continue
            lines[-1], piece = piece[:width], piece[width:]
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _number(value: float) -> str:
    """Two significant digits: 0.0042, 4.2e-5, 130."""
    text = f"{value:.2g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{value:.0f}" if 0 <= int(exponent) < 4 else f"{mantissa}e{int(exponent)}"
    return text
