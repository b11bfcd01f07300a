"""`evaluate`: from a network and its batches to an `Evaluation`."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..progress import Progress
from .collect import Collected, collect
from .faithfulness import CURVES, Options, curves
from .metrics import classification
from .report import Evaluation
from .results import Insertion, RunResult, SubsetResult, attention, insertion
from .swap import BackgroundSwap, mask_kinds, plan_swap, swap_sums

__all__ = ["evaluate"]


def evaluate(
    module: Any,
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    *,
    name: str = "net",
    bootstrap: int = 2000,
    tolerance: int = 0,
    faithful: Options | None = None,
    swap_images: int = 512,
    seed: int = 0,
    identities: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures a trained network on one or several subsets.

    Heatmaps explain the logit of the predicted class by the network's own LRP rules. Nothing of the module changes: its modes are
    put back. The same ``seed`` and data give the same numbers, whatever the batches.

    Args:
        module: an `ISNetModule`, or anything with ``net`` (`fisnet_cuda.ISNet`) and ``spec`` (`InputSpec`).
        loaders: subset -> prepared batches: dicts of ``image`` float ``[B, C, H, W]`` (normalised), ``label`` int64 ``[B]`` (-1:
            unknown) and, where there are masks, ``mask`` ``[B, 1, H, W]`` in [0, 1], ``has_mask`` bool ``[B]``; ``index`` int64 ``[B]``
            names the samples.
        name: of the network in the report.
        bootstrap: resamples behind the intervals of macro-F1, AUC and means; at least 100.
        tolerance: of the pointing game, in pixels of the input.
        faithful: of insertion and deletion; None for the defaults, ``Options(samples=0)`` to leave them out.
        swap_images: at most so many images of each subset, drawn by the seed, for `background_swap`; 0 leaves it out. They are kept in
            memory while it lasts.
        seed: of bootstrap, samples, random orders and donors.
        identities: subset -> what names each sample of ``index`` (a hash): makes comparisons of runs image by image.
        notes: subset -> what a reader must know of it.
        facts: of the run, for the report (checkpoint, variant ...).
        progress: show progress on standard error.

    Returns:
        An `Evaluation` of one run; `Evaluation.beside` puts several together.

    Raises:
        InputError: a subset is empty, the network does not fit the data or its outputs are not finite, a setting is wrong.

    Example:
        >>> import fisnet_cuda as fc
        >>> from types import SimpleNamespace
        >>> from fisnet_cuda.nets import small
        >>> from fisnet_cuda.evaluate import Options
        >>> from fisnet_cuda.data.spec import InputSpec
        >>> net = fc.ISNet(small(2, 1))
        >>> batch = {"image": torch.rand(6, 1, 8, 8), "label": torch.tensor([0, 1, 0, 1, 0, 1])}
        >>> module = SimpleNamespace(net=net, spec=InputSpec((8, 8), 1, ("a", "b")))
        >>> result = evaluate(module, {"test": [batch]}, bootstrap=100, faithful=Options(samples=2, steps=4))
        >>> result.runs[0].subsets["test"].classification.n
        6
    """
    if bootstrap < 100:
        raise InputError(f"an interval needs at least 100 bootstrap resamples, got {bootstrap}")
    if tolerance < 0:
        raise InputError(f"the tolerance of the pointing game must be at least 0 pixels, got {tolerance}")
    if swap_images < 0:
        raise InputError(f"swap_images must be at least 0, got {swap_images}")
    if not loaders:
        raise InputError("there is no subset to evaluate: give a test split or further sets")
    faithful = Options() if faithful is None else faithful
    net, spec = module.net, module.spec
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        subsets = {
            subset: _subset(net, spec, batches, subset, name, bootstrap, tolerance, faithful, swap_images, seed,
                            (identities or {}).get(subset, ()), (notes or {}).get(subset, ()), progress)
            for subset, batches in loaders.items()
        }  # fmt: skip
    finally:
        for part, training in modes:
            part.training = training
    settings = {
        "bootstrap": bootstrap, "seed": seed, "pointing_tolerance_pixels": tolerance, "explained": "predicted logit",
        "swap_images": swap_images,
    }  # fmt: skip
    if faithful.samples:
        sigma = faithful.sigma or 5 * max(spec.size) / 224
        settings |= {
            "faithfulness_samples": faithful.samples, "faithfulness_steps": faithful.steps, "insertion_into": faithful.insertion,
            "deletion_to": faithful.deletion, "blur_sigma_pixels": round(sigma, 3),
        }  # fmt: skip
    run = RunResult(name, tuple(spec.classes), subsets, dict(facts or {}))
    return Evaluation((run,), settings, _versions())


