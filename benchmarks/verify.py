"""No time is reported for a wrong result: what each case must compute, checked in float64 before it is timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

import fisnet_cuda as fc
from benchmarks.cases import DOUBLE_BACKWARD, PLAIN, Setup, explainer
from fisnet_cuda.isnet.variants import draw_contrast

MAPS, GRADIENTS = 1e-8, 1e-6  # relative errors that float64 rounding stays below


def training_cases(setup: Setup, cases: Iterable[str]) -> dict[str, str]:
    """Compare logits, heatmaps and gradients of a training step with the double-backward baseline.

    The baseline knows nothing of the relevance program: its maps come from ``torch.autograd.grad``. Selective must
    give the same heatmaps and the same gradients of the whole loss; Stochastic the baseline's maps of the classes
    that it drew, and Contrast of the weights; Original's maps and Dual's epsilon map sum to the baseline's maps of all classes.

    Args:
        setup: the network; checked at 64 pixels and 2 images, in train mode.
        cases: which to check; others are correct by definition.

    Returns:
        case -> what is wrong; empty when everything agrees.
    """
    setup = replace(setup, batch=2, size=64, precision="fp32")
    x, labels, masks = setup.data()
    x = x.double()
    baseline, plain = explainer(DOUBLE_BACKWARD, _double(setup)), _double(setup)
    logits = _seeded(lambda: plain(x))
    wrong = {}
    for case in cases:
        if case in (PLAIN, DOUBLE_BACKWARD):
            continue
        net = explainer(case, _double(setup))
        out = _seeded(lambda net=net: net(x, relevance=True))
        problems = _differs("logits", out.logits, logits, MAPS)
        if case in ("selective", "stochastic", "contrast"):
            target = out.explained[:, 0] if case == "stochastic" else None
            if case == "contrast":  # as `explainer` seeds it
                target = draw_contrast(out.logits.detach(), False, torch.Generator(x.device).manual_seed(0))
            same = _seeded(lambda target=target: baseline(x, relevance=True, target=target))
            problems += _differs("heatmaps", out.heatmaps, same.heatmaps, MAPS)
            mine, theirs = (_gradients(module, o, labels, masks) for module, o in ((net, out), (baseline, same)))
            problems += _differs("gradients", mine, theirs, GRADIENTS)
        else:
            maps = out.heatmaps if case == "original" else out.heatmaps[:, 1:]
            with torch.no_grad():
                each = [
                    _seeded(lambda c=c: baseline(x, relevance=True, target=torch.full_like(labels, c))).heatmaps
                    for c in range(setup.classes)
                ]
            problems += _differs("sum of maps", maps.sum(1), torch.cat(each, 1).sum(1), MAPS)
        if problems:
            wrong[case] = "; ".join(problems)
    return wrong


def heatmaps(setup: Setup) -> str:
    """Compare LRP-epsilon heatmaps of given classes, eval mode, with the autograd baseline; returns what is wrong."""
    setup = replace(setup, batch=2, size=64, precision="fp32")
    x, labels, _ = setup.data()
    maps = []
    for case in ("selective", DOUBLE_BACKWARD):
        net = explainer(case, _double(setup), first_layer="epsilon").eval()
        with torch.no_grad():
            maps.append(net(x.double(), relevance=True, target=labels).heatmaps)
    return "; ".join(_differs("heatmaps", *maps, MAPS))


def _double(setup: Setup) -> nn.Module:
    return setup.network().double()


def _seeded(run):
    """Dropout draws the same masks every time."""
    torch.manual_seed(2)
    return run()


def _gradients(module: nn.Module, out: fc.ISNetOutput, labels: Tensor, masks: Tensor) -> Tensor:
    total, _ = fc.ISNetLoss()(out, labels, masks)
    grads = torch.autograd.grad(total, list(module.parameters()))
    return torch.cat([g.flatten() for g in grads])


def _differs(name: str, got: Tensor, expected: Tensor, tolerance: float) -> list[str]:
    error = ((got - expected).norm() / expected.norm()).item()
    return [] if error <= tolerance else [f"{name} differ by {error:.1e} (relative; at most {tolerance:.0e})"]
