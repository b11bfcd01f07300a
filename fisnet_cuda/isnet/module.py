"""`ISNet`: a classifier and its relevance program in one module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .._backend import check_backend
from ..errors import FisnetWarning
from ..graph import Plan, Program, StreamSpec, build_graphs
from ..ops.linear_maps import _autocasting
from ..rules import ZB, Epsilon, Rule, RuleMap, ZPlus, resolve
from .variants import SELECT, VARIANTS, draw_class, draw_contrast, eta_gradient, one_hot, select_class

CHECKS = ("first", "always", "never")
Bound = float | Iterable[float] | Tensor


class ISNetOutput(NamedTuple):
    """What ``net(x, relevance=True)`` returns.

    Attributes:
        logits: ``[N, C]``, exactly the model's.
        heatmaps: relevance of the input, ``[N, K, C_in, *size]``, in the unit of the explained quantity; it sums over
            pixels to about that quantity (minus what biases and epsilon took).
        hidden: layer name -> ``[N, K, ...]``, the inner maps of ``supervise``.
        explained: class index of each map ``[N, K]``, int64; -1 means all classes.
    """

    logits: Tensor
    heatmaps: Tensor
    hidden: dict[str, Tensor]
    explained: Tensor


class ISNet(nn.Module):
    """A classifier that explains itself while it is trained: logits and LRP heatmaps from one forward.

    Relevance is an ordinary forward computation with an ordinary first-order backward, so a heatmap loss trains with one
    plain ``loss.backward()``. The model is used as it is: its parameters, buffers, modes and ``state_dict`` keys stay the
    user's own, and nothing is left on it.

    ==============  ===  ==============================================================================================
    variant         K    explained (Faster ISNet, arXiv 2401.08409; semantics.md section 3)
    ==============  ===  ==============================================================================================
    "original"      C    every class's logit: cost grows with the classes (ISNet, Nature Communications 15:291, 2024)
    "selective"     1    eta of the lowest logit's class, ``log(P_c + t) - log(1 - P_c + t)``
    "stochastic"    1    the top logit or, with probability 1/2, another one, drawn for each sample
    "dual"          2    all logits at once: map 0 by z+, map 1 by epsilon
    "contrast"      1    a random contrast of the logits, ``v . logits``, drawn for each sample: ours, in neither paper
    ==============  ===  ==============================================================================================

    Contrast: ``v`` is uniform among the unit vectors with zero sum, all that softmax depends on; with two classes, which have but one
    of those, among all unit vectors. Its map is ``sum_c v_c R_c`` over the maps of the classes, and the square of it an unbiased
    estimate of ``sum_c (R_c - mean R)^2 / (C - 1)``, of ``(R_0^2 + R_1^2) / 2`` with two classes: one map a step speaks for all
    classes, where Stochastic sees one of them. See `variants.draw_contrast`.

    Args:
        model: a classifier ``[N, C_in, ...] -> logits [N, C]`` of supported layers (``fisnet_cuda.supported()``).
        variant: "original", "selective", "stochastic", "dual" or "contrast".
        eps: epsilon of the epsilon rule (absolute, in units of a pre-activation), or an `Epsilon` rule, for instance
            ``Epsilon(1e-2, relative=True)``. z^B and Dual's z+ map use the same number, beside a relative one 0.01.
        eta_eps: ``t`` of Selective's eta.
        select: Selective's class: "lowest", "random" (any but the top) or "top".
        first_layer: "zb" for inputs with bounds (images), "epsilon" for any input.
        input_low, input_high: bounds of the input for "zb": a number, or one per channel (after normalisation).
        supervise: names of layers whose inner maps are wanted too (deep supervision): module paths or names from `plan`.
        rules: overrides the rules of the epsilon map: a rule, a preset's name, a mapping {layer: rule} or a `RuleMap`.
        backend: "auto" (by the tensors' device), "reference" or "cuda".
        generator: for the random draws of "stochastic", "contrast" and ``select="random"``; lives on the logits' device.
        multilabel: the head has independent sigmoid outputs: "selective" explains logits instead of eta, and "contrast" draws
            ``v`` from all unit vectors.
        example_input: one batch of the right shape; only for models that need torch.export to be traced.
        max_map_bytes: memory that the maps of one chunk may take ("original" folds classes into the batch, in chunks);
            None folds all of them at once. With gradients, each chunk is recomputed in the backward to keep the bound.
        check: when to look at values (non-finite inputs, inputs beyond the bounds), which needs a host sync: on the
            "first" call with relevance, "always" or "never".

    Raises:
        UnsupportedModelError: the model cannot be traced, or holds an op without a rule; names the module path and remedy.
        TypeError, ValueError: an argument is wrong; names it.

    Example:
        >>> import torch, fisnet_cuda as fc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...                             torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> out = fc.ISNet(model, variant="dual")(torch.rand(5, 3, 8, 8), relevance=True)
        >>> out.logits.shape, out.heatmaps.shape, out.explained[0]
        (torch.Size([5, 2]), torch.Size([5, 2, 3, 8, 8]), tensor([-1, -1]))
    """

    def __init__(
        self,
        model: nn.Module,
        variant: str = "selective",
        *,
        eps: float | Epsilon = 1e-2,
        eta_eps: float = 1e-2,
        select: str = "lowest",
        first_layer: str = "zb",
        input_low: Bound = 0.0,
        input_high: Bound = 1.0,
        supervise: Iterable[str] = (),
        rules: RuleMap | Rule | str | Mapping[str, Rule] | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        multilabel: bool = False,
        example_input: Tensor | None = None,
        max_map_bytes: int | None = 2**30,
        check: str = "first",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _one_of("variant", variant, VARIANTS)
        _one_of("select", select, SELECT)
        _one_of("first_layer", first_layer, ("zb", "epsilon"))
        _one_of("check", check, CHECKS)
        check_backend(backend)
        if isinstance(eta_eps, bool) or not isinstance(eta_eps, (int, float)) or not 0 < eta_eps < math.inf:
            raise ValueError(f"eta_eps must be a number > 0, got {eta_eps!r}")
        if max_map_bytes is not None and max_map_bytes <= 0:
            raise ValueError(f"max_map_bytes must be > 0 or None, got {max_map_bytes}")
        if isinstance(supervise, str):
            raise TypeError(f"supervise must be a sequence of names, got one str: write supervise=({supervise!r},)")
        epsilon = eps if isinstance(eps, Epsilon) else Epsilon(eps)
        first = ZB(_bound("input_low", input_low), _bound("input_high", input_high), epsilon.eps if not epsilon.relative else 1e-2)

        self.model = model
        self.variant, self.select, self.eta_eps, self.multilabel = variant, select, float(eta_eps), bool(multilabel)
        self.generator, self.check, self.max_map_bytes = generator, check, max_map_bytes
        self.supervise = tuple(supervise)
        first_rule = first if first_layer == "zb" else None
        base = resolve(rules, RuleMap(conv=epsilon, linear=epsilon, first=first_rule))
        specs = [StreamSpec("epsilon", base)]
        if variant == "dual":
            plus = ZPlus(epsilon.eps if not epsilon.relative else 1e-2)
            specs.insert(0, StreamSpec("z+", RuleMap(conv=plus, linear=plus, first=first_rule), from_all=True))
        target_specs = (StreamSpec("epsilon", base),)

        graphs = build_graphs(model, example_input)
        made: dict[int, tuple[Program, Program]] = {}
        for graph in graphs.values():
            if id(graph) not in made:
                main = Program(graph, tuple(specs), self.supervise, backend)
                one = main if variant != "dual" else Program(graph, target_specs, self.supervise, backend)
                made[id(graph)] = (main, one)
        self._programs = {mode: made[id(graph)] for mode, graph in graphs.items()}
        self._bounds = (first.low, first.high) if first_layer == "zb" else None
        self._backend = backend
        self._checked = False

    # ---- running -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, relevance: bool = False, target: Tensor | int | None = None) -> Tensor | ISNetOutput:
        """Logits, or logits with heatmaps.

        Args:
            x: input ``[N, C_in, ...]``.
            relevance: also explain; returns an `ISNetOutput`.
            target: explain these classes' logits instead of what the variant explains: ``[N]``, ``[N, K]`` or one int.

        Returns:
            The model's logits ``[N, C]``, or an `ISNetOutput`.

        Raises:
            TypeError, ValueError: ``x`` or ``target`` has a wrong type, shape, dtype or device.
        """
        if not relevance:
            if target is not None:
                raise ValueError("target= says what to explain: pass relevance=True with it")
            return self.model(x)
        return self._explain(x, target, None)

    def _explain(self, x: Tensor, target: Tensor | int | None, training: bool | None) -> ISNetOutput:
        look = self._check_input(x)
        mode = self.model.training if training is None else training
        main, one = self._programs[mode]
        program = main if target is None else one
        env = program.run_forward(self.model, x, training)
        logits = env[program.lowered.logits]
        if logits.dim() != 2:
            raise ValueError(f"the model must return logits [N, C], got a tensor {tuple(logits.shape)}")
        explained, starts = self._starts(logits, target, look)
        if look:
            self._checked = True  # a failed check is made again
        chunk = self._chunk(env[: program.lowered.slots], explained.shape[1]) if len(program.specs) == 1 else explained.shape[1]
        if chunk >= explained.shape[1]:
            heatmaps, hidden = self._relevance(program, env, starts)
        else:
            heatmaps, hidden = self._in_chunks(program, env, starts["epsilon"], chunk)
        return ISNetOutput(logits, heatmaps, hidden, explained)

    def _starts(
        self, logits: Tensor, target: Tensor | int | None, look: bool
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """``(explained [N, K], stream -> relevance per unit of the logits [N, K, C])``; ``look``: values may be looked at."""
        n, classes = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        if target is not None:
            index = self._target(target, logits, look)
            return index, {"epsilon": one_hot(index, classes, wide)}
        if self.variant == "dual":
            everything = torch.full((n, 2), -1, device=logits.device, dtype=torch.long)
            return everything, {"z+": None, "epsilon": logits.new_ones(n, 1, classes, dtype=wide)}
        detached = logits.detach()
        if self.variant == "contrast":
            everything = torch.full((n, 1), -1, device=logits.device, dtype=torch.long)
            return everything, {"epsilon": draw_contrast(detached, self.multilabel, self.generator).unsqueeze(1)}
        if self.variant == "original":
            index = torch.arange(classes, device=logits.device).expand(n, classes)
        elif self.variant == "selective":
            index = select_class(detached, self.select, self.generator).unsqueeze(1)
        else:
            index = draw_class(detached, self.generator).unsqueeze(1)
        # eta of the only class is a constant: its logit is explained instead
        if self.variant == "selective" and not self.multilabel and classes > 1:
            return index, {"epsilon": eta_gradient(logits, index, self.eta_eps, self._backend)}
        return index, {"epsilon": one_hot(index, classes, wide)}

    def _relevance(
        self, program: Program, env: list[Any], starts: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        n = env[program.lowered.logits].shape[0]
        folded = {name: None if g is None else g.flatten(0, 1) for name, g in starts.items()}
        env = program.run_relevance(env, folded)
        lowered = program.lowered

        def maps(slots: Mapping[str, int]) -> Tensor:
            names = [spec.name for spec in program.specs if spec.name in slots]
            parts = [env[slots[name]].unflatten(0, (n, 1 if starts[name] is None else starts[name].shape[1])) for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        return maps(lowered.heatmaps), {name: maps(slots) for name, slots in lowered.hidden.items()}

    def _in_chunks(
        self, program: Program, env: list[Any], g: Tensor, chunk: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Original's classes in parts. With gradients each part is computed again in the backward, so that the bound holds
        there too."""

        def run(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self._relevance(program, list(env), {"epsilon": part})  # a copy: every part needs the forward's values

        results = []
        for part in g.split(chunk, 1):
            if torch.is_grad_enabled():
                results.append(torch.utils.checkpoint.checkpoint(run, part, use_reentrant=False, preserve_rng_state=False))
            else:
                results.append(run(part))
        heatmaps = torch.cat([h for h, _ in results], 1)
        return heatmaps, {name: torch.cat([h[name] for _, h in results], 1) for name in results[0][1]}

    def _chunk(self, env: list[Any], maps: int) -> int:
        """How many maps a sample may be computed at once: one takes about twice the memory of the activations kept for it
        (``g`` and ``s`` beside every ``a``)."""
        if self.max_map_bytes is None or maps == 1:
            return maps
        kept = sum(v.numel() * v.element_size() for v in env if isinstance(v, Tensor) and v.dim() > 1)
        return max(1, min(maps, self.max_map_bytes // max(2 * kept, 1)))

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _target(self, target: Tensor | int, logits: Tensor, look: bool) -> Tensor:
        n, classes = logits.shape
        if isinstance(target, bool) or not isinstance(target, (int, Tensor)):
            raise TypeError(f"target must be an int or an integer tensor [N] or [N, K], got {type(target).__name__}")
        if isinstance(target, int):
            if not 0 <= target < classes:
                raise ValueError(f"target is {target} and the model has {classes} classes")
            return torch.full((n, 1), target, device=logits.device, dtype=torch.long)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target must hold class indices (int64), got {target.dtype}")
        if target.dim() not in (1, 2) or target.shape[0] != n:
            raise ValueError(f"target must be [N] or [N, K] with N={n}, got {tuple(target.shape)}")
        if target.device != logits.device:
            raise ValueError(f"target is on {target.device} and the logits are on {logits.device}: move target")
        if look and target.numel():
            low, high = target.min().item(), target.max().item()
            if low < 0 or high >= classes:
                raise ValueError(f"target holds {low if low < 0 else high} and the model has {classes} classes: 0 to {classes - 1}")
        return (target if target.dim() == 2 else target.unsqueeze(1)).long()

    def _check_input(self, x: Tensor) -> bool:
        """Raises or warns of what is wrong with ``x``; says whether this call looks at values."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor [N, C_in, ...], got {type(x).__name__}")
        if x.dim() < 2:
            raise ValueError(f"x must be [N, C_in, ...], got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}: convert it, x.float() (and scale images to [0, 1])")
        parameter = next(self.model.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"x is on {x.device} and the model is on {parameter.device}: move one of them")
        if self.check == "never" or (self.check == "first" and self._checked) or not _readable(x):
            return False
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if len(dtypes) == 1 and x.dtype not in dtypes and not _autocasting(x):
            (dtype,) = dtypes
            raise TypeError(f"x is {x.dtype} and the model is {dtype}: convert one of them, x.to({dtype})")
        if x.numel() and not bool(torch.isfinite(x).all()):
            raise ValueError("x holds NaN or infinity: clean the input (or pass check='never')")
        if self._bounds is None or not x.numel():
            return True
        shape = (1, -1, *[1] * (x.dim() - 2))
        for name, bound in zip(("input_low", "input_high"), self._bounds):
            if isinstance(bound, tuple) and len(bound) != x.shape[1]:
                raise ValueError(f"{name} has {len(bound)} channels and the input has {x.shape[1]}: give 1 or {x.shape[1]}")
        low, high = (x.new_tensor(b if isinstance(b, tuple) else (b,)).view(shape) for b in self._bounds)
        slack = 1e-3 * (high - low)
        outside = ((x < low - slack) | (x > high + slack)).sum().item()
        if outside:
            warnings.warn(
                f"{outside} of {x.numel()} input values lie outside input_low={self._bounds[0]}, input_high="
                f"{self._bounds[1]} (seen {x.min().item():.3g} to {x.max().item():.3g}): the z^B rule needs the true bounds. "
                "For normalised inputs pass (0 - mean)/std and (1 - mean)/std per channel, or use first_layer='epsilon'.",
                FisnetWarning,
                stacklevel=6,  # the line that calls the network, through torch's Module.__call__
            )
        return True

    # ---- looking, saving ---------------------------------------------------------------------------------------------

    def plan(self, device: torch.device | str | None = None) -> Plan:
        """Layer -> forward ops, relevance ops, rule, kernel, in forward order; ``print`` it.

        Args:
            device: where it would run, for the kernel column; the model's own by default.
        """
        parameter = next(self.model.parameters(), None)
        where = torch.device(device) if device is not None else parameter.device if parameter is not None else None
        return self._programs[self.model.training][0].plan(where)

    def layers(self) -> list[str]:
        """The names that ``supervise=`` and ``rules=`` accept: modules with an output, and layers of the plan."""
        graph = self._programs[self.model.training][0].graph
        names = [*graph.module_outputs, *(n.name for n in graph.nodes if n.kind not in ("input", "host"))]
        return list(dict.fromkeys(names))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The user's model's own ``state_dict``: same keys, no prefix."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a ``state_dict`` of the user's model."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # inside another module: its keys come without "model.", as `state_dict` writes them
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        state_dict.update({f"{prefix}model.{key[len(prefix):]}": value for key, value in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, supervise={self.supervise}"


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at here: not while compiling, faking or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _bound(name: str, bound: Bound) -> float | tuple[float, ...]:
    if isinstance(bound, Tensor):
        bound = bound.flatten().tolist()
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        return float(bound)
    try:
        values = None if isinstance(bound, str) else tuple(float(v) for v in bound)
    except TypeError:
        values = None
    if not values:
        raise TypeError(f"{name} must be a number or one number per channel, got {type(bound).__name__}")
    return values[0] if len(values) == 1 else values
