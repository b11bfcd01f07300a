"""Real handwritten digits with a shortcut in the background.

The images are scikit-learn's bundled digits (1,797 scans of 8x8 pixels), enlarged, turned, scaled and shifted
at random onto a dark canvas. Near the left edge, in the background, a small square may betray the class: the
height at which it stands is the class.

* ``biased``: the square stands at the digit's own class. All training images are like this.
* ``unbiased``: no square. Only the digit tells the class.
* ``confounded``: the square stands at a wrong class. A classifier that reads the square is wrong every time.

A classifier that reads the digit does equally well on all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Marks = Literal["biased", "unbiased", "confounded"]

MARKS: tuple[Marks, ...] = ("biased", "unbiased", "confounded")
CLASSES = 10


@dataclass(frozen=True)
class Originals:
    """The scans as they come, before anything is drawn at random.

    Attributes:
        pixels: ``[M, 8, 8]`` float32 in [0, 1].
        labels: ``[M]`` int64, the digit.
        index: ``[M]`` int64, the scan's place in scikit-learn's set; what the leak check compares.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Batch:
    """Images with what is needed to train on them.

    Attributes:
        images: ``[N, 1, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64, the digit.
        masks: ``[N, 1, H, W]`` float32, 1 = foreground: the digit and two pixels around it.
        marks: ``[N]`` int64, the class that the square betrays; -1 = no square.
    """

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    marks: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Canvas:
    """Where things go, in pixels.

    The leftmost ``strip`` columns hold the square and never the digit's mask, so that the two cannot overlap
    whatever the draw: the digit is drawn ``margin`` columns further right, its mask grows by ``margin``.

    Attributes:
        height, width: size of the image.
        strip: columns kept free of the digit's mask.
        margin: by how many pixels the mask is wider than the digit.
        side: side of the square.
        digit: smallest and largest size of the enlarged 8x8 scan.
        turn: largest rotation, in degrees.
    """

    height: int = 32
    width: int = 32
    strip: int = 5
    margin: int = 2
    side: int = 3
    digit: tuple[float, float] = (19.0, 24.0)
    turn: float = 12.0

    @property
    def field(self) -> int:
        """Width of the part of the canvas that the digit may use."""
        return self.width - self.strip - self.margin


def load_originals(seed: int = 0, test_share: float = 1 / 3) -> tuple[Originals, Originals]:
    """Loads the scans and splits them into train and test, class by class.

    The split comes before anything else: no variant of a test digit is ever seen in training.

    Args:
        seed: draws the split.
        test_share: share of each class that goes to the test set.

    Returns:
        The train and the test scans.
    """
    from sklearn.datasets import load_digits  # an extra, needed by the demo only

    data = load_digits()
    pixels = torch.as_tensor(data.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for c in range(CLASSES):
        members = torch.nonzero(labels == c).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(test_share * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    train_index, test_index = torch.cat(train).sort().values, torch.cat(test).sort().values
    return (
        Originals(pixels[train_index], labels[train_index], train_index),
        Originals(pixels[test_index], labels[test_index], test_index),
    )


def render(
    originals: Originals,
    picks: torch.Tensor,
    marks: Marks,
    generator: torch.Generator,
    canvas: Canvas | None = None,
) -> Batch:
    """Draws each picked scan once onto the canvas, with or without a square.

    Args:
        originals: the scans.
        picks: ``[N]`` int64, which of them to draw; a scan may be drawn many times.
        marks: ``"biased"``, ``"unbiased"`` or ``"confounded"``, see the module's docstring.
        generator: the only source of randomness. The digits drawn do not depend on ``marks``.
        canvas: sizes; the default is what the demo uses.

    Returns:
        The images with labels and masks.

    Raises:
        ValueError: ``marks`` is none of the three.
    """
    if marks not in MARKS:
        raise ValueError(f"marks must be one of {', '.join(MARKS)}; got {marks!r}")
    canvas = canvas or Canvas()
    labels = originals.labels[picks]
    digits = _draw_digits(originals.pixels[picks], generator, canvas)
    # Drawn for every kind, so that the same generator state gives the same digits in all three test sets.
    wrong = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    shown = {"biased": labels, "unbiased": torch.full_like(labels, -1), "confounded": wrong}[marks]
    masks = F.max_pool2d((digits > 0.1).float(), 2 * canvas.margin + 1, stride=1, padding=canvas.margin)
    return Batch((digits + _draw_squares(shown, canvas)).clamp_(0, 1), labels, masks, shown)


def training_batches(originals: Originals, batch_size: int, steps: int, seed: int, canvas: Canvas | None = None) -> Iterator[Batch]:
    """Yields ``steps`` biased batches, every image drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(originals), generator=generator)])
        yield render(originals, queue[:batch_size], "biased", generator, canvas)
        queue = queue[batch_size:]


def evaluation_sets(originals: Originals, variants: int, seed: int, canvas: Canvas | None = None) -> dict[Marks, Batch]:
    """Draws every test scan ``variants`` times; the three sets differ in their squares only."""
    picks = torch.arange(len(originals)).repeat(variants)
    return {marks: render(originals, picks, marks, torch.Generator().manual_seed(seed), canvas) for marks in MARKS}


def _draw_digits(pixels: torch.Tensor, generator: torch.Generator, canvas: Canvas) -> torch.Tensor:
    """Enlarges, turns and shifts scans ``[N, 8, 8]`` at random; returns ``[N, 1, H, W]``."""
    n = len(pixels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    padded = F.pad(pixels[:, None], (2, 2, 2, 2))  # so that the border pixels fade out instead of being cut
    size = uniform(*canvas.digit)
    angle = uniform(-math.radians(canvas.turn), math.radians(canvas.turn))
    # Nothing of the scan, turned by the largest angle, may leave its field.
    turned = size * (math.cos(math.radians(canvas.turn)) + math.sin(math.radians(canvas.turn)))
    free_x, free_y = ((canvas.field - turned) / 2).clamp(min=0), ((canvas.height - turned) / 2).clamp(min=0)
    shift_x, shift_y = uniform(-1, 1) * free_x, uniform(-1, 1) * free_y

    # grid_sample wants, for each output pixel, where to look in the padded scan, both in units of [-1, 1].
    zoom = size / pixels.shape[-1] * padded.shape[-1]
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack([cos * canvas.field, sin * canvas.height, -2 * (cos * shift_x + sin * shift_y)], dim=1),
            torch.stack([-sin * canvas.field, cos * canvas.height, -2 * (cos * shift_y - sin * shift_x)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [n, 1, canvas.height, canvas.field], align_corners=False)
    drawn = F.grid_sample(padded, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    drawn = ((drawn - 0.3) / 0.5).clamp(0, 1)  # gives the strokes back the edges that enlarging has blurred
    return F.pad(drawn, (canvas.width - canvas.field, 0))


def _draw_squares(shown: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Draws a square at the height of class ``shown`` ``[N]`` (-1: none); returns ``[N, 1, H, W]``."""
    gap = (canvas.strip - canvas.side) // 2
    pitch = (canvas.height - 2 * gap - canvas.side) / (CLASSES - 1)
    top = (gap + (shown * pitch).round())[:, None]
    row = torch.arange(canvas.height)[None]
    column = torch.arange(canvas.width)
    rows = (row >= top) & (row < top + canvas.side) & (shown >= 0)[:, None]
    columns = (column >= gap) & (column < gap + canvas.side)
    return (rows[:, :, None] & columns[None, None, :]).float()[:, None]
