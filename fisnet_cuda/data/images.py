"""Files and array entries to pixels: `read_image`, `read_mask`, and `read_sample` for both with what the report tells of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..isnet.loss import _mask_counts
from ._arrays import NONZERO, close_files, read_item
from ._paths import missing, shown
from .samples import ArrayItem, Sample
from .spec import InputSpec

__all__ = [
    "MASK_KINDS",
    "Facts",
    "MaskRead",
    "Pixels",
    "SampleRead",
    "close_files",
    "read_image",
    "read_mask",
    "read_pixels",
    "read_sample",
]

MASK_KINDS = {
    "binary": "two values; the higher is foreground",
    "anti-aliased": "black and white with grey edges",
    "soft": "grey levels",
    "labels": "small whole numbers, such as 0, 1, 2: all but 0 are foreground",
    "palette": "colours of a palette: all but black (or the first) are foreground",
    "colour": "colours: all but black are foreground",
    "alpha": "one colour on a transparent background: what is opaque is foreground",
    "nonzero": "made of the image: pixels above 0 are foreground",
    "values": "chosen values are foreground",
}
_BITS = (8, 10, 12, 14, 16, 24, 32, 64)
_MOST_LABEL = 63  # whole numbers up to here are labels, not grey levels
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as PIL


class Pixels(NamedTuple):
    """An image as it was stored.

    Attributes:
        values: [H, W], or [H, W, 3]; the file's own dtype (bool for 1-bit files). Upright (EXIF), without alpha.
        mode: what it was, for people: PIL's name of the mode, or the dtype of an array.
        alpha: uint8 [H, W] where there is some and it is not all opaque.
        palette: uint8 [n, 3] where ``values`` are its indices (masks only).
    """

    values: np.ndarray
    mode: str
    alpha: np.ndarray | None = None
    palette: np.ndarray | None = None


class MaskRead(NamedTuple):
    """A mask as the network's loss wants it.

    Attributes:
        mask: uint8 [1, H, W], 255 = foreground; values between only where soft masks were asked for.
        kind: one of `MASK_KINDS`.
        state: "ok"; "empty", "full" or "inverted" as `fisnet_cuda.check_masks` counts them, in the file's own resolution; or "lost":
            nothing of the foreground is left at the network's resolution.
        size: height and width in the file.
    """

    mask: Tensor
    kind: str
    state: str
    size: tuple[int, int]


class Facts(NamedTuple):
    """What the report tells of one sample; plain numbers and texts, so that a cache can keep them.

    Attributes:
        sha256: of the decoded image, before resizing: equal for equal pictures in different files. Grey images that are stored in
            colours count as grey.
        height, width: of the image's file.
        mode: see `Pixels`.
        mask_kind, mask_state: see `MaskRead`; None without a mask.
        share: mean of the mask at the network's resolution, in [0, 1]: the foreground's share of the area; None without a mask.
        mask_size: "same" as the image's, "scaled" (other size, same shape within 2 %), "other" (other shape: stretched to fit).
    """

    sha256: str
    height: int
    width: int
    mode: str
    mask_kind: str | None = None
    mask_state: str | None = None
    share: float | None = None
    mask_size: str | None = None


class SampleRead(NamedTuple):
    """Image uint8 [C, H, W], mask uint8 [1, H, W] or None, and facts for the report."""

    image: Tensor
    mask: Tensor | None
    facts: Facts


# ----------------------------------------------------------------------------------------------------------------------
# What people call


def read_image(ref: str | Path | ArrayItem, spec: InputSpec) -> Tensor:
    """An image at the network's resolution, resized bilinearly with anti-aliasing.

    Args:
        ref: an image file (any kind that PIL reads, or .npy), or an entry of an array.
        spec: size, channels, fit and window; mean and std are not applied.

    Returns:
        uint8 [C, H, W].

    Raises:
        InputError: it cannot be read, or its values need a ``window``; names the file.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(file, np.full((6, 4), 1000, np.int16))
        >>> read_image(file, InputSpec((3, 3), 1, ("a", "b"), window=(0, 2000))).unique()
        tensor([128], dtype=torch.uint8)
    """
    pixels = read_pixels(ref)
    return _image(pixels, spec, _name(ref))


def read_mask(
    ref: str | Path | ArrayItem,
    spec: InputSpec,
    *,
    threshold: float | None = 0.5,
    soft: bool = False,
    invert: bool = False,
    foreground: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> MaskRead:
    """A mask at the network's resolution, resized exactly as `read_image` resizes its image, and cut at ``threshold`` after that.

    What the values mean follows from the file (`MASK_KINDS`): two values are background and foreground whatever they are (0 and 1, 0
    and 255); grey levels count as shares of the full range; of palettes, colours and small labels all but black or 0 is foreground.

    Args:
        ref: an image file, or an entry of an array.
        spec: size and fit.
        threshold: in (0, 1]; a pixel is foreground where the (weighted) mean over its area is at least this. None: 0.5.
        soft: keep the shares, as values between 0 and 255, instead.
        invert: the file's foreground is the background.
        foreground: which label values or palette indices are foreground.
        image_size: height and width of the image's file, where the mask may have another size: it is stretched to it. None: the
            mask's own.

    Returns:
        The mask and what was found out about it.

    Raises:
        InputError: it cannot be read, or its values have no meaning as a mask; names the file.
    """
    threshold = 0.5 if threshold is None else threshold
    if not 0 < threshold <= 1:
        raise InputError(f"the threshold of masks must lie in (0, 1], got {threshold}")
    name = _name(ref)
    if isinstance(ref, ArrayItem) and ref.key.endswith(NONZERO):
        share, kind = _nonzero(read_pixels(ref)), "nonzero"
    else:
        share, kind = _share(read_pixels(ref, mask=True), foreground, name)
    if invert:
        share = 1 - share
    size = share.shape
    fitted = _fit(share, spec, image_size or size)
    if soft:
        mask = np.rint(fitted * 255).astype(np.uint8)
    else:
        mask = (fitted >= threshold - 1e-6).astype(np.uint8) * 255
    state = _state(share > 0 if soft else share >= threshold)
    if state in ("ok", "full", "inverted") and not mask.any():
        state = "lost"
    return MaskRead(torch.from_numpy(mask)[None], kind, state, size)


def read_sample(sample: Sample, spec: InputSpec, **mask_options: Any) -> SampleRead:
    """Image and mask of a sample, each decoded once, and the facts that a `DataReport` is made of.

    Args:
        sample: what to read.
        spec: see `read_image`.
        **mask_options: threshold, soft, invert, foreground of `read_mask`.

    Raises:
        InputError: as `read_image` and `read_mask`.
    """
    pixels = read_pixels(sample.image)
    height, width = pixels.values.shape[:2]
    image = _image(pixels, spec, _name(sample.image))
    facts = Facts(_sha256(pixels.values), height, width, pixels.mode)
    if sample.mask is None:
        return SampleRead(image, None, facts)
    read = read_mask(sample.mask, spec, image_size=(height, width), **mask_options)
    if read.size == (height, width):
        size = "same"
    else:
        size = "scaled" if abs(read.size[0] * width / (read.size[1] * height) - 1) < 0.02 else "other"
    share = read.mask.float().mean().item() / 255
    return SampleRead(image, read.mask, facts._replace(mask_kind=read.kind, mask_state=read.state, share=share, mask_size=size))


def read_pixels(ref: str | Path | ArrayItem, mask: bool = False) -> Pixels:
    """An image as it was stored, before anything is done to it; of files with several frames or pages, the first.

    Args:
        ref: an image file, or an entry of an array.
        mask: leave palette images as indices.

    Raises:
        InputError: it cannot be read; names the file.
    """
    if isinstance(ref, ArrayItem):
        ref = ref._replace(key=ref.key.removesuffix(NONZERO))
        if ref.key or ref.index >= 0:
            values = read_item(ref)
            return _layout(values, _name(ref))
        ref = ref.file  # a mask made of an image file
    path = Path(ref)
    try:
        if path.suffix.lower() == ".npy":
            return _layout(np.load(path, allow_pickle=False), shown(path))
        return _decode(path, mask)
    except InputError:
        raise
    except FileNotFoundError:
        raise missing(path, "image") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly everything: OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, IsADirectoryError):
            raise InputError(f"{shown(path)} is a folder, and an image is needed") from None
        raise InputError(f"cannot read the image {shown(path)}: {_reason(path, error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


def _decode(path: Path, mask: bool) -> Pixels:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError("reading images needs Pillow: pip install 'fisnet_cuda[train]'") from None
    with Image.open(path) as file:
        mode = file.mode
        frames = getattr(file, "n_frames", 1) if file.format != "MPO" else 1  # MPO: a JPEG with a preview
        file.load()
        upright = ImageOps.exif_transpose(file)
        label = mode if frames == 1 else f"{mode}, first of {frames} frames"
        alpha = palette = None
        if "transparency" in upright.info or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            alpha = np.array(upright.convert("RGBA").getchannel("A"))
            alpha = None if (alpha == 255).all() else alpha
        if mode == "1":
            values = np.array(upright.convert("L")) > 0
        elif mode == "P":
            colours = np.array(upright.getpalette("RGB") or [0, 0, 0], np.uint8).reshape(-1, 3)
            indices = np.array(upright)
            if indices.max(initial=0) >= len(colours):  # indices beyond the palette: PIL shows them black
                colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
            grey = (colours[:, :1] == colours).all()
            values = indices if mask and not grey else colours[indices]
            palette = colours if mask and not grey else None
            values = values[..., 0] if grey else values
        elif mode in ("LA", "La"):
            values = np.array(upright.convert("RGBA").getchannel("R"))
        elif mode == "L" or mode.startswith("I") or mode == "F":
            values = np.array(upright)
            values = values.astype(values.dtype.newbyteorder("="))
        else:
            values = np.array(upright.convert("RGBA").convert("RGB") if mode in ("PA", "RGBa") else upright.convert("RGB"))
    return Pixels(values, label, alpha, palette)


def _reason(path: Path, error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "the file is empty"
        return "it is no image of a known kind, or its beginning is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than PIL reads ({2 * Image.MAX_IMAGE_PIXELS:,}); make a smaller one"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return shown(text)


def _layout(values: np.ndarray, name: str) -> Pixels:
    """Channels last; a lone channel is dropped, and so is the fourth."""
    mode = str(values.dtype)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {values.dtype}, and images are numbers")
    if 0 in values.shape:
        raise InputError(f"{name} has the shape {list(values.shape)}: there is no pixel in it")
    whole = list(values.shape)
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] in (1, 3, 4):
        mode += f" x {values.shape[2]}" if values.shape[2] > 1 else ""
        values = values[..., 0] if values.shape[2] == 1 else values[..., :3]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] == 3):
        raise InputError(f"{name} has the shape {whole}: an image [H, W] with 1, 3 or 4 channels, first or last, is needed")
    return Pixels(values.astype(np.float32) if values.dtype == np.float16 else values, mode)


def _sha256(values: np.ndarray) -> str:
    if values.ndim == 3 and (values[..., :1] == values).all():
        values = values[..., 0]
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    digest = hashlib.sha256(f"{'f' if values.dtype.kind == 'f' else 'u'} {values.shape} ".encode())
    if values.dtype.kind in "iu":  # the same numbers in a wider type are the same image
        values = values.astype("<i8" if values.max() > 255 or values.min() < 0 else "u1")
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Images


def _image(pixels: Pixels, spec: InputSpec, name: str) -> Tensor:
    values = _eight_bits(pixels.values, spec.window, name)
    if spec.channels == 1 and values.ndim == 3:
        if (values[..., :1] == values).all():
            values = values[..., 0]
        else:
            luma = values.astype(np.float32) @ _LUMA
            values = np.rint(luma).astype(np.uint8) if values.dtype == np.uint8 else luma
    fitted = _fit(values, spec, values.shape[:2])
    if fitted.dtype != np.uint8:
        fitted = np.rint(fitted.clip(0, 1) * 255).astype(np.uint8)
    image = torch.from_numpy(fitted)
    if image.dim() == 2:
        return image[None].repeat(spec.channels, 1, 1)
    return image.permute(2, 0, 1).contiguous()


def _eight_bits(values: np.ndarray, window: tuple[float, float] | None, name: str) -> np.ndarray:
    """uint8 as it is, anything else float32 in [0, 1], by the window or by what the type can hold."""
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise InputError(f"{name} holds NaN: replace these values first")
    if window is not None:
        low, high = window
        return ((values.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)
    if values.dtype == np.uint8:
        return values
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if low < -1e-6 or high > 1 + 1e-6:
            raise InputError(
                f"{name} holds floats from {low:.4g} to {high:.4g}: say which are black and white, window=[{low:.4g}, {high:.4g}]"
            )
        return values.clip(0, 1).astype(np.float32)
    if low < 0:
        raise InputError(f"{name} holds values from {low} to {high}: say which are black and white, window=[low, high]")
    return (values / float(2 ** _bits(high) - 1)).astype(np.float32)


def _bits(highest: int) -> int:
    """Of 16-bit files and wider ones, the bits that hold values: detectors have 10, 12 or 14."""
    return next(bits for bits in _BITS if highest < 2**bits)


def _fit(values: np.ndarray, spec: InputSpec, size: tuple[int, int]) -> np.ndarray:
    """Resize [h, w(, 3)] (uint8, or float32) as an image of ``size`` fits into the network's input."""
    H, W = spec.size
    h, w = values.shape[:2]
    if (h, w) == (H, W) and tuple(size) == (H, W):
        return values
    region = (0.0, 0.0, float(w), float(h))
    inner = (H, W)
    if spec.fit == "pad":
        scale = min(H / size[0], W / size[1])
        inner = (min(H, max(1, round(size[0] * scale))), min(W, max(1, round(size[1] * scale))))
    elif spec.fit == "crop":
        scale = max(H / size[0], W / size[1])
        kept_h, kept_w = h * min(1.0, H / (size[0] * scale)), w * min(1.0, W / (size[1] * scale))
        region = ((w - kept_w) / 2, (h - kept_h) / 2, (w + kept_w) / 2, (h + kept_h) / 2)
    resized = _resize(values, inner, region)
    if inner == (H, W):
        return resized
    top, left = (H - inner[0]) // 2, (W - inner[1]) // 2
    whole = np.zeros((H, W, *values.shape[2:]), resized.dtype)
    whole[top : top + inner[0], left : left + inner[1]] = resized
    return whole


