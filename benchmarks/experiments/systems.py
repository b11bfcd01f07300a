"""What is compared: ways to train a classifier when masks of the foreground are there for training.

A system is a net with a loss. All systems of an experiment share the net, its initial weights, the batches, the optimizer, the
schedule and the number of steps; what differs is what the loss does with the masks. A system is added by adding a file that says
``@system("name")`` over a builder, and importing it in the package's ``__init__.py``: then it is there in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisnet_cuda as fc

from .nets import build_net, supervised
from .tasks import Images, Task

__all__ = ["ISNETS", "SYSTEMS", "ISNetSystem", "Setting", "Stage", "System", "build", "system"]

ISNETS = ("original", "selective", "stochastic", "dual", "contrast")


@dataclass(frozen=True)
class Setting:
    """Everything that one training hangs on, beside the task: a row of a result file starts with these.

    Attributes:
        system: what is trained, a name of `SYSTEMS`.
        net: of `benchmarks.experiments.nets`.
        seed: of the weights, the batches and every draw.
        steps: of the optimizer; 0: as many as ``seconds`` allow.
        seconds: of training time, where ``steps`` is 0 (comparisons at equal wall time).
        batch, lr, momentum: of SGD; the rate falls to 0 along half a cosine. Gradients are clipped at norm 1.
        deep: ISNets: deep supervision by the net's own list of layers.
        eps, relative: ISNets: LRP's epsilon, and whether it is relative to each layer's scale.
        eta_eps, select: Selective's.
        P, d, w1, w2, c1, c2: ISNets: the heatmap loss (`fisnet_cuda.ISNetLoss`).
        tune: ISNets: so many of the steps train the classifier alone, then C1 and C2 are set from its heatmaps.
        strength: baselines: weight of their attention loss beside the cross entropy; where backgrounds are swapped: the probability.
    """

    system: str
    net: str = "convnet"
    seed: int = 0
    steps: int = 1500
    seconds: float = 0.0
    batch: int = 64
    lr: float = 0.04
    momentum: float = 0.9
    deep: bool = False
    eps: float = 1e-4
    relative: bool = True
    eta_eps: float = 1e-2
    select: str = "lowest"
    P: float = 0.7
    d: float = 0.9
    w1: float = 1.0
    w2: float = 3.0
    c1: float = 1.0
    c2: float = 25.0
    tune: int = 0
    strength: float = 1.0

    @property
    def epsilon(self) -> fc.rules.Epsilon:
        """LRP's epsilon rule."""
        return fc.rules.Epsilon(self.eps, relative=self.relative)

    @property
    def title(self) -> str:
        """What a table calls the system."""
        return TITLES.get(self.system, self.system) + (" + deep supervision" if self.deep else "")

    @classmethod
    def names(cls) -> list[str]:
        """The columns that name a row."""
        return [f.name for f in fields(cls)]


