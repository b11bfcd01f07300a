"""Scenes of 2 to 200 classes: at equal time of a core, what do the ISNets reach whose cost does not grow with the classes?

Original makes a heatmap a class and step, the Faster variants one or two whatever the classes. Every system gets the same net, images,
batches, learning rate and **the same seconds of training**; what differs is how many steps they do in them. Scenes are composed
(`benchmarks.experiments.scene_images`): an object before a background whose tint and grating give the class away. Test sets: "biased"
(as in training), "unbiased" (a background of no class) and "confounded" (another class's background).

On the CPU, seconds are CPU seconds of the training's thread (`training_clock`): other work on the machine takes nothing from a system.
The rate falls to 0 within the time given, whatever the number of steps.

    python -m benchmarks.experiments.scenes                                         # the experiment
    python -m benchmarks.experiments.scenes --sheet docs/figures/scenes.png         # what the scenes look like
    python -m benchmarks.experiments.scenes --write DIR --classes 4 --images 200    # as an image folder with masks
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

from fisnet_cuda.errors import InputError
from fisnet_cuda.files import atomic, make_folder
from fisnet_cuda.progress import Progress

from .command import Run, in_one_line, parse, parser
from .figures import COLOURS, save
from .fit import fit
from .jobs import Row, unfinished
from .measure import measure
from .scene_images import BIASES, MOST, compose, sheet
from .systems import TITLES, Setting, as_row
from .tables import by, mean_spread, table, values, write_page
from .tasks import Task

SYSTEMS = ("standard", "original", "selective", "stochastic", "dual", "contrast")
SIZES = {"quick": (48, 8), "small": (20_000, 1_000), "full": (60_000, 4_000)}  # training and test images


@lru_cache(maxsize=1)
def load(classes: int, train: int, test: int) -> Task:
    """The task with so many classes; equally many images whatever the classes, each class equally often (but for the rest)."""

    def labels(n: int, seed: int) -> torch.Tensor:
        return torch.arange(n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] % classes

    tests = {bias: compose(labels(test, 2), classes, bias, seed=2) for bias in BIASES}
    parts = (compose(labels(n, seed), classes, "biased", seed) for n, seed in ((train, 0), (test, 1)))
    return Task("scenes", classes, *parts, tests)


# ---- the experiment ----------------------------------------------------------------------------------------------


def settings(run: Run) -> list[tuple[int, Setting]]:
    """All trainings of the experiment: (classes, setting)."""
    counts = run.pick((2, 3), (2, 10, 50, 200), (2, 10, 50, 200))
    seconds = run.pick(0.01, 50.0, 120.0)
    common = {"net": "poolnet", "steps": 0, "seconds": seconds, "batch": 32, "lr": 0.3, "P": 0.4}
    # a seed after the other, so that a run that was stopped has whole ones; in it the systems of a class count together: a process
    # keeps its images
    return [(classes, Setting(name, seed=seed, **common)) for seed in range(run.seeds) for classes in counts for name in SYSTEMS]


def one(job: Row, given: Row) -> Row:
    """Trains and measures one system: a row's results."""
    job = dict(job)
    task = load(job.pop("classes"), *SIZES[given["scale"]]).to(given["device"])
    fitted = fit(Setting(**job), task)
    times = {"seconds_done": fitted.seconds, "steps_done": fitted.steps, "ms_step": 1000 * fitted.seconds / max(fitted.steps, 1)}
    return {**measure(fitted.system, task), **times, "diverged": fitted.diverged}


