"""The third implementation: LRP on explicit layer matrices, written from the papers and semantics.md.

It imports nothing of fisnet_cuda, runs in float64, is slow, meant for a few thousand units a layer. All of
it is differentiable by plain autograd, to any order: use `torch.autograd.grad` on a map or a loss.

One layer. Matrix `W [out, in]` (or one a sample, `[N, out, in]`), bias `b [out]`, input `a [..., in]`,
relevance `R [..., out]`; every rule returns the relevance of the input, `[..., in]`:
    epsilon(W, b, a, R, e)         zplus(W, b, a, R, e)        zb(W, b, x, R, low, high, e), bounds [in]
    gamma(W, b, a, R, gamma, e)    alpha_beta(W, b, a, R, alpha, beta, e)
    w2(W, b, a, R, e)              flat(W, b, a, R, e), with W = connectivity(module, shape)
    matrix(fn, shape) -> W of a linear fn of one sample; layer_matrix(module, shape) -> W, b

Networks. `net = Net([(name, what, inputs), ...])` in topological order; the input is called "x", the last op
gives the logits. `what`: a torch module (conv, linear, norm, ReLU, pool, Flatten, Identity, Dropout in eval
mode), one of "relu" "add" "concat" "flatten" "identity", a tensor (a dropout's mask, multiplied), or any
callable that is a linear map (pad, upsample, mean). `inputs`: a name or a tuple of names. `Net.chain(module)`
takes the leaves of a sequential module, `golden_nets.ops(name, model)` gives the graph of a golden network,
`net.run(x)` -> {name: value}.
    out = explain_epsilon(net, x, start, eps=0.01, first_layer="zb" | "epsilon", low=0, high=1,
                          relative=False, relative_zb=False, hidden=())
    out = explain_zplus(net, x, eps=0.01, first_layer="zb" | "zplus", low=0, high=1, hidden=())
    out = explain_rules(net, x, R_start, {op name: (rule name, parameters)}, hidden=())
    out.logits [N, C]; out.heatmaps [N, K, *x.shape[1:]]; out.hidden {op name: relevance [N, K, ...] there}
`start`: g at the logits, `[N, K, C]`, or a function of the logits: `selective(t, c)`, `classes(c)` (drawn by
Stochastic, or labels), `original`, `all_logits`. Dual is explain_zplus beside explain_epsilon of all_logits.

Loss. gwrp(values, d), and heatmap_loss(R, mask, c1, c2, ...) -> background [N], foreground [N].
"""

import copy
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

# ------------------------------------------------------------------------------------------------------------
# One layer. `@` broadcasts over leading dimensions, `.mT` is the transpose.


def stabilise(z, e):
    """`z + e sign(z)` with sign(0) = +1."""
    return z + e * torch.where(z >= 0, 1.0, -1.0).to(z)


def ratio(R, z):
    """`R / z`, and 0 where z is 0: only with e = 0, and such a unit has nothing to hand on."""
    return torch.where(z == 0, 0.0, R / torch.where(z == 0, 1.0, z))


def pos(t):
    return t.clamp(min=0)


def neg(t):
    return t.clamp(max=0)


def epsilon(W, b, a, R, e):
    """LRP-epsilon (Bach et al. 2015, eq. 58): `R_j = a_j sum_k W_kj R_k / (z_k + e sign z_k)`."""
    z = a @ W.mT + b
    return a * (ratio(R, stabilise(z, e)) @ W)


def alpha_beta(W, b, a, R, alpha, beta, e):
    """LRP-alpha-beta (Bach et al. 2015, eq. 60): positive and negative contributions `W_kj a_j` apart."""
    z_pos = pos(a) @ pos(W).mT + neg(a) @ neg(W).mT + pos(b)
    z_neg = pos(a) @ neg(W).mT + neg(a) @ pos(W).mT + neg(b)
    s_pos, s_neg = ratio(R, z_pos + e), ratio(R, z_neg - e)
    R_pos = pos(a) * (s_pos @ pos(W)) + neg(a) * (s_pos @ neg(W))
    R_neg = pos(a) * (s_neg @ neg(W)) + neg(a) * (s_neg @ pos(W))
    return alpha * R_pos - beta * R_neg


