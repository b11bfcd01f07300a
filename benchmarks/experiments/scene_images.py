"""Scenes composed on the spot: an object of one of up to 200 classes before a textured background that may give the class away.

An **object** is a silhouette with a core of its own colour, a hue, and a pattern in a colour of its own: 5 x 8 x 5 kinds. A class is
one combination of the three, so that 200 classes can be told apart in a thousand pixels, and many only by all three together. Place,
size, shade and light are drawn, and the object is turned a little.

A **background** is coloured noise with the power spectrum of photographs (amplitude ~ 1/f), a gradient of light and dull blobs. A
*code* adds a tint and a grating: 8 hues x 5 orientations x 5 wavelengths make 200 codes. Backgrounds are dull, objects are vivid and
have edges: where an object is can be told without its class, and no code looks like an object.

In "biased" images the background's code is the object's class, in "confounded" ones another class, and in "unbiased" ones there is no
grating and any tint. All three come from one function and the same draws: only the code differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tasks import Images

__all__ = ["BIASES", "MOST", "SIZE", "Objects", "backgrounds", "codes", "compose", "objects", "properties", "shown_codes"]

BIASES = ("biased", "unbiased", "confounded")
SIZE = 32
SILHOUETTES, HUES, PATTERNS = 5, 8, 5
ORIENTATIONS, WAVELENGTHS = 5, 5
MOST = SILHOUETTES * HUES * PATTERNS  # = 200 = HUES * ORIENTATIONS * WAVELENGTHS

# r(angle) = r0 + sum of amplitude * cos(order * angle + phase): Fourier descriptors of the silhouettes
_OUTLINES: tuple[tuple[float, tuple[tuple[int, float, float], ...]], ...] = (
    (0.86, ()),  # disc
    (0.76, ((3, 0.17, math.pi / 2), (6, 0.06, math.pi))),  # triangle, a side up
    (0.74, ((5, 0.24, -math.pi / 2),)),  # star
    (0.66, ((2, 0.30, 0.0), (4, 0.09, 0.0))),  # spindle that lies
    (0.72, ((4, 0.26, 0.0),)),  # cross
)
# colours of the patterns, and of the cores that go with the silhouettes
_INKS = ((0.05, 0.05, 0.1), (1.0, 1.0, 1.0), (0.1, 0.1, 0.15), (1.0, 0.95, 0.2), (0.3, 0.75, 1.0))


def properties(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Silhouette, hue and pattern of classes: no two of the 200 agree in all three, and the first 40 in no two of shape and hue.

    Args:
        labels: ``[N]`` int64 in [0, 200).

    Returns:
        Three ``[N]`` int64.

    Example:
        >>> properties(torch.tensor([0, 1, 8, 40]))
        (tensor([0, 1, 3, 0]), tensor([0, 1, 0, 0]), tensor([0, 1, 3, 1]))
    """
    return labels % SILHOUETTES, labels % HUES, (labels + labels // (SILHOUETTES * HUES)) % PATTERNS


def codes(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, orientation and wavelength of the background code that stands for classes; a one-to-one map, unlike that of the objects.

    Args:
        labels: ``[N]`` int64 in [0, 200).

    Returns:
        Three ``[N]`` int64.

    Example:
        >>> codes(torch.tensor([0, 1, 2]))
        (tensor([3, 6, 1]), tensor([1, 4, 2]), tensor([1, 2, 3]))
    """
    k = (labels * 123 + 11) % MOST  # 123 and 200 have no common factor
    return k % HUES, k % ORIENTATIONS, (k + k // (HUES * ORIENTATIONS)) % WAVELENGTHS


class Objects(NamedTuple):
    """Objects on nothing.

    Attributes:
        colour: ``[N, 3, S, S]`` in [0, 1].
        alpha: ``[N, 1, S, S]`` in [0, 1]: the silhouette, its edge smooth.
    """

    colour: Tensor
    alpha: Tensor


def _draw(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """``[n, 1, 1]``, uniform."""
    return low + (high - low) * torch.rand(n, 1, 1, generator=generator)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours ``[...]`` (hue in turns) -> ``[N, 3, ...]`` (the usual HSV)."""
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + 6 * hue) % 6
        channels.append(value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return torch.stack(channels, 1)


def objects(labels: Tensor, generator: torch.Generator, size: int = SIZE) -> Objects:
    """Draws objects at a random place, 0.5 to 0.7 of the image wide, turned by up to 14 degrees.

    Args:
        labels: ``[N]`` int64 in [0, 200).
        generator: of everything that is drawn.
        size: S, height and width of the images.
    """
    n = len(labels)
    silhouette, hue, pattern = properties(labels)
    radius = _draw(n, 0.30, 0.38, generator) * size
    cx, cy = (radius + 1 + _draw(n, 0, 1, generator) * (size - 2 - 2 * radius) for _ in range(2))
    turn = _draw(n, -0.25, 0.25, generator)
    at = torch.arange(size) + 0.5
    x, y = (at[None, None, :] - cx) / radius, (at[None, :, None] - cy) / radius
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    distance, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)

    edge = torch.empty_like(distance)
    for kind, (r0, terms) in enumerate(_OUTLINES):
        chosen = silhouette == kind
        edge[chosen] = r0 + sum((a * torch.cos(m * angle[chosen] + p) for m, a, p in terms), torch.zeros(()))
    alpha = ((edge - distance) * radius + 0.5).clamp(0, 1)

    # the pattern in a colour of its own, waves of 0.62 of the radius
    wave = 2 * math.pi / 0.62
    shift = _draw(n, 0, 2 * math.pi, generator)
    across, along = torch.sin(wave * u + shift), torch.sin(wave * v + shift)
    checks = torch.sin(0.8 * wave * u) * torch.sin(0.8 * wave * v) * 2
    kinds = (torch.full_like(u, -1), along, across, checks, torch.sin(wave * distance + shift))
    stripes = torch.stack(kinds)[pattern, torch.arange(n)].mul(4).clamp(-1, 1) * 0.5 + 0.5
    # the core in another one, smooth at its edge
    core = ((0.34 - distance) * radius + 0.5).clamp(0, 1)

    light = 1 - 0.22 * distance.clamp(max=1) ** 2 + 0.16 * (-u - v) * _draw(n, 0, 1, generator)
    tone = (hue[:, None, None] + 0.5 * _draw(n, -0.3, 0.3, generator)) / HUES
    flat = torch.ones_like(u)
    colour = _rgb(tone * flat, _draw(n, 0.85, 1.0, generator) * flat, _draw(n, 0.8, 1.0, generator) * flat)
    inks = torch.tensor(_INKS)
    for where, ink in ((stripes, inks[pattern]), (core, inks[(silhouette + 1) % len(_INKS)])):
        colour = colour + (ink[:, :, None, None] - colour) * where[:, None]
    return Objects((colour * light[:, None]).clamp(0, 1), alpha.unsqueeze(1))


def _noise(n: int, channels: int, size: int, slope: Tensor, generator: torch.Generator) -> Tensor:
    """``[n, channels, size, size]``, zero mean and standard deviation 1, amplitude ~ 1 / f^slope."""
    white = torch.randn(n, channels, size, size, generator=generator)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    f = (fx * fx + fy * fy).sqrt().clamp(min=1 / size)
    spectrum = torch.fft.rfft2(white) / f ** slope[:, None]
    spectrum[..., 0, 0] = 0
    noise = torch.fft.irfft2(spectrum, s=(size, size))
    return noise / noise.std((2, 3), keepdim=True)


def backgrounds(shown: Tensor, generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Draws backgrounds ``[N, 3, S, S]`` in [0, 1].

    Args:
        shown: ``[N]`` int64: the class whose code is in it, -1 for none (no grating, any tint).
        generator: of everything that is drawn; equal draws whatever is shown.
        size: S.
    """
    n, coded = len(shown), shown >= 0
    hue, orientation, wavelength = codes(shown.clamp(min=0))
    at = (torch.arange(size) + 0.5) / size
    x, y = at[None, None, :], at[None, :, None]

    grey = _draw(n, 0.38, 0.58, generator)
    way = _draw(n, 0, 2 * math.pi, generator)
    gradient = ((x - 0.5) * way.cos() + (y - 0.5) * way.sin()) * _draw(n, 0, 0.25, generator)
    noise = _noise(n, 3, size, _draw(n, 0.9, 1.5, generator), generator)
    any_hue = torch.rand(n, generator=generator)
    phase, contrast = _draw(n, 0, 2 * math.pi, generator), _draw(n, 0.8, 1.2, generator)

    tint_hue = torch.where(coded, hue / HUES, any_hue)[:, None, None]
    tint = _rgb(tint_hue, torch.ones(n, 1, 1), torch.ones(n, 1, 1))
    tint = tint - tint.mean(1, keepdim=True)
    theta = (orientation * math.pi / ORIENTATIONS)[:, None, None]
    k = 2 * math.pi * 1.5 * 1.42 ** wavelength[:, None, None]  # 1.5 to 6 waves across the image
    grating = torch.sin(k * (x * theta.cos() + y * theta.sin()) + phase) * coded[:, None, None]

    image = (grey + gradient)[:, None] + 0.05 * noise.mean(1, keepdim=True) * math.sqrt(3) + 0.02 * noise
    for _ in range(3):  # dull blobs, of any hue
        bx, by, r = (_draw(n, low, high, generator) for low, high in ((0, 1), (0, 1), (0.06, 0.2)))
        blob_hue = _draw(n, 0, 1, generator)
        dull = _rgb(blob_hue, torch.full_like(blob_hue, 0.25), _draw(n, 0.3, 0.7, generator))
        there = torch.sigmoid((r - ((x - bx) ** 2 + (y - by) ** 2).sqrt()) * 40)[:, None] * (0.7 * _draw(n, 0, 1, generator))[:, None]
        image = image * (1 - there) + dull * there
    return (image + 0.26 * tint + 0.20 * (contrast * grating)[:, None]).clamp(0, 1)


def shown_codes(labels: Tensor, classes: int, bias: str, generator: torch.Generator) -> Tensor:
    """The class that each background tells: the image's own ("biased"), none, -1 ("unbiased"), or another one ("confounded").

    Raises:
        ValueError: ``bias`` is none of `BIASES`.
    """
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
    wrong = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return {"biased": labels, "unbiased": torch.full_like(labels, -1), "confounded": wrong}[bias]


def compose(labels: Tensor, classes: int, bias: str, seed: int, size: int = SIZE, part: int = 1024) -> Images:
    """Composes scenes; equal seeds give equal objects and equal draws of the background for every bias.

    The foreground is the object, dilated by one pixel.

    Args:
        labels: ``[N]`` int64 in [0, classes).
        classes: how many there are, 2 to 200.
        bias: one of `BIASES`.
        seed: of everything that is drawn.
        size: S.
        part: images at once.

    Returns:
        Images ``[N, 3, S, S]`` and masks ``[N, 1, S, S]``, uint8.

    Raises:
        ValueError: ``classes`` is not in [2, 200], or ``bias`` none of `BIASES`.

    Example:
        >>> scenes = compose(torch.tensor([0, 1]), 2, "biased", seed=0)
        >>> scenes.images.shape, scenes.images.dtype, scenes.masks.unique()
        (torch.Size([2, 3, 32, 32]), torch.uint8, tensor([  0, 255], dtype=torch.uint8))
    """
    if not 2 <= classes <= MOST:
        raise ValueError(f"classes must be 2 to {MOST}, got {classes}")
    shown = shown_codes(labels, classes, bias, torch.Generator().manual_seed(seed + 1_000_003))
    generator = torch.Generator().manual_seed(seed)
    images, masks = [], []
    for some, told in zip(labels.split(part), shown.split(part)):
        drawn = objects(some, generator, size)
        behind = backgrounds(told, generator, size)
        images.append((behind * (1 - drawn.alpha) + drawn.colour * drawn.alpha).mul(255).round().byte())
        masks.append(F.max_pool2d((drawn.alpha > 0).float(), 3, 1, 1).mul(255).byte())
    return Images(torch.cat(images), labels, torch.cat(masks))


def sheet(counts: Sequence[int] = (2, 10, 200), columns: int = 10, seed: int = 5) -> list[tuple[int, str, Images]]:
    """What a contact sheet shows: (classes, bias, ``columns`` scenes), the same objects for every bias."""
    rows = []
    for classes in counts:
        labels = torch.arange(columns) * 37 % classes
        rows += [(classes, bias, compose(labels, classes, bias, seed)) for bias in BIASES]
    return rows
