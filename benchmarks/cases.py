"""What is timed: one training step of one network, plain or as an ISNet. Imports no more than such a step needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisnet_cuda as fc
from benchmarks.models import build

PLAIN = "plain"
VARIANTS = ("selective", "stochastic", "contrast", "dual", "original")
DOUBLE_BACKWARD = "double_backward"
CASES = (PLAIN, *VARIANTS, DOUBLE_BACKWARD)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """The network and its input.

    Args:
        model: a name of `benchmarks.models`.
        classes, batch, size: outputs of the network; images ``[batch, 3, size, size]``.
        layout: "channels_last" or "contiguous".
        device: "cpu" or "cuda".
        precision: "fp32"; "tf32" (CUDA); or "bf16" or "fp16", which are autocast (without a
            loss scaler, which would look at the gradients and stop the GPU).
    """

    model: str
    classes: int = 10
    batch: int = 4
    size: int = 112
    layout: str = "channels_last"
    device: str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.layout not in ("channels_last", "contiguous"):
            raise ValueError(f"layout must be channels_last or contiguous, got {self.layout!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout, as PyTorch names it."""
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The context of the forward and the loss."""
        return torch.autocast(self.device, AUTOCAST.get(self.precision, torch.bfloat16), enabled=self.precision in AUTOCAST)

    def network(self) -> nn.Module:
        """The network, the same weights every time."""
        torch.manual_seed(0)
        return build(self.model, self.classes).to(self.device).to(memory_format=self.memory_format)

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(images [N, 3, H, W] in [0, 1], labels [N], masks [N, 1, H, W])``, the same every time."""
        g = torch.Generator().manual_seed(1)
        images = torch.rand(self.batch, 3, self.size, self.size, generator=g)
        labels = torch.randint(self.classes, (self.batch,), generator=g)
        masks = torch.zeros(self.batch, 1, self.size, self.size)
        edge = self.size // 4
        masks[..., edge:-edge, edge:-edge] = 1
        images = images.to(self.device).contiguous(memory_format=self.memory_format)
        return images, labels.to(self.device), masks.to(self.device)

    def as_row(self) -> dict[str, Any]:
        """The fields for a row of results, which has a name of the device of its own."""
        return {key: value for key, value in asdict(self).items() if key != "device"}


def explainer(case: str, model: nn.Module, **options: Any) -> nn.Module:
    """The module of a case that makes heatmaps: an `fisnet_cuda.ISNet`, or the double-backward baseline.

    Args:
        case: a variant of ISNet, or "double_backward", which changes ``model`` in place.
        model: the classifier.
        **options: further arguments of the module.
    """
    if case == DOUBLE_BACKWARD:
        from benchmarks.double_backward import DoubleBackward

        return DoubleBackward(model, **options)
    device = next(model.parameters()).device
    return fc.ISNet(model, variant=case, generator=torch.Generator(device).manual_seed(0), **options)


class TrainingStep:
    """One training step: forward, loss, backward; then clipping at norm 1 and SGD with momentum 0.9.

    Args:
        case: "plain" (cross entropy), a variant of ISNet, or "double_backward".
        setup: the network and its input.
        compiled: run forward, relevance and backward through ``torch.compile``.
        update: False stops after the backward. Importing ``torch.optim`` takes about 75 MiB, the same for every
            case, which would make ratios of memory look better than they are.
        backend: of the variants and the loss: "auto", "reference" or "cuda".
        model: train this one, which other steps may share, instead of a fresh one; not for "double_backward".
    """

    def __init__(
        self, case: str, setup: Setup, compiled: bool = False, update: bool = True, backend: str = "auto",
        model: nn.Module | None = None,
    ) -> None:  # fmt: skip
        if case not in CASES:
            raise ValueError(f"case must be one of {', '.join(CASES)}, got {case!r}")
        self.case, self.setup = case, setup
        model = setup.network() if model is None else model
        options = {"backend": backend} if case in VARIANTS else {}
        self.explainer = model if case == PLAIN else explainer(case, model, **options)
        self.net = torch.compile(self.explainer) if compiled else self.explainer
        self.loss = fc.ISNetLoss(backend=backend)
        self.parameters = list(model.parameters())
        # so small a step that thousands of them leave the weights, and with them the work, as they are
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-5, momentum=0.9) if update else None
        self.images, self.labels, self.masks = setup.data()

    def __call__(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with self.setup.autocast():
            if self.case == PLAIN:
                total = F.cross_entropy(self.net(self.images), self.labels)
            else:
                total, _ = self.loss(self.net(self.images, relevance=True), self.labels, self.masks)
        total.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
