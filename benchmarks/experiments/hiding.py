"""Where a classifier's use of the background hides from its heatmap, and what gives it away without unbiased data.

Symbols: ``x`` images, ``x0`` the same images without their background, ``a_l`` and ``b_l`` the output of the l-th ReLU for ``x`` and
``x0``, ``L`` logits, ``g_l = dL_c / da_l`` for the predicted class ``c``. In a ReLU net ``a_l . g_l`` is the layer's LRP relevance
with a vanishing epsilon; an epsilon e keeps the share ``phi_l = a_l / (a_l + e)`` of it and absorbs the rest. At the first ReLU it is
z^B's denominator ``z'`` that epsilon is added to, so ``phi_0 = z' / (z' + e)``.

A unit whose activation the background changes can do so in three ways, and only the last one is seen in a heatmap:

    below     alive, phi < 1/2: epsilon takes most of its relevance, later weights may still amplify its effect
    dead      a = 0, b > 0: the background switches the unit off; what is 0 has no relevance, whatever the epsilon
    visible   alive, phi >= 1/2
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisnet_cuda as fc

__all__ = [
    "auc", "best_threshold", "box_denominator", "epsilon_example", "influence", "inhibition_example", "layer_effects",
    "mean_background", "occlude", "patched", "pearson", "relu_outputs", "spearman", "spread",
]  # fmt: skip


# ---- cutting a net at its ReLUs ------------------------------------------------------------------------------------------

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


@contextmanager
def _hooked(model: nn.Module, hook: Hook) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, nn.ReLU)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relu_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what every ``nn.ReLU`` returned: name -> activation, in the order of the calls.

    A module that is called twice counts twice; its second call is named ``name:2``, as in a plan.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
        >>> logits, found = relu_outputs(model, torch.zeros(2, 1))
        >>> {name: tuple(a.shape) for name, a in found.items()}
        {'1': (2, 1)}
    """
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[str] = Counter()
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        calls[name] += 1
        found[name if calls[name] == 1 else f"{name}:{calls[name]}"] = output

    with _hooked(model, keep):
        logits = model(x)
    return logits, found


@torch.no_grad()
def patched(model: nn.Module, x: Tensor, layer: int, values: Tensor) -> Tensor:
    """Logits for ``x`` when the ReLU called as number ``layer`` (from 0) returns ``values``."""
    call = itertools.count()
    with _hooked(model, lambda module, inputs, output: values if next(call) == layer else None):
        return model(x)


# ---- what the background does --------------------------------------------------------------------------------------------


def occlude(images: Tensor, masks: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """Images ``[N, C, H, W]`` whose background is ``value``: a number, or one a channel ``[C]``.

    Example:
        >>> occlude(torch.tensor([[[[0.5, 0.7]]]]), torch.tensor([[[[1.0, 0.0]]]])).flatten().tolist()
        [0.5, 0.0]
    """
    fill = torch.as_tensor(value, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
    return masks * images + (1 - masks) * fill


def mean_background(images: Tensor, masks: Tensor) -> Tensor:
    """Mean colour of the backgrounds, ``[C]``."""
    inverse = 1 - masks
    return (images * inverse).sum((0, 2, 3)) / inverse.sum().clamp(min=1)


def spread(L: Tensor) -> float:
    """Root mean square of logits ``[N, C]`` around each sample's mean: what softmax depends on.

    Example:
        >>> spread(torch.tensor([[7.0, 9.0]]))
        1.0
    """
    return (L - L.mean(1, keepdim=True)).double().square().mean().sqrt().item()


def influence(logits: Tensor, changed: Tensor) -> float:
    """How much a change of the input moves the logits, in percent of their own spread: ``100 spread(L - L') / spread(L)``."""
    return 100 * spread(logits - changed) / max(spread(logits), 1e-30)


def box_denominator(model: nn.Module, x: Tensor) -> Tensor:
    """z^B's denominator at the first convolution for inputs in [0, 1], without its epsilon: ``z' = W x + b - W- 1 - b-``.

    A BatchNorm that follows the convolution is folded in, with its running statistics.
    """
    first = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))][:2]
    conv = first[0]
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"the first layer must be a convolution, got {type(conv).__name__}")
    W, b = conv.weight, conv.bias if conv.bias is not None else conv.weight.new_zeros(len(conv.weight))
    if len(first) > 1 and isinstance(first[1], nn.BatchNorm2d):
        norm = first[1]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        W, b = W * scale.reshape(-1, 1, 1, 1), (b - norm.running_mean) * scale + norm.bias
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    lowest = F.conv2d(torch.ones_like(x[:1]), W.clamp(max=0), b.clamp(max=0), *geometry)
    return F.conv2d(x, W, b, *geometry) - lowest


