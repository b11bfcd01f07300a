"""What does inference cost after training as an ISNet, next to the plain net?

Nothing should be left of the training: the ISNet's ``net(x)`` is the user's own model, and an exported one knows nothing of ISNets.
A net is trained as an ISNet for a few steps and exported (`fisnet_cuda.export`: ``state_dict``, `torch.export`, ONNX); all forms must
give the same logits first, then they take turns on the clock, batch by batch of the same images:

- *plain*: a fresh net of the same weights that was never wrapped, what all ratios are relative to;
- *plain, again*: a second one, whose ratio says how exact the clock is;
- *ISNet*: the trained ``net(x)``; *state_dict*: a fresh net that loaded the exported file; these must cost 1.00;
- *torch.export*, *ONNX Runtime* (where it is installed): the exported programs, which are contiguous where the nets are channels_last,
  as they are trained. Another engine or layout has a speed of its own, so their ratios are told and not judged; *plain, contiguous*,
  the plain net in the programs' layout, says what the layout makes.

    python -m benchmarks.experiments.inference

Two core-minutes, half of them for the exports. Keep the machine quiet: 2 % is judged.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fisnet_cuda as fc
from benchmarks.common import NOT_JUDGED, Spread, Times, interleave
from benchmarks.figures import BLUE, GREEN, GREY, ORANGE
from fisnet_cuda.errors import InputError

from .command import Run, in_one_line, parse, parser
from .figures import save
from .jobs import Row, unfinished
from .tables import by, table, write_page

__all__ = ["same_logits", "verdict"]

# name -> (import path, arguments, input [C, H, W], batch)
NETS = {
    "convnet": ("benchmarks.experiments.nets.convnet", {"size": [56, 56]}, (1, 56, 56), 32),
    "resnet18": ("fisnet_cuda.nets.resnet18", {}, (3, 112, 112), 4),
    "densenet121": ("fisnet_cuda.nets.densenet121", {}, (3, 112, 112), 4),
}
PLAIN, AGAIN, WRAPPED, LOADED, PROGRAM, ONNX = "plain", "plain, again", "ISNet", "state_dict", "torch.export", "ONNX Runtime"
CONTIGUOUS = "plain, contiguous"
JUDGED = (WRAPPED, LOADED)  # the same modules as the plain net: 1.00, or something was left behind
CLASSES, TOLERANCE, LOGITS = 10, 0.02, 1e-3
LEAST_ROUNDS = 20  # fewer are not judged


def verdict(ratio: Spread) -> str:
    """Whether a form costs what the plain net costs, by its time over the plain net's of the same round.

    PASS: the median is within 2 % of 1. FAIL: it is not, and neither does p20 to p80 reach 1. Else the clock was not exact enough to
    tell ("----"): measure again on a quieter machine.

    Example:
        >>> verdict(Spread(0.98, 1.01, 1.05)), verdict(Spread(1.05, 1.10, 1.20)), verdict(Spread(0.90, 1.10, 1.20))
        ('PASS', 'FAIL', '----')
    """
    if abs(ratio.p50 - 1) <= TOLERANCE + 1e-9:
        return "PASS"
    return NOT_JUDGED if ratio.p20 <= 1 <= ratio.p80 else "FAIL"


def same_logits(expected: Tensor, got: Tensor, exact: bool) -> float:
    """The largest difference over the largest logit; raises where it is more than 1e-3, or than 0 where ``exact``.

    Raises:
        RuntimeError: the logits differ; nothing is timed then.
    """
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= (0.0 if exact else LOGITS):  # NaN is caught, too
        raise RuntimeError(f"logits differ by {difference:.2g} of the largest one: not timed")
    return difference


def train(module: nn.Module, shape: tuple[int, int, int], batch: int, steps: int, device: str) -> None:
    """A few steps on noise with a square as foreground: weights, and statistics of BatchNorm, that are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(batch, 1, *shape[1:], device=device)
    masks[:, :, shape[1] // 4 : -(shape[1] // 4), shape[2] // 4 : -(shape[2] // 4)] = 1
    loss, optimizer = fc.ISNetLoss(), torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    module.train()
    for _ in range(steps):
        x = torch.rand(batch, *shape, generator=generator).to(device)
        y = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
        total, _ = loss(module.net(x, relevance=True), y, masks)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()


def one(job: Row, given: Row) -> list[Row]:
    """Trains, exports, compares and times one net: a row for each form."""
    try:
        from fisnet_cuda.data.spec import InputSpec
        from fisnet_cuda.export import _onnx_runner, export
        from fisnet_cuda.train.backbone import build_backbone
        from fisnet_cuda.train.module import ISNetModule
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'fisnet_cuda[train,export]'") from None

    path, arguments, (channels, height, width), batch = NETS[job["net"]]
    spec = InputSpec((height, width), channels, tuple(f"class {i}" for i in range(CLASSES)))
    module = ISNetModule(spec, backbone=path, backbone_args=arguments, variant=job["variant"], seed=job["seed"]).to(given["device"])
    train(module, (channels, height, width), batch, job["steps"], given["device"])
    weights = {key: value.cpu() for key, value in module.net.model.state_dict().items()}

    def fresh(state: dict[str, Tensor]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = build_backbone(path, arguments, spec)
        model.load_state_dict(state)
        return model.eval().to(given["device"], memory_format=torch.channels_last)

    x = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)).to(given["device"])
    x_last = x.contiguous(memory_format=torch.channels_last)
    onnx = given["onnx"] and given["device"] == "cpu"
    with tempfile.TemporaryDirectory(prefix="fisnet-inference-") as folder, torch.no_grad():
        contract = export(module, folder, onnx=onnx)
        files = {key: (Path(folder) / found["file"]).stat().st_size for key, found in contract["formats"].items()}
        plain = fresh(weights)
        torch.save(weights, Path(folder) / "plain.pt")
        plain_file = (Path(folder) / "plain.pt").stat().st_size
        loaded = fresh(torch.load(Path(folder) / "model.pt", weights_only=True))
        forms: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: plain, WRAPPED: module.net, LOADED: loaded, AGAIN: fresh(weights)}
        forms[CONTIGUOUS] = fresh(weights).to(memory_format=torch.contiguous_format)
        forms[PROGRAM] = torch.export.load(Path(folder) / "model.pt2").module().to(given["device"])
        if onnx:
            forms[ONNX] = _onnx_runner(Path(folder) / "model.onnx")[1]
        shown = {name: x if name in (CONTIGUOUS, PROGRAM, ONNX) else x_last for name in forms}
        expected = plain(x_last)
        differences = {
            name: same_logits(expected, form(shown[name]), exact=name in (*JUDGED, AGAIN)) for name, form in forms.items()
        }
        # whoever runs right after another engine finds its caches: a net that is not counted does, so that each of the judged ones
        # comes after a net like itself
        warm = fresh(weights)
        steps = {"uncounted": lambda: warm(x_last)}
        steps |= {name: (lambda form=form, x=shown[name]: form(x)) for name, form in forms.items()}
        times = interleave(steps, job["rounds"], 3, given["device"], f"inference, {job['net']}", calls=job["calls"])

    sizes = {AGAIN: plain_file, PLAIN: plain_file, LOADED: files["state_dict"], PROGRAM: files["torch_export"]}
    sizes |= {ONNX: files["onnx"]} if onnx else {}
    own = {PLAIN: plain, CONTIGUOUS: forms[CONTIGUOUS], AGAIN: forms[AGAIN], WRAPPED: module.net, LOADED: loaded}
    return [{"form": name, "batch": batch, "image": f"{channels}x{height}x{width}", **_spreads(times, name),
             "difference": differences[name], "file_bytes": sizes.get(name),
             "parameters": sum(p.numel() for p in own[name].parameters()) if name in own else None} for name in forms]  # fmt: skip


