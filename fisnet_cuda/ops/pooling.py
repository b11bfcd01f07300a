"""Pools: maximum (winner takes all) and average (a linear map without weights), forward and transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import kernel
from ..reference.head import spread
from .layout import memory_format
from .phi import as_epsilon


def max_pool(x: Tensor, spatial: int, adaptive: bool, settings: tuple, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``(values, winners)`` of a max pool; values equal PyTorch's bit for bit.

    Args:
        x: ``[N, C, *size]`` with ``spatial`` axes. Gets a gradient.
        spatial: 1, 2 or 3.
        adaptive: whether ``settings`` is ``(output_size,)`` or ``(kernel_size, stride, padding, dilation, ceil_mode)``.
        settings: as PyTorch's function takes them.
        backend: "auto", "reference" or "cuda".

    Returns:
        Values ``[N, C, *out]`` and the winners ``[N, C, *out]``; the first of equals wins, NaN wins over all. The reference
        gives positions in the flattened spatial axes, int64; the kernel, for 2-d windows of at most 256 pixels, one byte, the
        position inside the window. `max_pool_transposed` takes both.

    Example:
        >>> import torch
        >>> max_pool(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]), 1, False, (2, 2, 0, 1, False))
        (tensor([[[3., 2.]]]), tensor([[[1, 2]]]))
    """
    return kernel("max_pool", backend, x)(x, spatial, adaptive, settings)


class _MaxPoolTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, winners, in_size, pool, backend):
        ctx.save_for_backward(winners)
        ctx.pool, ctx.backend = pool, backend
        return kernel("max_pool_scatter", backend, g)(g, winners, in_size, pool)

    @staticmethod
    @once_differentiable
    def backward(ctx, x_bar):
        (winners,) = ctx.saved_tensors
        return kernel("max_pool_gather", ctx.backend, x_bar)(x_bar, winners, ctx.pool), None, None, None, None


def max_pool_transposed(
    g: Tensor,  # [N*K, C, *out]
    winners: Tensor,  # [N, C, *out]
    in_size: tuple[int, ...],
    pool: tuple | None = None,
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, C, *in_size]
    """Relevance through a max pool: each window's relevance goes to its winner; where windows overlap they **add**.

    (The authors' LRP-Block overwrites there and loses about a third of the relevance.) The kernel is deterministic; the
    reference on a GPU follows PyTorch's determinism settings.

    Args:
        g: relevance ``[N*K, C, *out]``, in either form. Gets a gradient (a gather).
        winners: from `max_pool`, ``[N, C, *out]``.
        in_size: spatial size of the pool's input.
        pool: ``(spatial, adaptive, settings)`` of the `max_pool` that made the winners; needed where they are bytes.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``[N*K, C, *in_size]``.

    Raises:
        ValueError: the winners are bytes and ``pool`` is None.

    Example:
        >>> import torch
        >>> max_pool_transposed(torch.tensor([[[5.0, 7.0]]]), torch.tensor([[[1, 1]]]), (3,))
        tensor([[[ 0., 12.,  0.]]])
    """
    return _MaxPoolTransposed.apply(g, winners, tuple(in_size), pool, backend)


class _MaxPoolTransposedPhi(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, winners, in_size, pool, a, eps, skip, backend):
        s = kernel("max_pool_scatter_phi", backend, g)(g, winners, in_size, pool, a, eps, skip)
        relative = isinstance(eps, Tensor)
        ctx.save_for_backward(s, winners, a, eps if relative else None)
        ctx.eps, ctx.pool, ctx.backend = None if relative else eps, pool, backend
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar):
        s, winners, a, eps = ctx.saved_tensors
        g_bar, a_bar, skip_bar = kernel("max_pool_scatter_phi_backward", ctx.backend, s)(
            s_bar, s, winners, ctx.pool, a, ctx.eps if eps is None else eps, ctx.needs_input_grad[4], ctx.needs_input_grad[6]
        )
        return g_bar, None, None, None, a_bar, None, skip_bar, None


