"""Where a heatmap lies: its share in the background, and the pointing game.

``R`` is the relevance of one class's logit, ``[N, C_in, H, W]``; ``M`` the mask, ``[N, 1, H, W]`` in [0, 1], 1 = foreground.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.backgrounds import dilate

__all__ = ["Pointing", "background_share", "dilate", "pointing_game"]


def background_share(R: Tensor, M: Tensor) -> Tensor:
    """Share of the absolute relevance that lies outside the mask, ``sum |R| (1 - M) / sum |R|`` over channels and pixels.

    The definition is semantics.md section 5's, of the heatmap loss: ``|.|`` before the sum over channels, so that relevance for
    and against the class does not cancel. A soft mask counts by its value.

    Args:
        R: relevance ``[N, C_in, H, W]``, in any unit.
        M: masks ``[N, 1, H, W]`` in [0, 1].

    Returns:
        ``[N]`` float64 in [0, 1]; NaN for a heatmap that is 0 everywhere: it looks at nothing.

    Example:
        >>> R = torch.tensor([[[[3.0, -1.0]]]])
        >>> background_share(R, torch.tensor([[[[1.0, 0.0]]]]))
        tensor([0.2500], dtype=torch.float64)
    """
    A = R.double().abs().sum(1, keepdim=True)
    total = A.sum((1, 2, 3))
    return torch.where(total > 0, (A * (1 - M.double())).sum((1, 2, 3)) / total, torch.nan)


class Pointing(NamedTuple):
    """What the pointing game found, each ``[N]``.

    Attributes:
        hit: the most relevant pixel lies in the foreground; False where no relevance is positive.
        chance: share of the image that would be a hit, what pointing anywhere gets.
        positive: the heatmap has positive relevance at all.
    """

    hit: Tensor
    chance: Tensor
    positive: Tensor


def pointing_game(R: Tensor, M: Tensor, tolerance: int = 0) -> Pointing:
    """The pointing game (Zhang et al. 2018, "Top-down neural attention by excitation backprop", IJCV 126): is the pixel that
    speaks most for the class part of the object?

    ``hit = M[argmax over pixels of max(sum over channels of R, 0)] >= 1/2``; a point within ``tolerance`` pixels (Euclidean) of the
    mask is a hit, too (Zhang et al. take 15 in photographs; 0 here).

    Args:
        R: relevance of the explained class ``[N, C_in, H, W]``.
        M: masks ``[N, 1, H, W]`` in [0, 1].
        tolerance: in pixels of the network's input.

    Returns:
        A `Pointing`; its ``chance`` grows with the tolerance.

    Example:
        >>> R = torch.tensor([[[[3.0, -9.0, 1.0]]]])
        >>> pointing_game(R, torch.tensor([[[[1.0, 0.0, 0.0]]]])).hit
        tensor([True])
    """
    allowed = dilate(M >= 0.5, tolerance)[:, 0].flatten(1)
    points = R.sum(1).flatten(1)
    most, where = points.max(1)
    positive = most > 0
    return Pointing(allowed.gather(1, where[:, None])[:, 0] & positive, allowed.double().mean(1), positive)
