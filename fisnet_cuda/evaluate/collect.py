"""One pass over a subset: logits, and what the masks say of the heatmaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .attention import background_share, pointing_game

__all__ = ["Collected", "collect"]


@dataclass(frozen=True)
class Collected:
    """What one pass found; arrays have one entry a sample, in the loader's order.

    Attributes:
        index: which sample of the data it is.
        labels: class, -1 where unknown.
        logits: ``[n, C]`` float64.
        mask: "none", "empty" (no foreground), "full" (no background) or "used": only the last counts below.
        share: background share of the heatmap; NaN without a usable mask, and for a heatmap of zeros.
        area: share of the image that is background: what a heatmap of equal values everywhere would have.
        hit, chance, positive: the pointing game's; NaN without a usable mask.
        kept: images ``[C_in, H, W]`` for insertion and deletion, drawn by the seed; by their place in the arrays.
        masked: images and masks ``[1, H, W]`` for the background swap, likewise, of those with a usable mask and a label.
    """

    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    mask: NDArray[np.str_]
    share: NDArray[np.float64]
    area: NDArray[np.float64]
    hit: NDArray[np.float64]
    chance: NDArray[np.float64]
    positive: NDArray[np.float64]
    kept: dict[int, Tensor]
    masked: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class that is answered, ``[n]``."""
        return self.logits.argmax(1)


@torch.no_grad()
def collect(
    net: Any,
    batches: Iterable[Mapping[str, Tensor]],
    classes: int,
    *,
    device: torch.device | str = "cpu",
    tolerance: int = 0,
    keep: int = 0,
    keep_masked: int = 0,
    seed: int = 0,
    name: str = "data",
    step: Any = None,
) -> Collected:
    """Runs a network over prepared batches.

    Heatmaps explain the logit of the predicted class by the network's own rules, in batches that have a mask at all.

    Args:
        net: an `fisnet_cuda.ISNet`, in eval mode.
        batches: dicts with ``image`` float (normalised), ``label`` int64 and, where there are masks, ``mask`` in [0, 1] and
            ``has_mask``; ``index`` names the samples.
        classes: number of logits.
        device: where the net is.
        tolerance: of the pointing game, in pixels.
        keep: how many images to keep for `faithfulness`; which ones hangs on ``seed`` and ``index`` alone, not on batches.
        keep_masked: how many images and masks to keep for `background_swap`; likewise.
        seed: of these draws.
        name: of the subset, for messages.
        step: called with the number of samples done.

    Raises:
        InputError: the subset is empty, or the logits are not finite or not ``classes`` many.
    """
    parts: list[dict[str, Any]] = []
    kept: list[tuple[float, int, Any]] = []
    masked: list[tuple[float, int, Any]] = []
    done = 0
    for batch in batches:
        x = batch["image"].to(device, non_blocking=True)
        n = len(x)
        index = batch["index"].cpu().numpy() if "index" in batch else np.arange(done, done + n)
        logits = net(x)
        if logits.shape[1] != classes:
            raise InputError(
                f"the network has {logits.shape[1]} outputs and the data have {classes} classes: they do not belong together"
            )
        part = {"index": index, "labels": batch["label"].cpu().numpy(), "logits": logits.double().cpu().numpy()}
        part |= _attention(net, x, logits.argmax(1), batch, tolerance)
        parts.append(part)
        usable = (part["mask"] == "used") & (part["labels"] >= 0)
        for i in range(n if keep or keep_masked else 0):
            entry = (-np.random.default_rng([seed, int(index[i])]).random(), done + i)
            _offer(kept, keep, entry, x, i)
            if usable[i]:
                _offer(masked, keep_masked, entry, (x, batch["mask"]), i)
        done += n
        if step is not None:
            step(done)
    if not done:
        raise InputError(f"{name} has no images: nothing to evaluate")
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    bad = int((~np.isfinite(whole["logits"])).any(1).sum())
    if bad:
        raise InputError(
            f"the network's outputs are not finite for {bad} of {done} images of {name}: its training has diverged; use another "
            "checkpoint"
        )
    drawn = ({place: value for _, place, value in sorted(heap, key=lambda entry: entry[1])} for heap in (kept, masked))
    return Collected(**whole, **dict(zip(("kept", "masked"), drawn)))


def _offer(heap: list[tuple[float, int, Any]], most: int, entry: tuple[float, int], values: Any, i: int) -> None:
    """Keeps sample ``i`` of a batch if it is among the ``most`` that come first by their draws; copies only what is kept."""
    if most and (len(heap) < most or entry > heap[0][:2]):
        # a clone: a view would keep the whole batch
        value = tuple(v[i].cpu().clone() for v in values) if isinstance(values, tuple) else values[i].cpu().clone()
        (heappush if len(heap) < most else heappushpop)(heap, (*entry, value))


def _attention(net: Any, x: Tensor, predicted: Tensor, batch: Mapping[str, Tensor], tolerance: int) -> dict[str, Any]:
    n = len(x)
    nan = np.full(n, np.nan)
    found: dict[str, Any] = {key: nan.copy() for key in ("share", "area", "hit", "chance", "positive")}
    found["mask"] = np.full(n, "none", "U5")
    if "mask" not in batch:
        return found
    M = batch["mask"].to(x.device)
    has = batch["has_mask"].to(x.device) if "has_mask" in batch else torch.ones(n, dtype=torch.bool, device=x.device)
    area = M.double().mean((1, 2, 3))
    some, all_ = (M > 0).any(3).any(2).any(1), (M >= 1).all(3).all(2).all(1)
    used = has & some & ~all_
    found["mask"][(has & ~some).cpu().numpy()] = "empty"
    found["mask"][(has & all_).cpu().numpy()] = "full"
    places = used.nonzero()[:, 0]
    if not len(places):
        return found
    # the whole batch where all have a mask (the rule), else only those that do
    rows = slice(None) if len(places) == n else places
    R = net(x[rows], relevance=True, target=predicted[rows]).heatmaps[:, 0]
    pointing = pointing_game(R, M[rows], tolerance)
    at = places.cpu().numpy()
    found["mask"][at] = "used"
    found["area"][at] = 1 - area[rows].cpu().numpy()
    found["share"][at] = background_share(R, M[rows]).cpu().numpy()
    for key, value in pointing._asdict().items():
        found[key][at] = value.double().cpu().numpy()
    return found
