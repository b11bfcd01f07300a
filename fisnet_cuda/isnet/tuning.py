"""C1 and C2, the natural range of a heatmap's total relevance, from the plain classifier's own maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["tune_c1_c2"]


def tune_c1_c2(
    net: Any,
    batches: Iterable[Any],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """C1 and C2 of `fisnet_cuda.ISNetLoss`, for the input and every supervised layer.

    With v the total absolute relevance of a sample's maps, mean over its K maps (for Dual, of each map by
    itself), and mean and std (with n - 1) over the samples::

        C1 = max(mean / 5, mean - 3 std)        C2 = min(25 C1, mean + 3 std)

    Call it on a classifier that was trained for a few epochs without the heatmap loss. Source: Bassi et al.,
    Nature Communications 15:291 (2024) and arXiv 2401.08409.

    Deviates from the authors' code, which collects v during the last training epoch: here the maps are those
    of one network, in eval mode. Each module gets its own mode back; parameters and buffers do not change.
    Their LRP-Flex averages only half of the maps; here it is all of them.

    Mean and std are accumulated in float64 on the device, batch by batch (Welford's update in the parallel
    form of Chan, Golub and LeVeque, 1983): one host sync, at the end.

    Args:
        net: an `fisnet_cuda.ISNet`; ``net(x, relevance=True)`` is called without gradients. Maps of unlike
            rules are kept apart when ``net.variant == "dual"``.
        batches: yields inputs x [N, ...] or tuples or lists ``(x, ...)``, on the network's device; 2 samples
            or more in all. For a progress bar pass e.g. ``tqdm(loader)``.
        progress: called after each batch with the number of batches and of samples so far.

    Returns:
        ``(c1, c2)``, each ``{"input": [K'], layer name: [K']}``, float64 on the CPU, in the unit of the
        explained quantity; K' = 2 for Dual (z+, epsilon), else 1. Pass them on as they are:
        ``ISNetLoss(c1=c1, c2=c2)``.

    Raises:
        TypeError: a batch is neither a tensor nor a tuple or list that starts with one.
        ValueError: fewer than two samples; or the maps of a layer are all zero, or not finite.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> def net(x, relevance):  # stands for an ISNet
        ...     return SimpleNamespace(heatmaps=x.unsqueeze(1), hidden={})
        >>> c1, c2 = tune_c1_c2(net, [torch.full((2, 1, 2, 2), 0.9), torch.full((2, 1, 2, 2), 1.1)])
        >>> c1["input"], c2["input"]
        (tensor([2.6144], dtype=torch.float64), tensor([5.3856], dtype=torch.float64))
    """
    per_map = getattr(net, "variant", None) == "dual"
    modes = {module: module.training for module in net.modules()} if isinstance(net, torch.nn.Module) else {}
    moments: dict[str, _Moments] = {}
    samples = 0
    try:
        if modes:
            net.eval()
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
                if not isinstance(x, Tensor):
                    raise TypeError(
                        f"batches must yield tensors, or tuples that start with one, got {type(x).__name__}"
                    )
                out = net(x, relevance=True)
                for layer, maps in {"input": out.heatmaps, **out.hidden}.items():
                    v = maps.abs().flatten(2).sum(2, dtype=torch.float64)  # [N, K]
                    moments.setdefault(layer, _Moments()).update(v if per_map else v.mean(1, keepdim=True))
                samples += len(x)
                if progress is not None:
                    progress(done, samples)
    finally:
        for module, training in modes.items():
            module.training = training
    if samples < 2:
        raise ValueError(
            f"batches must have at least 2 samples, got {samples}; a spread needs more, better hundreds"
        )
    c1, c2 = {}, {}
    for layer, moment in moments.items():
        c1[layer], c2[layer] = _range(layer, *moment.mean_and_std())
    return c1, c2


class _Moments:
    """Mean and sum of squared deviations of each column, merged batch by batch on the device."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0  # [K'] after the first update
        self.squares: Any = 0.0

    def update(self, v: Tensor) -> None:  # [N, K']
        n = len(v)
        if n == 0:
            return
        mean = v.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self.squares = self.squares + (v - mean).square().sum(0) + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        return self.mean.cpu(), (self.squares / (self.count - 1)).sqrt().cpu()


def _range(layer: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"the heatmaps at {layer!r} are not finite; look at the inputs and weights")
    if (mean == 0).any():
        raise ValueError(
            f"the heatmaps at {layer!r} are all zero, so C1 would be 0; train the classifier first"
        )
    low = torch.maximum(mean / 5, mean - 3 * std)
    return low, torch.minimum(25 * low, mean + 3 * std)
