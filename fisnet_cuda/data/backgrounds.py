"""Backgrounds: an image without its object, an object on another image's background, and backgrounds swapped at random in a batch.

Composites are ``x' = M x + (1 - M) b``, ``b`` = another image with its own object filled in. `fisnet_cuda.evaluate.swap` tests
classifiers with them; `swap_at_random` is for training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = [
    "default_margin", "dilate", "fill_foreground", "mask_kinds", "paste", "swap_at_random", "swap_backgrounds",
]  # fmt: skip

USED, EMPTY, FULL, NONE = range(4)  # kinds of masks


def fill_foreground(x: Tensor, M: Tensor) -> Tensor:
    """Images without their objects: where ``M > 0`` stands what the background around it suggests.

    Pull-push (Gortler et al. 1996, "The lumigraph", section 3.5): the background is averaged by normalised boxes of 2, 4, 8 ... pixels
    up to the whole image, and the hole is filled from the finest level that has background there, blended smoothly into the coarser
    ones. Every filled value is a weighted mean of pixels of the image's own background: nothing of the object is left, no value lies
    outside the background's range, a plain background is continued exactly, a wide hole ends in the mean background, and an affine
    normalisation of the images commutes with it. A learned inpainter would look better, and could paint the object back in.

    A soft mask is a hole wherever it is above 0 (as in the heatmap loss): at 0.5 half of the object would still be seen.

    Args:
        x: images ``[N, C, H, W]``, normalised or not.
        M: masks ``[N, 1, H, W]`` in [0, 1], 1 = foreground.

    Returns:
        ``[N, C, H, W]`` of x's dtype; x itself, bit by bit, where ``M`` is 0. An image without any background becomes 0.

    Example:
        >>> x, M = torch.ones(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
        >>> x[:, :, 2:4, 2:4], M[:, :, 2:4, 2:4] = 9.0, 1.0
        >>> fill_foreground(x, M).unique()
        tensor([1.])
    """
    check_composite(x, M)
    known = M <= 0
    high = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    filled = _pull_push(torch.where(known, high, torch.zeros_like(high)), known.to(high.dtype))
    return torch.where(known, x, filled.to(x.dtype))


def _pull_push(v: Tensor, w: Tensor) -> Tensor:
    """``v [N, C, H, W]`` with weights ``w [N, 1, H, W]`` in [0, 1]; at 0, from the coarser levels."""
    if max(v.shape[-2:]) == 1:
        return v
    # the divisor of the boxes that hang over the edge cancels
    weight = F.avg_pool2d(w, 2, ceil_mode=True)
    mean = F.avg_pool2d(v * w, 2, ceil_mode=True) / weight.clamp(min=torch.finfo(v.dtype).tiny)
    # a box half of which is known counts whole: what is near prevails over the far (Gortler's saturation)
    coarse = F.interpolate(_pull_push(mean, (2 * weight).clamp(max=1)), size=v.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(w > 0, w * v + (1 - w) * coarse, coarse)


def swap_backgrounds(x: Tensor, M: Tensor, donors_x: Tensor, donors_M: Tensor) -> Tensor:
    """The objects of ``x`` on the backgrounds of ``donors_x``: ``M x + (1 - M) b``, ``b = fill_foreground(donors_x, donors_M)``.

    Args:
        x: images ``[N, C, H, W]``.
        M: their masks ``[N, 1, H, W]`` in [0, 1].
        donors_x: images that give the backgrounds, like ``x``.
        donors_M: what is filled in them, like ``M``: at least their objects.

    Returns:
        ``[N, C, H, W]``: x bit by bit where ``M`` is 1, the donor where both masks are 0.

    Example:
        >>> M = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> swap_backgrounds(torch.full((1, 1, 1, 3), 5.0), M, torch.tensor([[[[9.0, 2.0, 2.0]]]]), M)
        tensor([[[[5., 2., 2.]]]])
    """
    check_composite(x, M)
    if donors_x.shape != x.shape:
        raise InputError(f"donors_x must have the shape of x, {tuple(x.shape)}, got {tuple(donors_x.shape)}")
    b = fill_foreground(donors_x, donors_M)
    M = M.to(x.dtype)
    return torch.where(M >= 1, x, M * x + (1 - M) * b)


def check_composite(x: Tensor, M: Tensor) -> None:
    """Refuses images and masks that do not belong together.

    Raises:
        InputError: which, and what was expected.
    """
    if x.dim() != 4 or M.dim() != 4 or M.shape != (len(x), 1, *x.shape[2:]):
        raise InputError(f"images must be [N, C, H, W] and masks [N, 1, H, W], got {tuple(x.shape)} and {tuple(M.shape)}")
    if not x.is_floating_point():
        raise InputError(f"images must be floating point, as the network takes them, got {x.dtype}")


# ---- masks -------------------------------------------------------------------------------------------------------------------


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Everything within ``radius`` pixels (Euclidean) of a bool mask ``[N, 1, H, W]``.

    Example:
        >>> dilate(torch.tensor([[[[True, False, False]]]]), 1)
        tensor([[[[ True,  True, False]]]])
    """
    if radius <= 0:
        return mask
    H = mask.shape[-2]
    out, run, width = torch.zeros_like(mask), mask.clone(), 0
    for dy in range(radius, -1, -1):  # the disc row by row: its runs are nested, the longest one in the middle
        while width < math.isqrt(radius**2 - dy**2):
            width += 1
            run[..., width:] |= mask[..., :-width]
            run[..., :-width] |= mask[..., width:]
        out[..., dy:, :] |= run[..., : max(H - dy, 0), :]
        out[..., : max(H - dy, 0), :] |= run[..., dy:, :]
    return out


def default_margin(size: tuple[int, int]) -> int:
    """Pixels by which a donor's hole is wider than its mask: the rim of an object that a mask cut at one half leaves outside."""
    return max(1, round(min(size) / 112))


def mask_kinds(M: Tensor, has_mask: Tensor | None = None, margin: int | None = None) -> Tensor:
    """What each mask ``[N, 1, H, W]`` is good for: `USED`, `EMPTY`, `FULL` (no background beside the widened object) or `NONE`.

    Returns:
        int64 ``[N]``, on the device of the masks; nothing waits for the device.

    Example:
        >>> mask_kinds(torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]])[:, None, None]).tolist() == [USED, EMPTY, FULL]
        True
    """
    margin = default_margin(M.shape[-2:]) if margin is None else margin
    hole = M > 0
    kinds = torch.full((len(M),), USED, device=M.device)
    kinds = kinds.masked_fill(dilate(hole, margin).flatten(1).all(1), FULL)
    kinds = kinds.masked_fill(~hole.flatten(1).any(1), EMPTY)
    return kinds if has_mask is None else kinds.masked_fill(~has_mask.to(M.device).bool(), NONE)


# ---- within a batch ----------------------------------------------------------------------------------------------------------


def paste(x: Tensor, M: Tensor, rows: Tensor, donors: Tensor, margin: int = 0) -> Tensor:
    """A batch in which some images stand on the backgrounds of others of the same batch, as they were before.

    Args:
        x: images ``[N, C, H, W]``.
        M: their masks ``[N, 1, H, W]`` in [0, 1].
        rows: positions of the images that get another background, int64 ``[n]``.
        donors: positions of those that give it, int64 ``[n]``.
        margin: pixels by which holes in the donors are wider than their masks.

    Returns:
        ``[N, C, H, W]``, a new tensor.

    Example:
        >>> x, M = torch.tensor([[5.0, 1.0, 1.0], [9.0, 2.0, 2.0]])[:, None, None], torch.tensor([1.0, 0.0, 0.0]).expand(2, 1, 1, 3)
        >>> paste(x, M, torch.tensor([0]), torch.tensor([1])).squeeze().tolist()
        [[5.0, 2.0, 2.0], [9.0, 2.0, 2.0]]
    """
    out = x.clone()
    holes = M[donors] if margin <= 0 else dilate(M[donors] > 0, margin).to(M.dtype)
    out[rows] = swap_backgrounds(x[rows], M[rows], x[donors], holes)
    return out


@torch.no_grad()
def swap_at_random(
    x: Tensor, M: Tensor, P: float, has_mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Pastes the objects of a batch, each with probability ``P``, onto the backgrounds of others: an augmentation.

    As in Xiao et al. 2021 (arXiv 2006.09994, "mixed-rand") and Ryali et al. 2021 (arXiv 2103.12719, "BG_Swaps"): of whatever
    class the other image is, the background tells nothing any more. Donors are the next ones in a random cycle through the images whose
    background is known, so that nobody is its own donor and no background is given twice.

    Without a mask an image neither takes nor gives. One whose mask is empty only gives: its label would be that of an object that is
    not there. One that is all foreground (or all but `default_margin`) has nothing to give or take. Masks stay what they are, those of
    the pasted objects.

    Args:
        x: images ``[N, C, H, W]``, normalised or not.
        M: their masks ``[N, 1, H, W]`` in [0, 1]; may be soft.
        P: probability in [0, 1], of each image by itself.
        has_mask: bool ``[N]``, where some images have none.
        generator: of the draws, on the CPU, so that they are the same on every device; None: torch's.

    Returns:
        The images, a new tensor, and bool ``[N]``: which have another background now. Both on x's device, which is not waited for.

    Example:
        >>> x, M = torch.rand(6, 3, 8, 8), torch.zeros(6, 1, 8, 8)
        >>> M[:, :, 2:6, 2:6] = 1
        >>> mixed, swapped = swap_at_random(x, M, P=1.0)
        >>> swapped.all().item(), torch.equal(mixed * M, x * M), torch.equal(mixed, x)
        (True, True, False)
    """
    margin = default_margin(M.shape[-2:])
    drawn, keys = torch.rand(2, len(x), generator=generator, dtype=torch.float64)
    rows = (drawn < P).nonzero()[:, 0].to(x.device)
    kinds = mask_kinds(M, has_mask, margin)
    donors = _cycle(keys.to(x.device), (kinds == USED) | (kinds == EMPTY))
    swapped = (drawn < P).to(x.device) & (kinds == USED) & (donors != torch.arange(len(x), device=x.device))
    return torch.where(swapped.view(-1, 1, 1, 1), paste(x, M, rows, donors[rows], margin), x), swapped


def _cycle(keys: Tensor, taking_part: Tensor) -> Tensor:
    """For each of those that take part the next one in the order of ``keys``, for the last one the first; for others themselves."""
    order = torch.where(taking_part, keys, 2.0).argsort(stable=True)
    places = order.argsort()
    after = order[(places + 1) % taking_part.sum().clamp(min=1)]
    return torch.where(taking_part, after, torch.arange(len(keys), device=keys.device))
