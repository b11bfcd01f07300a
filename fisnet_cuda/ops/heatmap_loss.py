"""The heatmap loss of ISNet, and what it is made of: GWRP and the resizing of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import check_backend, kernel
from ..reference.heatmap_loss import gwrp as _gwrp
from ..reference.heatmap_loss import gwrp_terms as _gwrp_terms
from ..reference.heatmap_loss import resize_mask as _resize_mask

__all__ = ["FOREGROUNDS", "NORMALIZATIONS", "gwrp", "gwrp_terms", "heatmap_loss", "resize_mask"]

FOREGROUNDS = ("hybrid", "L2", "L1")
NORMALIZATIONS = ("absRoIMean", "RoIMean", "none")


def gwrp_terms(d: float, tolerance: float) -> int:
    """How many of the largest values `gwrp` needs for a relative error of at most ``tolerance``.

    For values >= 0, stopping after the k largest has a relative error of at most ``d^k / (1 - d^k)``; this is
    the smallest such k.

    Args:
        d: decay, 0 <= d < 1.
        tolerance: relative error, > 0.

    Returns:
        k, at least 1.

    Raises:
        ValueError: ``d`` or ``tolerance`` is out of range.

    Example:
        >>> gwrp_terms(0.9, 1e-6), gwrp_terms(0.99, 1e-6), gwrp_terms(0.996, 1e-6)
        (132, 1375, 3447)
    """
    if not 0 <= d < 1:
        raise ValueError(f"d must be in [0, 1), got {d}; d = 1 is a mean, which needs every value")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    return _gwrp_terms(d, tolerance)


def gwrp(x: Tensor, d: float) -> Tensor:
    """Global weighted rank pooling over the last axis: between the maximum (d = 0) and the mean (d = 1).

    ``G = sum_i d^i sort_desc(x)_i / sum_i d^i`` (Kolesnikov and Lampert, ECCV 2016, arXiv 1603.06098).

    Only as many of the largest values are looked at as the dtype can tell apart: the relative error is at
    most ``torch.finfo(x.dtype).eps`` (see `gwrp_terms`). Differentiable; deterministic; values that tie share
    no gradient, one of them is taken first.

    Args:
        x: values >= 0, shape [..., n] with n >= 1, float32 or float64.
        d: decay in [0, 1].

    Returns:
        Shape [...], dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a float32 or float64 tensor.
        ValueError: ``x`` has no values to pool, or ``d`` is out of range.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 4.0, 2.0])
        >>> gwrp(x, d=0).item(), round(gwrp(x, d=0.5).item(), 4), round(gwrp(x, d=1).item(), 4)
        (4.0, 3.0, 2.3333)
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 or float64 tensor, got {got}; use x.float()")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one value along its last axis, got shape {list(x.shape)}")
    _check_decay(d)
    return _gwrp(x, d)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask at the size of a heatmap: adaptive average pooling, then anything above 0 is foreground.

    A pixel of the map is background only where nothing under it is foreground, so the loss never asks a
    network to ignore a part of the object. Works in both directions. A mask that already has the size is
    returned as it is, soft values included.

    Args:
        mask: [N, C, *spatial] with one to three spatial axes; bool, integer or float, >= 0.
        size: the spatial shape of the map.

    Returns:
        [N, C, *size], 0 and 1, dtype of ``mask``, without a gradient.

    Raises:
        TypeError: ``mask`` is not a tensor, or complex.
        ValueError: the number of spatial axes is not that of ``size``, or not 1, 2 or 3; or a size is not
            positive.

    Example:
        >>> import torch
        >>> resize_mask(torch.tensor([[[0, 0, 0, 1, 0, 0]]]), (3,))
        tensor([[[0, 1, 0]]])
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool, integer or float tensor, got {got}")
    if not 1 <= len(size) <= 3 or mask.dim() != len(size) + 2:
        raise ValueError(
            f"mask must be [N, C, *spatial] with as many spatial axes as size has (1, 2 or 3), "
            f"got shape {list(mask.shape)} and size {list(size)}"
        )
    if min(size) < 1 or min(mask.shape[2:]) < 1:
        raise ValueError(
            f"mask and size must not be empty, got shape {list(mask.shape)} and size {list(size)}"
        )
    return _resize_mask(mask, size)


