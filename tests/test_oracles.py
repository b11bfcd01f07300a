"""Who watches the oracle: the authors' goldens, PyTorch's autograd, and everything written down a second way.

The rules once more by contributions `a_j W_kj` instead of products of clamped matrices; section
4's folding of BatchNorm by hand, on a network without one; the train mode's gradient as one formula.
"""

import functools
import math

import golden_nets
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

E = 0.01
STARTS = {
    "selective": lambda data: oracles.selective(),
    "stochastic": lambda data: oracles.classes(data["flex/stochastic/selected"]),
    "original": lambda data: oracles.original,
    "label_logit": lambda data: oracles.classes(data["y"]),
}
FLEX = [(name, variant) for name in golden_nets.NAMES for variant in ("selective", "stochastic", "original")]
FLEX += [("seq", v) for v in ("label_logit", "selective_noZb", "selective_e0_noZb")]
FLEX += [("seqbn", v) for v in ("label_logit", "selective_noZb", "selective_e0_noZb")]


def error(got, want):
    """The largest difference, relative to the largest entry."""
    return ((got - want).abs().max() / want.abs().max()).item()


@functools.cache
def golden(name):
    model, data = golden_nets.load(name)
    return model, data, oracles.Net(golden_nets.ops(name, model))


def total(data, key, logits, losses):
    """The golden total `(1 - P) classification + P heatmaps`; losses: one number a layer."""
    meta = data["meta"]
    classification = nn.functional.cross_entropy(logits, data["y"])
    assert error(classification, data[f"{key}/cls"]) < 1e-12
    pooled = oracles.gwrp(torch.stack(losses), meta["dLoss"])
    return (1 - meta["P"]) * classification + meta["P"] * pooled


def layer_loss(data, key, R, suffix=""):
    background, foreground = oracles.heatmap_loss(
        R, data["mask"], data[f"{key}/cut{suffix}"], data[f"{key}/cut2{suffix}"]
    )
    return (background + foreground).mean()


def check_gradients(model, data, key, loss):
    """Every gradient the file has, and the norms of all, relative to the largest entry."""
    assert error(loss, data[f"{key}/total"]) < 1e-10
    names = data["meta"]["param_order"]
    grads = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    assert error(torch.stack([grads[n].norm() for n in names]), data[f"{key}/gradnorm"]) < 1e-10
    stored = [n for n in names if f"{key}/grad/{n}" in data]
    assert len(stored) >= 4
    for n in stored:
        assert error(grads[n], data[f"{key}/grad/{n}"]) < 1e-10, n


# ------------------------------------------------------------------------------------------------------------
# Against the goldens.


@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_golden_network(name):
    """The rebuilt networks and their graphs give the golden logits, parameter for parameter."""
    model, data, net = golden(name)
    assert list(dict(model.named_parameters())) == data["meta"]["param_order"]
    assert error(model(data["x"]), data["logits"]) < 1e-12
    assert error(net.run(data["x"])[net.out], data["logits"]) < 1e-12


@pytest.mark.parametrize(("name", "variant"), FLEX)
def test_golden_epsilon(name, variant):
    """Sections 1, 2, 3 and 5: heatmaps, the loss on them, and the gradient of a training step."""
    model, data, net = golden(name)
    start = STARTS[variant.split("_noZb")[0].removesuffix("_e0")](data)
    options = {"first_layer": "epsilon"} if variant.endswith("_noZb") else {}
    options |= {"eps": 0.0} if "_e0" in variant else {}
    out = oracles.explain_epsilon(net, data["x"], start, **options)
    key = f"flex/{variant}"
    assert error(out.heatmaps, data[f"{key}/heatmap"]) < 1e-10
    check_gradients(model, data, key, total(data, key, out.logits, [layer_loss(data, key, out.heatmaps)]))


@pytest.mark.parametrize(("name", "layers"), [
    ("resnet18s", {f"layer{i}": f"layer{i}.1.relu2" for i in range(1, 5)}),
    ("densenets", {n: n for n in ("features.transition1.relu", "features.fReLU")}),
])  # fmt: skip
def test_golden_deep_supervision(name, layers):
    """Inner maps `a . g`, with g before the layer's own phi; the layers' losses are pooled over layers."""
    model, data, net = golden(name)
    key = "flex_lds/selective"
    out = oracles.explain_epsilon(net, data["x"], oracles.selective(), hidden=layers.values())
    losses = [layer_loss(data, key, out.heatmaps)]
    for layer, op in layers.items():
        assert error(out.hidden[op], data[f"{key}/hidden/{layer}"]) < 1e-10
        losses.append(layer_loss(data, key, out.hidden[op], f"/{layer}"))
    assert error(torch.stack(losses), data[f"{key}/layer_losses"]) < 1e-10
    check_gradients(model, data, key, total(data, key, out.logits, losses))