PANELS = (
    ("accuracy_confounded", "confounded accuracy, %\n(the background tells another class; high is good)", (-3, 103)),
    ("share", "relevance in the background, %\n(0: looks at the object only)", (-3, 103)),
    ("steps_done", "steps of training done\nin the same time", None),
)


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Confounded accuracy, background share and steps done against classes: a line a system, a dot a seed."""
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    counts = sorted({row["classes"] for row in rows})
    systems = list(by(rows, "system").items())
    for ax, (column, label, limits) in zip(axes, PANELS):
        for place, ((name,), group) in enumerate(systems):
            # systems whose values agree stand side by side
            shift = 1.025 ** (place - (len(systems) - 1) / 2)
            found = {classes: values(some, column) for (classes,), some in by(group, "classes").items()}
            found = {classes: numbers for classes, numbers in found.items() if numbers}
            style = {"color": COLOURS.get(name, "black"), "linestyle": "--" if name == "standard" else "-"}
            at = [classes * shift for classes in found]
            ax.plot(at, [fmean(numbers) for numbers in found.values()], lw=1.8, label=TITLES.get(name, name), **style)
            for x, numbers in zip(at, found.values()):
                ax.plot([x] * len(numbers), numbers, "o", color=style["color"], markersize=4.5, alpha=0.75, markeredgewidth=0)
        ax.set_xscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set(xlabel="number of classes", ylabel=label)
        if limits:
            ax.set_ylim(*limits)
        else:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.grid(color="#DDDDDD", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    chance = [100 / count for count in counts]
    axes[0].plot(counts, chance, ":", color="black", lw=1.2, label="chance")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return save(figure, path)


def draw_sheet(path: Path, counts: Sequence[int] = (2, 10, 200)) -> Path:
    """A contact sheet: the same objects before the three kinds of backgrounds, and their masks."""
    rows = sheet(counts)
    lines = []
    for i, (classes, bias, scenes) in enumerate(rows):
        lines.append((f"{classes} classes\n{bias}", torch.cat(list(scenes.images), 2).permute(1, 2, 0)))
        if i % len(BIASES) == len(BIASES) - 1:
            lines.append(("masks", torch.cat(list(scenes.masks), 2)[0]))
    figure = Figure(figsize=(7.2, 0.62 * len(lines)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.01, w_pad=0.02, hspace=0.0)
    for ax, (label, pixels) in zip(figure.subplots(len(lines), 1), lines):
        ax.imshow(pixels.numpy(), cmap="gray", interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return save(figure, path)


def write_folder(folder: str | Path, classes: int, images: int, seed: int = 0, size: int = 64) -> Path:
    """Writes unbiased scenes in the layout of the command line: ``images/<class>/x.png`` and ``masks/<class>/x.png``.

    Args:
        folder: where to; made if it is not there.
        classes: 2 to 200.
        images: of each class.
        seed: of everything that is drawn.
        size: height and width, pixels.

    Returns:
        The folder.

    Raises:
        InputError: the numbers are out of range, or the folder cannot be written to.
    """
    if not 2 <= classes <= MOST:
        raise InputError(f"--classes must be 2 to {MOST}, got {classes}")
    if images < 1:
        raise InputError(f"--images must be 1 or more, got {images}")
    from PIL import Image

    folder = make_folder(folder)
    labels = torch.arange(classes).repeat(images)
    scenes = compose(labels, classes, "unbiased", seed, size)
    progress = Progress("Writing scenes", len(labels), sys.stderr)
    for i, label in enumerate(labels.tolist()):
        name = Path(f"{label:03d}") / f"{i // classes:04d}.png"
        for kind, pixels in (("images", scenes.images[i].permute(1, 2, 0)), ("masks", scenes.masks[i, 0])):
            with atomic(folder / kind / name) as temporary:
                Image.fromarray(pixels.contiguous().numpy()).save(temporary)
        progress.update(i + 1)
    return folder


def title(group: Sequence[Row]) -> str:
    """What a table calls a group's system."""
    return Setting(group[0]["system"]).title


def _notes(rows: Sequence[Row], scale: str) -> list[str]:
    row, (train, test) = rows[0], SIZES[scale]
    given = ", ".join(f"{value:g}" for value in sorted({row["seconds"] for row in rows}))
    return [
        f"Each training got {given} seconds; with one thread on the CPU these are CPU seconds of its thread, so that other work "
        "on the machine takes nothing from it. The step in which the time runs out is finished: Original's are long.",
        f"Equal for all: net ({row['net']}), initial weights, images ({train:,} to train on, {test:,} a test set, whatever the "
        f"classes), batches of {row['batch']}, SGD with momentum {row['momentum']:g}, rate {row['lr']:g} falling to 0 along half "
        f"a cosine over the time given, and P {row['P']:g} for the ISNets.",
        "Learning rate, P and the look of the images were chosen with Stochastic alone, by these test sets, so that it learns all "
        "numbers of classes: settings of their own might serve the other systems better. None was chosen by system or by class count.",
        "A system that did a few steps is at chance on all sets: the comparison is about what fits into the time, not about what "
        "Original would learn in unlimited time.",
        "Background share: of the predicted class's heatmap on biased test images, by one fine rule for all systems. Of an untrained "
        "net, too, it is a number: read it beside the accuracy.",
    ]


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=2)
    p.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of the scenes, and nothing else")
    p.add_argument("--write", type=Path, metavar="DIR", help="write unbiased scenes as an image folder with masks, and nothing else")
    p.add_argument("--classes", type=int, default=4, help="of --write (4)")
    p.add_argument("--images", type=int, default=200, help="of --write: a class (200)")
    options, run = parse(p, arguments)
    if options.sheet or options.write:
        print(draw_sheet(options.sheet) if options.sheet else write_folder(options.write, options.classes, options.images))
        return 0
    path, jobs = run.path("scenes", ".csv"), [{"classes": classes, **as_row(s)} for classes, s in settings(run)]
    given = {"device": run.device, "scale": run.scale}
    rows = run.rows(path, jobs, one, given, "scenes")
    columns: dict[str, Callable[[Sequence[Row]], str]] = {
        "classes": lambda g: str(g[0]["classes"]),
        "system": title,
        **{bias: lambda g, b=bias: mean_spread(g, f"accuracy_{b}") for bias in BIASES},
        "background share": lambda g: mean_spread(g, "share"),
        "swap gap": lambda g: mean_spread(g, "swap_gap"),
        "seconds": lambda g: mean_spread(g, "seconds_done", 0),
        "steps": lambda g: mean_spread(g, "steps_done", 0),
        "ms a step": lambda g: mean_spread(g, "ms_step", 0),
    }
    body = table(columns, list(by(rows, "classes", "system").values()))
    command, notes = run.command("scenes"), [*_notes(rows, run.scale), *unfinished(rows, jobs)]
    page = write_page(
        path.with_suffix(".md"), "2 to 200 classes in the same time: who ignores the background?", command, rows, body, notes
    )
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
