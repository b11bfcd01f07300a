"""Any image folder with masks: does a classifier ignore a bias that we put into the background?

The images are read as the command line reads them (``images/<class>/x.png`` and ``masks/<class>/x.png``, a CSV table, HDF5, ...). The
bias is put in by us, so that it is known: with ``--bias mark`` a small chequered square whose pattern is the class's, somewhere in the
background; with ``--bias background`` the whole background is replaced by a textured one with the class's code
(`benchmarks.experiments.scene_images`). Test sets: "biased" (as in training), "unbiased" (no mark; a background of no class) and
"confounded" (another class's mark or background).

    python -m benchmarks.experiments.image_folder --path images --masks masks
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fisnet_cuda.data import InputSpec, Store, list_samples
from fisnet_cuda.data.split import split
from fisnet_cuda.errors import InputError

from .biased_mnist import STYLES
from .command import Run, in_one_line, parse, parser
from .figures import draw_sets
from .fit import fit
from .jobs import Row, unfinished
from .measure import measure
from .nets import NETS
from .scene_images import BIASES, MOST, backgrounds, shown_codes
from .systems import SYSTEMS, Setting, as_row
from .tables import by, mean_spread, table, write_page
from .tasks import Images, Task

CELLS = 4  # of a mark, along each side
DEFAULT = ("standard", "selective", "stochastic", "dual")


def mark_patterns(classes: int, channels: int) -> Tensor:
    """The marks' cells ``[classes, channels, 4, 4]``, 0 or 1: of random patterns, drawn once and for all, those that differ most.

    Args:
        classes: how many.
        channels: 1 (black and white) or 3 (the cells are coloured).

    Example:
        >>> patterns = mark_patterns(3, 1)
        >>> patterns.shape, int((patterns[0] != patterns[1]).sum()) >= 8
        (torch.Size([3, 1, 4, 4]), True)
    """
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, 2, (max(256, 4 * classes), channels * CELLS * CELLS), generator=generator).float()
    chosen, nearest = [0], torch.cdist(candidates, candidates[:1], p=1)[:, 0]
    while len(chosen) < classes:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(candidates, candidates[chosen[-1:]], p=1)[:, 0])
    return candidates[chosen].view(classes, channels, CELLS, CELLS)


def put_marks(images: Images, shown: Tensor, classes: int, seed: int) -> tuple[Images, Tensor]:
    """Puts the marks of classes into backgrounds, a sixth of the image wide, at a random place where the mask leaves room.

    Where there is no room for a whole mark it stands where it covers least of the foreground, and is drawn in the background only.

    Args:
        images: uint8; the masks' pixels above 0 are never written to.
        shown: ``[N]`` int64: whose mark; -1: none.
        classes: how many there are.
        seed: of the places.

    Returns:
        The marked images, and ``[N]`` float32: how much of the mark found room, in [0, 1].
    """
    channels, height, width = images.images.shape[1:]
    cell = max(1, round(min(height, width) / 6 / CELLS))
    side = cell * CELLS
    if side > min(height, width):
        raise InputError(f"images of {height}x{width} pixels have no room for a mark of {side}: give a larger --size")
    foreground = (images.masks > 0).float()
    covered = F.avg_pool2d(foreground, side, 1)[:, 0]  # [N, H - side + 1, W - side + 1]
    draws = torch.rand(covered.shape, generator=torch.Generator().manual_seed(seed))
    best = covered.round(decimals=4).sub(0.5e-4 * draws).flatten(1).argmin(1)
    y0, x0 = best // covered.shape[2], best % covered.shape[2]
    room = 1 - covered.flatten(1).gather(1, best[:, None])[:, 0]

    marks = mark_patterns(classes, channels)[shown.clamp(min=0)].mul(255).byte()
    marks = marks.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    marked = images.images.clone()
    for i in torch.nonzero(shown >= 0).flatten().tolist():
        y, x = int(y0[i]), int(x0[i])
        place = marked[i, :, y : y + side, x : x + side]
        free = images.masks[i, :, y : y + side, x : x + side] == 0
        place.copy_(torch.where(free, marks[i], place))
    return Images(marked, images.labels, images.masks), room


def put_backgrounds(images: Images, shown: Tensor, seed: int) -> Images:
    """Replaces the background by one with a class's code; grey where the images are.

    Args:
        images: uint8; masks in between are blended.
        shown: ``[N]`` int64: whose code; -1: none.
        seed: of the backgrounds.
    """
    height, width = images.images.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    composed = []
    for told, image, mask in zip(shown.split(512), images.images.split(512), images.masks.split(512)):
        behind = backgrounds(told, generator, max(height, width))[:, :, :height, :width]
        behind = behind.mean(1, keepdim=True) if image.shape[1] == 1 else behind
        alpha = mask.float() / 255
        composed.append((behind * 255 * (1 - alpha) + image.float() * alpha).round().byte())
    return Images(torch.cat(composed), images.labels, images.masks)


def biased(images: Images, classes: int, kind: str, bias: str, seed: int) -> tuple[Images, Tensor]:
    """The images with ("biased", "confounded") or without a cue of a class; and ``[N]``, how much of it found room.

    Raises:
        ValueError: ``kind`` is neither "mark" nor "background".
    """
    if kind not in ("mark", "background"):
        raise ValueError(f"kind must be mark or background, got {kind!r}")
    shown = shown_codes(images.labels, classes, bias, torch.Generator().manual_seed(seed + 1_000_003))
    if kind == "mark":
        return put_marks(images, shown, classes, seed)
    return put_backgrounds(images, shown, seed), torch.ones(len(images))


@lru_cache(maxsize=1)
def load(path: str, masks: str | None, size: int, channels: int, kind: str, most: int) -> Task:
    """Reads a data set, leaves out what has no mask or no label, splits it as the command line does, and puts the bias in.

    Args:
        path, masks: as `fisnet_cuda.data.list_samples` takes them.
        size: height and width that images are brought to, pixels.
        channels: 1 or 3.
        kind: "mark" or "background".
        most: images of each split at most; the first ones in a fixed random order.

    Raises:
        InputError: no classes, no masks, or a split that is empty.
    """
    listing = list_samples(path, masks)
    classes = len(listing.classes)
    if classes < 2:
        raise InputError(f"--path {path}: {classes} classes, and a classifier needs two: one folder a class, images/<class>/x.png")
    if kind == "background" and classes > MOST:
        raise InputError(f"--bias background knows {MOST} codes and the data have {classes} classes: take --bias mark")
    splits = split(listing)
    # a data set with test groups of its own (the demo's digits) has each test image several times: one group is enough
    groups = Counter(s.group for s, part in zip(listing.samples, splits) if part == "test")
    group = "unbiased" if "unbiased" in groups else None
    store = Store.build(listing, InputSpec((size, size), channels, listing.classes), progress=False)
    found: dict[str, Images] = {}
    notes = []
    for number, part in enumerate(("train", "val", "test")):
        picks = [
            i for i, (sample, name) in enumerate(zip(listing.samples, splits))
            if name == part and sample.mask is not None and (part != "test" or group is None or sample.group == group)
        ]  # fmt: skip
        if not picks:
            raise InputError(f"--path {path}: no image with a mask and a label for {part}; give --masks, or more images")
        order = torch.randperm(len(picks), generator=torch.Generator().manual_seed(number))[:most]
        index = torch.tensor(picks)[order]
        found[part] = Images(store.images[index], store.labels[index], store.masks[index])
    left = sum(sample.mask is None or sample.label is None for sample in listing.samples)
    train, room = biased(found["train"], classes, kind, "biased", 0)
    if left:
        notes.append(f"{left} images without mask or label were left out.")
    if (room < 1).any():
        notes.append(f"In {100 * (room < 1).float().mean():.1f} % of the training images the mask leaves no room for a whole mark.")
    val = biased(found["val"], classes, kind, "biased", 1)[0]
    tests = {bias: biased(found["test"], classes, kind, bias, 2)[0] for bias in BIASES}
    sizes = ", ".join(f"{len(found[part])} {part}" for part in found)
    notes.insert(0, f"{classes} classes; images: {sizes}; {channels}x{size}x{size}.")
    return Task(Path(path).name, classes, train, val, tests, notes=tuple(notes))


# ---- the experiment ----------------------------------------------------------------------------------------------


def settings(run: Run, systems: Sequence[str], net: str, steps: int | None, lr: float, P: float) -> list[Setting]:
    """All trainings of the experiment."""
    steps = run.pick(3, 1200, 10_000) if steps is None else steps
    return [
        Setting(system, net=net, seed=seed, steps=steps, batch=run.pick(8, 32, 32), lr=lr, P=P)
        for seed in range(run.seeds) for system in systems
    ]  # fmt: skip


def one(job: Row, given: Row) -> Row:
    """Trains and measures one system: a row's results."""
    job = dict(job)
    kind, size, channels, _ = (job.pop(name) for name in ("bias", "size", "channels", "data"))
    task = load(given["path"], given["masks"], size, channels, kind, given["most"]).to(given["device"])
    fitted = fit(Setting(**job), task)
    return {**measure(fitted.system, task), "steps_done": fitted.steps, "seconds_done": fitted.seconds, "diverged": fitted.diverged}


