"""The training loss of an ISNet: classification plus the heatmap loss, and checks for the masks it is given.

`ISNetLoss` is what a training loop calls; the equation for one set of maps is `fisnet_cuda.ops.heatmap_loss`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._backend import check_backend
from ..errors import FisnetWarning
from ..ops.heatmap_loss import FOREGROUNDS, NORMALIZATIONS, gwrp, heatmap_loss, resize_mask

__all__ = ["ISNetLoss", "LayerLoss", "LossParts", "MaskReport", "check_masks"]

INPUT = "input"  # the name of the heatmaps at the network's input, beside the names of the supervised layers

# C1 or C2 as users give it: for every layer and map, for each map, or by layer.
RangeEnd: TypeAlias = float | Sequence[float] | Tensor | Mapping[str, float | Sequence[float] | Tensor]


class LayerLoss(NamedTuple):
    """The heatmap loss of one layer's maps, mean over the samples with a mask; 0-d, detached."""

    background: Tensor  # L_background
    foreground: Tensor  # L_foreground
    heatmap: Tensor  # w1 L_background + w2 L_foreground


class LossParts(NamedTuple):
    """What `ISNetLoss` is made of, for logging.

    Tensors are 0-d, on the device and detached: keeping them keeps no graph. Means are over the samples that
    have a mask, and 0 when there is none: to average over batches, weight ``background_share`` and the
    heatmap losses by ``counts["with_mask"]``.
    """

    classification: Tensor
    background: Tensor  # of the heatmaps at the input
    foreground: Tensor  # of the heatmaps at the input
    heatmap: Tensor  # L_LRP: all layers, pooled
    background_share: Tensor  # share of |R| outside the mask, in [0, 1], at the input; 0 for a zero heatmap
    layers: dict[str, LayerLoss]  # "input" and each supervised layer; empty without masks
    counts: dict[str, Tensor]  # int64: with_mask, without_mask, and of those with: empty, full, inverted


@dataclass(frozen=True)
class MaskReport:
    """How many masks there are and how many look wrong; each sample is in ``n`` and at most one other count.

    Args:
        n: samples.
        without: samples without a mask.
        empty: masks without any foreground.
        full: masks without any background.
        inverted: masks whose foreground takes up most of the border and less of the interior; not full.
    """

    n: int
    without: int
    empty: int
    full: int
    inverted: int

    def problems(self) -> str:
        """What is wrong and what to do, as text for people; empty when nothing is."""
        have = self.n - self.without
        texts = []
        if self.empty:
            texts.append(
                f"{self.empty} of {have} masks are empty (nothing is foreground): they raise the loss and "
                f"teach nothing. If these samples have no mask, say so: a mask of NaN, or has_mask=False."
            )
        if self.full:
            texts.append(
                f"{self.full} of {have} masks have no background, so these samples teach the network nothing "
                f"about it. Are they meant to be without a mask?"
            )
        if self.inverted:
            texts.append(
                f"{self.inverted} of {have} masks look inverted (1 along the border, less inside). 1 must "
                f"mean foreground: pass 1 - mask if it means background."
            )
        return " ".join(texts)


