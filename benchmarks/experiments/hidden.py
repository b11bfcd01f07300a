"""Does a quiet heatmap mean a clean classifier?

A net trained as an ISNet can keep its heatmap off the background and use the background all the same. When does that happen (variant,
epsilon, BatchNorm, depth, length of the training), where does the hidden relevance sit, and which number, computed without unbiased
data, warns of it?

Trainings on biased MNIST (as in `biased_mnist`, and on a canvas of 32x32, which costs less) and on the digits of `make demo`,
measured again and again on their way. A row of kind "time" is one measurement: accuracy on the three test sets (what must not be
known in earnest), and candidate signals on biased validation images. Rows of kind "layer" tell, at the end of a training, through
which units of each layer the background reaches the logits (see `hiding`). The loss of hold is the accuracy on biased images minus
that on confounded ones, in points; a net has lost its hold where it exceeds ten.

On these tasks an image without its background is an unbiased image and one with a swapped background a confounded one: that the
signals which ask the logits work here is to be expected. What is in question is whether signals of the heatmap do.

    python -m benchmarks.experiments.hidden --data mnist.npz                       # the small nets, with and without BatchNorm
    python -m benchmarks.experiments.hidden --data mnist.npz --net resnet18        # ResNet-18, and a slim one for more trainings
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator
from torch import Tensor

import fisnet_cuda as fc
from fisnet_cuda.demo import digits as demo
from fisnet_cuda.evaluate.attention import background_share
from fisnet_cuda.evaluate.swap import background_swap
from fisnet_cuda.isnet.variants import eta_gradient

from . import hiding
from .biased_mnist import MARKS, digits_of, load
from .command import Run, in_one_line, parse, parser
from .figures import COLOURS, save
from .fit import fit
from .jobs import Row, unfinished
from .measure import accuracy
from .systems import TITLES, ISNetSystem, Setting, System, as_row, system
from .tables import by, mean_spread, table, values, write_page
from .tasks import Images, Task

LOST = 10.0  # points between biased and confounded accuracy from which a net has lost its hold
SWAPPED = ("mixed", "stochastic_mixed", "contrast_mixed")  # systems trained with swapped backgrounds
LEARNT = 50.0  # % of accuracy on biased images below which a net is not judged yet
FINE = fc.rules.Epsilon(1e-7, relative=True)
FINE_BOX = 1e-7

# signal -> what the page calls it; the larger, the worse
SIGNALS = {
    "share_training": "background share, training's map",
    "share_own": "background share, predicted class, training's epsilon",
    "share_fine": "background share, predicted class, epsilon 1e-7 rms",
    "share_classes": "background share, all classes, epsilon 1e-7 rms",
    "gap_own": "conservation gap, training's epsilon",
    "gap_epsilon": "conservation gap that epsilon makes",
    "occluded_zero": "influence of occlusion by 0",
    "occluded_mean": "influence of occlusion by the mean background",
    "occluded_drop": "accuracy lost to occlusion by the mean background",
    "swap_shift": "background swap, shift of the probabilities",
    "swap_gap": "background swap, gap of the accuracy",
}


# ---- the small task ------------------------------------------------------------------------------------------------------

CANVAS, MARK = 32, 3


def render_small(digits: Tensor, labels: Tensor, marks: str, seed: int) -> Images:
    """Biased MNIST on 32x32 pixels: digits ``[N, 28, 28]`` uint8 shrunk to 20x20, right of the middle; near the left edge a 3x3 square
    at the height of the class. The foreground is the digit, dilated by two pixels. Marks and seed as in `biased_mnist.render`."""
    n = len(digits)
    images, masks = (torch.zeros(n, 1, CANVAS, CANVAS, dtype=torch.uint8) for _ in range(2))
    for part in torch.arange(n).split(4096):
        images[part, :, 6:26, 9:29] = F.interpolate(digits[part, None].float(), (20, 20), mode="area").round().byte()
        masks[part] = 255 * F.max_pool2d((images[part] > 25).float(), 5, 1, 2).byte()
    wrong = (labels + torch.randint(1, 10, (n,), generator=torch.Generator().manual_seed(seed))) % 10
    shown = {"biased": labels, "unbiased": None, "confounded": wrong}[marks]
    if shown is not None:
        rows = torch.arange(CANVAS)
        inside = (rows >= 1 + MARK * shown[:, None]) & (rows < 1 + MARK * (shown[:, None] + 1))
        images[:, 0, :, 1 : 1 + MARK][inside] = 255
    return Images(images, labels, masks)


@lru_cache(maxsize=2)
def load_small(path: str, train: int = 20_000, test: int = 1_000) -> Task:
    """The small task: ``train`` digits to learn from, 2,000 others to validate, ``test`` test digits."""
    (x, y), (x_test, y_test) = digits_of(path)
    train = min(train, len(x) - 2_000)
    tests = {marks: render_small(x_test[:test], y_test[:test], marks, seed=2) for marks in MARKS}
    first, rest = slice(0, train), slice(train, train + 2_000)
    return Task(
        "biased_mnist_small", 10, render_small(x[first], y[first], "biased", 0), render_small(x[rest], y[rest], "biased", 1), tests
    )


@lru_cache(maxsize=2)
def load_digits(path: str = "", train: int = 20_000, test: int = 1_000) -> Task:
    """The task of `make demo`, whose nets lose their hold from some seeds: scikit-learn's 8x8 digits, drawn ``train`` times at random;
    200 scans are kept for validation. It needs no file: ``path`` is not read."""
    learnt, tested = demo.load_originals(0)
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))

    def drawn(originals: demo.Originals, picks: Tensor, marks: str, seed: int) -> Images:
        batch = demo.render(originals, picks, marks, torch.Generator().manual_seed(seed))
        return Images((255 * batch.images).round().byte(), batch.labels, (255 * batch.masks).byte())

    def times(picks: Tensor, n: int) -> Tensor:
        return picks.repeat(math.ceil(n / len(picks)))[:n]

    tests = {marks: drawn(tested, times(torch.arange(len(tested)), test), marks, 2) for marks in MARKS}
    val, rest = times(order[:200], 1_000), times(order[200:], train)
    return Task("demo_digits", 10, drawn(learnt, rest, "biased", 0), drawn(learnt, val, "biased", 1), tests)


TASKS: Mapping[str, Callable[..., Task]] = {"small": load_small, "digits": load_digits, "mnist": load}


# ---- trainings -----------------------------------------------------------------------------------------------------------


class FineFirstLayer(ISNetSystem):
    """An ISNet whose z^B at the first layer has an epsilon of 1e-6: with a relative epsilon `fisnet_cuda.ISNet` keeps 0.01 there."""

    box_eps = 1e-6

    def __init__(self, setting: Setting, task: Task) -> None:
        s = replace(setting, system="selective")
        super().__init__(s, task)
        rules = fc.rules.RuleMap(conv=s.epsilon, linear=s.epsilon, first=fc.rules.ZB(0, 1, self.box_eps))
        self.net = fc.ISNet(
            self.model, s.system, rules=rules, eta_eps=s.eta_eps, select=s.select, check="never",
            generator=torch.Generator(task.train.images.device).manual_seed(s.seed),
        )  # fmt: skip


@system("selective_fine_first")
def _selective_fine_first(setting: Setting, task: Task) -> System:
    return FineFirstLayer(setting, task)


RATE, RATES = 0.08, {"digits": 0.04}  # of SGD, where a training does not say another one
ABSOLUTE, FINER, COARSE, RELATIVE = (1e-2, False), (1e-5, False), (1e-2, True), (1e-4, True)


def jobs(run: Run, net: str = "convnet") -> list[Row]:
    """All trainings of a part: ``net`` is "convnet" (small nets, with and without BatchNorm) or "resnet18" (and the slim one).

    The grid is on the small task, where a step costs least; the task of `biased_mnist` checks that what is found there holds for it.
    """
    found: list[Row] = []

    def add(task: str, net: str, system: str, seeds: int, steps: int, *epsilons: tuple[float, bool], **more: object) -> None:
        common = {"batch": 32 if task == "mnist" else 64, "lr": RATES.get(task, RATE)}
        for seed in range(min(seeds, run.seeds)):
            for eps, relative in epsilons:
                s = Setting(system, net=net, seed=seed, steps=steps, eps=eps, relative=relative, **(common | more))
                found.append({"task": task, **as_row(s)})

    if net == "resnet18":
        whole, slim = run.pick(4, 800, 6_000), run.pick(4, 2500, 12_000)
        full, more = run.scale == "full", run.seeds if run.scale == "full" else 1  # on two cores, second seeds of what held alone
        add("mnist", "resnet18", "standard", 1, whole, RELATIVE)
        add("mnist", "resnet18", "selective", more, whole, *([ABSOLUTE] if full else []), RELATIVE)
        add("mnist", "resnet18", "stochastic", more, whole, RELATIVE)
        add("mnist", "resnet18", "contrast", more, whole, RELATIVE, w1=10.0)
        add("mnist", "resnet18_slim", "standard", 1, slim, RELATIVE)
        add("mnist", "resnet18_slim", "selective", more, slim, ABSOLUTE, RELATIVE)
        add("mnist", "resnet18_slim", "stochastic", more, slim, ABSOLUTE, RELATIVE)
        add("mnist", "resnet18_slim", "stochastic", more, slim, RELATIVE, w1=10.0)
        add("mnist", "resnet18_slim", "contrast", more, slim, RELATIVE)
        add("mnist", "resnet18_slim", "contrast", run.seeds, slim, RELATIVE, w1=3.0)
        add("mnist", "resnet18_slim", "contrast", run.seeds, slim, RELATIVE, w1=10.0)
        add("mnist", "resnet18_slim", "contrast", more, slim, RELATIVE, w1=10.0, lr=0.02)
        add("mnist", "resnet18_slim", "contrast", 1, 2 * slim, RELATIVE, w1=10.0)  # it learns slowly
        for system in SWAPPED:  # what asks the logits in training
            add("mnist", "resnet18_slim", system, 1, slim, RELATIVE, strength=0.5)
        return found
    steps, longer, short = run.pick(4, 1500, 12_000), run.pick(6, 4000, 36_000), run.pick(4, 400, 12_000)
    add("small", "convnet3", "selective", 1, longer, ABSOLUTE, RELATIVE)
    add("small", "convnet3", "standard", 2, steps, RELATIVE)
    add("small", "convnet3", "selective", run.seeds, steps, ABSOLUTE, RELATIVE)
    add("small", "convnet3", "selective", 1, steps, FINER, COARSE)
    add("small", "convnet3", "stochastic", 2, steps, ABSOLUTE)
    add("small", "convnet3", "stochastic", run.seeds, steps, RELATIVE)
    add("small", "convnet3", "contrast", 1, steps, ABSOLUTE)
    add("small", "convnet3", "contrast", run.seeds, steps, RELATIVE)
    add("small", "convnet3_bn", "selective", 1, steps, ABSOLUTE, RELATIVE)
    # Stochastic's net with BatchNorm dies at the others' rate: all three at a quarter of it, too
    add("small", "convnet3_bn", "stochastic", 1, steps, RELATIVE)
    add("small", "convnet3_bn", "stochastic", run.seeds, steps, RELATIVE, lr=0.02)
    add("small", "convnet3_bn", "selective", 1, steps, RELATIVE, lr=0.02)
    add("small", "convnet3_bn", "contrast", run.seeds, steps, RELATIVE, lr=0.02)
    # a heavier background loss
    add("small", "convnet3_bn", "stochastic", 1, steps, RELATIVE, lr=0.02, w1=10.0)
    add("small", "convnet3_bn", "selective", 1, steps, RELATIVE, lr=0.02, w1=10.0)
    add("small", "convnet3_bn", "contrast", 1, steps, RELATIVE, lr=0.02, w1=10.0)
    add("small", "convnet3", "contrast", 1, steps, RELATIVE, w1=10.0)
    # as the preset has it
    add("small", "convnet3_bn", "contrast", 1, steps, RELATIVE, lr=0.02, w1=3.0)
    add("small", "convnet3", "contrast", 1, steps, RELATIVE, w1=3.0)
    add("digits", "convnet3", "selective", 2, steps, ABSOLUTE, RELATIVE)
    # why: another class, an eta that does not saturate, no epsilon at the first layer
    add("small", "convnet3", "selective", 1, steps, ABSOLUTE, select="random")
    add("small", "convnet3", "selective", 1, steps, ABSOLUTE, eta_eps=1e-7)
    add("small", "convnet3", "selective_fine_first", 1, steps, RELATIVE)
    add("small", "convnet3", "dual", 1, steps, ABSOLUTE)
    add("small", "convnet3", "original", 1, short, ABSOLUTE)  # nine times a step of the others
    add("mnist", "convnet", "selective", 1, run.pick(4, 4000, 12_000), ABSOLUTE)
    return found


# ---- measurements --------------------------------------------------------------------------------------------------------


def own_rules(trained: System) -> tuple[fc.rules.Epsilon, float]:
    """The epsilon of a system's maps in training, and of z^B at their first layer."""
    epsilon = trained.setting.epsilon
    return epsilon, getattr(trained, "box_eps", 1e-2 if epsilon.relative else epsilon.eps)


