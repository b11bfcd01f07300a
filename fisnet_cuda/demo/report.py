"""What the demo prints: what it is about to do, two tables, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence

from fisnet_cuda.demo.classes import PLAIN, VARIANTS, StepTime
from fisnet_cuda.demo.digits import MARKS
from fisnet_cuda.demo.train import EPSILON, Recipe, Trained


def introduction(recipe: Recipe, train_scans: int, test_scans: int) -> str:
    """What is about to happen, in a few lines."""
    return (
        f"Handwritten digits, enlarged to 32x32; {train_scans} scans to train on, "
        f"{test_scans} others to test on.\n"
        "In training, a small square in the background betrays the class of every image.\n"
        "All nets have one architecture and see the same images: "
        f"{recipe.steps} steps of {recipe.batch_size}.\n"
    )


def nets_table(nets: Sequence[Trained]) -> str:
    """Accuracy on the three test sets, background share and step time of each net."""
    lines = [
        "",
        f"{'':<18}{'accuracy, %: square is':<35}{'relevance in':>14}{'training':>12}",
        f"{'':<18}{'biased':>8}{'unbiased':>11}{'confounded':>13}{'':<3}{'background, %':>14}{'step, ms':>12}",
        "-" * 79,
    ]
    for net in nets:
        biased, unbiased, confounded = (net.accuracy[marks] for marks in MARKS)
        lines.append(
            f"{net.name:<18}{biased:8.1f}{unbiased:11.1f}{confounded:13.1f}{'':<3}{net.background_share:14.2f}{net.step_ms:12.1f}"
        )
    return "\n".join(lines) + "\n"


def classes_table(times: Sequence[StepTime]) -> str:
    """Median step time for each kind of training and number of classes, and its growth."""
    counts = sorted({row.classes for row in times})
    cells = {(row.kind, row.classes): row.p50 for row in times}
    lines = [
        "Time of a training step on one CPU thread, ms: median (and how many plain steps it takes)",
        f"{'classes':<12}" + "".join(f"{count:>16,}" for count in counts),
        "-" * (12 + 16 * len(counts)),
    ]
    for kind in (PLAIN, *VARIANTS):
        cell = [cells.get((kind, count)) for count in counts]
        texts = ["not measured" if c is None else f"{c:.1f} ({c / cells[PLAIN, n]:.1f}x)" for c, n in zip(cell, counts)]
        lines.append(f"{kind:<12}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines) + "\n"


def reading(nets: Sequence[Trained], quick: bool) -> str:
    """How to read the tables, in words that follow from the numbers."""
    if quick:
        return "--quick trains too briefly for the accuracies to mean anything; run without it.\n"
    lines = [_verdict(net) for net in nets]
    lines += [
        "",
        f"LRP's epsilon is {EPSILON.eps:g} of each layer's own scale here. Selective may take the square",
        "back, from some seeds and more so with the papers' epsilon (try --papers-epsilon --seed 1), with",
        "hardly more relevance in the background. So a quiet heatmap proves nothing by itself:",
        "always test on data in which the shortcut is broken, as the confounded digits do here.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(net: Trained) -> str:
    lost = net.accuracy["biased"] - net.accuracy["confounded"]
    if lost < 1:
        text = "reads the digit, whatever the square says"
    elif lost < 10:
        text = f"reads the digit; a square that lies still costs it {lost:.1f} points"
    elif lost < 50:
        text = f"reads both; a square that lies costs it {lost:.0f} points"
    else:
        text = f"reads the square; when that lies it loses {lost:.0f} points"
    return f"{net.name}: {text}."
