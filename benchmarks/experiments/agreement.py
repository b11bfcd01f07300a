"""Do the Faster ISNets look at what the Original looks at, and does training under them end where the Original's does?

The Original explains every class, which costs O(classes); the others explain less and cost O(1). Two questions, on biased MNIST:

a. *Same weights.* At checkpoints along the training of a standard net, an Original and a Stochastic ISNet, each variant's training
   maps ``|R|`` of the same test images against the Original's, the mean (and the maximum) over classes of ``|R_c|``: Spearman's rank
   correlation over pixels, the share of shared top-k pixels, and the background loss of both: its rank correlation over images, and
   the ratio of its means. Draws (Stochastic, Contrast) are looked at one at a time and as the mean of several.
b. *Different nets.* Nets trained by each variant from the same weights on the same batches, explained alike (the predicted class's
   logit, one fine epsilon), against the net trained as Original at the same checkpoint. A second Original, of another seed, says how
   much two nets differ that were trained the same way.

    python -m benchmarks.experiments.agreement --data mnist.npz

A job is a seed with all its nets: nine core-minutes with the second Original (seed 0), six without. Maps are those of test images
with the mark ("biased").
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fisnet_cuda as fc
from fisnet_cuda.ops.heatmap_loss import heatmap_loss

from .biased_mnist import load
from .command import Run, in_one_line, parse, parser
from .figures import COLOURS, save
from .fit import fit
from .jobs import Row, unfinished
from .measure import accuracy, heatmaps
from .systems import Setting, System, build
from .tables import by, mean_spread, table, values, write_page
from .tasks import Images, Task

__all__ = ["ranks", "spearman", "top_shared"]

FASTER = ("selective", "stochastic", "dual", "contrast")
DRAWN = ("stochastic", "contrast")
WATCHED = ("standard", "original", "stochastic")  # the weights of question a
LEAST_RATIO = 0.1  # of two background losses that a figure shows: a saturated eta makes one of 1e-12
OTHER_SEED = 1000  # what the second Original's seed is more


# ---- how alike two maps are ------------------------------------------------------------------------------------------


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis from 1, equal values share the mean of theirs.

    Args:
        x: ``[..., n]``.

    Returns:
        ``[..., n]`` float64.

    Example:
        >>> ranks(torch.tensor([10.0, 20.0, 10.0, 5.0])).tolist()
        [2.5, 4.0, 2.5, 1.0]
    """
    x = x.contiguous()
    ordered = x.sort(-1).values
    below = torch.searchsorted(ordered, x)
    up_to = torch.searchsorted(ordered, x, right=True)
    return (below + up_to + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis, over the entries where either is not zero.

    Pearson's correlation of `ranks` (ties share the mean rank), so that entries which both maps leave out, such as pixels that no
    unit looks at, do not count as agreement.

    Args:
        a, b: values >= 0, ``[..., n]`` of one shape.

    Returns:
        ``[...]`` float64 in [-1, 1]; NaN where fewer than two entries count or one side's are all equal.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 3.0, 2.0, 0.0])
        >>> f"{spearman(a, b).item():.3f}"
        '0.500'
    """
    counts = (a != 0) | (b != 0)
    left_out = (~counts).sum(-1, keepdim=True)
    # what does not count gets the lowest ranks in both, which are then taken off
    r, s = (ranks(torch.where(counts, x, x.new_tensor(-1.0))) - left_out for x in (a, b))
    n = counts.sum(-1, keepdim=True)
    r, s = (torch.where(counts, x - (x * counts).sum(-1, keepdim=True) / n, 0.0) for x in (r, s))
    found = (r * s).sum(-1) / (r.square().sum(-1) * s.square().sum(-1)).sqrt()
    return torch.where(found.isfinite(), found.clamp(-1, 1), math.nan)


def top_shared(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Share of the top k entries of ``a`` that are among the top k of ``b``, ``k = round(part n)``, at least 1.

    Chance is k / n. Where values tie at the edge of the top k, it is the share to expect when each map breaks its ties at random.

    Args:
        a, b: ``[..., n]`` of one shape.
        part: of the entries, in (0, 1].

    Returns:
        ``[...]`` float64 in [0, 1].

    Example:
        >>> a, b = torch.tensor([9.0, 8.0, 1.0, 0.0]), torch.tensor([9.0, 0.0, 8.0, 1.0])
        >>> top_shared(a, b, 0.5).item()
        0.5
    """
    k = max(1, round(part * a.shape[-1]))
    return (_belongs(a, k) * _belongs(b, k)).sum(-1) / k


def _belongs(x: Tensor, k: int) -> Tensor:
    """Probability that each entry is among the top k when ties are broken at random."""
    edge = x.topk(k, -1).values[..., -1:]
    above, tied = (x > edge).double(), (x == edge).double()
    return above + tied * (k - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)


# ---- question a: same weights ----------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What a variant looks at.

    Attributes:
        A: ``[N, H W]``, ``|R|`` summed over channels, mean over the maps.
        background: ``[N]``, the heatmap loss's L_background, likewise.
    """

    A: Tensor
    background: Tensor


def relevance(model: nn.Module, variant: str, images: Tensor, setting: Setting, seed: int = 0) -> Tensor:
    """The training maps ``R [N, K, C_in, H, W]`` of one variant, in eval mode, at the setting's epsilon."""
    generator = torch.Generator(images.device).manual_seed(seed)
    net = fc.ISNet(model, variant, eps=setting.epsilon, eta_eps=setting.eta_eps, check="never", generator=generator).eval()
    with torch.no_grad():
        return torch.cat([net(x, relevance=True).heatmaps for x in images.split(32)])


def look(R: Tensor, masks: Tensor, setting: Setting) -> Look:
    """Pixels and background loss of maps ``[N, K, C_in, H, W]``."""
    background, _ = heatmap_loss(
        R, masks, d=setting.d, E=1.0, c1=setting.c1, c2=setting.c2, foreground="hybrid", normalization="absRoIMean"
    )
    return Look(R.abs().sum(2).mean(1).flatten(1), background)


def looks(model: nn.Module, images: Images, setting: Setting, draws: int) -> Iterator[tuple[str, Look]]:
    """What every Faster variant looks at, by the name of the map."""
    for variant in FASTER:
        R = relevance(model, variant, images.images, setting)
        if variant == "dual":
            yield "dual, z+", look(R[:, :1], images.masks, setting)
            yield "dual, epsilon", look(R[:, 1:], images.masks, setting)
            continue
        yield variant, look(R, images.masks, setting)
        if variant in DRAWN and draws > 1:
            more = [relevance(model, variant, images.images, setting, seed) for seed in range(1, draws)]
            yield f"{variant}, {draws} draws", look(torch.cat([R, *more], 1), images.masks, setting)


def alike(a: Tensor, b: Tensor) -> Row:
    """Columns: how alike maps ``[N, H W]`` are, means over the images."""
    rho = spearman(a, b)
    found = rho[rho.isfinite()]
    return {
        "spearman": rho.nanmean().item(), "spearman_p10": found.quantile(0.1).item() if len(found) else math.nan,
        "top1": 100 * top_shared(a, b, 0.01).mean().item(), "top5": 100 * top_shared(a, b, 0.05).mean().item(),
        "images_compared": len(found),
    }  # fmt: skip


def same_weights(model: nn.Module, images: Images, setting: Setting, draws: int) -> list[Row]:
    """A row for each map of a variant and each way to sum up the Original's."""
    every = relevance(model, "original", images.images, setting)
    mean = look(every, images.masks, setting)
    references = {"mean": mean.A, "max": every.abs().sum(2).amax(1).flatten(1)}
    rows = []
    for name, seen in looks(model, images, setting, draws):
        loss, original = seen.background.double(), mean.background.double()
        background = {
            "loss_spearman": spearman(loss, original).item(), "loss_ratio": (loss.mean() / original.mean()).item(),
            "loss": loss.mean().item(), "loss_original": original.mean().item(),
        }  # fmt: skip
        rows += [{"map": name, "reference": to, **alike(seen.A, A), **background} for to, A in references.items()]
    return rows


# ---- question b: different nets --------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    """What a net looks at for its own prediction: ``A [N, H W]`` and the class ``[N]``."""

    A: Tensor
    classes: Tensor


def predicted(system: System, images: Images) -> Predicted:
    """The maps of the predicted class's logit, by `measure.FINE`."""
    A = heatmaps(system, images.images).abs().sum(1).flatten(1)
    return Predicted(A, system.logits(images.images, images.masks).argmax(1))


def _accuracies(system: System, task: Task) -> Row:
    found = {}
    for name, images in task.tests.items():
        images = images.floats()
        found[f"accuracy_{name}"] = accuracy(system.logits(images.images, images.masks), images.labels)
    return found


# ---- the experiment --------------------------------------------------------------------------------------------------


def settings(run: Run) -> list[Row]:
    """A job a seed."""
    steps, epochs, draws, images = run.pick((4, 1, 2, 8), (680, 8, 8, 128), (9_600, 32, 16, 512))
    base = {"net": "convnet", "steps": steps, "epochs": epochs, "batch": 32, "lr": 0.08, "eps": 1e-4, "relative": True}
    # the second Original costs as much as all the others together: one is enough, where time is short
    twins = run.pick(1, 1, run.seeds)
    return [{**base, "seed": seed, "second_original": seed < twins, "draws": draws, "images": images} for seed in range(run.seeds)]


def checkpoints(epochs: int) -> list[int]:
    """Epochs to look at: 0, the powers of 2, and the last one.

    Example:
        >>> checkpoints(8), checkpoints(3)
        ([0, 1, 2, 4, 8], [0, 1, 2, 3])
    """
    return sorted({0, *(2**i for i in range(epochs.bit_length()) if 2**i <= epochs), epochs})


def trainings(job: Row) -> dict[str, Setting]:
    """Name -> setting of the nets of a job; the Original first, which the others are compared with."""
    common = {name: job[name] for name in ("net", "steps", "batch", "lr", "eps", "relative")}
    nets = {"original": Setting("original", seed=job["seed"], **common)}
    if job["second_original"]:
        nets["original, other seed"] = Setting("original", seed=job["seed"] + OTHER_SEED, **common)
    return nets | {name: Setting(name, seed=job["seed"], **common) for name in ("standard", *FASTER)}


def one(job: Row, given: Row) -> list[Row]:
    """Trains all nets of a seed and compares."""
    test = {"quick": 60, "small": 1_000, "full": 10_000}[given["scale"]]
    per_epoch = job["steps"] // job["epochs"]
    task = load(given["data"], per_epoch * job["batch"], test).to(given["device"])
    shown = next(iter(task.tests.values()))[slice(0, job["images"])].floats()
    wanted, rows = checkpoints(job["epochs"]), []
    original: dict[int, Predicted] = {}

    def watch(name: str, system: System, number: int) -> Row:
        epoch = number + 1
        if epoch not in wanted:
            return {}
        facts = {"net_trained": name, "epoch": epoch, "step": epoch * per_epoch}
        if name in WATCHED:
            rows.extend({"question": "same weights", **facts, **row} for row in same_weights(
                system.model, shown, system.setting, job["draws"]))  # fmt: skip
        seen = predicted(system, shown)
        original.setdefault(epoch, seen)
        same = 100 * (seen.classes == original[epoch].classes).double().mean().item()
        found = {} if name == "original" else alike(seen.A, original[epoch].A)
        rows.append({"question": "different nets", **facts, "map": "predicted class", "reference": "original", **found,
                     "same_class": same, **_accuracies(system, task)})  # fmt: skip
        return {}

    for name, setting in trainings(job).items():
        watch(name, build(setting, task), -1)
        if fit(setting, task, partial(watch, name)).diverged:
            raise RuntimeError(f"{name}, seed {setting.seed}: the loss is not finite; no agreement of this seed is reported")
    return rows


# ---- figure and tables -----------------------------------------------------------------------------------------------

# map -> (colour, line, marker)
MAPS = {
    "selective": (COLOURS["selective"], "-", "s"),
    "stochastic": (COLOURS["stochastic"], ":", "o"), "stochastic, {} draws": (COLOURS["stochastic"], "-", "o"),
    "dual, z+": (COLOURS["dual"], ":", "^"), "dual, epsilon": (COLOURS["dual"], "-", "^"),
    "contrast": (COLOURS["contrast"], ":", "D"), "contrast, {} draws": (COLOURS["contrast"], "-", "D"),
}  # fmt: skip
NETS = {
    "original, other seed": (COLOURS["original"], "--", "x"), "standard": (COLOURS["standard"], "--", "v"),
    **{name: (COLOURS[name], "-", MAPS.get(name, MAPS["dual, epsilon"])[2]) for name in FASTER},
}  # fmt: skip
TEXTS = {"standard": "a standard net", "original": "an Original ISNet", "stochastic": "a Stochastic ISNet"}
Style = tuple[str, str, str]


def _lines(ax: Axes, rows: Sequence[Row], key: str, styles: Mapping[str, Style], column: str) -> None:
    """A line for each map: mean over seeds, seeds as dots; epochs evenly spaced."""
    epochs = sorted({row["epoch"] for row in rows})
    for name, (colour, line, marker) in styles.items():
        points = [(i, values([r for r in rows if r[key] == name and r["epoch"] == e], column)) for i, e in enumerate(epochs)]
        points = [(i, found) for i, found in points if found]
        if points:
            ax.plot([i for i, _ in points], [sum(v) / len(v) for _, v in points], line, color=colour, lw=1.8)
            ax.plot([i for i, v in points for _ in v], [x for _, v in points for x in v], marker, color=colour, ms=4.5, alpha=0.7)
    ax.set_xticks(range(len(epochs)), [str(e) for e in epochs])
    ax.grid(color="#E2E2E2", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes, styles: Mapping[str, Style], columns: int, title: str) -> None:
    for name, (colour, line, marker) in styles.items():
        ax.plot([], [], line, marker=marker, color=colour, ms=4.5, lw=1.8, label=name)
    ax.legend(frameon=False, fontsize=8.5, ncols=columns, loc="center", title=title, title_fontsize=9.5)
    ax.axis("off")


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Columns: three nets' weights (question a) and the nets themselves (question b); rows: three measures."""
    draws = rows[0]["draws"]
    maps = {name.format(draws): style for name, style in MAPS.items()}
    a = [row for row in rows if row["question"] == "same weights" and row["reference"] == "mean"]
    b = [row for row in rows if row["question"] == "different nets"]
    figure = Figure(figsize=(14, 9.8), layout="constrained")
    grid = figure.subplots(4, 4, height_ratios=(1, 1, 1, 0.38))
    for column, name in enumerate(WATCHED):
        part = [row for row in a if row["net_trained"] == name]
        for ax, measure in zip(grid[:2, column], ("spearman", "top5")):
            _lines(ax, part, "map", maps, measure)
        _lines(grid[2, column], [{**row, "loss_ratio": max(row["loss_ratio"], LEAST_RATIO)} for row in part], "map", maps, "loss_ratio")
        below = {row["map"]: None for row in part if row["loss_ratio"] < LEAST_RATIO}
        if below:
            grid[2, column].text(0.5, 0.03, f"below {LEAST_RATIO:g}, off the scale: {', '.join(below)}", ha="center", va="bottom",
                                 fontsize=8.5, transform=grid[2, column].transAxes)  # fmt: skip
        grid[0, column].set_title(f"same weights: {TEXTS[name]}", fontsize=10.5, fontweight="bold")
        grid[2, column].axhline(1, color="black", lw=1)
        grid[2, column].set_yscale("log")
        grid[2, column].set_xlabel("epochs of training")
    for ax, measure in zip(grid[:3, 3], ("spearman", "top5", "accuracy_confounded")):
        _lines(ax, b, "net_trained", {**NETS, "original": (COLOURS["original"], "-", "P")}, measure)
    grid[0, 3].set_title("different nets, against the Original", fontsize=10.5, fontweight="bold")
    grid[2, 3].set_xlabel("epochs of training")
    grid[2, 3].set_ylabel("accuracy, confounded test digits, %\n(high: reads the digit)")
    grid[0, 0].set_ylabel("Spearman's rank correlation\n(1: the same order of pixels)")
    grid[1, 0].set_ylabel("shared top 5 % of pixels, %\n(100: the same; chance: 5)")
    grid[2, 0].set_ylabel("background loss over the Original's\n(1: the same)")
    for ax in grid[0]:
        ax.set_ylim(min(-0.05, *(ax.get_ylim()[0] for ax in grid[0])), 1.02)
    for ax in grid[1]:
        ax.set_ylim(0, 102)
        ax.axhline(5, color="black", lw=0.8, ls=(0, (2, 3)))
    low, high = (f(ax.get_ylim()[i] for ax in grid[2, : len(WATCHED)]) for i, f in ((0, min), (1, max)))
    low /= 1.3  # room for the text
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)
    ticks = [m * 10.0**e for e in range(-6, 4) for m in steps if low <= m * 10.0**e <= high]
    for ax in grid[2, : len(WATCHED)]:
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(low, high)
    for ax in grid[:3, 1:3].flat:
        ax.tick_params(labelleft=False)
    grid[2, 3].set_ylim(-2, 102)
    spec = grid[0, 0].get_gridspec()
    for ax in grid[3]:
        ax.remove()
    _legend(figure.add_subplot(spec[3, :3]), maps, 4, "a variant's training maps, against the Original's mean over classes of |R|")
    _legend(figure.add_subplot(spec[3, 3]), {**NETS, "original": (COLOURS["original"], "-", "P")}, 2,
            "nets, maps of the class that each predicts")  # fmt: skip
    return save(figure, path)