def zplus(W, b, a, R, e):
    """The z+ rule (Montavon et al. 2017), for signed inputs alpha = 1, beta = 0: semantics.md section 4."""
    z = pos(a) @ pos(W).mT + neg(a) @ neg(W).mT + pos(b) + e
    s = ratio(R, z)
    return pos(a) * (s @ pos(W)) + neg(a) * (s @ neg(W))


def zb(W, b, x, R, low, high, e):
    """The z^B rule (Montavon et al. 2017) for `low <= x <= high`: semantics.md, section 2.

    The constant images low and high are 0 in the padding because the padding is inside W. The bias is an
    input that no pixel owns; it takes the widest bounds.
    """
    low, high = low.expand_as(x), high.expand_as(x)
    z_low = low @ pos(W).mT + low.min() * pos(b)
    z_high = high @ neg(W).mT + high.max() * neg(b)
    s = ratio(R, stabilise(x @ W.mT + b - z_low - z_high, e))
    return x * (s @ W) - low * (s @ pos(W)) - high * (s @ neg(W))


def gamma(W, b, a, R, gamma, e):
    """LRP-gamma (Montavon et al. 2019), generalised to signed inputs and outputs as in zennit's Gamma.

    Contributions of the sign of z count `1 + gamma` fold; z = 0 is taken as positive, as in `stabilise`.
    """
    z = a @ W.mT + b
    W_pos, W_neg = W + gamma * pos(W), W + gamma * neg(W)
    z_pos = pos(a) @ W_pos.mT + neg(a) @ W_neg.mT + b + gamma * pos(b)
    z_neg = pos(a) @ W_neg.mT + neg(a) @ W_pos.mT + b + gamma * neg(b)
    s_pos = torch.where(z >= 0, ratio(R, stabilise(z_pos, e)), 0.0)
    s_neg = torch.where(z < 0, ratio(R, stabilise(z_neg, e)), 0.0)
    return pos(a) * (s_pos @ W_pos + s_neg @ W_neg) + neg(a) * (s_pos @ W_neg + s_neg @ W_pos)


def w2(W, b, a, R, e):
    """The w^2 rule (Montavon et al. 2017): `R_j = sum_k W_kj^2 R_k / (sum_j' W_kj'^2 + e)`; no bias."""
    return ratio(R, torch.ones_like(a) @ W.square().mT + e) @ W.square()


def flat(W, b, a, R, e):
    """The flat rule (Lapuschkin et al. 2019): every connected input alike; W is 0 / 1, see `connectivity`."""
    return ratio(R, torch.ones_like(a) @ W.mT + e) @ W


RULES = {f.__name__: f for f in (epsilon, alpha_beta, zplus, zb, gamma, w2, flat)}

# Rules for which the relevance pass takes biases and beta as constants (sections 2 and 4; alpha_beta contains
# z+). Epsilon and gamma divide by the forward's own z: biases get their gradient through it, as in section 1.
CONSTANT_BIAS = ("zplus", "zb", "alpha_beta")


def matrix(fn, shape):
    """The matrix `[out, in]` of a linear map of one sample of this shape: its images of the identity."""
    eye = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return fn(eye.reshape(-1, *shape)).reshape(len(eye), -1).mT


def layer_matrix(module, shape):
    """`W [out, in], b [out]` of a conv or linear module, or of a linear map without parameters."""
    if getattr(module, "bias", None) is None:
        W = matrix(module, shape)
        return W, W.new_zeros(len(W))
    no_bias = {"bias": torch.zeros_like(module.bias)}
    W = matrix(lambda v: functional_call(module, no_bias, (v,)), shape)
    return W, module(W.new_zeros(1, *shape)).flatten()


