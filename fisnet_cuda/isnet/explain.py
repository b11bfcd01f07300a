"""LRP for users who do not train an ISNet: heatmaps of any model by any rules, and a conservation check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph import Program, StreamSpec
from ..rules import Rule, RuleMap, resolve
from .module import ISNet

# Nodes that neither hold a bias nor an epsilon: whatever relevance comes in goes out again.
_LOSSLESS = ("add", "concat", "reshape", "permute", "slice", "pool_max", "pool_avg", "linear_map", "mask")


def _model_of(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model.model if isinstance(model, ISNet) else model


def relevance(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    rules: RuleMap | Rule | str | Mapping[str, Rule] | None = None,
    *,
    backend: str = "auto",
    example_input: Tensor | None = None,
) -> Tensor:
    """Heatmaps of any supported model by any rules, in eval mode.

    The model is left as it was: its modes, statistics and gradients do not change. The result is differentiable with
    respect to the parameters and ``x`` when they ask for gradients; wrap the call in ``torch.no_grad()`` otherwise.

    Args:
        model: a classifier ``[N, C_in, ...] -> logits [N, C]``, or an `ISNet`.
        x: input ``[N, C_in, ...]``.
        target: the class(es) whose logit is explained: ``[N]``, ``[N, K]``, one int, or None for the top logit.
        rules: a rule, a preset ("epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box", ...), a mapping from
            layer names or globs to rules, or a `RuleMap`; LRP-epsilon (0.01) by default.
        backend: "auto", "reference" or "cuda".
        example_input: only for models that need torch.export to be traced; ``x`` by default.

    Returns:
        Relevance ``[N, K, C_in, ...]``, in the unit of a logit (K = 1 for ``[N]``, an int or None).

    Raises:
        UnsupportedModelError: an op has no rule; names the module path.
        TypeError, ValueError: an argument is wrong; names it.

    Example:
        >>> import torch, fisnet_cuda as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.rand(3, 2)
        >>> R = fc.relevance(model, x, rules=fc.rules.Epsilon(1e-6))
        >>> torch.allclose(R.sum((1, 2)), model(x)[:, 0], atol=1e-4)
        True
    """
    net = _explainer(model, x, rules, backend, example_input)
    return net._explain(x, target, False).heatmaps


def _explainer(
    model: nn.Module, x: Tensor, rules: object, backend: str, example_input: Tensor | None
) -> ISNet:
    """An ISNet that explains the top logit where no target is given."""
    rule_map = resolve(rules)
    example = example_input if example_input is not None else x if isinstance(x, Tensor) else None
    return ISNet(
        _model_of(model), variant="selective", select="top", multilabel=True, first_layer="epsilon", rules=rule_map,
        backend=backend, check="first", example_input=example, max_map_bytes=None,
    )  # fmt: skip


@dataclass(frozen=True)
class LayerConservation:
    """Relevance through one layer, summed over everything and the batch's mean.

    Attributes:
        layer, kind: which one.
        out: relevance of the layer's output, in the unit of the explained logit.
        into: relevance that it hands to its inputs.
        absorbed: ``out - into``: what biases, BatchNorm shifts and epsilon took.
        lossless: nothing in this layer can take relevance, so ``absorbed`` must be 0 up to rounding.
    """

    layer: str
    kind: str
    out: float
    into: float
    absorbed: float
    lossless: bool


@dataclass(frozen=True)
class ConservationReport:
    """What `check_conservation` found; ``print`` it.

    Attributes:
        layers: one row a layer, from the logits to the input.
        explained: mean explained logit, what relevance starts from.
        heatmap: mean sum of the input's relevance, what arrives.
        violations: names of lossless layers that lost or made relevance.
    """

    layers: tuple[LayerConservation, ...]
    explained: float
    heatmap: float
    violations: tuple[str, ...]

    def __str__(self) -> str:
        width = max([len(row.layer) for row in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'kind':10}  {'out':>12}  {'into':>12}  {'absorbed':>12}"]
        for row in self.layers:
            mark = "  <- must be 0" if row.layer in self.violations else ""
            lines.append(f"{row.layer:{width}}  {row.kind:10}  {row.out:12.5g}  {row.into:12.5g}  {row.absorbed:12.5g}{mark}")
        lines.append(f"explained {self.explained:.5g}, arrives at the input {self.heatmap:.5g}; absorbed = biases and epsilon")
        return "\n".join(lines)


def check_conservation(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    rules: RuleMap | Rule | str | Mapping[str, Rule] | None = None,
    *,
    tolerance: float = 1e-4,
) -> ConservationReport:
    """Whether relevance adds up, layer by layer: what comes out of a layer goes into its inputs, or into a bias or epsilon.

    Args:
        model, x, rules: as in `relevance`; use float64 for a sharp check.
        target: the class whose logit is explained: ``[N]``, one int, or None for the top logit.
        tolerance: relative to the relevance of the layer; a lossless layer beyond it is a violation.

    Returns:
        A printable `ConservationReport`.

    Example:
        >>> import torch, fisnet_cuda as fc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> fc.check_conservation(model, torch.rand(2, 1, 4, 4)).violations
        ()
    """
    inner = _model_of(model)
    net = _explainer(inner, x, rules, "auto", None)
    net._check_input(x)
    graph = net._programs[False][0].graph
    program = Program(graph, (StreamSpec("epsilon", resolve(rules)),), taps=True)
    with torch.no_grad():
        env = program.run_forward(inner, x, False)
        logits = env[program.lowered.logits]
        index = logits.argmax(1, keepdim=True) if target is None else net._target(target, logits, True)
        if index.shape[1] != 1:
            raise ValueError(f"target must be [N] or an int: one class a sample, got {tuple(index.shape)}")
        g = torch.zeros_like(logits).scatter_(1, index, 1.0)
        explained = float((g * logits).sum() / max(len(x), 1))
        env = program.run_relevance(env, {"epsilon": g})
        rows, violations = [], []
        kinds = {node.name: node.kind for node in graph.nodes}
        # under z+ pools and sums have a denominator of their own, and conversions into relevance per unit too
        dividing = {i.layer for i in program.lowered.relevance if i.op == "ratio" or i.op.endswith("z+")}
        for name, _, out_slot, handed in program.lowered.taps:
            out = float(env[out_slot].sum()) / max(len(x), 1)
            into = sum(float(env[slot].sum()) for slot in handed) / max(len(x), 1)
            size = float(env[out_slot].abs().sum()) / max(len(x), 1)
            lossless = kinds[name] in _LOSSLESS and name not in dividing
            rows.append(LayerConservation(name, kinds[name], out, into, out - into, lossless))
            if lossless and abs(out - into) > tolerance * max(size, 1e-12):
                violations.append(name)
        heatmap = float(env[program.lowered.heatmaps["epsilon"]].sum()) / max(len(x), 1)
    return ConservationReport(tuple(rows), explained, heatmap, tuple(violations))


def supported() -> str:
    """The layers and functions that have a rule, as text.

    Example:
        >>> import fisnet_cuda as fc
        >>> "Conv2d" in fc.supported()
        True
    """
    from ..graph.modules import LEAVES
    from ..graph.normalise import functions

    modules = ", ".join(kind.__name__ for kind in LEAVES)
    return (
        f"torch.nn: {modules}\nfisnet_cuda.nn: AddReLU, BNReLU, ConvBNReLU, ConvReLU, LinearReLU, MaxPool\n"
        f"functions, methods, operators and aten ops, in-place or not: {', '.join(functions())}"
    )
