"""Insertion and deletion: does the prediction hang on the pixels that the heatmap marks?

RISE (Petsiuk, Das and Saenko 2018, arXiv 1806.07421), section 4.1. With ``p(t)`` the probability of the predicted class when the
share ``t`` of the pixels, the most relevant first, has been changed:

    deletion  = integral of p(t) over t in [0, 1], pixels of the image taken away (set to a baseline): low is good
    insertion = the same, pixels of the image put into a blurred image: high is good

by the trapezoid rule over ``steps`` equal steps. The same with pixels in random order is what a heatmap without knowledge gets:
a deletion below it and an insertion above it are the heatmap's merit, the values alone also tell how sure the net is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.spec import InputSpec
from ..errors import InputError

__all__ = ["BASELINES", "CURVES", "Options", "areas", "blurred", "curves", "pixel_order"]

BASELINES = ("black", "mean", "blur")
CURVES = ("insertion", "deletion", "insertion_random", "deletion_random")


@dataclass(frozen=True)
class Options:
    """How insertion and deletion are measured.

    Attributes:
        samples: at most so many images of a subset, drawn by a seed; 0: none.
        steps: pixels are changed in so many equal parts (RISE: 224 for images of 224 pixels).
        deletion: what deleted pixels become: "black" (0 before normalisation, as RISE's code), "mean" (the image's mean colour)
            or "blur" (the blurred image).
        insertion: what pixels are inserted into, of the same choices ("blur" in RISE).
        sigma: of the blur, in pixels; None: 5 for images of 224 pixels as in RISE, in proportion for others.
        batch_size: images in one forward.
    """

    samples: int = 32
    steps: int = 24
    deletion: str = "black"
    insertion: str = "blur"
    sigma: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("deletion", "insertion"):
            if getattr(self, name) not in BASELINES:
                raise InputError(f"the {name} baseline must be one of {', '.join(BASELINES)}, got {getattr(self, name)!r}")
        for name, least in (("samples", 0), ("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"faithfulness {name} must be at least {least}, got {getattr(self, name)}")
        if self.sigma is not None and not 0 < self.sigma < math.inf:
            raise InputError(f"the blur's sigma must be > 0 pixels, got {self.sigma}")


def pixel_order(R: Tensor) -> Tensor:
    """Place of each pixel when all are sorted by relevance (summed over channels, signed), the most relevant first.

    Args:
        R: relevance ``[N, C_in, H, W]``.

    Returns:
        ``[N, H W]`` int64: 0 for the most relevant pixel; equal ones in reading order.

    Example:
        >>> pixel_order(torch.tensor([[[[0.5, -2.0, 3.0]]]]))
        tensor([[1, 2, 0]])
    """
    return R.sum(1).flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``x [N, C, H, W]``; the border is continued by its own pixels.

    Example:
        >>> blurred(torch.ones(1, 1, 4, 4), 2.0).allclose(torch.ones(1, 1, 4, 4))
        True
    """
    reach = max(1, math.ceil(2 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    C = x.shape[1]
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)


def baseline(x: Tensor, kind: str, spec: InputSpec, sigma: float) -> Tensor:
    """What pixels of the normalised images ``x`` are replaced by, of ``x``'s shape."""
    if kind == "blur":
        return blurred(x, sigma)
    if kind == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    low = x.new_tensor(spec.low).view(1, -1, 1, 1)
    return low.expand_as(x)


@torch.no_grad()
def curves(
    model: nn.Module,
    x: Tensor,
    R: Tensor,
    target: Tensor,
    spec: InputSpec,
    options: Options,
    generators: Sequence[torch.Generator],
    step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Probability of the predicted class while pixels are inserted and deleted, in the heatmap's order and in random order.

    Args:
        model: ``[N, C_in, H, W] -> logits [N, C]``, in eval mode.
        x: normalised images ``[N, C_in, H, W]``.
        R: their heatmaps, ``[N, C_in, H, W]``.
        target: the predicted class ``[N]``.
        spec: tells what black is.
        options: steps and baselines.
        generators: of the random order of each image; on the CPU.
        step: called with the number of images done after each of them.

    Returns:
        The four `CURVES`, each ``[N, steps + 1]`` float64 on the CPU: after 0, 1, ... ``steps`` equal parts of the pixels.
    """
    n, _, height, width = x.shape
    pixels = height * width
    sigma = options.sigma or 5 * max(height, width) / 224
    changed = _changed(pixels, options.steps)
    orders = {"": pixel_order(R).cpu(), "_random": torch.stack([torch.randperm(pixels, generator=g) for g in generators])}
    deleted, inserted = baseline(x, options.deletion, spec, sigma), baseline(x, options.insertion, spec, sigma)
    rows: dict[str, list[Tensor]] = {name: [] for name in CURVES}
    for i in range(n):
        # both ends of each curve belong to both orders: they are run once
        ends = torch.stack([inserted[i], deleted[i], x[i]])
        states = [ends]
        for order in orders.values():
            place = order[i].to(x.device).view(1, 1, height, width)
            done = place < torch.tensor(changed[1:-1], device=x.device).view(-1, 1, 1, 1)
            states += [torch.where(done, x[i], inserted[i]), torch.where(done, deleted[i], x[i])]
        everything = torch.cat(states)
        logits = torch.cat([model(part) for part in everything.split(options.batch_size)])
        p = torch.softmax(logits.double(), 1)[:, target[i]]
        (empty, gone, full), *inner = p.split([3] + [options.steps - 1] * 4)
        for name, middle in zip(CURVES, inner):
            start, end = (empty, full) if name.startswith("insertion") else (full, gone)
            rows[name].append(torch.cat([start[None], middle, end[None]]).cpu())
        if step is not None:
            step(i + 1)
    return {name: torch.stack(found) for name, found in rows.items()}


def areas(curves: Tensor, pixels: int) -> Tensor:
    """Area under each curve ``[N, steps + 1]`` over the share of changed pixels, by the trapezoid rule: ``[N]``.

    Example:
        >>> areas(torch.tensor([[0.0, 1.0, 1.0]]), 100)
        tensor([0.7500])
    """
    t = torch.tensor(_changed(pixels, curves.shape[1] - 1), dtype=curves.dtype) / pixels
    return torch.trapezoid(curves, t, dim=1)


def _changed(pixels: int, steps: int) -> list[int]:
    """Changed pixels after each step."""
    return [round(pixels * t / steps) for t in range(steps + 1)]