def block_rules(net):
    """LRP-Block: epsilon with its own e in every map, pools and the last layer too; z^B in the first."""
    rules = {op.name: ("epsilon", {"e": E}) for op in net.ops if op.kind == "map"}
    return rules | {net.ops[0].name: ("zb", {"low": 0.0, "high": 1.0, "e": E})}


@pytest.mark.parametrize("name", ["seq", "seqbn", "vgg"])
@pytest.mark.parametrize("variant", ["original", "dual"])
def test_golden_block(name, variant):
    """explain_rules against LRP-Block, and section 4 against Dual: maps and gradients.

    LRP-Block takes every bias and beta of the relevance pass as a constant, the start's too.
    """
    model, data, net = golden(name)
    x, key = data["x"], f"block/{variant}"
    what = oracles.original if variant == "original" else oracles.all_logits
    last = net.op[net.out]

    def start(logits):
        bias = last.what.bias
        return what(logits) * (logits - bias + bias.detach())[:, None]

    out = oracles.explain_rules(net, x, start, block_rules(net), constant_bias=("epsilon", "zplus", "zb"))
    R = out.heatmaps
    if variant == "dual":
        R = torch.cat([oracles.explain_zplus(net, x).heatmaps, R], 1)
    for k in range(R.shape[1]):
        assert error(R[:, k], data[f"{key}/heatmap"][:, k]) < 1e-10
    loss = total(data, key, out.logits, [layer_loss(data, key, R)])
    check_gradients(model, data, key, loss)


@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_dual_epsilon_map_is_the_sum_of_originals(name):
    _, data, net = golden(name)
    with torch.no_grad():
        maps = oracles.explain_epsilon(net, data["x"], oracles.all_logits).heatmaps[:, 0]
    assert error(maps, data["flex/original/heatmap"].sum(1)) < 1e-10


def test_golden_loss():
    """Section 5: 27 configurations, values and gradients. With w2 = 0 the authors ignore w1."""
    data = golden_nets.arrays("loss")
    masks = {"m": "mask", "big": "mask_big", "zero0": "mask_zero0"}
    assert len(data["meta"]["configs"]) == 27
    for i, c in enumerate(data["meta"]["configs"]):
        R = data["heatmap"].clone().requires_grad_()
        background, foreground = oracles.heatmap_loss(
            R, data[masks[c["mask"]]], c["cut"], c["cut2"], d=c["d"], E=c["E"],
            foreground=c["alternativeForeground"], normalization=c["norm"],
        )  # fmt: skip
        loss = (c["A"] if c["B"] else 1) * background + c["B"] * foreground
        assert error(loss, data[f"{i}/value"]) < 1e-12
        assert error(torch.autograd.grad(loss.mean(), R)[0], data[f"{i}/grad"]) < 1e-10
    for d in (0, 0.8, 1):
        assert error(oracles.gwrp(data["gwrp1d/x"], d), data[f"gwrp1d/d{d}"]) < 1e-12


# ------------------------------------------------------------------------------------------------------------
# One layer: random convolutions and linear layers, signed inputs.


