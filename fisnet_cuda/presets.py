"""Settings of an ISNet and its loss that belong together, each with what speaks for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .rules import Epsilon

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """How an ISNet is trained.

    Attributes:
        name: what it is asked for by.
        why: one sentence.
        variant: of `fisnet_cuda.ISNet`.
        eps: LRP's epsilon; relative: whether it is relative to the scale of each layer's activations (semantics.md section 1);
            beside a relative one, z^B at the first layer and Dual's z+ keep 0.01.
        eta_eps: ``t`` of Selective's eta.
        P, d, w1, w2, c1, c2: of `fisnet_cuda.ISNetLoss`.
    """

    name: str
    why: str
    variant: str = "stochastic"
    eps: float = 1e-2
    relative: bool = False
    eta_eps: float = 1e-2
    P: float = 0.7
    d: float = 0.9
    w1: float = 1.0
    w2: float = 3.0
    c1: float = 1.0
    c2: float = 25.0

    @property
    def net(self) -> Mapping[str, Any]:
        """Arguments of `fisnet_cuda.ISNet`."""
        return MappingProxyType({"variant": self.variant, "eps": Epsilon(self.eps, relative=self.relative), "eta_eps": self.eta_eps})

    @property
    def loss(self) -> Mapping[str, Any]:
        """Arguments of `fisnet_cuda.ISNetLoss`."""
        return MappingProxyType({name: getattr(self, name) for name in ("P", "d", "w1", "w2", "c1", "c2")})

    @property
    def module(self) -> Mapping[str, Any]:
        """Arguments of `fisnet_cuda.train.ISNetModule`, and thus of ``fisnet-cuda fit --model.*``."""
        own = {"variant": self.variant, "eps": self.eps, "relative_eps": self.relative, "eta_eps": self.eta_eps}
        return MappingProxyType({**own, **self.loss})


PRESETS: Mapping[str, Preset] = MappingProxyType({
    "paper": Preset("paper", "The papers' and the authors' setting, and fit's default: epsilon 0.01 in units of a pre-activation."),
    "steady": Preset(
        "steady", "What held the background out on every net it was tried on, at the price of slower learning (docs/evidence.md): "
        "Contrast, a small epsilon relative to each layer's scale, three times the weight of the background loss.",
        variant="contrast", eps=1e-4, relative=True, w1=3.0,
    ),
})  # fmt: skip


def preset(name: str) -> Preset:
    """A preset by its name.

    Args:
        name: "paper" or "steady".

    Raises:
        ValueError: there is no such preset.

    Example:
        >>> import torch, fisnet_cuda as fc
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> steady = fc.preset("steady")
        >>> net, loss = fc.ISNet(model, **steady.net), fc.ISNetLoss(**steady.loss)
        >>> net(torch.rand(5, 1, 2, 2), relevance=True).heatmaps.shape
        torch.Size([5, 1, 1, 2, 2])
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(str(name), PRESETS, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"there is no preset {name!r}{meant}: {', '.join(PRESETS)}")