def _phi(model: nn.Module, x: Tensor, layer: int, a: Tensor, epsilon: fc.rules.Epsilon, box_eps: float) -> Tensor:
    """The share of a unit's relevance that epsilon leaves."""
    if layer == 0:
        z = box_denominator(model, x)
        return z / (z + box_eps)
    e = epsilon.eps
    if epsilon.relative:
        e = e * a.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (a.dim() - 1))
    return a / (a + e).clamp(min=torch.finfo(a.dtype).tiny)


def _percent(part: Tensor, whole: Tensor) -> float:
    return 100 * (part.double().sum() / whole.double().sum().clamp(min=1e-30)).item()


def layer_effects(model: nn.Module, x: Tensor, x0: Tensor, epsilon: fc.rules.Epsilon, box_eps: float) -> list[dict[str, float | str]]:
    """Layer by layer: what epsilon takes, and through which units the background reaches the logits.

    The effect of a group of units is measured, not estimated: their activations are replaced by those for ``x0`` and the rest of the
    net runs. Effects of groups do not add up exactly, as the net is not linear. In a residual net the units inside a block carry only
    the block's own branch.

    Args:
        model: in eval mode, its ReLUs modules.
        x, x0: images with and without their background ``[N, C, H, W]`` in [0, 1].
        epsilon: of the heatmap.
        box_eps: of z^B at the first layer.

    Returns:
        A row a ReLU, in percent: ``units_below`` (of the live units), ``change_below`` (of the absolute change of live units by the
        background), ``absorbed`` (of the absolute relevance), ``absorbed_background`` (of the relevance that the background caused,
        ``|(a - b) g|``), and of the logits' spread, ``effect`` (all units), ``effect_below``, ``effect_dead``, ``effect_visible``.
    """
    with torch.enable_grad():
        logits, found = relu_outputs(model, x.detach().requires_grad_())
        gradients = torch.autograd.grad(logits.max(1).values.sum(), list(found.values()))
    logits = logits.detach()
    with torch.no_grad():
        b_all = relu_outputs(model, x0)[1]
        rows: list[dict[str, float | str]] = []
        for layer, ((name, a), b, g) in enumerate(zip(found.items(), b_all.values(), gradients)):
            a = a.detach()
            phi = _phi(model, x, layer, a, epsilon, box_eps)
            alive = a > 0
            groups = {"below": alive & (phi < 0.5), "dead": ~alive & (b > 0), "visible": alive & (phi >= 0.5)}
            change, R, caused = (a - b).abs() * alive, (a * g).abs(), ((a - b) * g).abs() * alive
            row: dict[str, float | str] = {
                "layer": layer,
                "name": name,
                "units_below": _percent(groups["below"], alive),
                "change_below": _percent(change * groups["below"], change),
                "absorbed": _percent(R * (1 - phi), R),
                "absorbed_background": _percent(caused * (1 - phi), caused),
                "effect": influence(logits, patched(model, x, layer, b)),
            }
            row |= {f"effect_{group}": influence(logits, patched(model, x, layer, torch.where(m, b, a))) for group, m in groups.items()}
            rows.append(row)
    return rows