@st.composite
def layers(draw):
    """`(module, input shape)`: conv 1-d to 3-d with groups, stride, padding, dilation; or linear."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    bias = draw(st.booleans())
    dims = draw(st.integers(0, 3))
    if dims == 0:
        c_in, lead = draw(st.integers(1, 6)), draw(st.lists(st.integers(1, 3), max_size=2))
        return nn.Linear(c_in, draw(st.integers(1, 5)), bias=bias).double(), (*lead, c_in)
    groups = draw(st.integers(1, 3))
    c_in, c_out = (groups * draw(st.integers(1, 2)) for _ in range(2))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options = {"stride": draw(st.integers(1, 3)), "padding": draw(st.integers(0, 2)), "dilation": dilation}
    options |= {"groups": groups, "bias": bias}
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](c_in, c_out, kernel, **options)
    reach = dilation * (kernel - 1) + 1
    return conv.double(), (c_in, *(draw(st.integers(reach, reach + 2)) for _ in range(dims)))


def one_layer(module, shape, positive=False, K=2):
    """W, b, a, R, and the contributions `c_kj = W_kj a_j`, [N, out, in]; some inputs are exactly 0."""
    W, b = (t.detach() for t in oracles.layer_matrix(module, shape))
    a = torch.randn(3, *shape, dtype=torch.float64)
    a = torch.where(torch.rand_like(a) < 0.2, 0.0, a.abs() if positive else a)
    z = module(a).detach()
    flat = oracles.flatten(a)
    assert torch.allclose(flat @ W.mT + b, oracles.flatten(z), rtol=1e-12, atol=1e-12)
    return W, b, flat, torch.randn(3, K, len(W), dtype=torch.float64), W * flat


def shared(contributions, R, denominator):
    """`R_j = sum_k c_kj R_k / denominator_k`."""
    return (contributions[:, None] * (R / denominator)[..., None]).sum(-2)


def equal(got, want):
    return torch.allclose(got, want, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_rules_by_contributions(layer):
    """Each rule once more, from the contributions `c_kj = W_kj a_j` and their positive and negative parts."""
    W, b, a, R, c = one_layer(*layer)
    c_pos, c_neg, z = c.clamp(min=0), c.clamp(max=0), (c.sum(-1) + b)[:, None]
    z_pos, z_neg = (c_pos.sum(-1) + b.clamp(min=0))[:, None], (c_neg.sum(-1) + b.clamp(max=0))[:, None]
    sign = torch.where(z < 0, -torch.ones_like(z), 1)
    assert equal(oracles.epsilon(W, b, a, R, E), shared(c, R, z + E * sign))
    assert equal(oracles.zplus(W, b, a, R, E), shared(c_pos, R, z_pos + E))
    alpha_beta = 3 * shared(c_pos, R, z_pos + E) - 2 * shared(c_neg, R, z_neg - E)
    assert equal(oracles.alpha_beta(W, b, a, R, 3, 2, E), alpha_beta)
    up = shared(c + 0.25 * c_pos, torch.where(z >= 0, R, 0.0), z + 0.25 * z_pos + E)
    down = shared(c + 0.25 * c_neg, torch.where(z < 0, R, 0.0), z + 0.25 * z_neg - E)
    assert equal(oracles.gamma(W, b, a, R, 0.25, E), up + down)
    square = W.square().expand_as(c)
    assert equal(oracles.w2(W, b, a, R, E), shared(square, R, square.sum(-1)[:, None] + E))
    seen = (W != 0).double().expand_as(c)
    assert equal(oracles.flat(seen[0], b, a, R, E), shared(seen, R, seen.sum(-1)[:, None] + E))


@settings(max_examples=60, deadline=None)
@given(layers(), st.tuples(st.floats(-2, 0), st.floats(0.1, 3)))
def test_zb_by_contributions(layer, bounds):
    """Every term `(x_j - bound_j) W_kj` is positive for `low <= x <= high`, the bound that of W's sign."""
    W, b, a, R, _ = one_layer(*layer)
    low = torch.linspace(bounds[0], 0, a.shape[-1], dtype=torch.float64)
    high = low + bounds[1]
    x = low + torch.rand_like(a) * (high - low)
    c = W * torch.where(W > 0, x - low, x - high)
    assert (c > -1e-12).all()
    z = (c.sum(-1) + b - low.min() * b.clamp(min=0) - high.max() * b.clamp(max=0))[:, None]
    z = torch.where(z < 0, z - E, z + E)
    assert equal(oracles.zb(W, b, x, R, low, high, E), shared(c, R, z))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_conservation(layer):
    """`sum_j R_j` in closed form: what the biases and e keep is all that is lost."""
    W, b, a, R, _ = one_layer(*layer)
    z, ones = a @ W.mT + b, torch.ones_like(a)
    z_pos = a.clamp(min=0) @ W.clamp(min=0).mT + a.clamp(max=0) @ W.clamp(max=0).mT
    z_neg = a @ W.mT - z_pos
    b_pos, b_neg = b.clamp(min=0), b.clamp(max=0)

    def kept(numerator, denominator):
        return (R * numerator / denominator).sum(-1)

    assert equal(oracles.epsilon(W, b, a, R, E).sum(-1), kept(z - b, oracles.stabilise(z, E)))
    assert equal(oracles.zplus(W, b, a, R, E).sum(-1), kept(z_pos, z_pos + b_pos + E))
    alpha_beta = 2 * kept(z_pos, z_pos + b_pos + E) - kept(z_neg, z_neg + b_neg - E)
    assert equal(oracles.alpha_beta(W, b, a, R, 2, 1, E).sum(-1), alpha_beta)
    more = torch.where(z >= 0, z_pos, z_neg), torch.where(z >= 0, b_pos, b_neg)
    whole = oracles.stabilise(z + 0.5 * (more[0] + more[1]), E)
    assert equal(oracles.gamma(W, b, a, R, 0.5, E).sum(-1), kept(z - b + 0.5 * more[0], whole))
    square, seen = ones @ W.square().mT, ones @ (W != 0).double().mT
    assert equal(oracles.w2(W, b, a, R, E).sum(-1), kept(square, square + E))
    assert equal(oracles.flat((W != 0).double(), b, a, R, E).sum(-1), kept(seen, seen + E))
    low, high = torch.full_like(a[0, 0], -1.0), torch.full_like(a[0, 0], 2.0)
    box = a @ W.mT - low @ W.clamp(min=0).mT - high @ W.clamp(max=0).mT
    denominator = oracles.stabilise(box + b + b_pos - 2 * b_neg, E)
    assert equal(oracles.zb(W, b, a, R, low, high, E).sum(-1), kept(box, denominator))


