"""How far can an ISNet's settings be off before it fails? One setting at a time, around the recommended one, on biased MNIST.

Epsilon (relative to each layer's scale, and absolute), d, P, C1 and C2 (fixed ranges, and tuned from the classifier's own maps) and
w1 : w2 are varied, each with all others as recommended, for Stochastic and Selective; P and d for Contrast, too. The recommended
setting: epsilon 1e-4 relative, d 0.9, P 0.7, C1 1, C2 25, w1 : w2 = 1 : 3.

*Safe range*, for each seed against the recommended setting's mean over seeds: a value is safe when every seed's accuracy on the biased
and on the confounded test set is at most 3 points below that mean. (Confounded: the shortcut does not come back. Biased: the net
learns as well as before.) The safe range is the unbroken run of safe values around the recommended one; where a grid does not hold the
recommended value, or has no order, the safe values are listed. A value that was not tried is not in it.

    python -m benchmarks.experiments.sensitivity --data mnist.npz

The small scale trims the grids to an hour and five minutes of a core: 39 settings, two seeds, 1,400 steps of batch 32. ``--full``
tries every value of `GRIDS` for all three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .biased_mnist import DATA, STYLES, load
from .command import Run, in_one_line, parse, parser
from .figures import save
from .fit import fit
from .jobs import Row, unfinished
from .measure import measure
from .systems import TITLES, Setting, as_row
from .tables import mean_spread, table, values, write_page

__all__ = ["GRIDS", "Grid", "range_text", "safe", "safe_range"]

MARGIN = 3.0  # points of accuracy
SETS = ("accuracy_biased", "accuracy_confounded")  # what safety is judged by


@dataclass(frozen=True)
class Grid:
    """The values of one setting.

    Attributes:
        title: what it is called.
        values: text -> what it changes in the recommended setting; nothing: it is the recommended value.
        small: values that the small scale tries, for each system that it tries the grid for.
        ordered: neighbours are alike, so that a range of values means something.
    """

    title: str
    values: Mapping[str, Mapping[str, Any]]
    small: Mapping[str, Sequence[str]]
    ordered: bool = True

    @property
    def recommended(self) -> str | None:
        """The recommended value's text, if it is among the values."""
        return next((text for text, change in self.values.items() if not change), None)


def _values(name: str, numbers: Sequence[float], **more: Any) -> dict[str, dict[str, Any]]:
    own = getattr(Setting("stochastic"), name)
    texts = [f"{v:.0e}".replace("e-0", "e-") if name == "eps" else f"{v:g}" for v in numbers]
    return {text: {} if v == own and not more else {name: v, **more} for text, v in zip(texts, numbers)}