@torch.no_grad()
def maps(model: torch.nn.Module, x: Tensor, epsilon: fc.rules.Epsilon, box_eps: float, target: Tensor | None = None) -> Tensor:
    """Relevance ``[N, K, C, H, W]`` of the predicted class's logit (or of ``target``'s), z^B at the input."""
    rules = fc.rules.RuleMap(conv=epsilon, linear=epsilon, first=fc.rules.ZB(0, 1, box_eps))
    parts = [slice(at, at + 64) for at in range(0, len(x), 64)]
    return torch.cat([fc.relevance(model, x[p], None if target is None else target[p], rules) for p in parts])


def map_share(R: Tensor, masks: Tensor) -> float:
    """Mean background share of maps ``[N, K, C, H, W]`` in percent, K counted as channels; NaN where all are 0."""
    return 100 * background_share(R.flatten(1, 2), masks).nanmean().item()


@torch.no_grad()
def training_maps(trained: ISNetSystem, x: Tensor) -> Tensor:
    """The maps that its training looks at, in eval mode; the draws of the training to come are not touched."""
    generator = trained.net.generator
    state = generator.get_state()
    generator.manual_seed(0)
    try:
        return torch.cat([trained.net(part, relevance=True).heatmaps for part in x.split(64)])
    finally:
        generator.set_state(state)