@settings(max_examples=40, deadline=None)
@given(layers())
def test_rules_meet(layer):
    """alpha 1, beta 0 is z+; gamma 0 is epsilon, infinity z+ if z > 0; z+ and z^B keep R >= 0."""
    W, b, a, R, _ = one_layer(*layer, positive=True)
    assert equal(oracles.alpha_beta(W, b, a, R, 1, 0, E), oracles.zplus(W, b, a, R, E))
    assert equal(oracles.gamma(W, b, a, R, 0, E), oracles.epsilon(W, b, a, R, E))
    alive = torch.where(a @ W.mT + b > 1e-3, R, 0.0)
    far = oracles.gamma(W, b, a, alive, 1e12, 0.0)
    assert torch.allclose(far, oracles.zplus(W, b, a, alive, 0.0), rtol=1e-6, atol=1e-6)
    assert (oracles.zplus(W, b, a, R.abs(), E) >= 0).all()
    x, unit = a.clamp(max=1), torch.ones_like(a[0, 0])
    assert (oracles.zb(W, b, x, R.abs(), 0 * unit, unit, E) >= -1e-12).all()


def test_a_unit_without_contributions_hands_on_nothing():
    """z = 0 and e = 0: no NaN, in the gradient neither; sign(0) = +1 with e."""
    W, b = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    a, R = torch.ones(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    parameters = {"gamma": {"gamma": 1}, "alpha_beta": {"alpha": 2, "beta": 1}}
    parameters["zb"] = {"low": a - 1, "high": a}
    for rule, function in oracles.RULES.items():
        weight = W.clone().requires_grad_()
        out = function(weight, b, a, R, **parameters.get(rule, {}), e=0.0)
        assert (out == 0).all(), rule
        assert torch.autograd.grad(out.sum(), weight)[0].isfinite().all(), rule
    assert oracles.stabilise(torch.tensor([-1.0, 0.0, 1.0]), 0.5).tolist() == [-1.5, 0.5, 1.5]


@settings(max_examples=30, deadline=None)
@given(layers())
def test_connectivity(layer):
    """The flat rule's matrix: where the weights are, also those that are 0."""
    module, shape = layer
    seen = oracles.connectivity(module, shape)
    with torch.no_grad():
        assert torch.equal(seen, (oracles.layer_matrix(module, shape)[0] != 0).double())
        module.weight.zero_()
    assert torch.equal(seen, oracles.connectivity(module, shape))


@pytest.mark.parametrize(("pool", "shape"), [
    (nn.MaxPool1d(3, 1, 1), (2, 9)),
    (nn.MaxPool2d(3, 2, 1), (2, 7, 6)),
    (nn.MaxPool2d(2, ceil_mode=True), (3, 5, 5)),
    (nn.MaxPool2d(2, 1, dilation=2), (1, 5, 5)),
    (nn.MaxPool3d(2, 1), (2, 3, 4, 3)),
    (nn.AdaptiveMaxPool2d((3, 2)), (2, 7, 5)),
])  # fmt: skip
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_winners(pool, shape, ties):
    """The winner takes all and overlapping windows add: the gradient of PyTorch's pool, with ties too."""
    v = torch.randn(3, *shape, dtype=torch.float64)
    v = (v.round() if ties else v).requires_grad_()
    y = pool(v)
    R = torch.randn_like(y)
    P = oracles.winners(pool, v)
    assert torch.equal((P @ v.flatten(1)[..., None])[..., 0], y.flatten(1))
    assert equal((oracles.flatten(R) @ P).reshape(v.shape), torch.autograd.grad(y, v, R)[0])


# ------------------------------------------------------------------------------------------------------------
# Whole networks: a small one with everything in it.


def small(bn_train=False, seed=0):
    """`(Net, x)`: stem, residual block, dense block behind a pool, dropout, groups, dilation."""
    torch.manual_seed(seed)

    def bn(c):
        m = nn.BatchNorm2d(c).double().train(bn_train)
        nn.init.normal_(m.weight, 0.3)  # negative scales too
        nn.init.normal_(m.bias, 0.1)
        nn.init.normal_(m.running_mean, 0, 0.2)
        nn.init.uniform_(m.running_var, 0.3, 2)
        return m

    def conv(*args, **kwargs):
        return nn.Conv2d(*args, **kwargs).double()

    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    drop = (torch.rand(3, 10, 2, 2, dtype=torch.float64) < 0.7).double() / 0.7
    net = oracles.Net([
        ("conv0", conv(2, 4, 3, padding=1), "x"), ("bn0", bn(4), "conv0"), ("relu0", "relu", "bn0"),
        ("pool0", nn.MaxPool2d(3, 2, 1), "relu0"),
        ("conv1", conv(4, 4, 3, padding=1, groups=2), "pool0"), ("bn1", bn(4), "conv1"),
        ("relu1", nn.ReLU(), "bn1"),
        ("conv2", conv(4, 4, 3, padding=2, dilation=2), "relu1"), ("bn2", bn(4), "conv2"),
        ("conv3", conv(4, 4, 1), "pool0"), ("bn3", bn(4), "conv3"),
        ("add", "add", ("bn2", "bn3")), ("relu2", "relu", "add"),
        ("pool2", nn.AvgPool2d(2), "relu2"),
        ("bn4", bn(4), "pool2"), ("relu4", "relu", "bn4"), ("conv4", conv(4, 6, 3, padding=1), "relu4"),
        ("concat", "concat", ("pool2", "conv4")),
        ("bn5", bn(10), "concat"), ("relu5", "relu", "bn5"),
        ("drop", drop, "relu5"), ("conv5", conv(10, 3, 1), "drop"),
        ("concat2", "concat", ("concat", "conv5")), ("bn6", bn(13), "concat2"), ("relu6", "relu", "bn6"),
        ("mean", lambda v: v.mean((2, 3)), "relu6"), ("fc", nn.Linear(13, 3).double(), "mean"),
    ])  # fmt: skip
    return net, x


def frozen_twin(net, x):
    """The network with the batch statistics of x as running statistics, in eval mode."""
    values = net.run(x)
    ops = []
    for op in net.ops:
        what = op.what
        if op.kind == "norm":
            v = values[op.inputs[0]].detach()
            what = nn.BatchNorm2d(v.shape[1], eps=op.what.eps).double().eval()
            what.weight, what.bias = op.what.weight, op.what.bias
            what.running_mean, what.running_var = v.mean((0, 2, 3)), v.var((0, 2, 3), unbiased=False)
        ops.append((op.name, what, op.inputs))
    return oracles.Net(ops)


@pytest.mark.parametrize("seed", range(3))
def test_without_epsilon_it_is_gradient_times_input(seed):
    net, x = small(seed=seed)
    x.requires_grad_()
    maps = oracles.explain_epsilon(net, x, oracles.original, eps=0.0, first_layer="epsilon").heatmaps
    logits = net.run(x)["fc"]
    for c in range(3):
        want = x * torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)[0]
        assert error(maps[:, c], want) < 1e-12