def _resize(values: np.ndarray, size: tuple[int, int], region: tuple[float, float, float, float]) -> np.ndarray:
    from PIL import Image

    if values.dtype != np.uint8 and values.ndim == 3:
        return np.stack([_resize(np.ascontiguousarray(values[..., i]), size, region) for i in range(values.shape[2])], 2)
    if (*size, 0.0, 0.0) == (*values.shape[:2], *region[:2]) and region[2:] == (values.shape[1], values.shape[0]):
        return values
    image = Image.fromarray(values if values.dtype == np.uint8 else values.astype(np.float32))
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=region))


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def _nonzero(pixels: Pixels) -> np.ndarray:
    values = pixels.values > 0
    return (values.any(2) if values.ndim == 3 else values).astype(np.float32)


def _share(pixels: Pixels, foreground: Sequence[int] | None, name: str) -> tuple[np.ndarray, str]:
    """How much of each pixel is foreground, float32 [h, w] in [0, 1], and the kind of the mask."""
    values = pixels.values
    if foreground is not None:
        if values.ndim == 3:
            if not (values[..., :1] == values).all():
                raise InputError(f"mask {name} is coloured: values of the foreground can be chosen for labels and palettes only")
            values = values[..., 0]
        return np.isin(values, list(foreground)).astype(np.float32), "values"
    if pixels.palette is not None:
        black = np.flatnonzero(~pixels.palette.any(1))
        background = 0 if not len(black) or 0 in black else int(black[0])
        on = values != background
        if len(black):
            on &= ~np.isin(values, black)
        return _opaque(on.astype(np.float32), pixels.alpha), "palette"
    if pixels.alpha is not None:
        visible = values[pixels.alpha > 0]
        if not len(visible) or (visible == visible[0]).all():
            return pixels.alpha.astype(np.float32) / 255, "alpha"
    if values.ndim == 3 and (values[..., :1] == values).all():
        values = values[..., 0]
    if values.ndim == 3:
        share, kind = _coloured(values, name)
    else:
        share, kind = _grey(values, name)
    return _opaque(share, pixels.alpha), kind