# ---- signals against the loss ----------------------------------------------------------------------------------------------


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties share their mean."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return ((ends - counts) + (ends - 1)).double()[inverse] / 2


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; NaN where one of them is constant or there are fewer than three."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / size) if len(x) > 2 and size > 0 else float("nan")


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 5.0, 6.0])), 6)
        1.0
    """
    return pearson(_ranks(x), _ranks(y))


def auc(signal: Tensor, lost: Tensor) -> float:
    """Area under the ROC curve of "the larger the signal, the likelier the loss", in [0, 1]; NaN where one kind is missing.

    Example:
        >>> auc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, True, True]))
        1.0
    """
    ranks, positives = _ranks(signal), int(lost.sum())
    negatives = len(lost) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[lost].sum() - positives * (positives - 1) / 2) / (positives * negatives))


def best_threshold(signal: Tensor, lost: Tensor) -> float:
    """The threshold above which to warn that makes misses and false alarms, each as a rate, least (Youden's J); the middle between
    two neighbouring values. NaN where one kind is missing.

    Example:
        >>> best_threshold(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([False, False, True]))
        3.0
    """
    if not lost.any() or lost.all():
        return float("nan")
    levels = signal.double().unique()
    middles = (levels[:-1] + levels[1:]) / 2
    if not len(middles):
        return float(levels[0])
    warns = signal.double()[None] > middles[:, None]
    score = (warns & lost).sum(1) / lost.sum() - (warns & ~lost).sum(1) / (~lost).sum()
    return float(middles[score.argmax()])


# ---- constructed nets -------------------------------------------------------------------------------------------------------


def epsilon_example(hide_at: int = 1, amplitude: float = 1e-4) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A net whose background unit is tiny in one layer and amplified by the next: heatmaps with a large epsilon do not see it.

    Images 1x4x4, two classes: the foreground (left half) lights its upper or lower part, and so does the background (right half). The
    net adds up both, the background twice; so the background alone decides. One channel carries each half; from convolution ``hide_at``
    (0: the first one, 1: the second one) to the next weights the background's channel has ``amplitude`` instead of 1.

    Returns:
        The net, images ``[8, 1, 4, 4]`` whose background agrees with the class, masks, labels.

    Example:
        >>> net, x, M, y = epsilon_example()
        >>> bool((net(x).argmax(1) == y).all()), bool((net(occlude(x, M)).argmax(1) == y).all())
        (True, True)
    """
    labels = torch.arange(8) % 2
    rows = torch.zeros(8, 1, 4, 1)
    for n, c in enumerate(labels.tolist()):
        rows[n, :, 2 * c : 2 * c + 2] = 1
    x = rows.expand(8, 1, 4, 4) * torch.linspace(0.6, 1.0, 8).reshape(8, 1, 1, 1)
    M = torch.zeros(8, 1, 4, 4)
    M[..., :2] = 1
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 2, bias=False),
    )  # fmt: skip
    scale = [amplitude if i == hide_at else 1.0 for i in (0, 1)]
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, scale[0]]).reshape(2, 1, 1, 1))
        net[2].weight.copy_(torch.diag(torch.tensor([1.0, scale[1] / scale[0]])).reshape(2, 2, 1, 1))
        W = torch.zeros(2, 2, 4, 4)  # class, channel, row, column
        for c in (0, 1):
            W[c, 0, 2 * c : 2 * c + 2, :2] = 1
            W[c, 1, 2 * c : 2 * c + 2, 2:] = 2 / scale[1]
        net[5].weight.copy_(W.flatten(1))
    return net.eval(), x.contiguous(), M, labels


def inhibition_example() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A net whose background switches units off: the predicted class's heatmap does not see it, whatever the epsilon.

    As in `epsilon_example`, but each class's logit is its foreground minus three times a unit per background pixel,
    ``max(1 - 2 x, 0)``: the mark of the class silences them, and what is silent has no relevance. The other class's map shows it.
    """
    _, x, M, labels = epsilon_example()
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 1.0]))
        W = torch.zeros(2, 2, 4, 4)
        for c in (0, 1):
            W[c, 0, 2 * c : 2 * c + 2, :2] = 1
            W[c, 1, 2 * c : 2 * c + 2, 2:] = -3
        net[3].weight.copy_(W.flatten(1))
    return net.eval(), x, M, labels