@pytest.mark.parametrize("explain", [
    lambda net, x: oracles.explain_epsilon(net, x, oracles.original, hidden=("add", "relu4")),
    lambda net, x: oracles.explain_zplus(net, x, hidden=("relu4", "relu2")),
])  # fmt: skip
def test_train_mode(explain):
    """The map is that of the frozen twin, so one sample's relevance stays its own; logits are PyTorch's."""
    net, x = small(bn_train=True)
    out, twin = explain(net, x), explain(frozen_twin(net, x), x)
    assert error(out.logits, twin.logits) < 1e-12
    assert error(out.heatmaps, twin.heatmaps) < 1e-12
    for name, R in out.hidden.items():
        assert error(R, twin.hidden[name]) < 1e-12
    bn = net.op["bn0"].what
    before = bn.running_mean.clone()
    net.run(x)
    assert torch.equal(bn.running_mean, before)
    assert error(bn(net.run(x)["conv0"]), net.run(x)["bn0"]) < 1e-12
    assert not torch.equal(bn.running_mean, before)  # by the module's own call; Net.run leaves them alone


@pytest.mark.parametrize("relative", [False, True])
def test_train_mode_gradient_by_hand(relative):
    """conv - BN - ReLU - linear written out: a has the gradient of the batch statistics, g has not."""
    torch.manual_seed(1)
    conv, bn, fc = nn.Conv1d(2, 3, 1, bias=False), nn.BatchNorm1d(3), nn.Linear(12, 2)
    model = nn.Sequential(conv, bn, nn.ReLU(), nn.Flatten(), fc).double().train()
    nn.init.normal_(bn.weight)
    x, weights = torch.rand(5, 2, 4, dtype=torch.float64), torch.randn(5, 2, 2, 4, dtype=torch.float64)
    net = oracles.Net.chain(model)
    out = oracles.explain_epsilon(net, x, oracles.original, E, "epsilon", relative=relative)

    h = torch.einsum("oi,nip->nop", conv.weight[..., 0], x)
    mean, std = h.mean((0, 2), keepdim=True), (h.var((0, 2), unbiased=False, keepdim=True) + bn.eps).sqrt()
    a = ((h - mean) / std * bn.weight[:, None] + bn.bias[:, None]).relu()
    e = E * a.detach().square().mean((1, 2), keepdim=True).sqrt() if relative else E
    s = (a / (a + e))[:, None] * fc.weight.reshape(2, 3, 4)
    k = bn.weight / std.detach().flatten()
    R = x[:, None] * torch.einsum("oi,o,nkop->nkip", conv.weight[..., 0], k, s)
    assert error(out.heatmaps, R) < 1e-12
    grads = [torch.autograd.grad((m * weights).sum(), list(model.parameters()), allow_unused=True)
             for m in (out.heatmaps, R)]  # fmt: skip
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        assert got is None or error(got, want) < 1e-10


