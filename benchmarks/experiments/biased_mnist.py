"""Biased MNIST: digits with a mark in the background that gives the class away.

28x28 digits are padded to 56x56; near the left or right edge, outside the digit's frame, a small square stands at a place that is the
class. Test sets: "biased" (the square tells the truth, as in training), "unbiased" (no square) and "confounded" (the square tells
another class). Which systems read the digit?

    python -m benchmarks.experiments.biased_mnist --data mnist.npz
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import mode

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fisnet_cuda.errors import InputError

from .command import Run, in_one_line, parse, parser
from .figures import draw_sets
from .fit import fit
from .jobs import Row, read_rows, unfinished
from .measure import measure
from .steptime import step_times
from .systems import ISNETS, TITLES, Setting, as_row
from .tables import by, mean_spread, table, write_page
from .tasks import Images, Task

MARKS = ("biased", "unbiased", "confounded")
SIZE, DIGIT, SIDE = 56, 28, 4
CLASSES = 10


def read_mnist(path: str | Path) -> dict[str, np.ndarray]:
    """``x_train, y_train, x_test, y_test`` of an MNIST npz file, as Keras distributes it.

    Raises:
        InputError: the file is not there or lacks one of them.
    """
    path = Path(path)
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except FileNotFoundError:
        raise InputError(f"--data {path}: there is no such file; give MNIST's mnist.npz (x_train, y_train, x_test, y_test)") from None
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"--data {path}: not MNIST's npz with x_train, y_train, x_test, y_test ({error})") from None


def render(digits: Tensor, labels: Tensor, marks: str, seed: int) -> Images:
    """Draws digits ``[N, 28, 28]`` uint8 in the middle of the canvas, with or without a square.

    Five places near the left edge stand for classes 0 to 4, five near the right edge for 5 to 9. The foreground is the digit, dilated
    by two pixels; it never reaches the squares.

    Args:
        digits: pixel > 0 is the digit.
        labels: ``[N]`` int64.
        marks: "biased", "unbiased" or "confounded".
        seed: of the wrong classes.
    """
    if marks not in MARKS:
        raise ValueError(f"marks must be one of {', '.join(MARKS)}, got {marks!r}")
    n = len(digits)
    generator = torch.Generator().manual_seed(seed)
    wrong = (labels + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
    shown = {"biased": labels, "unbiased": torch.full_like(labels, -1), "confounded": wrong}[marks]

    pad = (SIZE - DIGIT) // 2
    images = F.pad(digits, (pad, pad, pad, pad))
    masks = torch.zeros_like(images)
    for part in range(0, n, 4096):
        block = (images[part : part + 4096] > 0).float().unsqueeze(1)
        masks[part : part + 4096] = 255 * F.max_pool2d(block, 5, 1, 2)[:, 0].byte()

    edge = torch.arange(SIZE)
    pitch = SIZE // 5
    y0 = 4 + (shown % 5) * pitch
    x0 = torch.where(shown < 5, 2, SIZE - 2 - SIDE)
    inside_y = (edge >= y0[:, None]) & (edge < y0[:, None] + SIDE)
    inside_x = (edge >= x0[:, None]) & (edge < x0[:, None] + SIDE)
    square = inside_y[:, :, None] & inside_x[:, None, :] & (shown >= 0)[:, None, None]
    images[square] = 255
    return Images(images.unsqueeze(1), labels, masks.unsqueeze(1))


def _shuffled(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(x)[order], torch.as_tensor(y).long()[order]


def digits_of(path: str | Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test digits with their labels, shuffled once, as files may be sorted."""
    data = read_mnist(path)
    return _shuffled(data["x_train"], data["y_train"]), _shuffled(data["x_test"], data["y_test"])