def _opaque(share: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    return share if alpha is None else share * (alpha.astype(np.float32) / 255)


def _grey(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    if values.dtype == bool:
        return values.astype(np.float32), "binary"
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            raise InputError(f"mask {name} holds NaN: a sample without a mask needs no mask, not one of NaN")
        if values.max() > 1 and (values == np.rint(values)).all():  # whole numbers that are stored as floats
            values = values.astype(np.int64)
    low, high = values.min().item(), values.max().item()
    if low < 0 or (values.dtype.kind == "f" and high > 1 + 1e-6):
        raise InputError(f"mask {name} holds values from {low:.4g} to {high:.4g}: 0 to 1, 0 to 255 or labels are needed")
    lowest = values == low
    highest = values == high
    if (lowest | highest).all():
        return (values > (low if low < high else 0)).astype(np.float32), "binary"
    whole = values.dtype.kind in "iu"
    if whole and high <= _MOST_LABEL:
        return (values > 0).astype(np.float32), "labels"
    share = values.astype(np.float32) / (2 ** _bits(high) - 1 if whole else 1)
    between = ((share > 0.1 * share.max()) & (share < 0.9 * share.max())).mean()
    return share.clip(0, 1), "anti-aliased" if between < 0.1 else "soft"


def _coloured(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    if values.dtype != np.uint8:
        raise InputError(f"mask {name} has colours of the type {values.dtype}: uint8 is needed")
    codes = values.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    if len(np.unique(codes)) <= 64:  # flat colours: dark ones count, too
        return (codes > 0).astype(np.float32), "colour"
    return values.max(2).astype(np.float32) / 255, "colour"  # as from a JPEG: nearly black is no colour


def _state(on: np.ndarray) -> str:
    counts = _mask_counts(torch.from_numpy(on)[None, None], torch.ones(1, dtype=torch.bool))
    return next((state for state in ("empty", "full", "inverted") if counts[state]), "ok")


def _name(ref: str | os.PathLike[str] | ArrayItem) -> str:
    if not isinstance(ref, ArrayItem):
        return shown(Path(ref))
    key = ref.key.removesuffix(NONZERO)
    return shown(ref.file) + (f", {shown(key)}" if key else "") + (f", entry {ref.index}" if ref.index >= 0 else "")