@pytest.mark.parametrize(("name", "bias"), [("vgg", "classifier.2.bias"), ("seqbn", "9.bias")])
def test_ratio_form_is_gradient_form_in_a_chain(name, bias):
    """Where every map has its ReLU: epsilon in the maps, none in pools and the last layer. Gradients too."""
    model, data, net = golden(name)
    maps = [op.name for op in net.ops if op.kind == "map" and getattr(op.what, "weight", None) is not None]
    rules = dict.fromkeys(maps, ("epsilon", {"e": E})) | {maps[-1]: ("epsilon", {"e": 0.0})}
    rules[maps[0]] = ("zb", {"low": -0.5, "high": 1.5, "e": E})
    ratio = oracles.explain_rules(net, data["x"], lambda z: oracles.original(z) * z[:, None], rules).heatmaps
    gradient = oracles.explain_epsilon(net, data["x"], oracles.original, E, low=-0.5, high=1.5).heatmaps
    assert error(ratio, gradient) < 1e-10
    weights = torch.randn_like(ratio)
    grads = [torch.autograd.grad((R * weights).sum(), list(model.parameters()), allow_unused=True)
             for R in (ratio, gradient)]  # fmt: skip
    for n, got, want in zip(data["meta"]["param_order"], *grads, strict=True):
        if n == bias:  # R_start / z is 1 whatever the bias
            assert want is None
            assert got.abs().max() < 1e-10 * ratio.abs().max()
        else:
            assert error(got, want) < 1e-9, n


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bn_train", [False, True])
def test_zplus_folds_batchnorm_per_consumer(seed, bn_train):
    """Section 4's folding, done by hand: no BN, one copy of a map for each BN that sees it, scaled channels.

    An average pool before a BN becomes a depthwise convolution. Values and gradients of the weights.
    """
    net, x = small(bn_train, seed)
    values = net.run(x)

    def folded(name, channels, norm):
        """The op `name` as a conv with channels of a BN folded in; bias and beta detached, gamma not."""
        what = net.op[name].what
        if isinstance(what, nn.AvgPool2d):
            weight = torch.full((4, 1, 2, 2), 0.25, dtype=torch.float64)
            b = weight.new_zeros(4)
            options = {"stride": 2, "groups": 4}
        else:
            weight, b = what.weight, what.bias.detach()
            options = {n: getattr(what, n) for n in ("stride", "padding", "dilation", "groups")}
        m, v = net.op[norm].what, values[net.op[norm].inputs[0]].detach()
        mean, var = m.running_mean, m.running_var
        if bn_train:
            mean, var = v.mean((0, 2, 3)), v.var((0, 2, 3), unbiased=False)
        k = (m.weight / (var + m.eps).sqrt())[channels]
        b = k * (b - mean[channels]) + m.bias.detach()[channels]
        return Folded(weight * k[:, None, None, None], b, options)

    first, last, tail = slice(0, 4), slice(4, 10), slice(10, 13)
    twin = oracles.Net([
        ("conv0", folded("conv0", first, "bn0"), "x"), ("relu0", "relu", "conv0"),
        ("pool0", nn.MaxPool2d(3, 2, 1), "relu0"),
        ("conv1", folded("conv1", first, "bn1"), "pool0"), ("relu1", "relu", "conv1"),
        ("conv2", folded("conv2", first, "bn2"), "relu1"), ("conv3", folded("conv3", first, "bn3"), "pool0"),
        ("add", "add", ("conv2", "conv3")), ("relu2", "relu", "add"),
        ("pool2", folded("pool2", first, "bn4"), "relu2"), ("relu4", "relu", "pool2"),
        ("pool2_5", folded("pool2", first, "bn5"), "relu2"),
        ("conv4_5", folded("conv4", last, "bn5"), "relu4"),
        ("concat", "concat", ("pool2_5", "conv4_5")), ("relu5", "relu", "concat"),
        ("drop", net.op["drop"].what, "relu5"),
        ("pool2_6", folded("pool2", first, "bn6"), "relu2"),
        ("conv4_6", folded("conv4", last, "bn6"), "relu4"),
        ("conv5_6", folded("conv5", tail, "bn6"), "drop"),
        ("concat2", "concat", ("pool2_6", "conv4_6", "conv5_6")), ("relu6", "relu", "concat2"),
        ("mean", net.op["mean"].what, "relu6"), ("fc", net.op["fc"].what, "mean"),
    ])  # fmt: skip
    out, want = oracles.explain_zplus(net, x), oracles.explain_zplus(twin, x)
    assert error(out.logits, want.logits) < 1e-12
    assert error(out.heatmaps, want.heatmaps) < 1e-12
    assert (out.heatmaps > -1e-12).all()
    if not bn_train:  # (the twin's activations are detached from batch statistics)
        weights = torch.rand_like(x)
        convs = [op.what.weight for op in net.ops if isinstance(op.what, nn.Conv2d)]
        grads = [torch.autograd.grad((m.heatmaps[:, 0] * weights).sum(), convs) for m in (out, want)]
        assert error(*(torch.cat([g.flatten() for g in each]) for each in grads)) < 1e-10


