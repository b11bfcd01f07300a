"""Augmentation of images and masks together, a whole batch at a time on its own device, by kornia."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import kornia.augmentation as K
import torch
from kornia.augmentation.random_generator import PlainUniformGenerator
from kornia.constants import DataKey, Resample
from torch import Tensor, nn

from ..errors import InputError
from .backgrounds import swap_at_random
from .spec import InputSpec

__all__ = ["PRESETS", "Augmentation", "prepare"]

# option -> (largest value it may have, what it is)
OPTIONS = MappingProxyType({
    "flip": (1.0, "probability of a left-right flip"),
    "vertical_flip": (1.0, "probability of an upside-down flip"),
    "rotate": (180.0, "largest angle to either side, degrees"),
    "translate": (0.9, "largest shift in either direction, share of the size"),
    "scale": (0.9, "largest change of size, share of the size"),
    "brightness": (1.0, "largest change of brightness, share of white"),
    "contrast": (0.9, "largest change of contrast about mid-grey, share of it"),
    "noise": (1.0, "standard deviation of Gaussian noise, share of white; half of the images get some"),
    "blur": (8.0, "largest standard deviation of a Gaussian blur, pixels; half of the images get some"),
})  # fmt: skip

PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType({
    "none": {},
    "light": {"rotate": 5.0, "translate": 0.05, "scale": 0.05, "brightness": 0.1, "contrast": 0.1},
    "strong": {
        "rotate": 15.0, "translate": 0.1, "scale": 0.2, "brightness": 0.2, "contrast": 0.3, "noise": 0.03, "blur": 1.5,
    },
})  # fmt: skip


class Augmentation(nn.Module):
    """Random shifts, rotations, sizes, brightness, contrast, ... of images, with their masks moved along.

    Geometry is one bilinear warp for the image and the same one for its mask (rotation, shift and size are fused into one
    matrix). What comes in over the edges is black, and background in the mask. Masks that were 0 or 1 stay so: they are
    cut at 0.5 after the warp. Images stay in [0, 1]. No preset flips: left and right are not the same in most medical images.

    Args:
        preset: "none", "light" or "strong", or a mapping of options, which may name the preset it starts from:
            ``{"preset": "light", "flip": 0.5}``.
        soft_masks: masks have values between 0 and 1 that mean something: do not cut them.
        **options: over those of the preset: ``flip``, ``vertical_flip`` (probabilities), ``rotate`` (degrees), ``translate``,
            ``scale`` (share of the size), ``brightness``, ``contrast`` (share of white), ``noise`` (standard deviation, share of
            white), ``blur`` (standard deviation in pixels). 0 switches one off.

    Attributes:
        options: all options with their values.

    Raises:
        InputError: a preset or option of no such name, or a value out of range.

    Example:
        >>> augment = Augmentation("light", flip=0.5)
        >>> image, mask = torch.rand(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
        >>> image, mask = augment(image, mask, seed=1)
        >>> image.shape, mask.unique().tolist()
        (torch.Size([2, 3, 32, 32]), [0.0, 1.0])
    """

    def __init__(self, preset: str | Mapping[str, Any] = "light", *, soft_masks: bool = False, **options: float) -> None:
        super().__init__()
        self.options = _options(preset, options)
        self.soft_masks = soft_masks
        o = self.options
        geometry: list[nn.Module] = []
        look: list[nn.Module] = []
        if o["flip"]:
            geometry.append(K.RandomHorizontalFlip(p=o["flip"]))
        if o["vertical_flip"]:
            geometry.append(K.RandomVerticalFlip(p=o["vertical_flip"]))
        if o["rotate"] or o["translate"] or o["scale"]:
            geometry.append(
                K.RandomAffine(
                    degrees=o["rotate"],
                    translate=(o["translate"], o["translate"]) if o["translate"] else None,
                    scale=(1 - o["scale"], 1 + o["scale"]) if o["scale"] else None,
                    p=1.0,
                )
            )
        if o["blur"]:
            width = 2 * math.ceil(2 * o["blur"]) + 1
            # replicated borders: small images are no error, and no black comes in
            look.append(K.RandomGaussianBlur((width, width), (0.1, max(o["blur"], 0.1)), border_type="replicate", p=0.5))
        if o["brightness"] or o["contrast"]:
            look.append(_Intensity(o["brightness"], o["contrast"]))
        if o["noise"]:
            look.append(K.RandomGaussianNoise(0.0, o["noise"], p=0.5))
        self.geometry = K.AugmentationSequential(
            *geometry,
            data_keys=["input", "mask"],
            transformation_matrix_mode="skip",
            extra_args={DataKey.MASK: {"resample": Resample.BILINEAR, "align_corners": None}},
        )
        self.look = K.AugmentationSequential(*look, data_keys=["input"], transformation_matrix_mode="skip")
        self._warps = bool(o["rotate"] or o["translate"] or o["scale"])

    def __len__(self) -> int:
        """The number of steps; 0: nothing is changed."""
        return len(self.geometry) + len(self.look)

    @torch.no_grad()
    def forward(
        self, image: Tensor, mask: Tensor, seed: int | None = None, between: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            image: ``[B, C, H, W]`` in [0, 1], float; not yet normalised.
            mask: ``[B, 1, H, W]`` in [0, 1], float, on the same device.
            seed: what all draws hang on; torch's own generators are then left as they were. None: torch's CPU generator.
            between: changes the images ``(image, mask) -> image`` when they have been moved, and before brightness, contrast, blur
                and noise, which are then of the whole picture.

        Returns:
            ``(image, mask)``, float32 (autocast makes no difference), new tensors unless nothing is changed. The draws are made on
            the CPU: the same on every device.

        Raises:
            TypeError: integers, whose range would have to be guessed.
        """
        if not image.is_floating_point() or not mask.is_floating_point():
            raise TypeError(f"image and mask must be float in [0, 1], got {image.dtype} and {mask.dtype}")
        image, mask = image.float(), mask.float()
        if not len(image) or not (len(self) or between):
            return image, mask
        with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.autocast(image.device.type, enabled=False):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
            if len(self.geometry):
                image, mask = self.geometry(image, mask)
            if self._warps and not self.soft_masks:
                mask = (mask >= 0.5).float()
            if between is not None:
                image = between(image, mask.clamp(0, 1))
            if len(self.look):
                image = self.look(image)
        return image.clamp(0, 1), mask.clamp(0, 1)

    def extra_repr(self) -> str:
        """The options that are not 0."""
        return ", ".join(f"{key}={value:g}" for key, value in self.options.items() if value)


class _Intensity(K.IntensityAugmentationBase2D):
    """``(x - 1/2) contrast + 1/2 + brightness``, cut to [0, 1]: kornia's own brightness and contrast are five passes over memory
    more. Drawn for every image."""

    def __init__(self, brightness: float, contrast: float) -> None:
        super().__init__(p=1.0)
        self._param_generator = PlainUniformGenerator(
            (torch.tensor([-brightness, brightness]), "brightness", None, None),
            (torch.tensor([1 - contrast, 1 + contrast]), "contrast", None, None),
        )

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        contrast, brightness = (params[key].to(input).view(-1, 1, 1, 1) for key in ("contrast", "brightness"))
        return torch.addcmul(brightness + (1 - contrast) / 2, input, contrast).clamp_(0, 1)


def prepare(
    batch: Mapping[str, Any],
    spec: InputSpec,
    augmentation: Augmentation | None = None,
    seed: int | None = None,
    swap_background: float = 0.0,
) -> dict[str, Any]:
    """A batch of `MaskedImages` as the network takes it, on the device that it is on.

    Args:
        batch: ``image`` and ``mask`` are uint8.
        spec: the normalisation.
        augmentation: applied before that; None: none.
        seed: of the augmentation; None: torch's CPU generator.
        swap_background: probability with which an image gets the background of another one of the batch (see
            `fisnet_cuda.data.backgrounds.swap_at_random`), when both have been moved, and before brightness, contrast, blur and
            noise, which are of the whole picture. Its draws are its own: the augmentation's are the same with and without it.

    Returns:
        A new dict: ``image`` ``[B, C, H, W]`` normalised and ``mask`` ``[B, 1, H, W]`` in [0, 1], both float32, whatever autocast
        says; with ``swap_background``, bool ``swapped`` ``[B]``: which images have another background; the rest as it was. A batch
        that is prepared already comes back as it is.

    Example:
        >>> batch = {"image": torch.full((1, 1, 2, 2), 255).byte(), "mask": torch.full((1, 1, 2, 2), 255).byte()}
        >>> batch = prepare(batch, InputSpec((2, 2), 1, ("a", "b"), mean=(0.5,), std=(0.25,)))
        >>> batch["image"].unique().item(), batch["mask"].unique().item()
        (2.0, 1.0)
    """
    image, mask = batch["image"], batch["mask"]
    if image.is_floating_point():
        return dict(batch)
    image, mask = image.float().div_(255), mask.float().div_(255)
    swap = _Swap(swap_background, batch.get("has_mask"), seed) if swap_background else None
    if augmentation is not None or swap is not None:
        image, mask = (augmentation if augmentation is not None else Augmentation("none"))(image, mask, seed, swap)
    swapped = {} if swap is None else {"swapped": swap.swapped}
    return {**batch, "image": spec.normalise(image), "mask": mask, **swapped}


class _Swap:
    """Swaps backgrounds between the geometry and the look of an augmentation, and keeps which."""

    def __init__(self, P: float, has_mask: Tensor | None, seed: int | None) -> None:
        self.P, self.has_mask = P, has_mask
        # not the augmentation's seed: the same numbers would decide how far an image is turned and who gives it a background
        self.generator = None if seed is None else torch.Generator().manual_seed(seed ^ 0x5A)
        self.swapped = torch.zeros(0, dtype=torch.bool)

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        image, self.swapped = swap_at_random(image, mask, self.P, self.has_mask, self.generator)
        return image


def _options(preset: str | Mapping[str, Any], options: Mapping[str, float]) -> dict[str, float]:
    if isinstance(preset, Mapping):
        options = {**{key: value for key, value in preset.items() if key != "preset"}, **options}
        preset = preset.get("preset", "none")
    if preset not in PRESETS:
        raise InputError(f"augment must be one of {', '.join(PRESETS)}, or options, got {preset!r}")
    values = {**dict.fromkeys(OPTIONS, 0.0), **PRESETS[preset]}
    for key, value in options.items():
        if key not in OPTIONS:
            near = difflib.get_close_matches(key, OPTIONS, 1)
            raise InputError(
                f"augment has no option {key!r}{f', did you mean {near[0]!r}?' if near else ''}; there are {', '.join(OPTIONS)}"
            )
        most, meaning = OPTIONS[key]
        if isinstance(value, bool) and key not in ("flip", "vertical_flip"):
            raise InputError(f"augment option {key} must be a number ({meaning}), got {value}")
        if value is True:  # "flip: true" means what people mean by it
            value = 0.5
        if not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise InputError(f"augment option {key} must be a number from 0 to {most:g} ({meaning}), got {value!r}")
        values[key] = float(value)
    return values
