"""`dual_transposed_sum` (kernel 9): two launches of csrc/kernels/transposed_phi.cu."""

from __future__ import annotations

from torch import Tensor

from ... import reference
from ...reference import Geometry
from . import kernel_for
from .linear import refused
from .transposed_phi import transposed_phi


@kernel_for
def dual_transposed_sum(
    z_bar: Tensor, P_bar: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], sign: Tensor | None = None,
    *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_transposed_sum`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first.

    The second launch adds what the first one made while its own product is still in registers: one rounding less than two
    products and their sum.
    """
    plus = reference.folded_plus(W, sign)
    x_bar = transposed_phi(P_bar, plus, geometry, in_size, tile=tile, poison=poison)[0]
    return (transposed_phi(z_bar, W, geometry, in_size, skip=x_bar, tile=tile, poison=poison)[0],)


def serves(z_bar, P_bar, W, geometry, in_size, sign=None) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, z_bar, P_bar, size=in_size)


def tiles(z_bar, P_bar, W, geometry, in_size, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    return transposed_phi.tiles(z_bar, W, geometry, in_size)


dual_transposed_sum.serves, dual_transposed_sum.tiles = serves, tiles