@lru_cache(maxsize=2)
def load(path: str, train: int = 20_000, test: int = 2_000) -> Task:
    """The task: ``train`` digits to learn from, 2,000 others to validate, ``test`` test digits; drawn once, as files may be sorted."""
    (x, y), (x_test, y_test) = digits_of(path)
    train = min(train, len(x) - 2_000)
    tests = {marks: render(x_test[:test], y_test[:test], marks, seed=2) for marks in MARKS}
    return Task(
        "biased_mnist", CLASSES, render(x[:train], y[:train], "biased", seed=0),
        render(x[train : train + 2_000], y[train : train + 2_000], "biased", seed=1), tests,
    )  # fmt: skip


# ---- the experiment ----------------------------------------------------------------------------------------------

# the best of four by `tune_baselines`, on validation digits; the ISNets keep P = 0.7, though 0.5 was better there by 3 points
STRENGTHS = {"rrr": 0.1, "gradcam": 1.0, "hirescam": 0.1, "mixed": 0.5, "stochastic_mixed": 0.5, "contrast_mixed": 0.5}
DATA = {"quick": (600, 60), "small": (20_000, 2_000), "full": (58_000, 10_000)}  # training and test digits
SYSTEMS = (
    ("standard", False), *((name, deep) for name in ISNETS for deep in (False, True)),
    *((name, False) for name in ("masked", "segmented", "mixed", "stochastic_mixed", "contrast_mixed", "rrr", "gradcam", "hirescam")),
)  # fmt: skip


def settings(run: Run, systems: Sequence[str] = ()) -> list[Setting]:
    """All trainings of the experiment, or those of some systems.

    On two cores the costly Original and the segmentation net have two seeds, and Original one with deep supervision. Selective, which
    learns slowest, is trained a second time with twice the steps.
    """
    steps = run.pick(4, 2500, 12_000)
    common = {"net": "convnet", "steps": steps, "batch": 32, "lr": 0.08}
    found = [
        Setting(system, deep=deep, seed=seed, strength=STRENGTHS.get(system, 1.0), **common)
        for seed in range(run.seeds) for system, deep in SYSTEMS
        if run.scale == "full" or seed < {"original": 2 - deep, "segmented": 2}.get(system, run.seeds)
    ]  # fmt: skip
    found += [replace(s, steps=2 * steps) for s in found if s.system == "selective" and not s.deep]
    return [s for s in found if not systems or s.system in systems]


def one(job: Row, given: Row) -> Row:
    """Trains and measures one system: a row's results."""
    task = load(given["data"], *DATA[given["scale"]]).to(given["device"])
    fitted = fit(Setting(**job), task)
    return {**measure(fitted.system, task), "steps_done": fitted.steps, "train_seconds": fitted.seconds, "diverged": fitted.diverged}


STYLES = {"accuracy_biased": ("#6B6B6B", "o"), "accuracy_unbiased": ("#0072B2", "s"), "accuracy_confounded": ("#D55E00", "D")}


def usual_steps(rows: Sequence[Row]) -> int:
    """The steps of most trainings."""
    return mode(row["steps"] for row in rows)


def title(group: Sequence[Row], usual: int) -> str:
    """What a table calls a group's system; where its steps are not the usual ones they are told."""
    row = group[0]
    return Setting(row["system"], deep=row["deep"]).title + ("" if row["steps"] == usual else f", {row['steps']:,} steps")


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each line of the table, in the order of `SYSTEMS`."""
    return sorted(by(rows, "system", "deep", "steps").values(), key=lambda g: SYSTEMS.index((g[0]["system"], g[0]["deep"])))


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy of every seed on the three test sets, and the background share."""
    names = {name: name.removeprefix("accuracy_") for name in STYLES}
    xlabel = "accuracy, %\n(all three far right, together: the net reads the digit)"
    usual = usual_steps(rows)
    return draw_sets(path, [(title(g, usual), g) for g in groups(rows)], STYLES, names, xlabel, "digit")


