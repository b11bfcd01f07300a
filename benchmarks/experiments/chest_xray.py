"""Chest X-rays from two hospitals, where in training the hospital gives the diagnosis away.

Shenzhen and Montgomery differ outside the lungs (black borders, markers, collimation) and, less so, inside them. In training all
normal lungs are from Shenzhen and all tuberculous ones from Montgomery: a classifier that tells the hospitals apart is always right.
Test sets: "same" (the pairing of the training, images held out) and "swapped" (Shenzhen's tuberculous, Montgomery's normal lungs:
whoever tells the hospital is always wrong; AUC 50 = no use of the hospital on balance). Which systems fall less?

Two controls say what can be won at all: ``--controls`` trains the standard net on parts of the image: the lungs alone (everything
else black), the background alone (lungs black), and the lungs' outline alone (the mask itself).

    python -m benchmarks.experiments.chest_xray --data cxr_tb --seeds 4
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate.attention import dilate

from .command import Run, parse, parser
from .figures import dots, save
from .fit import fit
from .jobs import Row, read_rows, run_jobs
from .measure import measure
from .systems import ISNETS, SYSTEMS, Setting, as_row
from .tables import by, mean_spread, table, values, write_page
from .tasks import Images, Task

SIZE = 32  # pixels; on this many the sensors' sharpness does not show
SITES = ("shenzhen", "montgomery")
TRAINED = (("shenzhen", 0), ("montgomery", 1))  # (site, label) of the pairing in training
SWAPPED = (("shenzhen", 1), ("montgomery", 0))
VIEWS = ("shortcut", "background", "outline", "fair")
DILATION = 1  # pixels by which the foreground is wider than the lung masks
TEST, VAL = 0.25, 0.10  # of each group of the training's pairing


# ---- the data ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def read_folder(folder: str, size: int = SIZE) -> tuple[Images, tuple[tuple[str, int], ...]]:
    """Reads ``labels.csv`` (``file,site,label``), ``images/`` and ``masks/`` (same names), resized by area.

    Args:
        folder: where they lie.
        size: height and width of what is returned.

    Returns:
        All images (uint8, one channel, masks 0 or 255: 255 where at least half of the area is lung), and (site, label) of each.

    Raises:
        InputError: something is missing or cannot be read.
    """
    table = Path(folder) / "labels.csv"
    try:
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        raise InputError(f"--data {folder}: cannot read labels.csv there; give the folder with labels.csv, images/ and masks/") from None
    groups, images, masks = [], [], []
    for number, row in enumerate(rows, start=2):
        name, site, label = row.get("file"), row.get("site"), row.get("label")
        if not name or site not in SITES or label not in ("0", "1"):
            found = f"file={name!r}, site={site!r}, label={label!r}"
            raise InputError(f"{table}, line {number}: {found}; needed are a file, site {' or '.join(SITES)}, and label 0 or 1")
        groups.append((site, int(label)))
        images.append(_read(Path(folder) / "images" / name, size))
        masks.append(np.where(_read(Path(folder) / "masks" / name, size) >= 128, 255, 0).astype(np.uint8))
    for group in (*TRAINED, *SWAPPED):
        if groups.count(group) < 4:
            raise InputError(f"{table}: {groups.count(group)} images of site {group[0]}, label {group[1]}; at least 4 are needed")
    labels = torch.tensor([label for _, label in groups])
    return Images(torch.from_numpy(np.stack(images)[:, None]), labels, torch.from_numpy(np.stack(masks)[:, None])), tuple(groups)


def _read(path: Path, size: int) -> np.ndarray:
    """A grey image ``[size, size]`` uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BOX))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an image ({type(error).__name__}); listed in labels.csv") from None


def equalise(images: Tensor) -> Tensor:
    """Histogram equalisation of each image: a pixel becomes the share of the image's pixels that are not brighter.

    Exposure, which names the hospital (lungs have a mean of 150 of 255 in Shenzhen, 80 in Montgomery), and any other monotonic change
    of the grey values are gone.

    Args:
        images: ``[N, 1, H, W]`` uint8.

    Returns:
        ``[N, 1, H, W]`` uint8.

    Example:
        >>> equalise(torch.tensor([[[[7, 7], [3, 200]]]], dtype=torch.uint8)).flatten().tolist()
        [191, 191, 64, 255]
    """
    x = images.flatten(1)
    order = x.sort(1).values
    rank = torch.searchsorted(order, x, right=True).float() / x.shape[1]
    return (255 * rank).round().byte().view_as(images)