def _subset(
    net: Any, spec: Any, batches: Iterable[Mapping[str, Tensor]], name: str, run: str, bootstrap: int, tolerance: int,
    faithful: Options, swap_images: int, seed: int, identity: Sequence[str], notes: Sequence[str], progress: bool,
) -> SubsetResult:  # fmt: skip
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    total = _count(batches)
    shown = Progress(_short(name), total) if progress and total else None
    found = collect(
        net, batches, len(spec.classes), device=device, tolerance=tolerance, keep=faithful.samples, keep_masked=swap_images, seed=seed,
        name=name,
        step=None if shown is None else lambda done: shown.update(min(done, total), f"{run}: {done} images"),
    )  # fmt: skip
    answered = classification(found.logits, found.labels, spec.classes, bootstrap, seed)
    looked = attention(found, bootstrap, seed)
    inserted = _insertion(net, spec, found, name, run, faithful, bootstrap, seed, device, progress)
    named = tuple(identity[int(i)] for i in found.index) if identity else ()
    swapped = _swap(net, found, faithful.batch_size, seed, device)
    return SubsetResult(name, answered, looked, inserted, replace(found, kept={}, masked={}), named, tuple(notes), swapped)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _count(batches: Any) -> int:
    """Images in a loader, as far as it says."""
    for part in (batches, getattr(batches, "dataset", None)):
        images = getattr(part, "images", None)
        if isinstance(images, int):
            return images
    if hasattr(batches, "dataset") and hasattr(batches.dataset, "__len__"):
        return len(batches.dataset)
    return sum(len(b["label"]) for b in batches) if isinstance(batches, (list, tuple)) else 0


def _swap(net: Any, found: Collected, batch_size: int, seed: int, device: torch.device) -> BackgroundSwap | None:
    places = list(found.masked)
    if not places:
        return None
    pairs = list(found.masked.values())

    def fetch(at: Tensor) -> tuple[Tensor, Tensor]:  # a batch at a time: stacked, all would be in memory twice
        images, masks = zip(*(pairs[i] for i in at.tolist()))
        return torch.stack(images), torch.stack(masks)

    kinds = torch.cat([mask_kinds(fetch(at)[1]) for at in torch.arange(len(pairs)).split(batch_size)])
    plan = plan_swap(torch.as_tensor(found.labels[places]), kinds, seed)
    logits = torch.as_tensor(found.logits[places])
    sums = swap_sums(net, fetch, plan, batch_size=batch_size, device=device, logits=logits)
    return BackgroundSwap.of(sums, plan.guessing, plan.left_out)


@torch.no_grad()
def _insertion(
    net: Any,
    spec: Any,
    found: Collected,
    name: str,
    run: str,
    options: Options,
    bootstrap: int,
    seed: int,
    device: torch.device,
    progress: bool,
) -> Insertion | None:
    places = list(found.kept)
    if not places:
        return None
    shown = Progress(_short(name), len(places)) if progress else None
    predicted = torch.as_tensor(found.predicted[places])
    parts: list[dict[str, Tensor]] = []
    # a generator for each image, so that the order does not hang on the batch size
    seeds = np.random.SeedSequence(seed).generate_state(len(places))
    for start in range(0, len(places), options.batch_size):
        at = slice(start, start + options.batch_size)
        x = torch.stack([found.kept[place] for place in places[at]]).to(device)
        target = predicted[at].to(device)
        R = net(x, relevance=True, target=target).heatmaps[:, 0]
        orders = [torch.Generator().manual_seed(int(s)) for s in seeds[at]]

        def step(done: int, start: int = start) -> None:
            if shown is not None:
                shown.update(start + done, f"{run}: insertion and deletion")

        parts.append(curves(net, x, R, target, spec, options, orders, step))
    whole = {key: torch.cat([part[key] for part in parts]) for key in CURVES}
    return insertion(whole, spec.size[0] * spec.size[1], found.labels[places], bootstrap, seed)


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"fisnet_cuda": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
