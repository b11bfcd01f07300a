"""Whole training steps of small networks: what the tests on a GPU compare."""

from __future__ import annotations

from collections.abc import Iterable

import golden_nets
import torch
from torch import Tensor, nn

import fisnet_cuda as fc
from benchmarks import models
from fisnet_cuda import nets

VARIANTS = ("selective", "stochastic", "contrast", "dual", "original")
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# small nets of every kind of graph, and torchvision's ResNet-18; where there is dropout, it draws the same every time
SMALL = golden_nets.NAMES
NETS = (*SMALL, "resnet18", "densenet", "vgg_bn")


def build(name: str, classes: int = 4) -> nn.Module:
    """A network in train mode whose logits lie well apart, so that no precision changes which class is explained."""
    torch.manual_seed(0)
    if name in SMALL:
        model = golden_nets.build(name)
    elif name == "densenet":
        model = nets.DenseNet(16, (2, 3, 2), 32, classes)
    elif name == "vgg_bn":
        model = nets.VGG((16, 16, "M", 32, 32, "M", 64, "M"), classes)
    else:
        model = models.build(name, classes)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight *= 0.5
        head.bias.copy_(0.7 * torch.arange(head.out_features, dtype=head.bias.dtype))
    return model.train()


class Step:
    """Forward with relevance, loss and backward of one network; ``step()`` fills `seen` and the parameters' gradients.

    Args:
        name: of the network.
        variant: of ISNet.
        device: "cpu" or "cuda".
        precision: a key of `PRECISIONS`; bf16 and fp16 are autocast.
        backend: "auto" for the kernels, or "reference".
        layout: memory format of images and weights.
        optimizer: also clip the gradients and let it step: "sgd" or "adam".
        seed: of the images.
    """

    def __init__(
        self, name: str, variant: str, device: str, precision: str = "float32", backend: str = "auto",
        layout: torch.memory_format = torch.channels_last, optimizer: str = "", seed: int = 3,
    ) -> None:  # fmt: skip
        self.device, self.autocast = device, precision in ("bf16", "fp16")
        self.dtype = PRECISIONS[precision]
        wide = torch.float64 if precision == "float64" else torch.float32
        self.model = build(name).to(device, wide).to(memory_format=layout)
        self.generator = torch.Generator(device).manual_seed(0)
        self.net = fc.ISNet(self.model, variant, backend=backend, generator=self.generator)
        self.loss = fc.ISNetLoss(backend=backend)
        self.parameters = list(self.model.parameters())
        self.optimizer = None
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=1e-2, momentum=0.9)
        elif optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, capturable=device == "cuda")
        size = 64 if name in NETS[len(SMALL) :] else 32 if name in ("resnet18s", "densenets") else 16
        size = 32 if name == "vgg_bn" else size
        g = torch.Generator().manual_seed(seed)
        batch = 3
        classes = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1].out_features
        self.x = torch.rand(batch, 3, size, size, generator=g).to(device, wide).contiguous(memory_format=layout)
        self.labels = (torch.arange(batch) % classes).to(device)
        masks = torch.zeros(batch, 1, size, size)
        masks[..., size // 4 : -size // 4, size // 4 : -size // 4] = 1
        self.masks = masks.to(device, wide)
        self.seen: dict[str, Tensor] = {}

    def __call__(self) -> None:
        for p in self.parameters:
            p.grad = None
        torch.manual_seed(7) if not self._capturing() else None
        with torch.autocast(self.device, self.dtype, enabled=self.autocast):
            out = self.net(self.x, relevance=True)
            total, parts = self.loss(out, self.labels, self.masks)
        total.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        self.seen = {
            "logits": out.logits.detach(), "heatmaps": out.heatmaps.detach(), "explained": out.explained.detach(),
            "total": total.detach(), "background": parts.background.detach(),
        }  # fmt: skip

    def _capturing(self) -> bool:
        return self.device == "cuda" and torch.cuda.is_current_stream_capturing()

    def gradients(self) -> Tensor:
        """All gradients as one vector."""
        return flat(p.grad for p in self.parameters)

    def weights(self) -> Tensor:
        """All parameters as one vector."""
        return flat(p.detach() for p in self.parameters)

    def results(self) -> dict[str, Tensor]:
        """Everything that a step computed."""
        return {**self.seen, "gradients": self.gradients()}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all entries."""
    return torch.cat([t.flatten() for t in tensors])


def distance(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