def max_pool_transposed_phi(
    g: Tensor,  # [N*K, C, *out]
    winners: Tensor,  # [N, C, *out]
    in_size: tuple[int, ...],
    pool: tuple | None,
    a: Tensor,  # [N, C, *in_size]
    eps: float | Tensor,
    skip: Tensor | None = None,  # [N*K, C, *in_size]
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, C, *in_size]
    """Relevance through a max pool and LRP-epsilon at the ReLU before it: ``s = phi(a) . (max_pool^T g + skip)``.

    `max_pool_transposed` and `phi_scale` in one pass (semantics.md section 1; Bach et al. 2015). The kernel is deterministic;
    the reference on a GPU follows PyTorch's determinism settings. Under autocast it runs in the dtype of its inputs.

    Args:
        g: relevance per unit of the pool's output, ``[N*K, C, *out]``. Gets a gradient.
        winners: from `max_pool`, ``[N, C, *out]``.
        in_size: spatial size of the pool's input.
        pool: ``(spatial, adaptive, settings)`` of the `max_pool` that made the winners; needed where they are bytes.
        a: the ReLU's output and the pool's input, ``[N, C, *in_size]``, >= 0. Gets a gradient.
        eps: epsilon >= 0, absolute, in units of ``a``; or ``[N, 1, ...]`` from `relative_epsilon`, constant.
        skip: what other consumers of ``a`` give, ``[N*K, C, *in_size]``. Gets a gradient.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of pre-activation, ``[N*K, C, *in_size]``.

    Raises:
        ValueError: ``a`` is not ``[N, C, *in_size]``; or the winners are bytes and ``pool`` is None.

    Example:
        >>> import torch
        >>> g, winners, a = torch.tensor([[[5.0, 7.0]]]), torch.tensor([[[1, 1]]]), torch.tensor([[[0.0, 3.0, 1.0]]])
        >>> max_pool_transposed_phi(g, winners, (3,), None, a, eps=1.0)
        tensor([[[0., 9., 0.]]])
    """
    in_size = tuple(in_size)
    if tuple(a.shape[2:]) != in_size or a.shape[:2] != winners.shape[:2]:
        raise ValueError(f"a must be {(*winners.shape[:2], *in_size)}, the pool's input, got {tuple(a.shape)}")
    return _MaxPoolTransposedPhi.apply(g, winners, in_size, pool, a, as_epsilon(eps), skip, backend)


_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def avg_pool(x: Tensor, spatial: int, adaptive: bool, settings: tuple) -> Tensor:
    """An average pool by PyTorch's own function; ``settings`` are its positional arguments after the input.

    Example:
        >>> import torch
        >>> avg_pool(torch.tensor([[[1.0, 3.0]]]), 1, True, (1,))
        tensor([[[2.]]])
    """
    return (_ADAPTIVE_AVG_POOL if adaptive else _AVG_POOL)[spatial](x, *settings)


def avg_pool_transposed(g: Tensor, spatial: int, adaptive: bool, settings: tuple, in_size: tuple[int, ...]) -> Tensor:
    """The transpose of `avg_pool`: ``[N*K, C, *out] -> [N*K, C, *in_size]``, differentiable to first order.

    Example:
        >>> import torch
        >>> avg_pool_transposed(torch.ones(1, 1, 1), 1, True, (1,), (4,))
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    if adaptive and all(size == 1 for size in g.shape[2:]):  # global pool: nothing but a broadcast
        return spread(g, in_size)
    if spatial == 1:  # PyTorch has no 1-d backward op: run it as a 2-d pool of height 1
        settings2 = ((1, _one(settings[0])),) if adaptive else _as_2d(settings)
        return avg_pool_transposed(g.unsqueeze(2), 2, adaptive, settings2, (1, *in_size)).squeeze(2)
    aten = torch.ops.aten
    like = _like(g, (*g.shape[:2], *in_size))
    if adaptive:
        op = aten._adaptive_avg_pool2d_backward if spatial == 2 else aten._adaptive_avg_pool3d_backward
        return op(g, like)
    op = aten.avg_pool2d_backward if spatial == 2 else aten.avg_pool3d_backward
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor = settings
    sizes = [_tuple(v, spatial) for v in (kernel_size, kernel_size if stride is None else stride, padding)]
    return op(g, like, *sizes, ceil_mode, count_include_pad, divisor)


def _like(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What PyTorch's backward ops take for the pool's input: its shape and its layout, that of ``g``; nobody reads its values."""
    layout = memory_format(g)
    if layout == torch.contiguous_format:
        return g.new_empty(1).expand(shape)
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)


def _as_2d(settings: tuple) -> tuple:
    kernel_size, stride, padding, ceil_mode, count_include_pad = settings[:5]
    k, p = _one(kernel_size), _one(padding)
    st = k if stride is None else _one(stride)
    return (1, k), (1, st), (0, p), ceil_mode, count_include_pad, None


def _one(v) -> int:
    return v if isinstance(v, int) else v[0]


def _tuple(v, n: int) -> list[int]:
    return [v] * n if isinstance(v, int) else list(v)
