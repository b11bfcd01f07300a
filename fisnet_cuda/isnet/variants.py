"""What is explained: the start of relevance at the logits, for the four variants and for a given target.

All on the device and without a host sync: nothing here looks at a value. Sections 3 of semantics.md; Faster ISNet, arXiv
2401.08409.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.head import eta_start
from ..reference.head import one_hot as one_hot

VARIANTS = ("original", "selective", "stochastic", "dual")
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
    if generator is not None and generator.device != like.device:
        raise ValueError(f"generator is on {generator.device} and the logits are on {like.device}: make it there")
    return torch.randint(low, high, like.shape, generator=generator, device=like.device)


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