def _spreads(times: Times, name: str) -> Row:
    ms, ratio = times.spread(name), times.ratio(name, PLAIN)
    return {f"{key}_{p}": value for key, spread in (("ms", ms), ("ratio", ratio)) for p, value in spread._asdict().items()}


def spread_of(row: Row, key: str) -> Spread:
    """The percentiles of a row."""
    return Spread(*(row[f"{key}_{p}"] for p in Spread._fields))


def settings(run: Run) -> list[Row]:
    """A job a net."""
    rounds = {"quick": 3, "small": 30, "full": 300}[run.scale]
    nets = run.pick(("convnet",), tuple(NETS), tuple(NETS))
    return [
        {"net": net, "variant": "stochastic", "seed": seed, "steps": 3, "rounds": rounds, "calls": 4 if net == "convnet" else 1}
        for net in nets for seed in range(run.seeds)
    ]  # fmt: skip


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each form that must cost 1.00, and for each net's sizes."""
    lines = []
    for group in by(rows, "net", "seed").values():
        of = {row["form"]: row for row in group}
        for name in JUDGED:
            ratio = spread_of(of[name], "ratio")
            judged = verdict(ratio) if group[0]["rounds"] >= LEAST_ROUNDS else NOT_JUDGED
            lines.append(f"- {judged}  {group[0]['net']}, {name}: {ratio.text()} times the plain net (must be 1.00)")
        counts = {of[name]["parameters"] for name in (PLAIN, *JUDGED)}
        size = of[LOADED]["file_bytes"] / of[PLAIN]["file_bytes"]
        # a file's header holds its name, whose length may make a few bytes
        same = "PASS" if len(counts) == 1 and abs(size - 1) < 0.01 else "FAIL"
        numbers = " or ".join(f"{count:,}" for count in sorted(counts))
        lines.append(f"- {same}  {group[0]['net']}: {numbers} parameters in each; model.pt is {size:.3f} times the plain net's")
    return lines


