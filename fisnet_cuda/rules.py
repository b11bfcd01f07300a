"""The LRP rules, as frozen dataclasses: the only place where rule parameters are named.

A rule says how a layer hands the relevance of its outputs on to its inputs. Symbols are those of
`fisnet_cuda.reference`: a layer has inputs ``a``, weights ``W``, bias ``b``, output ``z = W a + b``; ``R`` is relevance,
in the unit of the explained quantity. A BatchNorm that follows a layer is folded into its ``W`` and ``b`` first.

========================  ==============================================================  =====================
rule                      relevance handed to input j                                     source
========================  ==============================================================  =====================
`Epsilon`                 a_j sum_k W_kj R_k / (z_k + eps sign z_k)                        Bach et al. 2015
`ZPlus`                   a_j sum_k W_kj+ R_k / (z_k+ + eps)                               Montavon et al. 2017
`ZB`                      box-constrained inputs, low <= x <= high                         Montavon et al. 2017
`Gamma`                   a_j sum_k (W + gamma W+)_kj R_k / (z'_k + eps sign z'_k)          Montavon et al. 2019
`AlphaBeta`               alpha (positive part) - beta (negative part)                     Bach et al. 2015
`WSquare`                 sum_k W_kj^2 R_k / (sum_j' W_kj'^2 + eps)                        Montavon et al. 2017
`Flat`                    as WSquare with every weight 1                                   Lapuschkin et al. 2019
========================  ==============================================================  =====================

>>> import fisnet_cuda as fc
>>> fc.rules.Epsilon(1e-3)
Epsilon(eps=0.001, relative=False)
>>> fc.rules.resolve("epsilon_plus").conv
ZPlus(eps=0.01)
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

Bound = float | tuple[float, ...]


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_eps(eps: float, minimum: float = 0.0) -> None:
    _check_number("eps", eps)
    if not math.isfinite(eps) or eps < minimum:
        raise ValueError(f"eps must be finite and >= {minimum:g}, got {eps}")


@dataclass(frozen=True)
class Epsilon:
    """LRP-epsilon: ``R_j = a_j sum_k W_kj R_k / (z_k + eps sign z_k)``, with ``sign 0 = +1``.

    It runs in gradient form (no division in the layer): epsilon acts once, in the ReLU that follows.

    Args:
        eps: the stabiliser. Absolute, in units of ``z``; with ``relative`` a fraction of the layer's own scale.
        relative: use ``eps * rms(a)`` instead, the root mean square of the layer's activation over the sample itself,
            detached. A layer of small activations then keeps its relevance; a unit far below the others of its layer still loses it.
    """

    eps: float = 1e-2
    relative: bool = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)


@dataclass(frozen=True)
class ZPlus:
    """LRP-z+ : only positive contributions, ``z+ = W+ a+ + W- a- + b+``, ``R = a+ W+^T s + a- W-^T s``, ``s = R/(z+ + eps)``.

    Args:
        eps: added to the (non-negative) denominator of every linear map, in units of ``z``.
    """

    eps: float = 1e-2

    def __post_init__(self) -> None:
        _check_eps(self.eps)


@dataclass(frozen=True)
class ZB:
    """LRP-z^B for the first layer, whose inputs are bounded: ``low <= x <= high``.

    ``z = W x + b - (W+ low + b+ l) - (W- high + b- h)``, ``R = (x - low) W+^T s + (x - high) W-^T s``,
    ``s = R_out / (z + eps sign z)``.

    Args:
        low, high: bounds of the input, one number or one per channel (so that normalised inputs work). The bias is
            bounded by ``l = min(low)``, ``h = max(high)``.
        eps: the stabiliser, in units of ``z``.
    """

    low: Bound = 0.0
    high: Bound = 1.0
    eps: float = 1e-2

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, str) or not (isinstance(value, (int, float)) or hasattr(value, "__iter__")):
                raise TypeError(f"{name} must be a number or one per channel, got {type(value).__name__}")
            if not isinstance(value, (int, float)):
                object.__setattr__(self, name, tuple(float(v) for v in value))
                if not getattr(self, name):
                    raise ValueError(f"{name} must be a number or one per channel, got an empty {type(value).__name__}")
        low, high = _as_tuple(self.low), _as_tuple(self.high)
        if len(low) > 1 and len(high) > 1 and len(low) != len(high):
            raise ValueError(f"low has {len(low)} channels and high has {len(high)}: give one number or one per channel")
        n = max(len(low), len(high))
        low, high = low * (n // len(low)), high * (n // len(high))
        for channel, (lo, hi) in enumerate(zip(low, high)):
            if not lo < hi:
                raise ValueError(f"low must be below high, got low={lo}, high={hi} (channel {channel})")


@dataclass(frozen=True)
class Gamma:
    """LRP-gamma: positive weights count ``1 + gamma`` fold; generalised to signed inputs and outputs.

    Args:
        gamma: extra weight of the positive part; 0 is `Epsilon`, infinity tends to `ZPlus`.
        eps: the stabiliser, in units of ``z``.
    """

    gamma: float = 0.25
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        _check_number("gamma", self.gamma)
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")


@dataclass(frozen=True)
class AlphaBeta:
    """LRP-alpha-beta: positive and negative contributions each with their own denominator, ``alpha - beta = 1``.

    Args:
        alpha, beta: weights of the two parts; 2, 1 by default; 1, 0 is `ZPlus`.
        eps: the stabiliser, in units of ``z``.
    """

    alpha: float = 2.0
    beta: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        for name in ("alpha", "beta"):
            _check_number(name, getattr(self, name))
        if self.alpha < 0 or self.beta < 0 or not math.isclose(self.alpha - self.beta, 1.0):
            raise ValueError(f"alpha - beta must be 1 with both >= 0, got alpha={self.alpha}, beta={self.beta}")


@dataclass(frozen=True)
class WSquare:
    """LRP-w^2: relevance shared by squared weight, whatever the input.

    Args:
        eps: the stabiliser, in units of ``W^2``.
    """

    eps: float = 1e-12

    def __post_init__(self) -> None:
        _check_eps(self.eps)


@dataclass(frozen=True)
class Flat:
    """LRP-flat: relevance shared evenly over the inputs that a unit sees.

    Args:
        eps: the stabiliser, a count of inputs.
    """

    eps: float = 1e-12

    def __post_init__(self) -> None:
        _check_eps(self.eps)


Rule = Epsilon | ZPlus | ZB | Gamma | AlphaBeta | WSquare | Flat
RULES = (Epsilon, ZPlus, ZB, Gamma, AlphaBeta, WSquare, Flat)


def _as_tuple(bound: Bound) -> tuple[float, ...]:
    return (float(bound),) if isinstance(bound, (int, float)) else tuple(bound)


@dataclass(frozen=True)
class RuleMap:
    """Which rule serves which layer: by name first, then the first layer's, then by kind.

    Args:
        conv, linear: the rule of convolutions (with pools and additions between them) and of dense layers.
        first: the rule of layers that read the network's input; None means "as its kind".
        layers: (pattern, rule) pairs; a pattern is a layer name as `plan()` prints it, or a glob ("layer1.*");
            the first match wins.
    """

    conv: Rule = Epsilon()
    linear: Rule = Epsilon()
    first: Rule | None = None
    layers: tuple[tuple[str, Rule], ...] = ()

    def __post_init__(self) -> None:
        for where, rule in (("conv", self.conv), ("linear", self.linear), ("first", self.first), *self.layers):
            if not isinstance(where, str):
                raise TypeError(f"rules: a layer's name must be a str, got {type(where).__name__}")
            if not isinstance(rule, RULES) and not (where == "first" and rule is None):
                names = ", ".join(r.__name__ for r in RULES)
                raise TypeError(f"rules: {where!r} must be one of {names}, got {rule!r}")

    def named(self, name: str) -> Rule | None:
        """The rule that `layers` gives the layer ``name``, or None."""
        for pattern, rule in self.layers:
            if name == pattern or fnmatch.fnmatchcase(name, pattern):
                return rule
        return None

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns of `layers` that match none of ``names``: most likely typing errors."""
        return [p for p, _ in self.layers if not any(n == p or fnmatch.fnmatchcase(n, p) for n in names)]