class ISNetLoss(torch.nn.Module):
    """Classification loss plus heatmap loss, ``total, parts = loss(out, labels, masks)``.

    ::

        L_LRP = mean over the samples with a mask of  w1 L_background + w2 L_foreground         for each layer
        total = (1 - P) L_classification + P (the layers' L_LRP, pooled by 1-D GWRP with d_loss)

    L_background and L_foreground are those of `fisnet_cuda.ops.heatmap_loss`; without supervised inner layers
    there is one layer, the input, and nothing to pool. Source: Bassi et al., Nature Communications 15:291
    (2024) and arXiv 2401.08409.

    Everything is computed in float32 (float64 stays float64), whatever the autocast dtype, and stays on the
    device: no host sync, no data-dependent shape. The exception are the value checks, see ``check``.

    Args:
        P: weight of the heatmap loss in [0, 1]; or a schedule ``{epoch: P}``, each P holding from its epoch
            on, that names epoch 0 and is advanced by `set_epoch`.
        d: decay of the background loss's GWRP over pixels, in [0, 1]; 0 = maximum, 1 = mean; in between, about the mean of the
            1 / (1 - d) largest pixels. Where those outnumber a mark's pixels by far, the mark counts for little.
        E: > 0; a background of E times the foreground's mean relevance has the activation 1/2.
        w1: weight of the background loss, >= 0.
        w2: weight of the foreground loss, >= 0.
        c1: lower end of the natural range of a map's total absolute foreground relevance, > 0, in the unit of
            the explained quantity. A number; or a value for each of the K maps; or a dict of such by layer,
            ``{"input": ..., "layer1": ...}``, as `fisnet_cuda.tune_c1_c2` returns them. Layers differ in
            scale: with deep supervision prefer the dict. Values for each map are buffers: ``loss.to(device)``
            saves a copy in every step.
        c2: upper end of that range, >= c1; likewise.
        foreground: what a map above ``c2`` costs: "hybrid", "L2" or "L1".
        normalization: of the background loss, "absRoIMean", "RoIMean" or "none".
        d_loss: decay of the GWRP over layers, in [0, 1]; 0 = the worst layer, 1 = mean.
        classification_loss: ``f(logits, labels) -> scalar``, given float logits, e.g.
            ``torch.nn.CrossEntropyLoss(label_smoothing=0.1)``. Default: cross entropy for integer labels [N],
            binary cross entropy with logits for float or bool labels [N, C] (multi-label).
        check: when to look at values (non-finite heatmaps, masks outside [0, 1], empty or inverted masks,
            labels that do not exist): "first" = in the first call that has masks, "always", or "never". It
            costs a host sync, and is left out under ``torch.compile``, fake tensors and CUDA-graph capture.
            Shapes, dtypes and devices are always checked.
        backend: "auto" (by device), "reference" or "cuda"; of the heatmap loss.

    Attributes:
        epoch: set by `set_epoch`, 0 at first. Not in the ``state_dict``: set it when you resume.
        P_now: the P of this epoch.
        checked: whether the check of ``check="first"`` is done.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> loss = ISNetLoss(P=0.7, c1=1, c2=25)
        >>> out = SimpleNamespace(logits=torch.zeros(1, 2), heatmaps=torch.ones(1, 1, 3, 4, 4), hidden={})
        >>> masks = torch.zeros(1, 4, 4)
        >>> masks[:, 1:3, 1:3] = 1
        >>> total, parts = loss(out, torch.tensor([1]), masks)
        >>> f"{parts.classification:.3f} {parts.background:.3f} {parts.background_share:.3f}"
        '0.693 0.632 0.750'
    """

    def __init__(
        self,
        P: float | Mapping[int, float] = 0.7,
        d: float = 0.9,
        E: float = 1,
        w1: float = 1,
        w2: float = 3,
        c1: RangeEnd = 1,
        c2: RangeEnd = 25,
        foreground: str = "hybrid",
        normalization: str = "absRoIMean",
        d_loss: float = 0.8,
        *,
        classification_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        check: str = "first",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(P, Mapping):
            schedule = {
                _epoch("an epoch of P", epoch): _number(f"P[{epoch}]", p, 0, 1) for epoch, p in P.items()
            }
            if 0 not in schedule:
                raise ValueError(
                    f"P must say what holds from epoch 0 on, got the epochs {sorted(schedule)}; add 0: ..."
                )
            self.P = dict(sorted(schedule.items()))
        else:
            self.P = _number("P", P, 0, 1)
        self.d = _number("d", d, 0, 1)
        self.E = _number("E", E, 0, open_low=True)
        self.w1 = _number("w1", w1, 0)
        self.w2 = _number("w2", w2, 0)
        self.c1 = _PerLayer("c1", c1)
        self.c2 = _PerLayer("c2", c2)
        _check_order(self.c1, self.c2)
        self.foreground = _choice("foreground", foreground, FOREGROUNDS)
        self.normalization = _choice("normalization", normalization, NORMALIZATIONS)
        self.d_loss = _number("d_loss", d_loss, 0, 1)
        if classification_loss is not None and not callable(classification_loss):
            raise TypeError(
                f"classification_loss must be a function of (logits, labels), "
                f"got {type(classification_loss).__name__}"
            )
        self.classification_loss = classification_loss
        self.check = _choice("check", check, ("first", "always", "never"))
        self.backend = check_backend(backend)
        self.epoch = 0
        self.checked = False

    @property
    def P_now(self) -> float:
        """P in this epoch: of a schedule, the value of the last epoch it names that has come."""
        if isinstance(self.P, float):
            return self.P
        return self.P[max(start for start in self.P if start <= self.epoch)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that a schedule of P goes by; call it at the start of each epoch, and when resuming.

        P is a number of the step, not a tensor: after a change of P, capture a CUDA graph anew
        (``torch.compile`` does by itself).

        Args:
            epoch: counted from 0.

        Raises:
            TypeError: not an integer.
            ValueError: negative.

        Example:
            >>> loss = ISNetLoss(P={0: 0.3, 5: 0.7})
            >>> loss.set_epoch(6)
            >>> loss.P_now
            0.7
        """
        self.epoch = _epoch("epoch", epoch)

    def extra_repr(self) -> str:
        names = ("P", "d", "E", "w1", "w2", "foreground", "normalization", "d_loss", "check", "epoch")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        out: Any,
        labels: Tensor,
        masks: Tensor | None = None,
        *,
        has_mask: Tensor | None = None,
    ) -> tuple[Tensor, LossParts]:
        """The total loss, to call ``backward()`` on, and its parts.

        Args:
            out: what ``net(x, relevance=True)`` returned: ``logits`` [N, C], ``heatmaps`` [N, K, C_in,
                *spatial] and ``hidden`` {layer: [N, K, channels, *spatial]} (empty without deep supervision);
                any float dtype. Their gradients are what the loss is for. ``heatmaps`` may be None when
                ``masks`` is.
            labels: integer [N]; or float or bool [N, C], for multi-label (with C = 1, [N] is fine too).
                Anything that ``classification_loss`` takes, when there is one.
            masks: [N, *spatial], [N, 1, *spatial] or [N, C_in, *spatial], bool, 0/1 integers, or float in [0,
                1] (soft); 1 = foreground. At another size than a map's they are resized, and then anything
                above 0 is foreground; for inner layers the channels are united. A sample whose mask is all
                NaN has none; None: no sample has one. Samples without a mask take part in the classification
                loss only.
            has_mask: bool [N], False for samples without a mask; what ``masks`` holds for them is ignored.

        Returns:
            ``(total, parts)``: total 0-d, float32 (float64 if the logits or heatmaps are); see `LossParts`.

        Raises:
            TypeError: ``out`` does not come from ``net(x, relevance=True)``, or a tensor has a dtype that
                cannot be right.
            ValueError: shapes, devices or layer names do not match; when values are checked: non-finite
                heatmaps, masks outside [0, 1] or partly NaN, labels that do not exist.

        Warns:
            FisnetWarning: when values are checked: empty, full or inverted masks, with counts.
        """
        logits, layers = _maps(out, masks)
        _check_mask_arguments(masks, has_mask, layers)
        if self.classification_loss is None:
            _check_label_arguments(labels, logits)
        P = self.P_now
        with torch.autocast(logits.device.type, enabled=False):
            logits = _wide(logits)
            if masks is None:
                classification = self._classification(logits, labels)
                counts = {
                    key: torch.full((), count, device=logits.device)
                    for key, count in _no_masks(logits.shape[0]).items()
                }
                zero = torch.zeros_like(classification)
                parts = LossParts(classification.detach(), zero, zero, zero, zero, {}, counts)
                return (1 - P) * classification, parts

            R = layers[INPUT]
            M, has = _prepare(masks, has_mask, R.dim() - 3, _wide_dtype(R.dtype))
            counts = _mask_counts(M, has)
            if self._checks_now(R):  # before a GPU's cross entropy aborts on a label that does not exist
                if self.classification_loss is None:
                    _check_label_values(labels, logits)
                _check_map_values(layers)
                _check_mask_values(masks, M, has)
                problems = _report({key: int(count) for key, count in counts.items()}).problems()
                if problems:
                    warnings.warn(problems, FisnetWarning, stacklevel=3)
                self.checked = True
            classification = self._classification(logits, labels)
            heatmap, shown, share = self._heatmap(layers, M, has, counts["with_mask"])
            at_input = shown[INPUT]
            parts = LossParts(
                classification.detach(),
                at_input.background,
                at_input.foreground,
                heatmap.detach(),
                share,
                shown,
                counts,
            )
            return (1 - P) * classification + P * heatmap, parts

    def _classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.classification_loss is None:
            return _default_classification(logits, labels)
        value = self.classification_loss(logits, labels)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = list(value.shape) if isinstance(value, Tensor) else _kind(value)
            raise ValueError(f"classification_loss must return a 0-d tensor, got {got}; use reduction='mean'")
        return value

    def _heatmap(
        self, layers: dict[str, Tensor], M: Tensor, has: Tensor, with_mask: Tensor
    ) -> tuple[Tensor, dict[str, LayerLoss], Tensor]:
        """The heatmap loss pooled over layers, that of each layer (detached), and the background share."""
        with_mask = with_mask.clamp(min=1)

        def mean(value: Tensor) -> Tensor:  # [N] -> 0-d, over the samples with a mask
            return torch.where(has, value, 0).sum() / with_mask

        losses, shown = [], {}
        for name, maps in layers.items():
            own = M if name == INPUT or M.shape[1] == 1 else M.amax(1, keepdim=True)
            background, foreground = heatmap_loss(
                maps,
                resize_mask(own, maps.shape[3:]),
                d=self.d,
                E=self.E,
                c1=self.c1.of(name, maps),
                c2=self.c2.of(name, maps),
                foreground=self.foreground,
                normalization=self.normalization,
                backend=self.backend,
            )
            background, foreground = mean(background), mean(foreground)
            losses.append(self.w1 * background + self.w2 * foreground)
            shown[name] = LayerLoss(background.detach(), foreground.detach(), losses[-1].detach())
        heatmap = gwrp(torch.stack(losses), self.d_loss) if len(losses) > 1 else losses[0]
        R = layers[INPUT]
        return heatmap, shown, mean(_background_share(R, resize_mask(M, R.shape[3:])))

    def _checks_now(self, R: Tensor) -> bool:
        wanted = self.check == "always" or (self.check == "first" and not self.checked)
        return wanted and not torch.compiler.is_compiling() and _has_values(R)


def check_masks(
    masks: Tensor | Iterable[Tensor | None],
    *,
    spatial_dims: int = 2,
) -> MaskReport:
    """Count the masks of a data set that look wrong, and warn about them once.

    "Empty" has no foreground, "full" no background; "inverted" has foreground (anything above 0, in any
    channel) on more than half of the border, and on a larger share of the border than of the interior.

    Args:
        masks: one batch, or an iterable of batches, as `ISNetLoss` takes them: [N, *spatial] or [N, C,
            *spatial], bool, 0/1 integers, or float in [0, 1]; all NaN = the sample has no mask. An item may
            also be one mask [*spatial], or None for one sample without. Batches may differ in size. Arrays
            are converted.
        spatial_dims: 1, 2 or 3.

    Returns:
        The counts.

    Raises:
        TypeError: a mask is complex, or no tensor at all.
        ValueError: values outside [0, 1], masks that are partly NaN, or a wrong number of axes.

    Warns:
        FisnetWarning: some masks are empty, full or look inverted; with counts and what to do.

    Example:
        >>> import torch
        >>> mask = torch.zeros(8, 8)
        >>> mask[2:6, 2:6] = 1
        >>> check_masks([mask, None, mask > 0])
        MaskReport(n=3, without=1, empty=0, full=0, inverted=0)
    """
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    totals = dict.fromkeys(("with_mask", "without_mask", "empty", "full", "inverted"), 0)
    for item in [masks] if hasattr(masks, "__array__") else masks:
        if item is None:
            totals["without_mask"] += 1
            continue
        try:
            batch = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"masks must hold tensors or arrays, got {type(item).__name__}") from error
        if batch.is_complex():
            raise TypeError(f"masks must be bool, integer or float, got {batch.dtype}")
        if not spatial_dims <= batch.dim() <= spatial_dims + 2 or 0 in batch.shape[-spatial_dims:]:
            raise ValueError(
                f"masks must be [N, *spatial] or [N, C, *spatial] with {spatial_dims} spatial axes, none of "
                f"them empty, got {list(batch.shape)}; see spatial_dims"
            )
        if batch.dim() == spatial_dims:
            batch = batch.unsqueeze(0)
        M, has = _prepare(batch, None, spatial_dims, _wide_dtype(batch.dtype))
        _check_mask_values(batch, M, has)
        for key, count in _mask_counts(M, has).items():
            totals[key] += int(count)
    report = _report(totals)
    if report.problems():
        warnings.warn(report.problems(), FisnetWarning, stacklevel=2)
    return report


class _PerLayer(torch.nn.Module):
    """C1 or C2 by layer. More than one value a layer is kept as a buffer too, which moves with the loss."""

    def __init__(self, name: str, given: RangeEnd) -> None:
        super().__init__()
        self.name = name
        self.by_layer = isinstance(given, Mapping)
        self.values: dict[str, list[float]] = {}  # one value, or one for each map
        self.buffer_names: dict[str, str] = {}  # layer names have dots, buffer names must not
        for layer, value in given.items() if isinstance(given, Mapping) else [("", given)]:
            values = self._values(f"{name}[{layer!r}]" if self.by_layer else name, value)
            self.values[layer] = values
            if len(values) > 1:
                self.buffer_names[layer] = f"values{len(self.buffer_names)}"
                tensor = torch.tensor(values, dtype=torch.float64)
                self.register_buffer(self.buffer_names[layer], tensor, persistent=False)

    @staticmethod
    def _values(label: str, given: Any) -> list[float]:
        if isinstance(given, (int, float, str)):
            return [_number(label, given, 0, open_low=True)]
        values = given.tolist() if hasattr(given, "tolist") else given  # tensors and arrays
        if isinstance(values, (int, float)):  # of no axes
            values = [values]
        if not isinstance(values, Sequence):
            raise TypeError(
                f"{label} must be a number, a tensor or sequence with a value for each map, or a dict "
                f"of these by layer, got {_kind(given)}"
            )
        if len(values) == 0:
            raise ValueError(f"{label} must have a value for each map, got none")
        return [_number(label, value, 0, open_low=True) for value in values]

    def at(self, layer: str) -> list[float] | None:
        """The value of a layer, or its value for each map; None when a dict does not name the layer."""
        return self.values.get(layer if self.by_layer else "")

    def of(self, layer: str, R: Tensor) -> float | Tensor:
        """As `at`, on the device of the layer's maps ``R`` [N, K, ...]; raises if none fits."""
        values, K = self.at(layer), R.shape[1]
        if values is None:
            raise ValueError(
                f"{self.name} has no value for layer {layer!r}, only for {list(self.values)}; add one, or "
                f"tune them with fisnet_cuda.tune_c1_c2(net, batches)"
            )
        if len(values) == 1:
            return values[0]
        if len(values) != K:
            raise ValueError(
                f"{self.name} has {len(values)} values for layer {layer!r}, which has {K} maps a sample; "
                f"give one value, or one for each map"
            )
        buffer = getattr(self, self.buffer_names[layer if self.by_layer else ""])
        return buffer.to(R.device, non_blocking=True)

    def extra_repr(self) -> str:
        shown = {layer: values[0] if len(values) == 1 else values for layer, values in self.values.items()}
        return str(shown if self.by_layer else shown[""])


def _check_order(c1: _PerLayer, c2: _PerLayer) -> None:
    for layer in dict.fromkeys([*c1.values, *c2.values]):
        low, high = c1.at(layer), c2.at(layer)
        if low is None or high is None:  # only one of them names the layer: reported if it is used
            continue
        where = f" for layer {layer!r}" if layer else ""
        K = max(len(low), len(high))
        if not {len(low), len(high)} <= {1, K}:
            raise ValueError(f"c1 has {len(low)} values{where}, c2 has {len(high)}; give one for each map")
        if any(low[k % len(low)] > high[k % len(high)] for k in range(K)):
            raise ValueError(f"c1 must not exceed c2{where}, got {low} and {high}")


def _number(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from error
    if not (low <= number <= high and math.isfinite(number)) or (open_low and number == low):
        sign = ">" if open_low else ">="
        expected = f"in [{low}, {high}]" if high < math.inf else f"finite and {sign} {low}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return number


def _epoch(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x.dtype))


def _has_values(x: Tensor) -> bool:
    """Whether values can be read back: not from fake or meta tensors, nor while a CUDA graph is captured."""
    if isinstance(x, FakeTensor) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _kind(x: Any) -> str:
    """What an argument is, for messages about its type."""
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _maps(out: Any, masks: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and the maps by layer, with shapes, dtypes and devices checked."""
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or not hasattr(out, "heatmaps"):
        raise TypeError(f"out must be what net(x, relevance=True) returns, got {_kind(out)}")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"out.logits must be float [N, C], got {logits.dtype} {list(logits.shape)}")
    if out.heatmaps is None:
        if masks is not None:
            raise ValueError("out.heatmaps is None, but masks are given; call net(x, relevance=True)")
        return logits, {}
    layers = {INPUT: out.heatmaps, **(getattr(out, "hidden", None) or {})}
    for name, R in layers.items():
        label = "out.heatmaps" if name == INPUT else f"out.hidden[{name!r}]"
        if not isinstance(R, Tensor) or not R.is_floating_point():
            raise TypeError(f"{label} must be a float tensor, got {_kind(R)}")
        if R.dim() < 4 or R.dim() != out.heatmaps.dim():
            raise ValueError(
                f"{label} must be [N, K, channels, *spatial] with as many spatial axes as the input, got "
                f"{list(R.shape)}; supervise layers that still have a map"
            )
        if R.shape[0] != logits.shape[0]:
            raise ValueError(f"{label} has {R.shape[0]} samples, out.logits {logits.shape[0]}")
        if R.device != logits.device:
            raise ValueError(f"{label} is on {R.device}, out.logits on {logits.device}; move one with .to()")
    return logits, layers


def _check_mask_arguments(masks: Tensor | None, has_mask: Tensor | None, layers: dict[str, Tensor]) -> None:
    if masks is None:
        if has_mask is not None:
            raise ValueError("has_mask is given without masks; pass both or neither")
        return
    R = layers[INPUT]
    N, C, spatial_dims, device = R.shape[0], R.shape[2], R.dim() - 3, R.device
    if not isinstance(masks, Tensor) or masks.is_complex():
        raise TypeError(f"masks must be a bool, integer or float tensor, got {_kind(masks)}")
    with_channels = masks.dim() == spatial_dims + 2
    if (
        not (with_channels or masks.dim() == spatial_dims + 1)
        or (with_channels and masks.shape[1] not in (1, C))
        or 0 in masks.shape[1:]
    ):
        axes = ", ".join(["D", "H", "W"][-spatial_dims:])
        raise ValueError(
            f"masks must be [N, {axes}], [N, 1, {axes}] or [N, {C}, {axes}] for heatmaps {list(R.shape)}, "
            f"got {list(masks.shape)}"
        )
    if masks.shape[0] != N:
        raise ValueError(
            f"masks has {masks.shape[0]} samples, the heatmaps {N}; use NaN where there is no mask"
        )
    if masks.device != device:
        raise ValueError(
            f"masks is on {masks.device}, the heatmaps on {device}; use masks.to({str(device)!r})"
        )
    if has_mask is None:
        return
    if not isinstance(has_mask, Tensor) or has_mask.dtype != torch.bool:
        raise TypeError(f"has_mask must be a bool tensor, got {_kind(has_mask)}")
    if has_mask.shape != (N,):
        raise ValueError(f"has_mask must be [N] with N = {N}, got {list(has_mask.shape)}")
    if has_mask.device != device:
        raise ValueError(f"has_mask is on {has_mask.device}, the heatmaps on {device}; move it with .to()")


def _is_multi_label(labels: Tensor) -> bool:
    return labels.is_floating_point() or labels.dtype == torch.bool


def _check_label_arguments(labels: Tensor, logits: Tensor) -> None:
    N, C = logits.shape
    if not isinstance(labels, Tensor) or labels.is_complex():
        raise TypeError(f"labels must be an integer, float or bool tensor, got {_kind(labels)}")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}, the logits on {logits.device}; move it with .to()")
    if _is_multi_label(labels):
        if labels.shape != (N, C) and not (C == 1 and labels.shape == (N,)):
            raise ValueError(
                f"labels of {labels.dtype} are multi-label and must be [{N}, {C}] like the logits, got "
                f"{list(labels.shape)}; use labels.long() for one class index a sample"
            )
    elif labels.shape != (N,):
        raise ValueError(
            f"labels of {labels.dtype} are class indices and must be [{N}], got {list(labels.shape)}; use "
            f"labels.flatten() for [N, 1], labels.float() for multi-label"
        )
    elif C == 1:
        raise ValueError("labels are class indices, but there is one logit; use labels.float() for yes or no")


def _default_classification(logits: Tensor, labels: Tensor) -> Tensor:
    if _is_multi_label(labels):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype).view_as(logits))
    return F.cross_entropy(logits, labels.long())


def _prepare(
    masks: Tensor, has_mask: Tensor | None, spatial_dims: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Masks as [N, 1 or C, *spatial] of ``dtype``, and which samples have one [N].

    A sample without gets the mask 1: none of its relevance is background then, and its (unused) loss and the
    gradient of it stay finite.
    """
    M = masks.detach().to(dtype)
    if M.dim() == spatial_dims + 1:
        M = M.unsqueeze(1)
    has = torch.ones(M.shape[0], dtype=torch.bool, device=M.device) if has_mask is None else has_mask
    if masks.is_floating_point():
        has = has & ~M.isnan().flatten(1).all(1)
    return torch.where(has.view(-1, *[1] * (spatial_dims + 1)), M, 1), has


def _mask_counts(M: Tensor, has: Tensor) -> dict[str, Tensor]:
    """The device-side counts of `LossParts`, from what `_prepare` returns."""
    spatial_dims = M.dim() - 2
    on = (M > 0).any(1)  # [N, *spatial]
    inner = on[(slice(None), *[slice(1, -1)] * spatial_dims)]
    pixels, inner_pixels = math.prod(on.shape[1:]), math.prod(inner.shape[1:])
    on_all, on_inner = on.flatten(1).sum(1), inner.flatten(1).sum(1)
    on_border, border_pixels = on_all - on_inner, pixels - inner_pixels
    full = on_all == pixels
    # Shares of border and interior, compared without dividing; a mask without an interior is never suspect.
    # A full one is not either: its shares are equal.
    inverted = (2 * on_border > border_pixels) & (on_border * inner_pixels > on_inner * border_pixels)
    with_mask = has.sum()
    return {
        "with_mask": with_mask,
        "without_mask": has.shape[0] - with_mask,
        "empty": (has & (on_all == 0)).sum(),
        "full": (has & full).sum(),
        "inverted": (has & inverted).sum(),
    }


def _no_masks(N: int) -> dict[str, int]:
    return {"with_mask": 0, "without_mask": N, "empty": 0, "full": 0, "inverted": 0}


def _report(counts: Mapping[str, int]) -> MaskReport:
    n = counts["with_mask"] + counts["without_mask"]
    return MaskReport(n, counts["without_mask"], counts["empty"], counts["full"], counts["inverted"])


@torch.no_grad()
def _background_share(R: Tensor, M: Tensor) -> Tensor:
    """Share of |R| outside the mask of each sample [N], mean over its maps; 0 for maps that are 0."""
    A = _wide(R).abs()
    outside = (A * (1 - M.unsqueeze(1))).flatten(2).sum(2)
    total = A.flatten(2).sum(2)
    return torch.where(total > 0, outside / total, 0).mean(1)


# The checks below need values, and therefore a host sync.


def _check_map_values(layers: dict[str, Tensor]) -> None:
    for name, R in layers.items():
        bad = int((~R.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise ValueError(
                f"the heatmaps of {bad} of {len(R)} samples are not finite at {name!r}; look at the inputs, "
                f"the weights and the learning rate, and prefer bfloat16 to float16 autocast"
            )


def _check_label_values(labels: Tensor, logits: Tensor) -> None:
    if _is_multi_label(labels):
        return
    C = logits.shape[1]
    bad = ((labels < 0) | (labels >= C)) & (labels != -100)  # cross entropy ignores the label -100
    if bad.any():
        raise ValueError(f"labels must be in [0, {C}) for {C} logits, got {labels[bad].unique().tolist()}")


def _check_mask_values(masks: Tensor, M: Tensor, has: Tensor) -> None:
    """Raise for values that cannot be right; ``M`` and ``has`` are what `_prepare` made of ``masks``."""
    if masks.is_floating_point():
        partly = int(M.isnan().flatten(1).any(1).sum())
        if partly:
            raise ValueError(
                f"masks has {partly} samples that are NaN in some pixels only; NaN must fill the whole mask "
                f"and means that there is none"
            )
    if masks.dtype == torch.bool or len(M) == 0:
        return
    low, high = (float(v) for v in M.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"masks must be within [0, 1], 1 = foreground, got values from {low:g} to {high:g}; use "
            f"masks > threshold for a grey image, masks == index for one class of a label map"
        )
