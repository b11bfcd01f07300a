"""Drop-in fused layers: two or three layers of a network in one module, by hand or `from_modules(...)`.

They hold the user's own modules as children, so parameters, ``state_dict`` entries and modes are theirs; they compute the
same numbers, in fewer passes over memory; and tracing finds the layers inside.

>>> import torch, fisnet_cuda as fc
>>> block = fc.nn.ConvBNReLU.from_modules(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
>>> sorted(block.state_dict())[:2]
['bn.bias', 'bn.num_batches_tracked']
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["AddReLU", "BNReLU", "ConvBNReLU", "ConvReLU", "LinearReLU", "MaxPool"]

_Layer = TypeVar("_Layer")
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def _expect(argument: str, module: nn.Module, kinds: tuple[type, ...]) -> None:
    if not isinstance(module, kinds):
        names = ", ".join(k.__name__ for k in kinds)
        raise TypeError(f"{argument} must be one of torch.nn's {names}, got {type(module).__name__}")


def _same_channels(first: str, out: int, bn: nn.Module) -> None:
    if out != bn.num_features:
        raise ValueError(f"bn has {bn.num_features} features and {first} has {out} outputs: they must be equal")


def _bn_act(bn: nn.Module, x: Tensor, skip: Tensor | None) -> Tensor:
    return ops.tracked_bn_act(
        x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.training, bn.momentum, bn.eps,
        skip, relu=True,
    )[0]  # fmt: skip


class ConvBNReLU(nn.Module):
    """``relu(bn(conv(x)) [+ skip])``.

    Args:
        conv: a ``torch.nn.Conv1d/2d/3d``.
        bn: the ``torch.nn.BatchNorm1d/2d/3d`` of its output.

    Raises:
        TypeError, ValueError: other module types, or channels that do not match.

    Example:
        >>> layer = ConvBNReLU(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2))
        >>> layer(torch.rand(4, 1, 5)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        _expect("conv", conv, _CONV)
        _expect("bn", bn, _BN)
        _same_channels("conv", conv.out_channels, bn)
        self.conv, self.bn = conv, bn

    @classmethod
    def from_modules(cls: type[_Layer], conv: nn.Module, bn: nn.Module) -> _Layer:
        """Fuse existing layers; they stay the same objects."""
        return cls(conv, bn)

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return "conv", "bn", "add", "relu"

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """``x [N, C_in, ...]``, ``skip`` shaped as the output (a residual branch)."""
        return _bn_act(self.bn, self.conv(x), skip)


class ConvReLU(nn.Module):
    """``relu(conv(x))``.

    Args:
        conv: a ``torch.nn.Conv1d/2d/3d``.

    Example:
        >>> ConvReLU(nn.Conv2d(1, 2, 3))(torch.rand(1, 1, 3, 3)).shape
        torch.Size([1, 2, 1, 1])
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        _expect("conv", conv, _CONV)
        self.conv = conv

    @classmethod
    def from_modules(cls: type[_Layer], conv: nn.Module, relu: nn.Module | None = None) -> _Layer:
        """Fuse existing layers; ``relu`` is accepted for symmetry and holds nothing."""
        if relu is not None:
            _expect("relu", relu, (nn.ReLU,))
        return cls(conv)

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return "conv", "relu"

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, C_in, ...]``."""
        return torch.relu_(self.conv(x))


class BNReLU(nn.Module):
    """``relu(bn(x))``, the head of a pre-activation block.

    Args:
        bn: a ``torch.nn.BatchNorm1d/2d/3d``.

    Example:
        >>> BNReLU(nn.BatchNorm2d(2))(torch.rand(4, 2, 3, 3)).min() >= 0
        tensor(True)
    """

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        _expect("bn", bn, _BN)
        self.bn = bn

    @classmethod
    def from_modules(cls: type[_Layer], bn: nn.Module, relu: nn.Module | None = None) -> _Layer:
        """Fuse existing layers; ``relu`` is accepted for symmetry and holds nothing."""
        if relu is not None:
            _expect("relu", relu, (nn.ReLU,))
        return cls(bn)

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return "bn", "relu"

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, C, ...]``."""
        return _bn_act(self.bn, x, None)


class LinearReLU(nn.Module):
    """``relu(linear(x))``.

    Args:
        linear: a ``torch.nn.Linear``.

    Example:
        >>> LinearReLU(nn.Linear(3, 2))(torch.rand(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        _expect("linear", linear, (nn.Linear,))
        self.linear = linear

    @classmethod
    def from_modules(cls: type[_Layer], linear: nn.Module, relu: nn.Module | None = None) -> _Layer:
        """Fuse existing layers; ``relu`` is accepted for symmetry and holds nothing."""
        if relu is not None:
            _expect("relu", relu, (nn.ReLU,))
        return cls(linear)

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return "linear", "relu"

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, ..., C_in]``."""
        return torch.relu_(self.linear(x))


class AddReLU(nn.Module):
    """``relu(x + y)``, the end of a residual block.

    Example:
        >>> AddReLU()(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]))
        tensor([2., 0.])
    """

    @classmethod
    def from_modules(cls: type[_Layer], relu: nn.Module | None = None) -> _Layer:
        """``relu`` is accepted for symmetry and holds nothing."""
        if relu is not None:
            _expect("relu", relu, (nn.ReLU,))
        return cls()

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return "add", "relu"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return torch.relu_(x + y)


class MaxPool(nn.Module):
    """A max pool that keeps its winners' positions for relevance.

    Args:
        pool: a ``torch.nn.MaxPool1d/2d/3d`` (with ``return_indices=False``).

    Example:
        >>> MaxPool(nn.MaxPool1d(2))(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
        tensor([[[3., 2.]]])
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        _expect("pool", pool, _POOL)
        if pool.return_indices:
            raise ValueError("pool has return_indices=True: use return_indices=False")
        self.pool = pool

    @classmethod
    def from_modules(cls: type[_Layer], pool: nn.Module) -> _Layer:
        """Wrap an existing pool."""
        return cls(pool)

    def lrp_expand(self) -> tuple[str, ...]:
        """The layers inside, for tracing."""
        return ("pool",)

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, C, ...]``."""
        p = self.pool
        spatial = _POOL.index(next(k for k in _POOL if isinstance(p, k))) + 1
        return ops.max_pool(x, spatial, False, (p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode))[0]