def presets() -> dict[str, RuleMap]:
    """The named rule maps; the ones that zennit also has carry zennit's names.

    >>> sorted(presets())[:3]
    ['alpha2_beta1', 'epsilon', 'epsilon_alpha2_beta1']
    """
    return {
        "epsilon": RuleMap(),
        "zplus": RuleMap(conv=ZPlus(), linear=ZPlus()),
        "alpha2_beta1": RuleMap(conv=AlphaBeta(), linear=AlphaBeta()),
        "gradient_x_input": RuleMap(conv=Epsilon(0.0), linear=Epsilon(0.0)),
        "epsilon_plus": RuleMap(conv=ZPlus(), linear=Epsilon()),
        "epsilon_plus_flat": RuleMap(conv=ZPlus(), linear=Epsilon(), first=Flat()),
        "epsilon_alpha2_beta1": RuleMap(conv=AlphaBeta(), linear=Epsilon()),
        "epsilon_alpha2_beta1_flat": RuleMap(conv=AlphaBeta(), linear=Epsilon(), first=Flat()),
        "epsilon_gamma_box": RuleMap(conv=Gamma(), linear=Epsilon(), first=ZB()),
        "epsilon_gamma_w2": RuleMap(conv=Gamma(), linear=Epsilon(), first=WSquare()),
    }


def resolve(rules: RuleMap | Rule | str | Mapping[str, Rule] | None, default: RuleMap = RuleMap()) -> RuleMap:
    """Turn what users write for ``rules=`` into a `RuleMap`.

    Args:
        rules: None (``default``), a `RuleMap`, one rule for every layer, a preset's name, or a mapping from layer names
            or globs to rules, which overrides ``default``; its keys "conv", "linear" and "first" set the kinds' rules.

    Raises:
        TypeError, ValueError: for anything else, naming what was given and what is allowed.
    """
    if rules is None:
        return default
    if isinstance(rules, RuleMap):
        return rules
    if isinstance(rules, ZB):
        return replace(default, first=rules)
    if isinstance(rules, RULES):
        return replace(default, conv=rules, linear=rules)
    if isinstance(rules, str):
        known = presets()
        if rules not in known:
            raise ValueError(f"rules: unknown preset {rules!r}; the presets are {', '.join(sorted(known))}")
        return known[rules]
    if isinstance(rules, Mapping):
        kinds = {k: rules[k] for k in ("conv", "linear", "first") if k in rules}
        layers = tuple((k, r) for k, r in rules.items() if k not in kinds)
        return replace(default, **kinds, layers=layers + default.layers)
    raise TypeError(
        f"rules must be a rule, a preset's name, a mapping {{layer: rule}} or a RuleMap, got {type(rules).__name__}"
    )