def split(groups: Sequence[tuple[str, int]], seed: int) -> dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]]:
    """Cuts each (site, label) into images to train on, to validate on and to test on, at random.

    One image a patient in this data set: no patient is in two of them.

    Args:
        groups: (site, label) of every image.
        seed: of the draw.

    Returns:
        Group -> indices ``(train, val, test)``; test a quarter, val a tenth, at least one.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for group in (*TRAINED, *SWAPPED):
        own = torch.tensor([i for i, g in enumerate(groups) if g == group])
        own = own[torch.randperm(len(own), generator=generator)]
        test, val = max(1, round(TEST * len(own))), max(1, round(VAL * len(own)))
        parts[group] = (own[test + val :], own[test : test + val], own[:test])
    return parts


def balanced(parts: Sequence[Tensor]) -> Tensor:
    """Indices of an epoch in which every group has as many as the largest: images of smaller ones come again.

    Example:
        >>> balanced([torch.tensor([1, 2, 3]), torch.tensor([7])])
        tensor([1, 2, 3, 7, 7, 7])
    """
    most = max(len(part) for part in parts)
    return torch.cat([part.repeat(math.ceil(most / len(part)))[:most] for part in parts])


def augment(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turns (10 degrees), shifts (10 %), stretches each axis (20 %) image and mask together; changes gamma, contrast and brightness.

    The stretch blurs another mark of the hospital, the lungs' outline: the two scale their images differently.
    """
    n = len(images)

    def draw(width: float) -> Tensor:
        return width * (2 * torch.rand(n, generator=generator) - 1)

    angle, scale_x, scale_y = draw(math.radians(10)), draw(0.2).exp(), draw(0.2).exp()
    zero = torch.zeros(n)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(n, 2, 3)
    theta = turn * torch.stack([scale_x, scale_y], 1)[:, :, None]
    theta[:, :, 2] = torch.stack([draw(0.1), draw(0.1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    masks = (F.grid_sample(masks, grid, padding_mode="zeros", align_corners=False) >= 0.5).to(images.dtype)
    gamma, contrast, brightness = (draw(w).view(n, 1, 1, 1).to(images.device) for w in (0.4, 0.4, 0.12))
    images = (images.clamp(0, 1) ** gamma.exp() - 0.5) * contrast.exp() + 0.5 + brightness
    return images.clamp(0, 1), masks


@lru_cache(maxsize=2)
def load(folder: str, seed: int, view: str = "shortcut", size: int = SIZE) -> Task:
    """The task of one seed.

    Args:
        folder: of the data.
        seed: of the split.
        view: "shortcut", the task; controls: "background", the same with black lungs, "outline", with the mask for an image, and
            "fair", all four groups in training and in "same", a quarter of the swapped groups in "swapped".
        size: of the images.

    Raises:
        InputError: the data are not as `read_folder` wants them.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    found, groups = read_folder(folder, size)
    parts = split(groups, seed)
    pixels = equalise(found.images)
    masks = 255 * dilate(found.masks > 0, DILATION).byte()
    if view == "background":
        pixels = torch.where(masks > 0, 0, pixels).byte()
    elif view == "outline":
        pixels = masks
    everything = Images(pixels, found.labels, masks)
    fair = view == "fair"
    training = (*TRAINED, *SWAPPED) if fair else TRAINED
    train, val, test = ([parts[group][i] for group in training] for i in range(3))
    swapped = [parts[group][2] if fair else torch.cat(parts[group]) for group in SWAPPED]
    tests = {"same": everything[torch.cat(test)], "swapped": everything[torch.cat(swapped)]}
    return Task("chest_xray", 2, everything[balanced(train)], everything[torch.cat(val)], tests, augment)
