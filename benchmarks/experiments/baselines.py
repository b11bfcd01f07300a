"""What the ISNets are compared with: six other ways to use masks of the foreground, written from their papers, and one of them
together with an ISNet.

``masked`` and ``segmented`` hide the background from the classifier, ``mixed`` gives it backgrounds of other images, and so do
``stochastic_mixed`` and ``contrast_mixed`` to an ISNet; ``rrr``, ``gradcam`` and ``hirescam`` add a loss on an explanation to the
cross entropy, weighted by `Setting.strength`. Only ``masked`` needs masks at test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisnet_cuda.data.backgrounds import paste

from .nets import supervised
from .systems import ISNetSystem, Setting, Stage, System, system
from .tasks import Images, Task

__all__ = [
    "RRR", "ContrastMixed", "GradCAM", "HiResCAM", "Masked", "Mixed", "Segmented", "StochasticMixed", "UNet", "background_part", "dice",
    "grad_cam", "input_gradient_penalty",
]  # fmt: skip

EPS = 1e-8  # of sums that are divided by; a Grad-CAM is of the order of a logit


# ---- systems that hide the background ----------------------------------------------------------------------------


@system("masked")
class Masked(System):
    """The classifier of images times their true masks, in training and at test: it cannot see the background.

    An upper bound rather than a competitor: it needs masks of the images that it is asked about. A soft mask dims a pixel.
    """

    def visible(self, images: Tensor, masks: Tensor) -> Tensor:
        return masks

    def prepare(self, images: Tensor, masks: Tensor) -> Tensor:
        return images * self.visible(images, masks)

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = F.cross_entropy(self.model(self.prepare(batch.images, batch.masks)), batch.labels)
        return loss, {"classification": loss.detach()}


class Swapping(System):
    """Gives each image of a batch, with probability ``setting.strength``, the background of another one, whose object is filled in
    (`fisnet_cuda.data.backgrounds.paste`), before the loss of the system that it is mixed into.

    Who swaps with whom hangs on the setting's seed and the step: systems of a seed see the same composites.
    """

    def __init__(self, setting: Setting, task: Task) -> None:
        super().__init__(setting, task)
        self.generator = torch.Generator().manual_seed(setting.seed)

    def swapped(self, batch: Images) -> Images:
        """The batch with some of its backgrounds swapped; masks and labels stay those of the objects."""
        n, device = len(batch), batch.images.device
        donors = torch.randperm(n, generator=self.generator)
        rows = (torch.rand(n, generator=self.generator) < self.setting.strength).nonzero()[:, 0]
        images = paste(batch.images, batch.masks, rows.to(device), donors[rows].to(device))
        return Images(images, batch.labels, batch.masks)

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        return super().loss(self.swapped(batch))


@system("mixed")
class Mixed(Swapping):
    """Backgrounds swapped at random in training: the plainest way to say with masks that the background tells nothing.

    The net sees whole images at test. As augmentation in Xiao et al. 2021 (arXiv 2006.09994, "mixed-rand") and Ryali et al. 2021 (arXiv
    2103.12719, "BG_Swaps"). The background swap of `measure` asks what this net was trained on: its gap is no independent witness here.
    """


class MixedISNet(Swapping, ISNetSystem):
    """An ISNet that learns from images some of which stand on another one's background, as `Mixed` does: both at once.

    The heatmap loss sees the masks of the pasted objects. As for `Mixed`, the swap gap is no independent witness.
    """

    def classifier_loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        return super().classifier_loss(self.swapped(batch))


@system("stochastic_mixed")
class StochasticMixed(MixedISNet):
    """A Stochastic ISNet with backgrounds swapped in training."""

    variant = "stochastic"


@system("contrast_mixed")
class ContrastMixed(MixedISNet):
    """A Contrast ISNet with backgrounds swapped in training."""

    variant = "contrast"


@system("segmented")
class Segmented(Masked):
    """A segmentation net, then a classifier of ``x * (sigmoid(unet(x)) > 1/2)``, in training and at test.

    First a `UNet` learns the training masks (binary cross entropy + soft Dice), then the classifier learns images that it has cut
    out; no gradient goes back, and the net is in eval mode. Each of the two gets the setting's whole number of steps (or seconds): its
    training costs both, and so does every inference. No mask is needed at test.

    Attributes:
        unet: the segmentation net.
    """

    def __init__(self, setting: Setting, task: Task) -> None:
        super().__init__(setting, task)
        device = task.train.images.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            self.unet = UNet(task.channels, task.size).to(device, memory_format=torch.channels_last)

    def modules(self) -> list[nn.Module]:
        return [self.model, self.unet]

    def stages(self) -> list[Stage]:
        return [Stage("segmentation", lambda: list(self.unet.parameters()), self.segmentation_loss), *super().stages()]

    def segmentation_loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Binary cross entropy + 1 - soft Dice (of each image, then the mean) of the U-Net."""
        logits = self.unet.train()(batch.images)
        entropy = F.binary_cross_entropy_with_logits(logits, batch.masks)
        overlap = dice(logits.sigmoid(), batch.masks).mean()
        return entropy + 1 - overlap, {"segmentation_entropy": entropy.detach(), "segmentation_dice": overlap.detach()}

    @torch.no_grad()
    def visible(self, images: Tensor, masks: Tensor) -> Tensor:
        # eval here, not by the caller: the loop puts all of a system in training mode, and BatchNorm's statistics would go on moving
        return (self.unet.eval()(images) > 0).to(images.dtype)

    def extra(self, task: Task) -> dict[str, float]:
        """``dice``: of the U-Net's masks on the first test set, mean over images, in percent."""
        images = next(iter(task.tests.values()))
        parts = (images[slice(i, i + 256)].floats() for i in range(0, len(images), 256))
        found = [dice(self.visible(part.images, part.masks), (part.masks >= 0.5).float()) for part in parts]
        return {"dice": 100 * torch.cat(found).mean().item()}


