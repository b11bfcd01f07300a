"""What does a heatmap alone cost, next to a plain forward? Eval mode, without gradients of weights.

fisnet_cuda's LRP-epsilon and z^B maps; gradient * input; the same LRP-epsilon maps by ``torch.autograd.grad``; and
captum's and zennit's LRP-epsilon when they can be imported (as they come; what they compute is not checked). All
explain the logit of a given class.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures, verify
from benchmarks.cases import DOUBLE_BACKWARD, Setup, explainer
from benchmarks.common import Bar, Report, Spread, Times, cell

TARGET = 2.2
BOUND = 2.0  # a forward, and a transposed product for each of its products
MODELS = ("resnet18", "densenet121")  # that the target is for

FORWARD, EPSILON, ZB, GRADIENT, AUTOGRAD, CAPTUM, ZENNIT = (
    "forward", "fisnet_epsilon", "fisnet_zb", "gradient_input", "autograd_epsilon", "captum", "zennit",
)  # fmt: skip
OURS = (EPSILON, ZB)
TEXTS = {
    FORWARD: "plain forward",
    EPSILON: "fisnet_cuda, LRP-epsilon",
    ZB: "fisnet_cuda, LRP-epsilon\nand z^B",
    GRADIENT: "gradient * input",
    AUTOGRAD: "LRP-epsilon by\nautograd.grad",
    CAPTUM: "captum, LRP-epsilon",
    ZENNIT: "zennit, LRP-epsilon",
}
COLOURS = {
    FORWARD: figures.GREY, EPSILON: figures.BLUE, ZB: figures.GREEN, GRADIENT: figures.SKY,
    AUTOGRAD: figures.PURPLE, CAPTUM: figures.ORANGE, ZENNIT: figures.VERMILION,
}  # fmt: skip
COLUMNS = {
    "net": cell("model"),
    "heatmap": lambda row: TEXTS[row["case"]].replace("\n", " "),
    "ms": cell("ms", 1),
    "over forward": cell("over_forward"),
}

Explain = Callable[[], object]


def run(options: argparse.Namespace, seen: Callable[[Report], None] = lambda report: None, seconds: float | None = None) -> Report:
    """Check, time, and compare with the target.

    Args:
        options: of `arguments`.
        seen: given the report as it grows.
        seconds: about so long for the rounds.
    """
    report = Report(
        "heatmap", "Time of a heatmap alone", common.settings_of(options), common.environment(options.device),
        COLUMNS,
    )  # fmt: skip
    for model in options.models:
        setup = common.setup_of(options, model=model, classes=options.classes)
        with ExitStack() as stack:
            steps = _competitors(report, setup, stack)
            problem = verify.heatmaps(setup)
            if problem:
                report.drop(f"{model}, fisnet_cuda", problem)
                steps = {case: step for case, step in steps.items() if case not in OURS}

            def tell(times: Times, partial: bool = True, setup: Setup = setup) -> None:
                report.forget_partial()
                for case in times.ms:
                    report.add(
                        **setup.as_row(), case=case, ms=times.spread(case), over_forward=times.ratio(case, FORWARD),
                        all_ms=times.ms[case], partial=partial,
                    )  # fmt: skip
                seen(report)

            share = None if seconds is None else seconds / len(options.models)
            times = common.interleave(
                steps, options.rounds, options.warmup, options.device, f"heatmap, {model}", share, seen=tell
            )  # fmt: skip
            tell(times, partial=False)
        for case in OURS:
            ratio = times.ratio(case, FORWARD) if case in steps else None
            name = f"heatmap, {model}, {TEXTS[case]} over a plain forward".replace("\n", " ")
            judged = common.is_protocol(setup) and model in MODELS
            report.bars.append(Bar(name, ratio, TARGET, judged=judged))
    return report


def _competitors(report: Report, setup: Setup, stack: ExitStack) -> dict[str, Explain]:
    x, labels, _ = setup.data()
    plain = setup.network().eval()

    def forward() -> Tensor:
        with torch.no_grad(), setup.autocast():
            return plain(x)

    def gradient_input() -> Tensor:
        inputs = x.detach().requires_grad_()
        with setup.autocast():
            logits = plain(inputs)
        (g,) = torch.autograd.grad(logits.gather(1, labels.unsqueeze(1)).sum(), inputs)
        return g * x

    def relevance(case: str, first_layer: str) -> Explain:
        net = explainer(case, setup.network(), first_layer=first_layer).eval()

        def explain() -> Tensor:
            with torch.no_grad(), setup.autocast():
                return net(x, relevance=True, target=labels).heatmaps

        return explain

    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    steps: dict[str, Explain] = {
        FORWARD: forward,
        EPSILON: relevance("selective", "epsilon"),
        ZB: relevance("selective", "zb"),
        GRADIENT: gradient_input,
        AUTOGRAD: relevance(DOUBLE_BACKWARD, "epsilon"),
    }
    for case, prepare in ((CAPTUM, _captum), (ZENNIT, _zennit)):
        if importlib.util.find_spec(case) is None:
            report.note(f"{setup.model}: {case} is left out, it is not installed; --path names a folder with it")
            continue
        try:
            steps[case] = prepare(setup.network().eval(), x, labels, stack)
            steps[case]()
        except Exception as error:
            steps.pop(case, None)
            reason = str(error).strip().split("\n")[0][:200]
            report.note(f"{setup.model}: {case} is left out, it raises {type(error).__name__}: {reason}")
    return steps


def _captum(model: nn.Module, x: Tensor, labels: Tensor, stack: ExitStack) -> Explain:
    from captum.attr import LRP

    lrp, inputs = LRP(model), x.detach().requires_grad_()
    return lambda: lrp.attribute(inputs, target=labels)


def _zennit(model: nn.Module, x: Tensor, labels: Tensor, stack: ExitStack) -> Explain:
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.types import Activation, AvgPool, Convolution, Linear

    rules = [(Activation, Pass()), (AvgPool, Norm()), (Convolution, Epsilon(1e-2)), (Linear, Epsilon(1e-2))]
    # hooks and merged BatchNorms stay on for the whole measurement: their set-up is not part of the time
    modified = stack.enter_context(LayerMapComposite(rules, canonizers=[SequentialMergeBatchNorm()]).context(model))

    def explain() -> Tensor:
        inputs = x.detach().requires_grad_()
        logits = modified(inputs)
        start = torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0) * logits.detach()
        return torch.autograd.grad(logits, inputs, start)[0]

    return explain


def draw(report: Report, path: Path) -> None:
    """One panel a network: time over a plain forward of each way to make a heatmap."""
    panels = []
    for model in dict.fromkeys(row["model"] for row in report.rows):
        rows = [row for row in report.rows if row["model"] == model]
        items = [
            figures.Item(
                TEXTS[row["case"]],
                Spread(**row["over_forward"]),
                COLOURS[row["case"]],
                target=TARGET if row["case"] in OURS else None,
                bound=BOUND if row["case"] in OURS else None,
                text=f"{row['over_forward']['p50']:.2f}x, {row['ms']['p50']:.0f} ms",
            )
            for row in rows
        ]
        panels.append(figures.Panel(figures.model_title(rows[0]), items))
    figures.bars(
        path, "What a heatmap alone costs", figures.machine(report.environment), panels,
        "time of forward and heatmap over a plain forward", bound_text="bound: the arithmetic alone",
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    p.add_argument("--models", nargs="+", default=list(MODELS))
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--size", type=int, default=112, help="height and width of the images")
    p.add_argument("--rounds", type=int, default=40, help="how often each is timed")
    p.add_argument("--warmup", type=int, default=5, help="rounds before that")
    p.add_argument("--path", type=Path, nargs="*", default=[], help="folders with captum or zennit")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.models, options.batch, options.size = ["small"], 2, 32
        options.rounds, options.warmup = 3, 1
    sys.path.extend(str(folder) for folder in options.path)
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