def connectivity(module, shape):
    """1 where the module has a weight between an input and an output, 0 elsewhere (even if it is 0)."""
    if getattr(module, "weight", None) is None:
        return (matrix(module, shape) != 0).double()
    ones = {k: torch.full_like(p, float(k == "weight")) for k, p in module.named_parameters()}
    return (matrix(lambda v: functional_call(module, ones, (v,)), shape) != 0).double()


def winners(pool, v):
    """One 0 / 1 matrix a sample, `[N, out, in]`: which input a max pool hands on (of equals the first)."""
    pool = copy.copy(pool)
    pool.return_indices = True
    index = pool(v)[1].flatten(2)  # [N, C, out pixels], counted within a channel
    index = index + torch.arange(v.shape[1])[:, None] * v[0, 0].numel()
    return F.one_hot(index.flatten(1), v[0].numel()).to(v)


def normalisation(module, v):
    """`mean, var, scale, shift` of a norm layer, broadcastable against v; nothing is detached.

    The statistics are those the forward uses: running ones, or biased ones of v (for BatchNorm the batch's).
    """
    features = (-1,) + (1,) * (v.dim() - 2)
    if isinstance(module, nn.LayerNorm):
        features = module.normalized_shape
        dims = tuple(range(v.dim() - len(features), v.dim()))
        mean, var = v.mean(dims, keepdim=True), v.var(dims, unbiased=False, keepdim=True)
    elif isinstance(module, nn.GroupNorm):
        groups = v.reshape(len(v), module.num_groups, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        mean, var = (t.expand_as(groups).reshape(v.shape) for t in (mean, var))
    elif module.training or module.running_mean is None:
        dims = (0, *range(2, v.dim()))
        mean, var = v.mean(dims, keepdim=True), v.var(dims, unbiased=False, keepdim=True)
    else:
        mean, var = module.running_mean.reshape(features), module.running_var.reshape(features)
    if module.weight is None:
        return mean, var, v.new_ones(()), v.new_zeros(())
    return mean, var, module.weight.reshape(features), module.bias.reshape(features)


# ------------------------------------------------------------------------------------------------------------
# Networks. Inside the explain functions a value, and what belongs to it, is flat: `[N, K, D]`, activations
# with K = 1.


class Op(NamedTuple):
    name: str
    what: Any
    inputs: tuple

    @property
    def kind(self):
        """map (linear, has a matrix), norm, relu, mask, concat, or same (identity and reshapes)."""
        what = self.what
        if isinstance(what, str):
            return {"add": "map", "flatten": "same", "identity": "same"}.get(what, what)
        if isinstance(what, torch.Tensor):
            return "mask"
        if isinstance(what, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            return "norm"
        if isinstance(what, nn.ReLU):
            return "relu"
        if isinstance(what, nn.modules.dropout._DropoutNd):
            if what.training:
                raise ValueError(f"{self.name}: give a dropout in train mode as the tensor of its mask")
            return "same"
        return "same" if isinstance(what, nn.Flatten | nn.Identity) else "map"


class Net:
    """A directed acyclic graph of `Op`s: see the head of this file."""

    def __init__(self, ops):
        self.ops = [Op(n, what, (i,) if isinstance(i, str) else tuple(i)) for n, what, i in ops]
        self.out = self.ops[-1].name
        self.op = {op.name: op for op in self.ops}
        self.consumers = defaultdict(list)
        for op in self.ops:
            for name in op.inputs:
                self.consumers[name].append(op)

    @classmethod
    def chain(cls, module):
        leaves = [(name, m) for name, m in module.named_modules() if not list(m.children())]
        before = ["x", *(name for name, _ in leaves)]
        return cls([(name, m, before[i]) for i, (name, m) in enumerate(leaves)])

    def run(self, x):
        """Every value of the forward pass, `{name: [N, ...]}`; running statistics are left alone."""
        values = {"x": x}
        for op in self.ops:
            v = values[op.inputs[0]]
            if op.kind == "norm":
                mean, var, scale, shift = normalisation(op.what, v)
                v = (v - mean) / torch.sqrt(var + op.what.eps) * scale + shift
            elif op.kind == "relu":
                v = v.relu()
            elif op.kind == "mask":
                v = v * op.what
            elif op.what == "add":
                v = sum(values[name] for name in op.inputs)
            elif op.what == "concat":
                v = torch.cat([values[name] for name in op.inputs], 1)
            elif op.what == "flatten":
                v = v.flatten(1)
            elif op.what != "identity":
                v = op.what(v)
            values[op.name] = v
        return values

    def layer(self, op, values, connected=False):
        """`W, b, a` of a map: its matrix on all its inputs side by side, which are `a [N, 1, in]`."""
        a = torch.cat([flatten(values[name]) for name in op.inputs], -1)
        v = values[op.inputs[0]]
        if op.what == "add":
            W = torch.eye(v[0].numel(), dtype=a.dtype).repeat(1, len(op.inputs))
        elif isinstance(op.what, nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
            W = winners(op.what, v)
        else:
            W, b = layer_matrix(op.what, v.shape[1:])
            return connectivity(op.what, v.shape[1:]) if connected else W, b, a
        return W, W.new_zeros(W.shape[-2]), a

    def affine(self, op, values):
        """`k, shift, shift0` of a norm layer, `v -> k v + shift` elementwise: `[D]`, or `[N, 1, D]`.

        Statistics are constants of the relevance pass (section 1, ours); in shift0 beta is one too.
        """
        v = values[op.inputs[0]]
        mean, var, scale, beta = normalisation(op.what, v)
        k = scale / torch.sqrt(var.detach() + op.what.eps)
        terms = k, beta - mean.detach() * k, beta.detach() - mean.detach() * k
        if isinstance(op.what, nn.modules.batchnorm._BatchNorm):
            return tuple(t.expand(1, *v.shape[1:]).flatten() for t in terms)
        return tuple(flatten(t.expand_as(v)) for t in terms)

    def split(self, op, values, t):
        """A concat's `t [..., D]`, or what belongs to an add's inputs side by side, one part an input."""
        shapes = [values[name].shape[1:] for name in op.inputs]
        if op.what != "concat":
            return t.split([shape.numel() for shape in shapes], -1)
        n = len(shapes[0])
        parts = t.unflatten(-1, values[op.name].shape[1:]).split([shape[0] for shape in shapes], -n)
        return [part.flatten(-n) for part in parts]


class Explanation(NamedTuple):
    logits: torch.Tensor  # [N, C]
    heatmaps: torch.Tensor  # [N, K, *x.shape[1:]]
    hidden: dict  # {name: [N, K, ...]}


def flatten(v):
    return v.reshape(len(v), 1, -1)


def like(R, v):
    """Relevance `[N, K, D]` in the shape of the value v it belongs to."""
    return R.unflatten(-1, v.shape[1:])


def rms(v):
    """`[N, 1, 1]`: the root mean square over each sample, a constant for the gradient."""
    return flatten(v).detach().square().mean(-1, keepdim=True).sqrt()


def fold(W, b, k, shift):
    """The matrix and bias of `v -> k v + shift` after `W, b`."""
    return (k[:, None] if k.dim() == 1 else k.mT) * W, k * b + shift


def image(bound, shape):
    """A bound (a number, or one a channel) as a flat constant image."""
    bound = torch.as_tensor(bound, dtype=torch.float64)
    return bound.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).flatten()


# ------------------------------------------------------------------------------------------------------------
# What is explained (section 3): functions of the logits that return g = d quantity / d logits, [N, K, C].


def eta(logits, c, t=1e-2):
    """`log(P_c + t) - log(1 - P_c + t)` for the class c `[N]`, P the softmax."""
    P = logits.softmax(1).gather(1, c[:, None])[:, 0]
    return torch.log(P + t) - torch.log(1 - P + t)


def selective(t=1e-2, c=None):
    """Selective: eta of the class c `[N]`, by default the lowest logit's; g depends on the logits."""

    def start(logits):
        logits = logits if logits.requires_grad else logits.detach().requires_grad_()
        quantity = eta(logits, logits.argmin(1) if c is None else c, t).sum()
        return torch.autograd.grad(quantity, logits, create_graph=True)[0][:, None]

    return start


def classes(c):
    """The logits of the given classes, `[N]` or `[N, K]`."""
    return lambda logits: F.one_hot(c.reshape(len(logits), -1), logits.shape[1]).to(logits)


def original(logits):
    """One map a class."""
    return torch.eye(logits.shape[1], dtype=logits.dtype).expand(len(logits), -1, -1)


def all_logits(logits):
    """One map of all logits at once."""
    return torch.ones_like(logits)[:, None]


# ------------------------------------------------------------------------------------------------------------
# Whole networks.


def first_layers(net):
    """`{end: (map, norm or None)}` of the maps that read the input; the end is the ReLU behind map and norm.

    Without a ReLU, or where another op looks at a value in between, the end is the last value before that.
    """
    found = {}
    for op in net.ops:
        if op.inputs == ("x",) and op.kind == "map":
            end, norm = op, None
            while end.kind != "relu" and len(net.consumers[end.name]) == 1:
                after = net.consumers[end.name][0]
                if after.kind not in ("norm", "relu", "same") or (after.kind == "norm" and norm):
                    break
                end, norm = after, after if after.kind == "norm" else norm
            found[end.name] = op, norm
    return found


def explain_epsilon(
    net, x, start, eps=0.01, first_layer="zb", low=0.0, high=1.0, relative=False, relative_zb=False, hidden=()
):
    """LRP-epsilon (section 1), with z^B in the first layer (section 2) or without.

    Between ReLUs a network is affine (a max pool chooses inputs, a norm layer scales). The relevance R_k of a
    ReLU's output is handed on as `R_k / (z_k + e sign z_k)`, once, through the transposes of all that lies in
    front of it, to the ReLU outputs a_j there, where R_j is a_j times all that arrives. Where no ReLU is
    there is no epsilon.

    relative: e = eps rms(ReLU output) in the ReLUs; relative_zb: the same in z^B (first ReLU's output).
    """
    values = net.run(x)
    logits = values[net.out]
    arrived = defaultdict(int)  # at each value; relevance = value * what arrived
    arrived[net.out] = start(logits) if callable(start) else start
    first = first_layers(net) if first_layer == "zb" else {}
    R_x = 0
    for op in reversed(net.ops):
        if op.name not in arrived:
            continue  # inside the first layer, or without a path to the logits
        y, g = flatten(values[op.name]), arrived[op.name]
        if op.name in first:
            conv, norm = first[op.name]
            W, b, a = net.layer(conv, values)
            b = b.detach()
            if norm is not None:
                k, _, shift0 = net.affine(norm, values)
                W, b = fold(W, b, k, shift0)
            bounds = image(low, x.shape[1:]), image(high, x.shape[1:])
            R_x = R_x + zb(W, b, a, y * g, *bounds, eps * rms(y) if relative_zb else eps)
            continue
        if op.kind == "relu":
            z = flatten(values[op.inputs[0]])
            g = ratio(y * g, stabilise(z, eps * rms(y) if relative else eps))
        elif op.kind == "norm":
            g = net.affine(op, values)[0] * g
        elif op.kind == "mask":
            g = flatten(op.what.expand_as(values[op.name])) * g
        elif op.kind == "map":
            g = g @ net.layer(op, values)[0]
        shares = net.split(op, values, g) if len(op.inputs) > 1 else [g]
        for name, share in zip(op.inputs, shares, strict=True):
            arrived[name] = arrived[name] + share
    R_x = R_x + flatten(x) * arrived["x"]
    if missing := [name for name in hidden if name not in arrived]:
        raise ValueError(f"no relevance at {missing}: inside the first layer, or not connected to the logits")
    maps = {name: like(flatten(values[name]) * arrived[name], values[name]) for name in hidden}
    return Explanation(logits, like(R_x, x), maps)


class _Part(NamedTuple):
    """A share of a value's relevance, from one consumer, behind the norm layers between the two."""

    R: torch.Tensor  # [N, K, D]
    norms: tuple = ()  # names of those norm layers, together v -> k v + shift
    k: Any = 1
    shift: Any = 0
    shift0: Any = 0  # shift, with every beta a constant


def explain_rules(net, x, R_start, rules, hidden=(), constant_bias=CONSTANT_BIAS):
    """Relevance in the ratio form: every linear map has its rule and its denominator, as after canonisation.

    Norm layers are folded into the map before them, per consumer and through a concat; where there is none
    (behind a ReLU, a mask or the input) they are maps of their own. ReLU, masks and reshapes hand on R.

    Args:
        R_start: relevance of the logits, `[N, K, C]`, or a function of the logits.
        rules: an entry for every op with weights; pools, sums, norm layers of their own and other maps may
            have one and otherwise take epsilon with e = 0.
        constant_bias: rules whose denominators give biases and beta no gradient. The authors' LRP-Block does
            so in epsilon too, where section 1 lets it flow.
    """
    values = net.run(x)
    logits = values[net.out]
    parts = defaultdict(list)
    parts[net.out] = [_Part(R_start(logits) if callable(R_start) else R_start)]

    def rule_of(name):
        return rules.get(name, ("epsilon", {"e": 0.0}))

    def apply(name, part, W, b, a, shape):
        """Relevance of a map's input, by the rule of `name`, from one part of its output's."""
        rule, parameters = rule_of(name)
        constant = rule in constant_bias
        b = b.detach() if constant else b
        if part.norms and rule != "flat":
            W, b = fold(W, b, part.k, part.shift0 if constant else part.shift)
        if rule == "zb":
            parameters = parameters | {bound: image(parameters[bound], shape) for bound in ("low", "high")}
        return RULES[rule](W, b, a, part.R, **parameters)

    def settle(name):
        """The relevance of a value that no map can fold norm layers into: they become maps of their own."""
        a, shape = flatten(values[name]), values[name].shape[1:]
        eye, zero = torch.eye(a.shape[-1], dtype=a.dtype), a.new_zeros(a.shape[-1])
        R = sum(apply(p.norms[0], p, eye, zero, a, shape) if p.norms else p.R for p in parts[name])
        parts[name] = [_Part(R)]
        return R

    for op in reversed(net.ops):
        if op.name not in parts:
            continue
        if op.kind == "norm":
            k, shift, shift0 = net.affine(op, values)
            for p in parts[op.name]:
                behind = p.k * k, p.k * shift + p.shift, p.k * shift0 + p.shift0
                parts[op.inputs[0]].append(_Part(p.R, (op.name, *p.norms), *behind))
        elif op.kind == "concat":
            for p in parts[op.name]:
                tensors = [net.split(op, values, t) for t in ((p.R, *p[2:]) if p.norms else (p.R,))]
                for name, R, *behind in zip(op.inputs, *tensors, strict=True):
                    parts[name].append(_Part(R, p.norms, *behind))
        elif op.kind == "map":
            if op.name not in rules and getattr(op.what, "weight", None) is not None:
                raise ValueError(f"no rule for {op.name}")
            layer = net.layer(op, values, connected=rule_of(op.name)[0] == "flat")
            shape = values[op.inputs[0]].shape[1:]
            R = sum(apply(op.name, p, *layer, shape) for p in parts[op.name])
            for name, share in zip(op.inputs, net.split(op, values, R), strict=True):
                parts[name].append(_Part(share))
        elif op.kind == "same":
            parts[op.inputs[0]] += parts[op.name]
        else:
            parts[op.inputs[0]].append(_Part(settle(op.name)))
    for name in hidden:
        if any(p.norms for p in parts[name]):
            raise ValueError(f"{name} has no relevance of its own: a norm layer is folded into it")
    maps = {name: like(sum(p.R for p in parts[name]), values[name]) for name in hidden}
    return Explanation(logits, like(settle("x"), x), maps)


def explain_zplus(net, x, eps=0.01, first_layer="zb", low=0.0, high=1.0, hidden=()):
    """Dual's first map (section 4): z+ in every map, pools, sums and the last layer too; z^B in the first.

    The start is `R = W+ a + b+` of the last layer, of all logits at once.
    """
    values = net.run(x)
    last = net.op[net.out]
    while last.kind == "same":
        last = net.op[last.inputs[0]]
    if last.kind == "map":
        W, b, a = net.layer(last, values)
        R_start = pos(a) @ pos(W).mT + neg(a) @ neg(W).mT + pos(b.detach())
    else:
        R_start = pos(flatten(values[net.out]))
    rules = {op.name: ("zplus", {"e": eps}) for op in net.ops if op.kind in ("map", "norm")}
    if first_layer == "zb":
        bounded = ("zb", {"low": low, "high": high, "e": eps})
        rules |= {op.name: bounded for op in net.ops if op.kind == "map" and op.inputs == ("x",)}
    return explain_rules(net, x, R_start, rules, hidden)


# ------------------------------------------------------------------------------------------------------------
# The heatmap loss (section 5).


def gwrp(values, d):
    """Global weighted ranked pooling over the last dimension: weights d^i on descending values."""
    weights = torch.tensor([float(d) ** i for i in range(values.shape[-1])], dtype=values.dtype)
    return (values.sort(-1, descending=True)[0] * weights).sum(-1) / weights.sum()


def heatmap_loss(R, mask, c1, c2, d=0.9, E=1.0, foreground="hybrid", normalization="absRoIMean"):
    """`background [N], foreground [N]` of the maps `R [N, K, C, h, w]`.

    mask: `[N, 1 or C, H, W]`, 1 = foreground; of another size, it is resized so that any foreground counts.
    c1, c2: a number, or one a map, `[K]`. foreground: "L2", "hybrid" or "L1" (the authors' third).
    """
    if mask.shape[-2:] != R.shape[-2:]:
        mask = F.adaptive_avg_pool2d(mask.to(R), R.shape[-2:]) > 0
    M = mask.to(R)[:, None].expand_as(R)
    c1, c2 = torch.as_tensor(c1).to(R), torch.as_tensor(c2).to(R)
    over = (-3, -2, -1)
    area = M.sum(over, keepdim=True) + 1e-10  # an empty foreground has mean 0
    if normalization == "absRoIMean":
        A = R.abs() / ((R.abs() * M).sum(over, keepdim=True) / area + 1e-10)
    elif normalization == "RoIMean":
        A = (R / ((R * M).sum(over, keepdim=True) / area + 1e-10)).abs()
    elif normalization == "none":
        A = R.abs() * R[0, 0].numel()
    G = gwrp((A * (1 - M)).flatten(-2), d)  # [N, K, C]
    u = (G / (G + E)).clamp(max=1 - 1e-7)
    background = -torch.log(1 - u).mean((1, 2))
    total = (R.abs() * M).sum(over)  # [N, K]
    left = ((total / c1).clamp(max=1) - 1) ** 2
    right = (torch.maximum(total / c1, c2 / c1) - c2 / c1) ** 2
    if foreground == "hybrid":
        right = torch.where(total > c1 + c2, total - (c1 + c2) + 1, right)
    elif foreground == "L1":
        right = torch.maximum(total, c2) - c2
    return background, (left + right).mean(1)