def tables(rows: Sequence[Row]) -> list[str]:
    """Both questions at the last checkpoint, and question a at every one for the Original's weights."""
    last = max(row["epoch"] for row in rows)

    def show(column: str, digits: int = 1):
        return lambda group: mean_spread(group, column, digits)

    measures = {
        "Spearman": show("spearman", 2), "its 10th percentile": show("spearman_p10", 2),
        "shared top 1 %": show("top1"), "shared top 5 %": show("top5"),
    }  # fmt: skip
    loss = {"background loss over the Original's": show("loss_ratio", 2), "its Spearman over images": show("loss_spearman", 2)}
    a = [row for row in rows if row["question"] == "same weights"]
    b = [row for row in rows if row["question"] == "different nets"]
    lines = [f"Same weights, after {last} epochs; against the mean over classes of the Original's |R|:", ""]
    head = {"weights": lambda g: g[0]["net_trained"], "map": lambda g: g[0]["map"]}
    ends = [row for row in a if row["epoch"] == last and row["reference"] == "mean"]
    lines += table({**head, **measures, **loss}, list(by(ends, "net_trained", "map").values()))
    lines += ["", "Spearman over training, against the mean and against the maximum over classes:", ""]
    epochs = sorted({row["epoch"] for row in a})

    def at(epoch: int):
        return lambda group: mean_spread([row for row in group if row["epoch"] == epoch], "spearman", 2)

    over = {f"epoch {epoch}": at(epoch) for epoch in epochs}
    head = {**head, "against the": lambda g: g[0]["reference"]}
    lines += table({**head, **over}, list(by(a, "net_trained", "map", "reference").values()))
    lines += ["", f"Different nets, after {last} epochs; maps of the predicted class, against the net trained as Original:", ""]
    ends = [row for row in b if row["epoch"] == last]
    rest = {"same class predicted, %": show("same_class")}
    rest |= {f"accuracy, {name}": show(f"accuracy_{name}") for name in ("biased", "unbiased", "confounded")}
    lines += table({"net": lambda g: g[0]["net_trained"], **measures, **rest}, list(by(ends, "net_trained").values()))
    return lines


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=2)
    p.add_argument("--data", required=True, help="MNIST's mnist.npz")
    options, run = parse(p, arguments)
    path, jobs = run.path("agreement", ".csv"), settings(run)
    given = {"data": options.data, "device": run.device, "scale": run.scale}
    if not run.draw:
        load(options.data, 600, 60)  # a wrong --data is told before processes start
    rows = run.rows(path, jobs, one, given, "agreement")
    command = run.command("agreement", "--data mnist.npz")
    job = rows[0]
    scale = ", relative to the scale of each layer" if job["relative"] else ""
    notes = [
        f"{job['net']}, {job['steps']} steps of batch {job['batch']}, {job['epochs']} epochs of "
        f"{job['steps'] // job['epochs'] * job['batch']:,} training digits; epsilon {job['eps']:g}{scale}; maps of {job['images']} "
        "test images with the mark, in eval mode.",
        f"Second Original (\"original, other seed\"): of {len({row['seed'] for row in rows if row['second_original']})} seed(s).",
        "Chance: Spearman 0, shared top 1 % and 5 %: 1 and 5. Ratios of the background loss: mean over the images (and maps) of each.",
        "Contrast is this project's own variant; the others are those of the papers.",
    ]
    page = write_page(
        path.with_suffix(".md"), "Do the Faster ISNets look at what the Original looks at?", command, rows, tables(rows),
        [*notes, *unfinished(rows, jobs)],
    )  # fmt: skip
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
