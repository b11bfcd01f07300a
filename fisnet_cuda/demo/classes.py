"""How the time of a training step grows with the number of classes.

A heatmap for every class (Original) costs more with every class. Selective, Stochastic, Dual and Contrast make
one or two heatmaps a sample, whatever the number of classes: their step may grow only as much as a plain training
step does, whose last layer grows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fisnet_cuda as fc
from fisnet_cuda.demo.nets import small_net
from fisnet_cuda.progress import Progress
from fisnet_cuda.timing import interleaved

PLAIN = "plain"
VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")
ORIGINAL_EVERY = 3  # the one slow kind runs in every third repetition only


@dataclass(frozen=True)
class StepTime:
    """Time of one training step in milliseconds: the 20th, 50th and 80th percentile of the repetitions."""

    kind: str
    classes: int
    p20: float
    p50: float
    p80: float


def measure(
    class_counts: Sequence[int] = (2, 10, 100, 1000),
    original_up_to: int = 100,
    repetitions: int = 30,
    batch_size: int = 8,
    size: int = 32,
) -> list[StepTime]:
    """Times training steps of a plain net and of all ISNets, side by side.

    For each number of classes, all nets are timed in turn within each repetition, in one process: whatever
    else the machine is doing hits them alike.

    Args:
        class_counts: the numbers of classes.
        original_up_to: Original is left out beyond this number of classes; it would take minutes.
        repetitions: how often each step is timed, after one step that is not; Original a third as often.
        batch_size, size: of the input.

    Returns:
        One row for each kind and number of classes.
    """
    progress = Progress("step time, classes", len(class_counts) * (repetitions + 1))
    rows, done = [], 0
    for classes in class_counts:
        kinds = [kind for kind in (PLAIN, *VARIANTS) if kind != "original"]
        if classes <= original_up_to:
            kinds.append("original")
        steps = {kind: _training_step(kind, classes, batch_size, size) for kind in kinds}
        times = interleaved(
            steps,
            repetitions,
            every={"original": ORIGINAL_EVERY},
            tick=lambda turn, done=done, classes=classes: progress.update(done + turn, f"{classes} classes"),
        )
        done += repetitions + 1
        rows += [StepTime(kind, classes, *times[kind]) for kind in kinds]
    return rows


def _training_step(kind: str, classes: int, batch_size: int, size: int) -> Callable[[], None]:
    """A closure that does one whole training step: forward, loss, backward, update."""
    torch.manual_seed(0)
    model = small_net(classes, size=None, widths=(32, 64, 64))
    net = None if kind == PLAIN else fc.ISNet(model, variant=kind, generator=torch.Generator().manual_seed(0))
    heatmap_loss = fc.ISNetLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x = torch.rand(batch_size, 1, size, size)
    y = torch.randint(classes, (batch_size,))
    masks = torch.zeros_like(x)
    masks[..., size // 4 : -size // 4, size // 4 : -size // 4] = 1

    def step() -> None:
        optimizer.zero_grad()
        if net is None:
            loss = F.cross_entropy(model(x), y)
        else:
            loss, _ = heatmap_loss(net(x, relevance=True), y, masks)
        loss.backward()
        optimizer.step()

    return step