def heatmap_loss(
    R: Tensor,  # [N, K, C, *spatial]
    mask: Tensor,  # [N, 1 or C, *spatial]
    *,
    d: float,
    E: float,
    c1: float | Tensor,
    c2: float | Tensor,
    foreground: str,
    normalization: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Background and foreground loss of each sample's heatmaps: relevance belongs inside the mask, and in a
    range.

    With M the mask (1 = foreground), for sample n and map k::

        A = |R| / (mean of |R| over the foreground + 1e-10)            over channels and pixels ("absRoIMean")
        G = sum_i d^i sort_desc(A (1 - M))_i / sum_i d^i               GWRP per channel, over all pixels
        u = min(G / (G + E), 1 - 1e-7)
        background = mean over k and channels of -log(1 - u)

        F = sum |R| M                                                  not normalised
        foreground = mean over k of (min(F / c1, 1) - 1)^2 + right(F)
            "L2"      right = (max(F, c2) / c1 - c2 / c1)^2
            "hybrid"  as "L2" up to F = c1 + c2, then F - (c1 + c2) + 1: the slope no longer grows with F
            "L1"      right = max(F, c2) - c2, in units of R, not of c1

    Other normalisations: "RoIMean" divides by the signed foreground mean, then takes the absolute value;
    "none" multiplies by the number of values of a map. Sources: Bassi et al., Nature Communications 15:291
    (2024) and arXiv 2401.08409 (hybrid).

    A sample whose mask is empty has the foreground mean 0: any relevance then costs -log(1e-7), with gradient
    0, and F is 0. An all-foreground mask has the background loss 0. A zero heatmap has the background loss 0,
    and the gradient there is finite.

    Deviates from the authors' code: -log(1 - u) is computed as log(1 + min(G / E, 1e7 - 1)), the same number
    without its cancellation in float32; GWRP stops where the dtype no longer sees a difference (`gwrp`); NaN
    and inf are not replaced by values of other samples, they come out as NaN; masks may be soft.

    Args:
        R: relevance [N, K, C, *spatial], one or more spatial axes, any float dtype, in the unit of the
            explained quantity. Gets a gradient. Computed in float32, whatever the autocast dtype; float64
            stays float64.
        mask: [N, 1, *spatial] or [N, C, *spatial], bool, integer or float in [0, 1], 1 = foreground; shared
            by the K maps. Gets no gradient. Other sizes: `resize_mask`.
        d: decay of GWRP in [0, 1]; 0 looks at the largest value, 1 at the mean.
        E: > 0, the G at which u = 1/2.
        c1: lower end of the natural range of F, > 0, in the unit of R; a number, or a tensor [1] or [K].
        c2: upper end, >= c1; likewise.
        foreground: "hybrid", "L2" or "L1".
        normalization: "absRoIMean", "RoIMean" or "none".
        backend: "auto" (by the device of R), "reference" (plain PyTorch) or "cuda".

    Returns:
        ``(background, foreground)``, each [N], >= 0, float32 (float64 if R is). Deterministic; no host sync.

    Raises:
        TypeError: R is not a float tensor, mask not a real tensor, or c1 or c2 neither number nor tensor.
        ValueError: shapes or devices do not match, or an option is out of range.
        RuntimeError: backend "cuda" without the extension, or with R elsewhere than on a GPU.

    Example:
        >>> import torch
        >>> R = torch.tensor([[[[[0.0, 2.0], [1.0, 0.0]]]]])  # one sample, map and channel, 2 x 2 pixels
        >>> mask = torch.tensor([[[[0, 1], [0, 1]]]])  # the right half: the mean of |R| there is 1, F is 2
        >>> options = dict(d=0.0, E=1.0, c1=1.0, c2=25.0, foreground="hybrid", normalization="absRoIMean")
        >>> background, foreground = heatmap_loss(R, mask, **options)
        >>> [round(v.item(), 4) for v in (background, foreground)]  # log(1 + 1 / 1), and F is in [c1, c2]
        [0.6931, 0.0]
    """
    _check_maps(R, mask)
    _check_decay(d)
    if not E > 0:
        raise ValueError(f"E must be > 0, got {E}")
    _check_range_end("c1", c1, R)
    _check_range_end("c2", c2, R)
    _check_choice("foreground", foreground, FOREGROUNDS)
    _check_choice("normalization", normalization, NORMALIZATIONS)
    run = kernel("heatmap_loss", check_backend(backend), R)
    return run(R, mask, d=d, E=E, c1=c1, c2=c2, foreground=foreground, normalization=normalization)


def _check_maps(R: Tensor, mask: Tensor) -> None:
    if not isinstance(R, Tensor) or not R.is_floating_point():
        got = R.dtype if isinstance(R, Tensor) else type(R).__name__
        raise TypeError(f"R must be a float tensor, got {got}")
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool, integer or float tensor, got {got}")
    if R.dim() < 4 or 0 in R.shape[1:]:
        raise ValueError(
            f"R must be [N, K, C, *spatial] with at least one spatial axis and no empty axis after N, "
            f"got shape {list(R.shape)}"
        )
    N, _, C, *spatial = R.shape
    if mask.shape not in (torch.Size((N, 1, *spatial)), torch.Size((N, C, *spatial))):
        raise ValueError(
            f"mask must be {[N, 1, *spatial]} or {[N, C, *spatial]} to match R {list(R.shape)}, "
            f"got {list(mask.shape)}; resize_mask(mask, {tuple(spatial)}) changes its size"
        )
    if mask.device != R.device:
        raise ValueError(f"mask is on {mask.device}, R on {R.device}; move one with .to(device)")


def _check_decay(d: float) -> None:
    if not 0 <= d <= 1:
        raise ValueError(f"d must be in [0, 1], got {d}")


def _check_range_end(name: str, value: float | Tensor, R: Tensor) -> None:
    """A number is checked for its value, a tensor only for its shape: its values are on the device."""
    if isinstance(value, Tensor):
        K = R.shape[1]
        if value.dim() > 1 or value.numel() not in (1, K):
            raise ValueError(
                f"{name} must have one value, or one for each of the {K} maps, got {list(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    elif not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