@torch.no_grad()
def signals(trained: System, val: Images, maps_of: int = 128) -> dict[str, float]:
    """Candidate signals from images of the training's kind alone, in percent (points); the larger, the worse.

    Args:
        trained: the net, put into eval mode.
        val: images that it was not trained on; their background still holds the shortcut.
        maps_of: heatmaps are made of so many of them.
    """
    trained.eval()
    model, val = trained.model, val.floats()
    few = val[slice(0, maps_of)]
    x, M = few.images, few.masks
    found: dict[str, float] = {}
    if isinstance(trained, ISNetSystem):
        R = training_maps(trained, x)
        found["share_training"] = map_share(R, M)
        found["map_foreground"] = (R.abs() * M.unsqueeze(1)).flatten(2).sum(2).mean().item()
    logits = torch.cat([model(part) for part in val.images.split(256)])
    own, fine = maps(model, x, *own_rules(trained)), maps(model, x, FINE, FINE_BOX)
    found |= {"share_own": map_share(own, M), "share_fine": map_share(fine, M)}
    half = slice(0, maps_of // 2)
    every = torch.arange(logits.shape[1], device=x.device).expand(len(x), -1)
    found["share_classes"] = map_share(maps(model, x[half], FINE, FINE_BOX, every[half]), M[half])
    explained = logits[: len(x)].max(1).values.double().sum()
    gaps = [100 * float((explained - R.double().sum()) / explained.abs().clamp(min=1e-12)) for R in (own, fine)]
    found |= {"gap_own": gaps[0], "gap_epsilon": gaps[0] - gaps[1]}

    def answers(value: Tensor | float) -> Tensor:
        return torch.cat([model(hiding.occlude(i, m, value)) for i, m in zip(val.images.split(256), val.masks.split(256))])

    on_mean = answers(hiding.mean_background(val.images, val.masks))
    found["occluded_zero"] = hiding.influence(logits, answers(0.0))
    found["occluded_mean"] = hiding.influence(logits, on_mean)
    found["occluded_drop"] = accuracy(logits, val.labels) - accuracy(on_mean, val.labels)
    swap = background_swap(model, val.images, val.masks, val.labels, logits=logits)
    found |= {
        "swap_gap": 100 * swap.gap.value, "swap_low": 100 * swap.gap.low, "swap_shift": 100 * swap.shift,
        "swap_follows": 100 * (swap.follows.value - swap.chance), "swap_warns": float(swap.warns),
    }  # fmt: skip
    # what eta's saturation would show in: the start of Selective's relevance, and how sure the net is
    P = logits.softmax(1)
    lowest = logits.argmin(1, keepdim=True)
    found["eta_slope"] = eta_gradient(logits, lowest, trained.setting.eta_eps).abs().sum((1, 2)).mean().item()
    found["confidence"] = 100 * P.max(1).values.mean().item()
    return found


def watched(task: Task, images: int, val: int, maps_of: int) -> Callable[[System, int], dict[str, float]]:
    """Measures accuracy on the test sets and the signals on validation images."""
    tests = {name: found[slice(0, images)].floats() for name, found in task.tests.items()}

    def watch(trained: System, _: int) -> dict[str, float]:
        trained.eval()
        found = {}
        for name, few in tests.items():
            found[f"accuracy_{name}"] = accuracy(trained.logits(few.images, few.masks), few.labels)
        found["lost"] = found["accuracy_biased"] - found["accuracy_confounded"]
        return found | signals(trained, task.val[slice(0, val)], maps_of)

    return watch


def one(job: Row, given: Row) -> list[Row]:
    """Trains one net and measures it on its way: rows of kind "layer", of its end, then rows of kind "time"."""
    s, scale = Setting(**{name: job[name] for name in Setting.names()}), given["scale"]
    sizes = {"quick": (600, 60), "small": (20_000, 1_000), "full": (58_000, 10_000)}[scale]
    task = TASKS[job["task"]](given["data"], *sizes).to(given["device"])
    large = s.net == "resnet18"
    rows_wanted = {"quick": 2, "small": 4 if large else 8, "full": 16}[scale]
    small = (500, 256, 64) if large else (1_000, 500, 128)
    images, val, maps_of = {"quick": (60, 64, 16), "small": small, "full": (10_000, 2_000, 256)}[scale]
    fitted = fit(s, task, watched(task, images, val, maps_of), every=math.ceil(s.steps / rows_wanted))
    left_out = ("stage", "train_seconds", "train_background", "train_foreground", "train_background_share")
    facts = {"train_seconds": fitted.seconds, "diverged": fitted.diverged}
    rows: list[Row] = [
        {"kind": "time", **{k: v for k, v in row.items() if k not in left_out}, **facts} for row in fitted.history
    ]
    if fitted.diverged:
        return [*rows, {"kind": "time", **facts}]
    few = task.val[slice(0, maps_of // 2)].floats()
    without = hiding.occlude(few.images, few.masks)
    epsilon, box_eps = own_rules(fitted.system)
    layers = hiding.layer_effects(fitted.system.model, few.images, without, epsilon, box_eps)
    return [*({"kind": "layer", **row} for row in layers), *rows]


# ---- judging the signals ---------------------------------------------------------------------------------------------------


def judged(rows: Sequence[Row]) -> list[Row]:
    """The measurements of nets that have learnt something; not of the standard net, which is no ISNet and loud in every signal, nor
    of nets trained with swapped backgrounds, whom the swap asks what they were trained to answer."""
    left_out = ("standard", *SWAPPED)
    return [r for r in rows if r["kind"] == "time" and r["system"] not in left_out and (r.get("accuracy_biased") or 0) >= LEARNT]


def _columns(rows: Sequence[Row], signal: str) -> tuple[Tensor, Tensor]:
    kept = [(r[signal], r["lost"]) for r in rows if isinstance(r.get(signal), (int, float)) and math.isfinite(r[signal])]
    pairs = torch.tensor(kept, dtype=torch.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def held_out(rows: Sequence[Row], signal: str) -> tuple[int, int, int, int]:
    """Misses, losses, false alarms and holds, where the threshold for each seed comes from the other seeds' trainings."""
    missed = losses = alarms = holds = 0
    for seed in sorted({row["seed"] for row in rows}):
        mine, others = (_columns([r for r in rows if (r["seed"] == seed) is same], signal) for same in (True, False))
        threshold = hiding.best_threshold(others[0], others[1] > LOST)
        if math.isnan(threshold):
            continue
        warns, lost = mine[0] > threshold, mine[1] > LOST
        missed, losses = missed + int((lost & ~warns).sum()), losses + int(lost.sum())
        alarms, holds = alarms + int((warns & ~lost).sum()), holds + int((~lost).sum())
    return missed, losses, alarms, holds


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def signal_table(rows: Sequence[Row]) -> list[str]:
    """One line a signal: how it goes with the loss, and how well it warns."""

    def line(signal: str) -> dict[str, str]:
        found, lost = _columns(rows, signal)
        missed, losses, alarms, holds = held_out(rows, signal)
        bad = lost > LOST
        return {
            "Spearman": _number(hiding.spearman(found, lost), 2), "Pearson": _number(hiding.pearson(found, lost), 2),
            "AUC": _number(hiding.auc(found, bad), 3), "threshold": _number(hiding.best_threshold(found, bad), 2),
            "missed, other seeds' threshold": f"{missed} of {losses}", "false alarms": f"{alarms} of {holds}",
        }  # fmt: skip

    lines = {SIGNALS[signal]: line(signal) for signal in SIGNALS}
    names = list(next(iter(lines.values())))
    warns, lost = _columns(rows, "swap_warns")
    bad = lost > LOST
    # the tool's own rule, fixed before these trainings: nothing is fitted
    counts = f"{int((bad & (warns < 1)).sum())} of {int(bad.sum())}", f"{int((~bad & (warns > 0)).sum())} of {int((~bad).sum())}"
    lines["background swap, what the tool warns of"] = dict(zip(names, ("-", "-", "-", "fixed", *counts)))
    columns = {"signal": lambda g: g[0]["signal"], **{n: lambda g, n=n: lines[g[0]["signal"]][n] for n in names}}
    return table(columns, [[{"signal": text}] for text in lines])


# ---- page and figures ------------------------------------------------------------------------------------------------------

KEYS = ("task", "net", "system", "select", "eta_eps", "eps", "relative", "w1", "lr", "steps")
NETS = {"convnet3": "net", "convnet3_bn": "net with BN", "convnet": "net", "resnet18": "ResNet-18", "resnet18_slim": "slim ResNet-18"}


def epsilon_title(row: Row) -> str:
    """How a row's epsilon reads."""
    text = f"{row['eps']:g}" if row["eps"] >= 1e-2 else f"{row['eps']:.0e}".replace("e-0", "e-")
    return text + (" rms" if row["relative"] else "")


def net_title(row: Row) -> str:
    """What tables and figures call a row's net and task."""
    return {"small": "32x32 MNIST, ", "digits": "demo's digits, ", "mnist": "56x56 MNIST, "}[row["task"]] + NETS[row["net"]]


def title(group: Sequence[Row]) -> str:
    """What tables and figures call a group."""
    row = group[0]
    name = TITLES.get(row["system"], "Selective ISNet, z^B epsilon 1e-6")
    if row["system"] in ("standard", "mixed"):
        return name
    extra = ", random class" if row["select"] == "random" else f", eta's t {row['eta_eps']:g}" if row["eta_eps"] != 1e-2 else ""
    rate = "" if row["lr"] == RATES.get(row["task"], RATE) else f", rate {row['lr']:g}"
    weight = "" if row["w1"] == 1 else f", w1 {row['w1']:g}"
    return f"{name.replace(' ISNet', '')}{extra}, eps {epsilon_title(row)}{weight}{rate}"


def ends(rows: Sequence[Row]) -> list[Row]:
    """The last measurement of each training."""
    return [group[-1] for group in by([r for r in rows if r["kind"] == "time" and r.get("step")], *KEYS, "seed").values()]


def setting_table(rows: Sequence[Row]) -> list[str]:
    """One line a setting, at the end of its trainings."""
    columns = {
        "net": lambda g: net_title(g[0]), "training": title, "steps": lambda g: str(g[0]["steps"]), "seeds": lambda g: str(len(g)),
        **{m: lambda g, m=m: mean_spread(g, f"accuracy_{m}") for m in ("biased", "unbiased", "confounded")},
        "share, training's map": lambda g: mean_spread(g, "share_training", 2),
        "share, fine": lambda g: mean_spread(g, "share_fine", 2),
        "swap gap": lambda g: mean_spread(g, "swap_gap"),
    }  # fmt: skip
    return table(columns, list(by(ends(rows), *KEYS).values()))


def layer_table(rows: Sequence[Row]) -> list[str]:
    """One line a setting and layer."""
    columns = {
        "net": lambda g: net_title(g[0]), "training": title,
        **{key: lambda g, k=column: str(g[0][k]) for key, column in (("steps", "steps"), ("layer", "name"))},
        "relevance absorbed": lambda g: mean_spread(g, "absorbed"),
        "of the background's": lambda g: mean_spread(g, "absorbed_background"),
        "effect on the logits": lambda g: mean_spread(g, "effect"),
        **{f"{k}": lambda g, k=k: mean_spread(g, f"effect_{k}") for k in ("below", "dead", "visible")},
    }  # fmt: skip
    return table(columns, list(by([r for r in rows if r["kind"] == "layer"], *KEYS, "layer").values()))


def _clean(ax: Axes) -> None:
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def draw_courses(rows: Sequence[Row], path: Path) -> Path:
    """Over the steps of every training: accuracy on confounded images, and what the heatmap and the swap say of it."""
    groups = [g for g in by([r for r in rows if r["kind"] == "time" and r.get("step")], *KEYS).values() if g[0]["system"] != "standard"]
    groups = sorted(groups, key=lambda g: list(NETS).index(g[0]["net"]))
    columns = 4
    figure = Figure(figsize=(3.1 * min(columns, len(groups)), 2.5 * math.ceil(len(groups) / columns) + 0.9), layout="constrained")
    axes = figure.subplots(math.ceil(len(groups) / columns), min(columns, len(groups)), sharey=True, squeeze=False)
    lines = {
        "accuracy_confounded": ("#0072B2", "-", "accuracy, confounded images (good: high; needs unbiased data)"),
        "share_training": ("#D08A00", "--", "background share of the training's heatmap (what a user sees)"),
        "swap_gap": ("#D55E00", "-", "gap of the background swap on biased validation images (good: 0)"),
    }
    for ax, group in zip(axes.flat, groups):
        for name, (colour, style, _) in lines.items():
            for training in by(group, "seed").values():
                points = [(r["step"], r[name]) for r in training if r.get(name) is not None]
                ax.plot(*zip(*points), style, color=colour, linewidth=1.6, marker=".", markersize=4) if points else None
        ax.set_title(f"{net_title(group[0])}, {group[0]['steps']:,} steps\n{textwrap.fill(title(group), 38)}", fontsize=8.5)
        ax.set_ylim(-4, 104)
        _clean(ax)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("%")
    figure.supxlabel("training steps", fontsize=9)
    for colour, style, text in lines.values():
        axes.flat[0].plot([], [], style, color=colour, label=text)
    figure.legend(loc="outside upper center", frameon=False, fontsize=9)
    return save(figure, path)


def _by_decades(ax: Axes, linear: float) -> None:
    """Logarithmic on both sides of 0, linear below the first decade from ``linear`` on; at most three labels a side."""
    first = math.ceil(math.log10(linear))
    ax.set_xscale("symlog", linthresh=10.0**first)
    ax.margins(x=0.08)
    low, high = ax.get_xlim()
    ticks = [0.0]
    for sign, end in ((-1, -low), (1, high)):
        decades = range(first, math.floor(math.log10(end)) + 1 if end > 10.0**first else first)
        ticks += [sign * 10.0**k for k in decades[:: max(1, math.ceil(len(decades) / 3))]]
    ax.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    ax.xaxis.set_minor_locator(NullLocator())


def draw_signals(rows: Sequence[Row], path: Path) -> Path:
    """Every signal against the loss of hold, one point a measurement."""
    columns = 4
    lines = math.ceil(len(SIGNALS) / columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True)
    used: dict[tuple[str, bool], None] = {}
    for ax, (signal, text) in zip(axes.flat, SIGNALS.items()):
        for row in rows:
            if not isinstance(row.get(signal), (int, float)) or not math.isfinite(row[signal]):
                continue
            family, fine = row["system"].split("_")[0], bool(row["relative"]) or row["eps"] < 1e-3
            used[family, fine] = None
            ax.plot(row[signal], row["lost"], "o" if fine else "D", color=COLOURS[family], markersize=4, alpha=0.6, markeredgewidth=0)
        found, lost = _columns(rows, signal)
        threshold = hiding.best_threshold(found, lost > LOST)
        ax.axhline(LOST, color="#6B6B6B", linewidth=0.8)
        if not math.isnan(threshold):
            ax.axvline(threshold, color="#6B6B6B", linewidth=0.8, linestyle=":")
        ax.set_xlabel(textwrap.fill(text + ", %", 34), fontsize=8)
        ax.set_title(f"AUC {_number(hiding.auc(found, lost > LOST), 2)}", fontsize=9)
        if float(found.max() if len(found) else 0) > 20 * max(float(found.abs().median() if len(found) else 0), 1e-3):
            _by_decades(ax, max(float(found.abs().median()), 1e-2))
        _clean(ax)
    for ax in axes.flat[len(SIGNALS) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss of hold, points\n(biased - confounded)", fontsize=8)
    markers = {True: "o", False: "D"}
    handles = [axes.flat[0].plot([], [], markers[fine], color=COLOURS[family], markersize=5)[0] for family, fine in used]
    texts = [f"{TITLES[family].split(' ISNet')[0]}, {'small or relative' if fine else 'absolute 0.01'}" for family, fine in used]
    good = "a good signal: all points above the line (hold lost) right of the dotted threshold, all others left of it"
    figure.legend(handles, texts, loc="outside upper center", ncols=4, frameon=False, fontsize=8, title=good)
    return save(figure, path)


GROUPS = {"effect_visible": ("#0072B2", "visible to the heatmap"), "effect_below": ("#D55E00", "below epsilon: hidden"),
          "effect_dead": ("#6B6B6B", "switched off by the background: no relevance at any epsilon")}  # fmt: skip


def draw_layers(rows: Sequence[Row], path: Path) -> Path:
    """Through which units of each layer the background reaches the logits, at the end of the trainings."""
    layers = [r for r in rows if r["kind"] == "layer" and r["system"] != "standard"]
    wanted = sorted(by(layers, *KEYS).values(), key=lambda g: list(NETS).index(g[0]["net"]))
    columns = 3
    figure = Figure(figsize=(4.1 * columns, 2.2 * math.ceil(len(wanted) / columns) + 0.9), layout="constrained")
    axes = figure.subplots(math.ceil(len(wanted) / columns), columns, sharey=True, squeeze=False)
    for ax, group in zip(axes.flat, wanted):
        parts = list(by(group, "layer").values())
        for j, (name, (colour, _)) in enumerate(GROUPS.items()):
            for i, part in enumerate(parts):
                numbers = values(part, name)
                ax.bar(i + (j - 1) * 0.26, sum(numbers) / max(len(numbers), 1), 0.25, color=colour)
                ax.plot([i + (j - 1) * 0.26] * len(numbers), numbers, ".", color="black", markersize=3)
        ax.set_xticks(range(len(parts)), [p[0]["name"] for p in parts], fontsize=7, rotation=90 if len(parts) > 4 else 0)
        ax.set_title(f"{net_title(group[0])}, {group[0]['steps']:,} steps\n{textwrap.fill(title(group), 48)}", fontsize=8)
        _clean(ax)
    for ax in axes.flat[len(wanted) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("effect on logits,\n% of their spread", fontsize=8)
    handles = [Patch(color=colour, label=text) for colour, text in GROUPS.values()]
    question = "How much removing the background moves the logits through units that are ... (good: nothing; dots: seeds)"
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9, title=question)
    return save(figure, path)


NOTES = (
    "Lost: more than 10 points between biased and confounded accuracy. Measurements along a training depend on each other; counts of "
    "errors take the threshold from the trainings of other seeds. The standard net, nets trained with swapped backgrounds and nets "
    "below 50 % on biased images are out.",
    "On this task an image without background is an unbiased one and a swapped one is confounded, so the signals that ask the "
    "logits are close to the truth by construction; the heatmap's signals are what is tested.",
    "Effects of groups of units do not add up exactly. In a residual net, units inside a block carry the block's own branch alone.",
)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__)
    p.add_argument("--data", required=True, help="MNIST's mnist.npz")
    p.add_argument("--net", choices=("convnet", "resnet18"), default="convnet", help="the small nets or ResNet-18 (convnet)")
    options, run = parse(p, arguments)
    suffix = "" if options.net == "convnet" else f"_{options.net}"
    path, todo = run.path(f"hidden{suffix}", ".csv"), jobs(run, options.net)
    given = {"data": options.data, "device": run.device, "scale": run.scale}
    if not run.draw:
        load(options.data, 600, 60)  # a wrong --data is told before processes start
    rows = run.rows(path, todo, one, given, "hidden")
    command = run.command("hidden", "--data mnist.npz", f"--net {options.net}" if suffix else "")
    body = [
        "### Which settings hold? (the end of each training)", "", *setting_table(rows), "",
        "### Which signal warns? (every measurement)", "", *signal_table(judged(rows)), "",
        "### Where does the background hide? (the end of each training, % of the logits' spread)", "", *layer_table(rows),
    ]  # fmt: skip
    notes = [*NOTES, *unfinished(rows, todo)]
    page = write_page(path.with_suffix(".md"), "Does a quiet heatmap mean a clean classifier?", command, rows, body, notes)
    draw_all(rows, path)
    print(page.read_text())
    return 0


def draw_all(rows: Sequence[Row], path: Path) -> Mapping[str, Path]:
    """The three figures beside the result file."""
    makers = {"courses": draw_courses, "signals": lambda r, p: draw_signals(judged(r), p), "layers": draw_layers}
    return {name: make(rows, path.with_name(f"{path.stem}-{name}.png")) for name, make in makers.items()}


if __name__ == "__main__":
    sys.exit(main())