def title(group: Sequence[Row]) -> str:
    """What a table calls a group's system."""
    return Setting(group[0]["system"]).title


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy of every seed on the three test sets, and the background share."""
    xlabel = "accuracy, % (all three far right, together: the net reads the object)"
    names = {name: name.removeprefix("accuracy_") for name in STYLES}
    return draw_sets(path, [(title(g), g) for g in by(rows, "system").values()], STYLES, names, xlabel, "object")


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=2)
    p.add_argument("--path", required=True, help="folder, table or file of the images, as `fisnet-cuda fit --path` takes it")
    p.add_argument("--masks", help="folder of the masks, where they are not found beside the images")
    p.add_argument("--name", help="of the data in the result files' names (the last part of --path)")
    p.add_argument("--bias", choices=("mark", "background"), default="mark", help="what betrays the class (mark)")
    p.add_argument("--size", type=int, default=64, help="height and width, pixels (64)")
    p.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey (3)")
    p.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(DEFAULT), metavar="SYSTEM", help=", ".join(SYSTEMS))
    p.add_argument("--net", choices=list(NETS), default="convnet_bn", help=f"{', '.join(NETS)} (convnet_bn)")
    p.add_argument("--steps", type=int, help="of the optimizer (by scale: 3, 1200, 10000)")
    p.add_argument("--lr", type=float, default=0.1, help="learning rate (0.1)")
    p.add_argument("--P", type=float, default=0.7, help="weight of the heatmap loss (0.7)")
    options, run = parse(p, arguments)
    if options.size < 8:
        p.error(f"argument --size: at least 8, got {options.size}")
    if options.steps is not None and options.steps < 1:
        p.error(f"argument --steps: at least 1, got {options.steps}")
    data = options.name or Path(options.path).resolve().name
    most = run.pick(64, 20_000, 100_000)
    task = load(options.path, options.masks, options.size, options.channels, options.bias, most)
    about = {"data": data, "bias": options.bias, "size": options.size, "channels": options.channels}
    chosen = settings(run, options.systems, options.net, options.steps, options.lr, options.P)
    jobs = [{**about, **as_row(s)} for s in chosen]
    given = {"path": options.path, "masks": options.masks, "device": run.device, "most": most}
    path = run.path(f"image_folder-{data}-{options.bias}", ".csv")
    rows = run.rows(path, jobs, one, given, data)
    columns = {
        "system": title,
        **{bias: lambda g, b=bias: mean_spread(g, f"accuracy_{b}") for bias in BIASES},
        "background share": lambda g: mean_spread(g, "share"),
        "swap gap": lambda g: mean_spread(g, "swap_gap"),
    }
    body = table(columns, list(by(rows, "system").values()))
    # folders by their own names: where they lie on this machine is nobody's business
    folders = [f"--{name} {Path(value).name}" for name, value in (("path", options.path), ("masks", options.masks)) if value]
    own = ("name", "bias", "size", "channels", "systems", "net", "steps", "lr", "P")
    chosen_options = {name: getattr(options, name) for name in own if getattr(options, name) != p.get_default(name)}
    more = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in chosen_options.items()]
    command = run.command("image_folder", *folders, *more)
    some = chosen[0]
    notes = [
        *task.notes,
        f"{some.net}, {some.steps} steps of batch {some.batch}, rate {some.lr:g}, P {some.P:g} for the ISNets: no system has "
        "settings of its own.",
        *unfinished(rows, jobs),
    ]
    heading = f"{data} with a {options.bias} that betrays the class: which systems read the object?"
    page = write_page(path.with_suffix(".md"), heading, command, rows, body, notes)
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
