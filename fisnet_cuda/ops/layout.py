"""How maps lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


def undivided(t: Tensor) -> Tensor:
    """``t``; where it is some channels of a map, a dense copy in the layout of that map.

    For what several products read: each of them would make that copy, and what is kept of a slice is the whole map.

    Example:
        >>> undivided(torch.ones(1, 4, 2, 2)[:, 1:3]).is_contiguous()
        True
    """
    inside = CHANNELS_LAST.get(t.dim())
    if inside is None or t.is_contiguous() or t.is_contiguous(memory_format=inside) or 0 in t.stride():
        return t
    return t.contiguous(memory_format=inside if t.stride(1) == 1 else torch.contiguous_format)


def memory_format(t: Tensor) -> torch.memory_format:
    """channels_last of a dense ``t`` with its channels innermost; of any other tensor, and where both hold, contiguous.

    Example:
        >>> memory_format(torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last))
        torch.channels_last
    """
    inside = CHANNELS_LAST.get(t.dim(), torch.contiguous_format)
    return inside if not t.is_contiguous() and t.is_contiguous(memory_format=inside) else torch.contiguous_format


def laid_out_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with its channels innermost where those of ``like`` are, else as it is.

    For gradients in a backward: what was saved knows the layout of a program, while gradients may come in another one, and
    torch.compile, when it looks at a backward for the first time, takes all of them for contiguous.

    Example:
        >>> t, like = torch.ones(1, 2, 3, 3), torch.ones(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        >>> laid_out_as(t, like).stride()
        (18, 1, 6, 2)
    """
    layout = memory_format(like)
    return t if layout == torch.contiguous_format else t.contiguous(memory_format=layout)