TITLES = {
    "standard": "standard", "original": "Original ISNet", "selective": "Selective ISNet", "stochastic": "Stochastic ISNet",
    "dual": "Dual ISNet", "contrast": "Contrast ISNet (ours)", "masked": "input masked by the true mask",
    "segmented": "segmentation net, then classifier", "rrr": "RRR (input gradients)", "gradcam": "Grad-CAM attention loss",
    "hirescam": "HiResCAM attention loss",
    "mixed": "backgrounds swapped in training", "stochastic_mixed": "Stochastic ISNet + backgrounds swapped",
    "contrast_mixed": "Contrast ISNet (ours) + backgrounds swapped",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part of a training, ended before the next one begins.

    Attributes:
        name: what progress calls it.
        parameters: what it trains.
        loss: a batch -> (what is minimised, numbers worth a look; 0-d).
        share: of the setting's steps (or seconds) that it gets.
    """

    name: str
    parameters: Callable[[], list[nn.Parameter]]
    loss: Callable[[Images], tuple[Tensor, Mapping[str, Tensor]]]
    share: float = 1.0


class System:
    """The standard classifier, and what every other system has in common with it.

    Attributes:
        setting: how it is trained.
        model: the classifier ``[N, C, H, W] -> logits``.
    """

    def __init__(self, setting: Setting, task: Task) -> None:
        self.setting = setting
        device = task.train.images.device
        self.model = build_net(setting.net, task.classes, task.channels, task.size, setting.seed).to(device)

    def stages(self) -> list[Stage]:
        """What is trained, in order."""
        return [Stage("classifier", lambda: list(self.model.parameters()), self.loss)]

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch in training mode."""
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        return loss, {"classification": loss.detach()}

    def prepare(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the classifier is shown of images ``[N, C, H, W]``; a system that hides the background does it here."""
        return images

    def visible(self, images: Tensor, masks: Tensor) -> Tensor:
        """``[N, 1, H, W]``: what the pixels are multiplied by before the classifier sees them, 0 = hidden."""
        return torch.ones_like(masks)

    def extra(self, task: Task) -> dict[str, float]:
        """Numbers that only this system has, for `benchmarks.experiments.measure.measure`."""
        return {}

    @torch.no_grad()
    def logits(self, images: Tensor, masks: Tensor) -> Tensor:
        """Logits in eval mode, in parts."""
        self.eval()
        return torch.cat([self.model(self.prepare(x, m)) for x, m in zip(images.split(256), masks.split(256))])

    def modules(self) -> list[nn.Module]:
        """All nets, for modes."""
        return [self.model]

    def train(self) -> None:
        for module in self.modules():
            module.train()

    def eval(self) -> None:
        for module in self.modules():
            module.eval()


class ISNetSystem(System):
    """One of the ISNets.

    Attributes:
        variant: which one; None: the system's name says it.
    """

    variant: str | None = None

    def __init__(self, setting: Setting, task: Task) -> None:
        super().__init__(setting, task)
        s, device = setting, task.train.images.device
        self.net = fc.ISNet(
            self.model, self.variant or s.system, eps=s.epsilon, eta_eps=s.eta_eps, select=s.select, check="never",
            supervise=supervised(s.net) if s.deep else (), generator=torch.Generator(device).manual_seed(s.seed),
        )  # fmt: skip
        self.heatmap_loss = fc.ISNetLoss(P=s.P, d=s.d, w1=s.w1, w2=s.w2, c1=s.c1, c2=s.c2)
        self._task = task

    def stages(self) -> list[Stage]:
        whole = Stage("ISNet", lambda: list(self.model.parameters()), self.loss)
        if not self.setting.tune:
            return [whole]
        share = self.setting.tune / max(self.setting.steps, 1)
        return [
            Stage("classifier alone", whole.parameters, self.classifier_loss, share),
            Stage("ISNet", self._tuned_parameters, self.loss, 1 - share),
        ]

    def classifier_loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the steps before C1 and C2 are tuned."""
        return System.loss(self, batch)

    def _tuned_parameters(self) -> list[nn.Parameter]:
        """Sets C1 and C2 from the maps of the classifier so far; called when its stage begins."""
        s = self.setting
        some = self._task.train[slice(0, 8 * s.batch)].floats().images
        c1, c2 = fc.tune_c1_c2(self.net, some.split(s.batch))
        self.heatmap_loss = fc.ISNetLoss(P=s.P, d=s.d, w1=s.w1, w2=s.w2, c1=c1, c2=c2)
        return list(self.model.parameters())

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        out = self.net(batch.images, relevance=True)
        loss, parts = self.heatmap_loss(out, batch.labels, batch.masks)
        named = ("classification", "heatmap", "background", "foreground", "background_share")
        return loss, {name: getattr(parts, name) for name in named}


Builder = Callable[[Setting, Task], System]
SYSTEMS: dict[str, Builder] = {"standard": System, **dict.fromkeys(ISNETS, ISNetSystem)}


def system(name: str) -> Callable[[Builder], Builder]:
    """Registers a baseline under the name that settings use."""

    def add(builder: Builder) -> Builder:
        SYSTEMS[name] = builder
        return builder

    return add


def build(setting: Setting, task: Task) -> System:
    """The untrained system of a setting.

    Raises:
        ValueError: there is no such system.
    """
    if setting.system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {setting.system!r}")
    return SYSTEMS[setting.system](setting, task)


def as_row(setting: Setting) -> dict[str, Any]:
    """The setting as columns of a result file."""
    return {name: getattr(setting, name) for name in Setting.names()}