GRIDS = {
    "eps": Grid(
        "epsilon, relative", _values("eps", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
        {"stochastic": ("1e-6", "1e-3", "1e-2", "1e-1"), "selective": ("1e-3", "1e-2", "1e-1")},
    ),
    "eps_absolute": Grid(
        "epsilon, absolute", _values("eps", (1e-5, 1e-3, 1e-2, 1e-1), relative=False),
        {"stochastic": ("1e-2",), "selective": ("1e-2",)},
    ),
    "d": Grid(
        "d", _values("d", (0.5, 0.9, 0.99, 0.996, 1.0)),
        {"stochastic": ("0.99", "1"), "selective": ("1",), "contrast": ("1",)},
    ),
    "P": Grid(
        "P", _values("P", (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)),
        {"stochastic": ("0.1", "0.3", "0.5", "0.9", "0.97"), "selective": ("0.3", "0.5", "0.9"), "contrast": ("0.3", "0.5", "0.9")},
    ),
    "C1": Grid(
        "C1 (C2 = 25 C1)", {"0.1": {"c1": 0.1, "c2": 2.5}, "1": {}, "10": {"c1": 10.0, "c2": 250.0}},
        {"stochastic": ("0.1", "10"), "selective": ("0.1", "10")},
    ),
    "tune": Grid(
        "C1, C2", {"1, 25": {}, "tuned": {"tune": 0.2}}, {"stochastic": ("tuned",), "selective": ()}, ordered=False,
    ),
    "w": Grid(
        "w1 : w2", {"1:0": {"w1": 1.0, "w2": 0.0}, "1:1": {"w1": 1.0, "w2": 1.0}, "1:3": {}, "1:10": {"w1": 1.0, "w2": 10.0},
                    "3:3": {"w1": 3.0, "w2": 3.0}, "10:3": {"w1": 10.0, "w2": 3.0}},
        {"stochastic": ("1:0", "1:10", "10:3"), "selective": ("1:0", "10:3"), "contrast": ("3:3", "10:3")}, ordered=False,
    ),
}  # fmt: skip
SYSTEMS = ("stochastic", "selective", "contrast")


def base(run_steps: int, system: str, seed: int) -> Setting:
    """The recommended setting."""
    return Setting(system, seed=seed, steps=run_steps, batch=32, lr=0.08)


def changed(setting: Setting, change: Mapping[str, Any]) -> Setting:
    """The setting with a grid's change; ``tune`` is given as a share of the steps."""
    change = dict(change)
    if "tune" in change:
        change["tune"] = round(change["tune"] * setting.steps)
    return replace(setting, **change)


def tried(grid: Grid, system: str, scale: str) -> list[str]:
    """The values that a scale tries, in the grid's order, the recommended one included; none: not this system."""
    if scale == "full":
        return list(grid.values)
    chosen = grid.small.get(system, ())
    if scale == "quick":
        chosen = chosen[:1]
    return [text for text in grid.values if text in chosen or (chosen and text == grid.recommended)]


def settings(run: Run) -> list[Setting]:
    """All trainings, each once: the recommended setting is part of every grid that holds it."""
    steps = run.pick(4, 1400, 6000)
    found = [
        changed(base(steps, system, seed), grid.values[text])
        for seed in range(run.seeds) for system in SYSTEMS for grid in GRIDS.values() for text in tried(grid, system, run.scale)
    ]  # fmt: skip
    found += [base(steps, system, seed) for seed in range(run.seeds) for system in SYSTEMS]
    # recommended settings first, so that a run that was stopped has what the others are compared with
    return sorted(dict.fromkeys(found), key=lambda s: s != base(steps, s.system, s.seed))


def one(job: Row, given: Row) -> Row:
    """Trains and measures one setting."""
    task = load(given["data"], *DATA[given["scale"]]).to(given["device"])
    fitted = fit(Setting(**job), task)
    return {**measure(fitted.system, task), "steps_done": fitted.steps, "train_seconds": fitted.seconds, "diverged": fitted.diverged}


# ---- the safe range --------------------------------------------------------------------------------------------------


def safe(rows: Sequence[Row], recommended: Sequence[Row], margin: float = MARGIN) -> bool:
    """Whether a value is safe: no seed's biased or confounded accuracy is more than ``margin`` points below the recommended mean.

    Example:
        >>> reference = [{"accuracy_biased": 97.0, "accuracy_confounded": b} for b in (96.0, 94.0)]
        >>> safe([{"accuracy_biased": 94.0, "accuracy_confounded": 92.0}], reference)
        True
        >>> safe([{"accuracy_biased": 99.0, "accuracy_confounded": 91.9}], reference)
        False
    """
    if not rows or not recommended:
        return False
    return all(
        row[column] is not None and row[column] >= fmean(values(recommended, column)) - margin for row in rows for column in SETS
    )


def safe_range(texts: Sequence[str], good: Sequence[bool], recommended: str | None, ordered: bool) -> list[str]:
    """The safe values: of an ordered grid, the unbroken run around the recommended one; else all of them.

    Example:
        >>> safe_range(["0.1", "0.3", "0.7", "0.9"], [True, False, True, True], "0.7", True)
        ['0.7', '0.9']
        >>> safe_range(["a", "b", "c"], [True, False, True], "c", False)
        ['a', 'c']
        >>> safe_range(["1", "2"], [True, False], "2", True)
        []
    """
    if not ordered or recommended not in texts:
        return [text for text, fine in zip(texts, good) if fine]
    first = last = texts.index(recommended)
    if not good[first]:
        return []
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(texts) and good[last + 1]:
        last += 1
    return list(texts[first : last + 1])


def rows_of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """The rows of a setting, whatever their seed, as they read back from a file (six significant digits)."""

    def same(row: Row) -> bool:
        for name, value in as_row(setting).items():
            wanted = float(f"{value:.6g}") if isinstance(value, float) else value
            if name != "seed" and row.get(name) != wanted:
                return False
        return True

    return [row for row in rows if same(row)]


@dataclass(frozen=True)
class Result:
    """One grid of one system: the rows of every value that was tried, and which values are safe."""

    grid: Grid
    system: str
    rows: dict[str, list[Row]]
    recommended_rows: list[Row]
    safe: list[str]


def results(rows: Sequence[Row]) -> list[Result]:
    """Every grid of every system that has rows besides the recommended setting's."""
    found = []
    for system in SYSTEMS:
        own = [row for row in rows if row["system"] == system]
        if not own:
            continue
        start = base(own[0]["steps"], system, 0)
        recommended = rows_of(own, start)
        for grid in GRIDS.values():
            there = {text: part for text, change in grid.values.items() if (part := rows_of(own, changed(start, change)))}
            if set(there) <= {grid.recommended}:
                continue
            good = [safe(part, recommended) for part in there.values()]
            found.append(Result(grid, system, there, recommended, safe_range(list(there), good, grid.recommended, grid.ordered)))
    return found


# ---- figure and table ------------------------------------------------------------------------------------------------


def range_text(result: Result) -> str:
    """The safe values as the table tells them."""
    texts, ordered = result.safe, result.grid.ordered and result.grid.recommended in result.rows
    if not texts:
        return "none"
    if ordered and len(texts) > 1:
        return f"{texts[0]} to {texts[-1]}"
    return "; ".join(texts)


def _worst(result: Result, column: str) -> str:
    """The value whose lowest seed is lowest."""
    lowest = {text: min(values(rows, column), default=float("nan")) for text, rows in result.rows.items()}
    text = min(lowest, key=lowest.__getitem__)
    return f"{lowest[text]:.1f} at {text}"


def lines(found: Sequence[Result]) -> list[str]:
    """The table of safe ranges, and all values."""
    columns: dict[str, Callable[[Sequence[Any]], str]] = {
        "system": lambda g: TITLES[g[0].system], "setting": lambda g: g[0].grid.title,
        "recommended": lambda g: g[0].grid.recommended or "(relative)",
        "safe": lambda g: range_text(g[0]), "tried": lambda g: ", ".join(text.replace(", ", "/") for text in g[0].rows),
        "lowest confounded, %": lambda g: _worst(g[0], "accuracy_confounded"),
        "lowest biased, %": lambda g: _worst(g[0], "accuracy_biased"),
    }  # fmt: skip
    body = table(columns, [[result] for result in found])
    cells = [(result, text) for result in found for text in result.rows]
    every: dict[str, Callable[[Sequence[Any]], str]] = {
        "system": lambda g: TITLES[g[0][0].system], "setting": lambda g: g[0][0].grid.title,
        "value": lambda g: g[0][1] + (" (recommended)" if g[0][1] == g[0][0].grid.recommended else ""),
        **{name.removeprefix("accuracy_"): lambda g, n=name: mean_spread(g[0][0].rows[g[0][1]], n) for name in STYLES},
        "background share": lambda g: mean_spread(g[0][0].rows[g[0][1]], "share"),
        "by its own epsilon": lambda g: mean_spread(g[0][0].rows[g[0][1]], "share_own"),
        "swap gap": lambda g: mean_spread(g[0][0].rows[g[0][1]], "swap_gap"),
        "safe": lambda g: "yes" if g[0][1] in g[0][0].safe else "no",
    }  # fmt: skip
    return [*body, "", "Every value:", "", *table(every, [[cell] for cell in cells])]


def _panel(ax: Axes, result: Result) -> None:
    texts = list(result.rows)
    for i, text in enumerate(texts):
        if text in result.safe:
            ax.axvspan(i - 0.5, i + 0.5, color="#DDEFE6", zorder=0)
    if result.grid.recommended in texts:
        ax.axvline(texts.index(result.grid.recommended), color="black", lw=1, ls=(0, (3, 3)), zorder=1)
    for j, (column, (colour, marker)) in enumerate(STYLES.items()):
        shift = 0.14 * (j - 1)  # lines that lie on one another are seen
        points = [(i + shift, values(result.rows[text], column)) for i, text in enumerate(texts)]
        points = [(x, found) for x, found in points if found]
        line = "-" if result.grid.ordered else "none"
        ax.plot([x for x, _ in points], [fmean(v) for _, v in points], linestyle=line, color=colour, lw=1.5)
        ax.plot([x for x, v in points for _ in v], [y for _, v in points for y in v], marker, color=colour, ms=4.2, alpha=0.75, mew=0)
    ax.set_xticks(range(len(texts)), texts, fontsize=8, rotation=20 if max(map(len, texts)) > 5 else 0)
    ax.set_xlim(-0.5, len(texts) - 0.5)
    ax.grid(axis="y", color="#E2E2E2", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw(rows: Sequence[Row], path: Path) -> Path:
    """A panel for each setting (columns) and system (rows)."""
    found = results(rows)
    systems = list(dict.fromkeys(result.system for result in found))
    grids = list(dict.fromkeys(result.grid.title for result in found))
    widths = [max(2.6, max(len(r.rows) for r in found if r.grid.title == title) + 0.8) for title in grids]
    figure = Figure(figsize=(1.2 + 0.44 * sum(widths) + 0.3 * len(grids), 1.4 + 2.3 * len(systems)), layout="constrained")
    axes = figure.subplots(len(systems), len(grids), squeeze=False, sharey=True, width_ratios=widths)
    for i, system in enumerate(systems):
        first = True
        for j, title in enumerate(grids):
            ax, own = axes[i, j], [r for r in found if r.system == system and r.grid.title == title]
            if not own:
                ax.axis("off")
                continue
            _panel(ax, own[0])
            ax.set_title(title, fontsize=9.5)
            if first:
                ax.set_ylabel(f"{TITLES[system]}\naccuracy, % (high is good)", fontsize=9)
                ax.tick_params(labelleft=True)
                first = False
    low = min((v for row in rows for column in STYLES for v in values([row], column)), default=0)
    axes[0, 0].set_ylim(max(-2, low - 6), 101.5)
    legend = axes[0, 0]
    for name, (colour, marker) in STYLES.items():
        legend.plot([], [], "-", marker=marker, ms=4.5, color=colour, label=f"{name.removeprefix('accuracy_')} (dots: seeds)")
    legend.plot([], [], color="black", lw=1, ls=(0, (3, 3)), label="recommended")
    legend.plot([], [], "s", ms=9, color="#DDEFE6", label="safe: no seed more than 3 points below the recommended mean")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8.5)
    return save(figure, path)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=2)
    p.add_argument("--data", required=True, help="MNIST's mnist.npz")
    options, run = parse(p, arguments)
    path, jobs = run.path("sensitivity", ".csv"), [as_row(s) for s in settings(run)]
    given = {"data": options.data, "device": run.device, "scale": run.scale}
    if not run.draw:
        load(options.data, 600, 60)  # a wrong --data is told before processes start
    rows = run.rows(path, jobs, one, given, "sensitivity")
    command, (train, test) = run.command("sensitivity", "--data mnist.npz"), DATA[run.scale]
    some = Setting(**{name: rows[0][name] for name in Setting.names()})
    notes = [
        f"{some.net}, {train:,} training digits, {some.steps} steps of batch {some.batch}, {test:,} test digits; one "
        "setting changed at a time, all others as recommended: epsilon 1e-4 relative to each layer's scale, d 0.9, "
        "P 0.7, C1 1, C2 25, w1 : w2 = 1 : 3.",
        f"Safe: no seed's biased or confounded accuracy is more than {MARGIN:g} points below the recommended setting's mean; of "
        "ordered settings, the unbroken run of such values around the recommended one. What was not tried is not known.",
        "tuned: the first fifth of the steps trains the classifier alone, then C1 and C2 are set from its heatmaps; the learning rate "
        "falls to 0 within each of the two parts, so that more than C1 and C2 is changed.",
        "Safety is judged on the test sets, the confounded one included: the table tells how far these settings can be off here, and "
        "chooses nothing that other pages report. Background share: by epsilon 1e-4 of each layer's scale, whatever the training's.",
    ]
    if run.scale == "small":
        notes.append("Values are left out at this scale (all of them: --full); Contrast, this project's own, is tried for d and P.")
    page = write_page(
        path.with_suffix(".md"), "How far can an ISNet's settings be off?", command, rows, lines(results(rows)),
        [*notes, *unfinished(rows, jobs)],
    )  # fmt: skip
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
