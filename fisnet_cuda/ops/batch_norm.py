"""BatchNorm with addition and ReLU in one op, and the affine map that relevance sees of it."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._backend import kernel


def bn_act(
    x: Tensor,  # [N, C, ...]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    skip: Tensor | None = None,  # [N, C, ...]
    relu: bool = False,
    *,
    copies: int = 1,
    known: tuple[Tensor, int, Tensor, Tensor] | None = None,  # [N, part of C, ...], its first channel, [rest of C], [rest of C]
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # ([N, C, ...], [C], [C], *[N, C, ...])
    """``y = [relu](bn(x) [+ skip])``, and the statistics that the forward really used.

    Args:
        x: ``[N, C, ...]``. Gets a gradient.
        weight, bias: gamma and beta ``[C]`` or None. Get gradients.
        running_mean, running_var: ``[C]``; updated in place when ``training``.
        training: normalise with the batch's statistics instead of the running ones.
        momentum, eps: as in ``torch.nn.BatchNorm2d``.
        skip: added before the ReLU. Gets a gradient.
        relu: whether a ReLU follows.
        copies: how many consumers y will have; each may get an output of its own (on a GPU one kernel then joins their
            gradients in the backward; elsewhere it is the same tensor).
        known: ``(part, first, mean, rstd)`` in train mode: ``part`` is ``x[:, first : first + part.shape[1]]``, and the other
            channels have the batch statistics ``mean`` and ``rstd`` (with this ``eps``), as another BatchNorm returned them
            that has normalised the same channels. Then a kernel measures ``part`` alone. No gradients.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(y, mean, rstd)``; ``rstd = 1/sqrt(var + eps)`` with the biased variance, both detached ``[C]``. Then
        ``copies - 1`` times y again, the same memory: do not change it in place.

    Raises:
        ValueError: one value a channel in training mode, where a variance does not exist; a skip of another shape; fewer
            than one copy; a part and known statistics that are not the channels of x.

    Example:
        >>> import torch
        >>> y, mean, rstd = bn_act(torch.tensor([[1.0], [3.0]]), None, None, None, None, training=True, relu=True)
        >>> y.flatten(), mean
        (tensor([0.0000, 1.0000]), tensor([2.]))
    """
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"BatchNorm in train mode needs more than one value a channel, got an input {tuple(x.shape)}")
    if skip is not None and skip.shape != x.shape:
        raise ValueError(f"skip must have the shape of x, {tuple(x.shape)}, got {tuple(skip.shape)}: bring both to one shape first")
    if copies < 1:
        raise ValueError(f"copies must be at least 1 (the result itself), got {copies}")
    if known is not None and known[0].shape[1] + known[2].shape[0] != x.shape[1]:
        raise ValueError(
            f"known must have the {x.shape[1]} channels of x, got a part with {known[0].shape[1]} and statistics of {known[2].shape[0]}"
        )
    return kernel("bn_act", backend, x)(
        x, weight, bias, running_mean, running_var, training, momentum, eps, skip, relu, copies, known
    )


def tracked_bn_act(
    x: Tensor,  # [N, C, ...]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    counter: Tensor | None,  # []
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    skip: Tensor | None = None,  # [N, C, ...]
    relu: bool = False,
    *,
    copies: int = 1,
    known: tuple[Tensor, int, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # ([N, C, ...], [C], [C], *[N, C, ...])
    """`bn_act` with the bookkeeping of ``torch.nn.BatchNorm2d``: the batch counter, and which statistics are used.

    Args:
        counter: ``num_batches_tracked``, incremented in train mode; None without running statistics.
        training: the module's flag; without running statistics the batch's own are used in either mode.
        momentum: None is the cumulative average (which reads the counter on the host, as PyTorch does).
        x, weight, bias, running_mean, running_var, eps, skip, relu, copies, known, backend: as in `bn_act`.

    Returns:
        As `bn_act`.

    Example:
        >>> import torch
        >>> mean, var, counter = torch.zeros(1), torch.ones(1), torch.tensor(0)
        >>> _ = tracked_bn_act(torch.tensor([[1.0], [3.0]]), None, None, mean, var, counter, training=True)
        >>> mean, counter
        (tensor([0.2000]), tensor(1))
    """
    if training and counter is not None:
        counter.add_(1)
        if momentum is None:
            momentum = 1.0 / float(counter)
    batch_statistics = bool(training or running_mean is None)
    return bn_act(
        x, weight, bias, running_mean, running_var, batch_statistics, 0.0 if momentum is None else momentum, eps, skip, relu,
        copies=copies, known=known, backend=backend,
    )  # fmt: skip


def affine_scale_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, linear_bias: Tensor | None = None,
    constant_bias: bool = True,
) -> tuple[Tensor, Tensor]:  # ([C], [C])
    """``(scale, b~)`` of a BatchNorm folded into the map before it: ``scale = gamma rstd``, ``b~ = (b - mean) scale + beta``.

    gamma keeps its gradient; the statistics are detached, and with ``constant_bias`` ``b`` and ``beta`` too (semantics.md
    sections 2 and 4).

    Example:
        >>> import torch
        >>> affine_scale_shift(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([0.5]))
        (tensor([1.]), tensor([-2.]))
    """
    return reference.affine_scale_shift(weight, bias, mean, rstd, linear_bias, constant_bias)
