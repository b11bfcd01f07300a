"""`InputSpec`: how an image file becomes the network's input. Checkpoints carry it, so that a trained net reads new images just as
it read those that it learned from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError

__all__ = ["FITS", "InputSpec"]

FITS = ("squash", "pad", "crop")


@dataclass(frozen=True)
class InputSpec:
    """What the network's input is, and what its outputs are called.

    Attributes:
        size: height and width in pixels, after resizing.
        channels: 1 (grey) or 3 (RGB; grey images are repeated).
        classes: names of the classes, in the order of the logits.
        mean, std: per channel, of images in [0, 1]; ``x = (image - mean) / std``.
        fit: how other sizes are brought to ``size``: "squash" (the aspect ratio changes), "pad" (black bars, counted as
            background) or "crop" (the middle).
        window: intensities (low, high), in the file's own units, that become 0 and 1: for 16-bit, integer and float images. None:
            the full range of the file's integer dtype (of 16-bit files, the bits that hold values), and [0, 1] for floats.

    Example:
        >>> spec = InputSpec((64, 64), 1, ("normal", "TB"), mean=(0.5,), std=(0.25,))
        >>> spec.low, spec.high
        ((-2.0,), (2.0,))
    """

    size: tuple[int, int]
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    fit: str = "squash"
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "classes", "mean", "std", "window"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.channels not in (1, 3):
            raise InputError(f"channels must be 1 or 3, got {self.channels}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(f"size must be two numbers of pixels, height and width, got {self.size}")
        if self.fit not in FITS:
            raise InputError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                allowed = "1 number" if self.channels == 1 else f"1 or {self.channels} numbers"
                raise InputError(f"{name} must have {allowed}, got {len(getattr(self, name))}")
        if min(self.std) <= 0:
            raise InputError(f"std must be > 0, got {self.std}")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise InputError(f"window must be two numbers, low < high, got {self.window}")

    @property
    def low(self) -> tuple[float, ...]:
        """What black becomes: the lower bounds of the z^B rule, one a channel (or one for all)."""
        return tuple((0.0 - m) / s for m, s in zip(*self._both()))

    @property
    def high(self) -> tuple[float, ...]:
        """What white becomes: the upper bounds of the z^B rule."""
        return tuple((1.0 - m) / s for m, s in zip(*self._both()))

    def _both(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        width = max(len(self.mean), len(self.std))
        return self.mean * (width // len(self.mean)), self.std * (width // len(self.std))

    def normalise(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]``, uint8 or float in [0, 1] -> the network's input, float."""
        x = images if images.is_floating_point() else images.float() / 255
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        """The network's input -> images in [0, 1], for showing."""
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists, for a checkpoint or JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, spec: InputSpec | dict[str, Any]) -> InputSpec:
        """The spec itself, or the one that `to_dict` wrote."""
        return spec if isinstance(spec, InputSpec) else cls(**spec)
