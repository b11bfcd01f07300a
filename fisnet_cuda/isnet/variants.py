"""What is explained: the start of relevance at the logits, for the variants and for a given target.

All on the device and without a host sync: nothing here looks at a value. Section 3 of semantics.md; Faster ISNet, arXiv
2401.08409. Contrast is this project's own and in neither paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.head import eta_start
from ..reference.head import one_hot as one_hot

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")
SELECT = ("lowest", "random", "top")


def eta_gradient(logits: Tensor, index: Tensor, eta_eps: float, backend: str = "auto") -> Tensor:
    """Gradient of ``eta = log(P_c + t) - log(1 - P_c + t)`` with respect to the logits, ``P = softmax``, in float32 or wider.

    Args:
        logits: ``[N, C]``.
        index: the class ``c`` of every map, ``[N, K]``.
        eta_eps: ``t``; 1e-2 in the paper.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``[N, K, C]``: relevance per unit of each logit. It keeps its own gradient, to first order.

    Example:
        >>> import torch
        >>> eta_gradient(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.long), 0.0)
        tensor([[[ 1., -1.]]])
    """
    return eta_start(logits, index, eta_eps, backend=backend)


def eta(logits: Tensor, index: Tensor, eta_eps: float) -> Tensor:
    """The explained quantity of Selective ISNet, ``log(P_c + t) - log(1 - P_c + t)``, ``[N, K]``.

    Example:
        >>> import torch
        >>> eta(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.long), 1e-2)
        tensor([[0.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    P_c = torch.softmax(logits, -1).gather(1, index)
    return torch.log(P_c + eta_eps) - torch.log(1 - P_c + eta_eps)


def other_class(top: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    """A class other than ``top [N]``, uniformly, one draw a sample; with one class, that class.

    Example:
        >>> import torch
        >>> other_class(torch.tensor([0, 1]), 2, None)
        tensor([1, 0])
    """
    if classes == 1:
        return torch.zeros_like(top)
    step = _randint(1, classes, top, generator)
    return (top + step) % classes


def _randint(low: int, high: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    _check_generator(generator, like)
    return torch.randint(low, high, like.shape, generator=generator, device=like.device)


def _gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Always float32, so that a seed means the same draw whatever the model's dtype."""
    _check_generator(generator, like)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def _check_generator(generator: torch.Generator | None, like: Tensor) -> None:
    if generator is not None and generator.device != like.device:
        raise ValueError(f"generator is on {generator.device} and the logits are on {like.device}: make it there")


def select_class(logits: Tensor, select: str, generator: torch.Generator | None) -> Tensor:
    """The class that Selective ISNet explains, ``[N]``: the lowest logit, a random class other than the top, or the top."""
    if select == "lowest":
        return logits.argmin(1)
    top = logits.argmax(1)
    return top if select == "top" else other_class(top, logits.shape[1], generator)


def draw_class(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """The class that Stochastic ISNet explains, ``[N]``: with probability 1/2 the top logit, else another, uniformly.

    Exactly 1/2, vectorised and on the device (the authors' draw gives 5/11, sample by sample). With one class, that class.
    """
    top = logits.argmax(1)
    other = other_class(top, logits.shape[1], generator)
    return torch.where(_randint(0, 2, top, generator) == 0, top, other)


def draw_contrast(logits: Tensor, multilabel: bool, generator: torch.Generator | None) -> Tensor:
    """The weights ``v`` of the logits that Contrast ISNet explains, ``v . logits``: one random direction for each sample.

    Ours, in neither paper. LRP-epsilon is linear in its start, so the map of ``v . logits`` is ``R_v = sum_c v_c R_c`` over the maps
    ``R_c`` of the classes. Softmax depends on the logits only through contrasts, combinations with zero sum: with three classes or
    more ``v`` is uniform on the unit sphere of those, a Gaussian minus its mean over its norm. So ``E[v v^T] = (I - 1 1^T / C) /
    (C - 1)``, and one map estimates the squared relevance of all classes without bias, as Hutchinson's estimator does a trace::

        E[R_v^2] = 1 / (C - 1)  sum_c (R_c - mean_c R_c)^2

    Two classes have but one contrast, the decision itself: the total of its map is 0 just where the answer turns, and there the
    heatmap loss would be a wall between the answers. Their ``v`` is uniform on the whole unit circle, the logits' mean included, which
    softmax does not need: ``E[v v^T] = I / 2``, and::

        E[R_v^2] = (R_0^2 + R_1^2) / 2 = D^2 / 2 + S^2 / 2,      D = (R_1 - R_0) / sqrt(2),  S = (R_0 + R_1) / sqrt(2)

    as one logit at a time has it, too (Stochastic). The total ``v . logits`` is 0 somewhere else for each ``v``: where maps go with
    their logits (``R_c = logits_c p`` for one ``p``), it is ``|logits| cos a`` with ``a`` uniform, so that the expected heatmap loss
    depends on ``|logits|`` alone and pulls the answer to neither side (docs/tool.md, "Two classes").

    Args:
        logits: ``[N, C]``; their shape, device and dtype count, not their values.
        multilabel: independent sigmoids depend on each logit: ``v`` is uniform on the whole unit sphere, ``E[v v^T] = I / C``.
        generator: of the draw, on the logits' device.

    Returns:
        ``[N, C]``, float32 or wider, without a gradient; all ones where there is one class, whose logit is then explained.

    Raises:
        ValueError: the generator is on another device.

    Example:
        >>> import torch
        >>> v = draw_contrast(torch.zeros(3, 5), False, torch.Generator().manual_seed(0))
        >>> bool((v.sum(1).abs() < 1e-6).all()), v.norm(dim=1)
        (True, tensor([1., 1., 1.]))
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[1] == 1:
        return torch.ones_like(logits, dtype=wide)
    drawn = _gaussian(logits, generator)
    # equal numbers have no contrast: should they be drawn, they are given one, so that the norm is never 0
    drawn[:, :1] += (drawn == drawn[:, :1]).all(1, keepdim=True)
    v = drawn.double()  # numbers that are almost equal keep a zero sum
    if logits.shape[1] > 2 and not multilabel:
        v = v - v.mean(1, keepdim=True)
    return (v / torch.linalg.vector_norm(v, dim=1, keepdim=True)).to(wide)
