"""`fprop_adjoint` (kernels 8 and 10): csrc/kernels/fprop_adjoint.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import Geometry
from ..tiles import number
from . import kernel_for
from .layout import acc_dtype, split_eps, vector
from .linear import as_map, as_weight, from_map, new_map, positions, refused, settings, tile_choices


@kernel_for
def fprop_adjoint(
    g_bar: Tensor, W: Tensor, geometry: Geometry, factor: Tensor | None, a: Tensor, s: Tensor, eps: float | Tensor,
    join: Tensor | None = None, need_a: bool = True, need_factor: bool = True, *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.fprop_adjoint`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first.

    ``factor_bar`` comes in the dtype of ``factor``.
    """
    choice = number(tile, tiles(g_bar, W, geometry, factor, a, s, eps))
    eps, eps_n = split_eps(eps, a)
    need_a = need_a and (eps_n is not None or eps != 0)  # without epsilon a_bar is 0
    need_factor = need_factor and factor is not None
    g_bar_in, a_bar, factor_bar = torch.ops.fisnet.fprop_adjoint(
        as_map(g_bar, geometry), as_weight(W, geometry), *settings(geometry), vector(factor, g_bar), as_map(a, geometry),
        as_map(s, geometry), eps, eps_n, as_map(join, geometry), need_a, need_factor, choice, poison,
    )  # fmt: skip
    return (
        from_map(g_bar_in, geometry, s),
        from_map(a_bar, geometry, a) if need_a else None,
        factor_bar.to(factor.dtype) if need_factor else None,
    )


def serves(g_bar, W, geometry, factor, a, s, eps, join=None, need_a=True, need_factor=True) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, g_bar, a, s, join, size=s.shape[2:])


def tiles(g_bar, W, geometry, factor, a, s, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    return tile_choices(positions(s, geometry), W.shape[0], g_bar, W, geometry)


fprop_adjoint.serves, fprop_adjoint.tiles = serves, tiles


@torch.library.register_fake("fisnet::fprop_adjoint")
def _(g_bar, W, sy, sx, py, px, dy, dx, factor, a, s, eps, eps_n, join, need_a, need_factor, tile, poison=False):
    result = new_map(g_bar, *s.shape)
    a_bar = new_map(g_bar, *a.shape) if need_a else a.new_empty(0)
    return result, a_bar, g_bar.new_empty(W.shape[0] if need_factor else 0, dtype=acc_dtype(g_bar) if need_factor else None)