class Folded(nn.Module):
    """A convolution given by its tensors."""

    def __init__(self, weight, bias, options):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.options = options

    def forward(self, v):
        return nn.functional.conv2d(v, self.weight, self.bias, **self.options)


def test_zplus_of_pools_and_sums_by_hand():
    """Section 4's formulas: max pool, also before BN; BN behind a ReLU; a residual sum of signed values."""
    torch.manual_seed(3)
    bn, pool = nn.BatchNorm1d(2).double().eval(), nn.MaxPool1d(3, 2, 1)
    with torch.no_grad():
        bn.weight[:], bn.bias[:] = torch.tensor([1.5, -0.5]), torch.tensor([-0.2, 2.0])
    k = (bn.weight / (1 + bn.eps) ** 0.5)[:, None]
    kp, bp = k.clamp(min=0), bn.bias[:, None].clamp(min=0)
    v = torch.randn(4, 2, 7, dtype=torch.float64)
    a = v.relu().requires_grad_()

    def explain(*ops):
        net = oracles.Net([("relu", "relu", "x"), *ops])
        R = torch.randn_like(net.run(v)[net.out])[:, None]
        rules = {op.name: ("zplus", {"e": E}) for op in net.ops[1:]}
        out = oracles.explain_rules(net, v, oracles.flatten(R[:, 0]), rules)
        return R[:, 0], out.heatmaps[:, 0]

    R, got = explain(("pool", pool, "relu"), ("bn", bn, "pool"))
    u = pool(a)
    assert equal(got, a * torch.autograd.grad(u, a, kp * R / (kp * u + bp + E))[0])
    R, got = explain(("pool", pool, "relu"))
    u = pool(a)
    assert equal(got, a * torch.autograd.grad(u, a, R / (u + E))[0])
    R, got = explain(("pool", pool, "relu"), ("bn", bn, "pool"), ("bn again", bn, "bn"))
    u, b2 = pool(a), (k + 1) * bn.bias[:, None]
    assert equal(got, a * torch.autograd.grad(u, a, k**2 * R / (k**2 * u + b2.clamp(min=0) + E))[0])
    R, got = explain(("bn", bn, "relu"))
    assert equal(got, a * kp * R / (kp * a + bp + E))
    R, got = explain(("add", "add", ("relu", "x")))
    assert equal(got, (a + v.clamp(min=0)) * R / (a + v.clamp(min=0) + E))


def test_bounds_per_channel():
    """low and high, one number a channel, become images; R_1 = y_0 g of the first ReLU's output y_0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(75, 1)).double()
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([1.5, 0.5])
    x = low[:, None, None] + torch.rand(2, 2, 5, 5, dtype=torch.float64) * (high - low)[:, None, None]
    W, b = oracles.layer_matrix(model[0], (2, 5, 5))
    R_1 = (model[:3](x) * model[3].weight)[:, None]
    bounds = low.double().repeat_interleave(25), high.double().repeat_interleave(25)
    want = oracles.zb(W, b, oracles.flatten(x), R_1, *bounds, E)
    out = oracles.explain_epsilon(oracles.Net.chain(model), x, oracles.original, E, low=low, high=high)
    assert error(out.heatmaps, want.reshape(out.heatmaps.shape)) < 1e-12


@pytest.mark.parametrize("absolute", [False, True])
def test_relative_epsilon_ignores_the_scale_of_a_layer(absolute):
    """A layer's weights times t, the next's over t: the same function, and the same map if e is relative."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)]
    model = nn.Sequential(*layers).double()
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    options = {"relative": not absolute, "relative_zb": not absolute}
    maps = []
    for t in (1, 100):
        with torch.no_grad():
            model[0].weight *= t
            model[0].bias *= t
            model[2].weight /= t
        maps.append(oracles.explain_epsilon(oracles.Net.chain(model), x, oracles.selective(), **options))
    assert error(maps[1].logits, maps[0].logits) < 1e-12
    assert (error(maps[1].heatmaps, maps[0].heatmaps) < 1e-10) != absolute