def dice(found: Tensor, masks: Tensor) -> Tensor:
    """Dice coefficient ``2 sum(p M) / (sum p + sum M)`` of each image.

    Args:
        found: ``[N, 1, H, W]`` in [0, 1]: a mask, or its probability.
        masks: ``[N, 1, H, W]`` in [0, 1].

    Returns:
        ``[N]`` in [0, 1]; 1 where both are empty.

    Example:
        >>> dice(torch.tensor([[[[1.0, 1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]]))
        tensor([0.6667])
    """
    both, sizes = (found * masks).sum((1, 2, 3)), found.sum((1, 2, 3)) + masks.sum((1, 2, 3))
    return (2 * both + EPS) / (sizes + EPS)


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): pooled until the map is about 12 pixels wide, and back up with skip connections.

    Two 3x3 conv-BN-ReLU a level (the paper's have no BatchNorm and shrink the map), width doubled by every 2x2 max pool, bilinear
    upsampling to the skip's size in place of transposed convolutions, so that any size goes through.

    Args:
        channels: of the images.
        size: their height and width: they set the depth (1 to 4 poolings; 2 at 56 pixels, 3 at 96).
        width: of the first level; by default 8 up to 128 pixels, else 16.

    Example:
        >>> UNet(1, (56, 56)).eval()(torch.rand(2, 1, 56, 56)).shape
        torch.Size([2, 1, 56, 56])
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int | None = None) -> None:
        super().__init__()
        depth = min(max(int(math.log2(max(min(size), 12) / 12)), 1), 4)
        width = width or (8 if max(size) <= 128 else 16)
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(self._level(c_in, c_out) for c_in, c_out in zip([channels, *widths], widths))
        self.up = nn.ModuleList(self._level(2 * w + w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _level(c_in: int, c_out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [nn.Conv2d(c, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the foreground ``[N, 1, H, W]`` of images ``[N, C, H, W]``."""
        skips = []
        for level, layers in enumerate(self.down):
            x = layers(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for layers in self.up:
            skip = skips.pop()
            x = layers(torch.cat([skip, F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)], 1))
        return self.head(x)


# ---- losses on explanations --------------------------------------------------------------------------------------


@system("rrr")
class RRR(System):
    """Right for the right reasons (Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717): small input gradients in the background.

    ``cross entropy + strength * input_gradient_penalty``; the paper's weight decay is left out, as for every system here. By double
    backward, about three times a plain step.
    """

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, penalty = input_gradient_penalty(self.model, batch.images, batch.masks)
        classification = F.cross_entropy(logits, batch.labels)
        loss = classification + self.setting.strength * penalty
        return loss, {"classification": classification.detach(), "attention": penalty.detach()}


def input_gradient_penalty(model: nn.Module, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers of RRR: ``mean_n sum_d ((1 - M_nd) d/dx_nd sum_c log p_nc)^2``, d over channels and pixels (equation 1 of arXiv
    1703.03717; its sum over samples is a mean here, as the cross entropy's is, so that the strength does not hang on the batch).

    The gradient is that of the sum over samples: in training mode BatchNorm's statistics let a sample's gradient hold a little of the
    others', as in any implementation by autograd.

    Args:
        model: ``[N, C, H, W] -> logits``.
        images: ``[N, C, H, W]``.
        masks: ``[N, 1, H, W]`` in [0, 1], 1 = foreground.

    Returns:
        Logits and the penalty (0-d, in squared log-probabilities per unit of image intensity); both can be differentiated.

    Example:
        >>> x, model = torch.zeros(1, 1, 1, 2), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
        >>> input_gradient_penalty(model, x, torch.ones(1, 1, 1, 2))[1].item()
        0.0
    """
    x = images.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(F.log_softmax(logits, 1).sum(), x, create_graph=True)
    return logits, ((1 - masks) * gradient).square().sum((1, 2, 3)).mean()


@system("gradcam")
class GradCAM(System):
    """Attention supervised by the mask: the share of the label's Grad-CAM that lies in the background is a loss.

    ``cross entropy + strength * mean_n background_part(grad_cam)``. The setting is that of GAIN's external supervision (Li et al. 2018,
    arXiv 1802.10171): Grad-CAM as part of training, differentiated through its weights, too. Deviates: GAIN's squared distance to the
    mask asks for attention all over the object; masks here only say what must not be looked at, so this loss has one side. The map
    is the last convolutional activation's: the last layer that the net's deep supervision looks at.
    """

    averaged = True

    def loss(self, batch: Images) -> tuple[Tensor, Mapping[str, Tensor]]:
        layer = self.model.get_submodule(supervised(self.setting.net)[-1])
        logits, cam = grad_cam(self.model, layer, batch.images, batch.labels, self.averaged)
        classification, attention = F.cross_entropy(logits, batch.labels), background_part(cam, batch.masks).mean()
        loss = classification + self.setting.strength * attention
        return loss, {"classification": classification.detach(), "attention": attention.detach()}


@system("hirescam")
class HiResCAM(GradCAM):
    """The same with HiResCAM (Draelos and Carin 2020, arXiv 2011.08891): every position keeps its own gradient.

    Before a linear layer that sees every position, gradients averaged over positions say little of the logit, and a net can make
    Grad-CAM's map look at the object while it decides by the background; here the map's sum is the logit's part, exactly.
    """

    averaged = False


def grad_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, labels: Tensor, averaged: bool = True
) -> tuple[Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2) of the labels' logits, to be trained through.

    ``relu(sum_k alpha_k A_k)``, ``alpha_k`` = mean over positions of ``d logit / d A_k``; A the layer's output.

    Args:
        model: ``[N, C, H, W] -> logits``. Nothing stays on it: the hook that hands out A is gone when this returns.
        layer: one of its modules, called once in a forward, with an output ``[N, K, h, w]``; nothing behind it may mix samples.
        images: ``[N, C, H, W]``.
        labels: ``[N]`` int64: whose logit is explained.
        averaged: False keeps ``d logit / d A_k`` of each position in alpha's place: HiResCAM.

    Returns:
        Logits and maps ``[N, 1, h, w]`` >= 0 in units of the logit; both can be differentiated.

    Raises:
        ValueError: the forward did not call the layer exactly once.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(20, 2))
        >>> grad_cam(model, model[1], torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]))[1].shape
        torch.Size([3, 1, 2, 2])
    """
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        logits = model(images)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ValueError(f"layer must be called once in a forward, and it was called {len(outputs)} times")
    (A,) = outputs
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), A, create_graph=True)
    alpha = gradient.mean((2, 3), keepdim=True) if averaged else gradient
    return logits, F.relu((alpha * A).sum(1, keepdim=True))


def background_part(cam: Tensor, masks: Tensor) -> Tensor:
    """Share of a map, upsampled to the image (bilinear), that lies outside the mask: ``sum cam (1 - M) / (sum cam + 1e-8)``.

    Masks keep their size and may be soft. Upsampling a coarse map and weighing it by the mask is weighing the coarse map by a soft,
    shrunken mask; a cell at the mask's edge can therefore not reach 0.

    Args:
        cam: ``[N, 1, h, w]`` >= 0.
        masks: ``[N, 1, H, W]`` in [0, 1].

    Returns:
        ``[N]`` in [0, 1]; 0, without gradient, for a map that is 0 everywhere.

    Example:
        >>> background_part(torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0]]]]))
        tensor([0.2500])
    """
    cam = F.interpolate(cam, masks.shape[2:], mode="bilinear", align_corners=False)
    return (cam * (1 - masks)).sum((1, 2, 3)) / (cam.sum((1, 2, 3)) + EPS)
