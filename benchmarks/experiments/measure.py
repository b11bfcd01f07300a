"""What is measured of a trained system; the same for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

import fisnet_cuda as fc
from fisnet_cuda.evaluate.attention import background_share
from fisnet_cuda.evaluate.swap import BackgroundSwap, background_swap

from .systems import System
from .tasks import Images, Task

__all__ = ["accuracy", "auroc", "heatmaps", "measure", "share", "shown", "swap", "visible"]

# the rule by which every system's maps are made for the table, so that shares compare: the ISNets' own in training, unless a setting
# says otherwise (finer ones: `hidden.FINE`)
FINE = fc.rules.Epsilon(1e-4, relative=True)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the images whose class is told right."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def auroc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of a two-class task, in percent, by the Mann-Whitney statistic; NaN where a class is missing."""
    score = (logits[:, 1] - logits[:, 0]).double()
    positive, negative = score[labels == 1], score[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    wins = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
    return 100 * wins.mean().item()


def heatmaps(system: System, shown: Tensor, epsilon: fc.rules.Epsilon = FINE) -> Tensor:
    """Relevance ``[N, C, H, W]`` of the predicted class's logit, z^B at the input, for images as the classifier sees them."""
    system.eval()
    rules = fc.rules.RuleMap(conv=epsilon, linear=epsilon, first=fc.rules.ZB(low=0, high=1))
    with torch.no_grad():
        return torch.cat([fc.relevance(system.model, x, rules=rules)[:, 0] for x in shown.split(128)])


def share(system: System, images: Images, epsilon: fc.rules.Epsilon = FINE) -> float:
    """Mean background share of the absolute relevance, in percent; maps that are 0 everywhere do not count.

    z^B gives relevance to black pixels, too: a pixel that may lie in [0, 1] and is 0 says something. One that the system blanks
    is 0 whatever the image shows, and its relevance is not the image's: it counts as 0.
    """
    R = heatmaps(system, shown(system, images), epsilon) * visible(system, images)
    return 100 * background_share(R, images.masks).nanmean().item()


@torch.no_grad()
def shown(system: System, images: Images) -> Tensor:
    """What the classifier sees of the images."""
    system.eval()
    parts = zip(images.images.split(256), images.masks.split(256))
    return torch.cat([system.prepare(x, m) for x, m in parts])


@torch.no_grad()
def visible(system: System, images: Images) -> Tensor:
    """Bool ``[N, 1, H, W]``: the pixels that the classifier is shown."""
    system.eval()
    parts = zip(images.images.split(256), images.masks.split(256))
    return torch.cat([system.visible(x, m) for x, m in parts]) > 0


def swap(system: System, images: Images, seed: int = 0) -> BackgroundSwap:
    """The background swap on images of the training's kind: asks for the background's hold without unbiased data."""

    def predict(x: Tensor) -> Tensor:
        return system.logits(x, torch.ones_like(x[:, :1]))

    return background_swap(predict, images.images, images.masks, images.labels, seed=seed)


def measure(system: System, task: Task, share_images: int = 512) -> dict[str, float]:
    """Accuracy (two classes: and AUC) on every test set, the background share on the first one, the background swap on validation.

    Returns:
        In percent: ``accuracy_<set>``, ``auroc_<set>`` (two classes), ``share`` (by `FINE`) and ``share_own`` (by the system's own
        epsilon), ``swap_same``, ``swap_other`` and ``swap_gap`` (not for "masked", which would need the composites' masks); and what
        the system itself adds (`System.extra`).
    """
    found: dict[str, float] = {}
    for name, images in task.tests.items():
        images = images.floats()
        logits = system.logits(images.images, images.masks)
        found[f"accuracy_{name}"] = accuracy(logits, images.labels)
        if task.classes == 2:
            found[f"auroc_{name}"] = auroc(logits, images.labels)
    first = next(iter(task.tests.values()))[slice(0, share_images)].floats()
    found["share"] = share(system, first)
    found["share_own"] = share(system, first, system.setting.epsilon)
    if system.setting.system != "masked":
        held = swap(system, task.val[slice(0, share_images)].floats())
        found |= {f"swap_{name}": 100 * getattr(held, name).value for name in ("same", "other", "gap")}
    return found | system.extra(task)