def notes(rows: Sequence[Row], scale: str) -> list[str]:
    """What a reader of the page must know."""
    train, test = DATA[scale]
    steps, batch = usual_steps(rows), rows[0]["batch"]
    tuned = {row["system"]: row["strength"] for row in rows if row["system"] in ("rrr", "gradcam", "hirescam")}
    weights = ", ".join(f"{TITLES[name]} {strength:g}" for name, strength in tuned.items())
    return [
        f"{train:,} training digits, {test:,} test digits; {steps} steps of batch {batch} ({steps * batch / train:.1f} epochs), SGD "
        f"with rate {rows[0]['lr']:g} falling to 0 along half a cosine; the same net, initial weights and batches for every system of "
        "a seed. The segmentation net's steps come on top of its classifier's.",
        f"Weights of the attention losses: {weights or '-'}; four values of each were tried by `tune_baselines` (validation digits "
        "with each kind of square, another seed), and four of P for Stochastic. The ISNets keep their default (P 0.7, d 0.9, "
        "C1 1, C2 25); learning rate and steps are the same for all systems.",
        "Background share: of the predicted class's heatmap on biased test images, by one rule for all systems, epsilon 1e-4 of each "
        "layer's scale; that is also the ISNets' epsilon in training. Pixels that a system blanks count as 0, so \"masked\" has 0 by "
        "construction.",
        "Swap gap: points of accuracy that go when a biased validation digit gets the background of another class in place of its own "
        "class's; \"masked\" is left out, as composites have no true mask. Where backgrounds are swapped in training (each image's "
        f"with probability {STRENGTHS['mixed']:g}, which was not tuned) it asks what was trained, and is no independent witness.",
        "Time per epoch, and its ratio to the standard net's: by `--time`, steps of all systems in turn (`steptime`), not by the "
        "clock of the trainings.",
    ]


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__)
    p.add_argument("--data", required=True, help="MNIST's mnist.npz")
    p.add_argument("--systems", nargs="+", default=(), choices=list(dict.fromkeys(name for name, _ in SYSTEMS)), metavar="SYSTEM",
                   help="train only these; the page shows whatever the file holds")  # fmt: skip
    p.add_argument("--time", action="store_true", help="no training: time a step of every system, side by side")
    options, run = parse(p, arguments)
    path, jobs = run.path("biased_mnist", ".csv"), [as_row(s) for s in settings(run)]
    todo = [as_row(s) for s in settings(run, options.systems)]
    given = {"data": options.data, "device": run.device, "scale": run.scale}
    clock = path.with_name(path.name.replace("biased_mnist", "biased_mnist-time"))
    if options.time:
        torch.set_num_threads(run.threads)
        chosen = list({(s.system, s.deep): s for s in settings(run, options.systems and ['standard', *options.systems])}.values())
        step_times(clock, load(options.data).to(run.device), chosen, rounds=run.pick(1, 20, 50))
    elif not run.draw:
        load(options.data, 600, 60)  # a wrong --data is told before processes start
    rows = run.rows(path, jobs, one, given, "biased MNIST", [] if options.time else todo)
    times = {(row["system"], row["deep"]): row for row in read_rows(clock)}

    def epoch(group: Sequence[Row]) -> str:
        row = times.get((group[0]["system"], group[0]["deep"]))
        return f"{row['epoch_seconds']:.1f} s, {row['ratio']:.1f}x" if row else "-"

    usual = usual_steps(rows)
    columns = {
        "system": lambda g: title(g, usual),
        **{marks: lambda g, m=marks: mean_spread(g, f"accuracy_{m}") for marks in MARKS},
        "background share": lambda g: mean_spread(g, "share"),
        "swap gap": lambda g: mean_spread(g, "swap_gap"),
        "time per epoch": epoch,
    }
    body = table(columns, groups(rows))
    command, told = run.command("biased_mnist", "--data mnist.npz"), [*notes(rows, run.scale), *unfinished(rows, jobs)]
    page = write_page(path.with_suffix(".md"), "Biased MNIST: which systems read the digit?", command, rows, body, told)
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