def test_sum_of_a_map():
    """Without biases and e a map adds up to what it explains: the logit; for z+ the last layer's W+ a."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 1, 1),
              nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]  # fmt: skip
    model = nn.Sequential(*layers, nn.Linear(16, 3, bias=False)).double()
    x, net = torch.rand(2, 2, 6, 6, dtype=torch.float64), oracles.Net.chain(model)
    for first_layer in ("epsilon", "zb"):
        out = oracles.explain_epsilon(net, x, oracles.original, eps=0.0, first_layer=first_layer)
        assert error(out.heatmaps.sum((2, 3, 4)), out.logits) < 1e-12
        out = oracles.explain_zplus(net, x, eps=0.0, first_layer="zb" if first_layer == "zb" else "zplus")
        R_start = model[:-1](x) @ model[-1].weight.clamp(min=0).T
        assert error(out.heatmaps.sum((2, 3, 4))[:, 0], R_start.sum(1)) < 1e-12


def test_hidden_relevance_that_does_not_exist_is_refused():
    """Nothing arrives inside the z^B layer, and in front of a folded norm layer z+ has only shares."""
    net, x = small()
    with pytest.raises(ValueError, match="conv0"):
        oracles.explain_epsilon(net, x, oracles.original, hidden=("conv0",))
    with pytest.raises(ValueError, match="conv1"):
        oracles.explain_zplus(net, x, hidden=("conv1",))
    with pytest.raises(ValueError, match="conv5"):
        oracles.explain_rules(net, x, oracles.original, {"fc": ("epsilon", {"e": E})})


def test_starts():
    """Section 3: eta's gradient in closed form, finite at any spread of the logits; by default the lowest."""
    z = torch.randn(5, 4, dtype=torch.float64)
    P, rows, t = z.softmax(1), torch.arange(5), 0.02
    for c in (z.argmin(1), torch.tensor([0, 1, 2, 3, 0])):
        P_c = P[rows, c][:, None]
        one = nn.functional.one_hot(c, 4)
        g = P_c * (one - P) * (1 / (P_c + t) + 1 / (1 - P_c + t))
        assert error(oracles.selective(t, c)(z), g[:, None]) < 1e-12
        assert torch.equal(oracles.classes(c)(z), one[:, None].double())
    lowest = oracles.selective(t)(z)
    assert torch.equal(lowest, oracles.selective(t, z.argmin(1))(z))
    assert oracles.selective()(1e4 * z).isfinite().all()
    assert torch.equal(oracles.classes(torch.arange(4).expand(5, 4))(z), oracles.original(z))
    assert torch.equal(oracles.original(z).sum(1, keepdim=True), oracles.all_logits(z))
    bound = math.log(1.01 / 0.01)
    assert oracles.eta(torch.tensor([[1e4, 0.0]]), torch.tensor([0])).item() == pytest.approx(bound)
    assert oracles.eta(torch.tensor([[1e4, 0.0]]), torch.tensor([1])).item() == pytest.approx(-bound)


@pytest.mark.parametrize(("norm", "shape"), [
    (nn.BatchNorm1d(3), (4, 3)),
    (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 5)),
    (nn.BatchNorm3d(2, track_running_stats=False), (3, 2, 2, 2, 3)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
    (nn.LayerNorm((4, 5)), (3, 2, 4, 5)),
])  # fmt: skip
@pytest.mark.parametrize("train", [False, True])
def test_norm_layers(norm, shape, train):
    """The forward is PyTorch's, and `k v + shift` is that forward."""
    norm = norm.double().train(train)
    for p in norm.parameters():
        nn.init.normal_(p)
    v = torch.randn(shape, dtype=torch.float64)
    net = oracles.Net([("norm", norm, "x")])
    y = net.run(v)
    k, shift, shift0 = net.affine(net.op["norm"], y)
    assert error(k * oracles.flatten(v) + shift, oracles.flatten(y["norm"])) < 1e-12
    assert torch.equal(shift, shift0)
    assert error(y["norm"], norm(v)) < 1e-12