STYLES = {
    AGAIN: (GREY, "o"), WRAPPED: (BLUE, "s"), LOADED: (GREEN, "D"), CONTIGUOUS: (GREY, "o"), PROGRAM: (ORANGE, "^"),
    ONNX: (ORANGE, "v"),
}  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Ratios to the plain net, p20 to p80, a panel for each net."""
    groups = list(by(rows, "net", "seed").values())
    figure = Figure(figsize=(10, 1.5 + 1.75 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for ax, group in zip(axes, groups):
        of = {row["form"]: row for row in group}
        names = [name for name in STYLES if name in of]
        for y, name in enumerate(names):
            ratio, (colour, marker) = spread_of(of[name], "ratio"), STYLES[name]
            ax.plot([ratio.p20, ratio.p80], [y, y], color=colour, lw=2)
            ax.plot(ratio.p50, y, marker, color=colour, ms=7, markerfacecolor=colour if name in (AGAIN, *JUDGED) else "white")
            ax.annotate(f"{ratio.p50:.2f}", (ratio.p80, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
        ax.axvline(1, color="black", lw=1)
        ax.axvspan(1 - TOLERANCE, 1 + TOLERANCE, color="#ECECEC", zorder=0)
        ax.set_yticks(range(len(names)), [f"{n} (control)" if n == AGAIN else n for n in names], fontsize=9)
        ax.set_ylim(len(names) - 0.4, -0.6)
        plain = spread_of(of[PLAIN], "ms")
        title = f"{group[0]['net']}, {group[0]['batch']} images of {group[0]['image']}: the plain net takes {plain.p50:.1f} ms"
        ax.set_title(title, fontsize=10, loc="left", fontweight="bold")
        ax.grid(axis="x", color="#E2E2E2", lw=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low, 0.9), max(high, 1.1) + 0.03 * (high - low))
    axes[-1].set_xlabel(
        "time of inference over the plain net's, p20-p80 (1: free; grey: within 2 %)\n"
        "filled: must be 1.00; hollow: another engine and layout, told and not judged", fontsize=9
    )  # fmt: skip
    return save(figure, path)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=1)
    p.add_argument("--no-onnx", action="store_true", help="leave ONNX out (it needs the extra export)")
    options, run = parse(p, arguments)
    path = run.path("inference", ".csv")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing and not options.no_onnx and not run.draw:
        print(f"inference: ONNX is left out, {' and '.join(missing)} not installed (fisnet_cuda[export])", file=sys.stderr)
    given = {"device": run.device, "onnx": not options.no_onnx and not missing}
    jobs = settings(run)
    # in this process and one after the other: they are timed
    rows = replace(run, processes=1).rows(path, jobs, one, given, "inference")
    columns = {
        "net": lambda g: f"{g[0]['net']}, {g[0]['batch']} of {g[0]['image']}", "form": lambda g: g[0]["form"],
        "ms": lambda g: spread_of(g[0], "ms").text(1), "over plain": lambda g: spread_of(g[0], "ratio").text(),
        "difference of logits": lambda g: f"{g[0]['difference']:.1g}",
        "parameters": lambda g: "-" if g[0]["parameters"] is None else f"{g[0]['parameters']:,}",
        "file, bytes": lambda g: "-" if g[0]["file_bytes"] is None else f"{g[0]['file_bytes']:,}",
    }  # fmt: skip
    body = [*table(columns, [[row] for row in rows]), "", *verdicts(rows)]
    command = run.command("inference", "--no-onnx" if options.no_onnx else "")
    notes = [
        "Rounds: every form is timed once, one after the other; ratios are taken within a round.",
        "PASS: the median is within 2 % of 1; FAIL: p20 to p80 do not reach 1 either; ----: the clock was not exact enough to tell "
        "(\"plain, again\", a second plain net, says how exact it was).",
        "Difference of logits: the largest, over the largest logit; it must be 0 for ISNet and state_dict.",
    ]  # fmt: skip
    page = write_page(
        path.with_suffix(".md"), "What does inference cost after training as an ISNet?", command, rows, body,
        [*notes, *unfinished(rows, jobs)], numbers="p50 (p20-p80) over rounds",
    )  # fmt: skip
    draw(rows, path.with_suffix(".png"))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
