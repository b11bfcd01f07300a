"""Products with the phi behind them, and phi's adjoint handed over: where, where not, and that nothing else changes."""

import copy

import golden_nets
import pytest
import torch
from helpers import GraphNet, close, close_grads, error, rand, random_ops, randomise
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.graph import fuse, fuse_linear, program
from fisnet_cuda.graph.fan_out import fan_out
from fisnet_cuda.graph.ir import Instr, Slot, slots_in
from fisnet_cuda.rules import Epsilon

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")


def relevance_of(net):
    return net._programs[True][0].lowered.relevance


def rows(net):
    return {row.layer: row.relevance.replace("bn_scale", "").strip() for row in net.plan().rows}


def option(instr, name):
    return dict(instr.options).get(name, False)


def conv(name, source, c_in=4, c_out=4, k=3, stride=1):
    return name, nn.Conv2d(c_in, c_out, k, stride, k // 2), source


def head(source, features=4):
    return [("pool", nn.AdaptiveAvgPool2d(1), source), ("flat", "flatten", "pool"), ("fc", nn.Linear(features, 3), "flat")]


CHAIN = [
    conv("conv0", "x", 3), ("relu0", nn.ReLU(), "conv0"), conv("conv1", "relu0"), ("relu1", nn.ReLU(), "conv1"),
    conv("conv2", "relu1"), ("relu2", nn.ReLU(), "conv2"), *head("relu2"),
]  # fmt: skip
RESIDUAL = [
    conv("conv0", "x", 3), ("relu0", nn.ReLU(), "conv0"),
    conv("conv1", "relu0"), ("bn1", nn.BatchNorm2d(4), "conv1"), ("relu1", nn.ReLU(), "bn1"),
    conv("conv2", "relu1"), ("bn2", nn.BatchNorm2d(4), "conv2"), ("add2", "add", ("bn2", "relu0")), ("relu2", nn.ReLU(), "add2"),
    conv("conv3", "relu2", stride=2), ("bn3", nn.BatchNorm2d(4), "conv3"), ("relu3", nn.ReLU(), "bn3"),
    conv("conv4", "relu3"), ("bn4", nn.BatchNorm2d(4), "conv4"),
    conv("down", "relu2", k=1, stride=2), ("down_bn", nn.BatchNorm2d(4), "down"),
    ("add4", "add", ("bn4", "down_bn")), ("relu4", nn.ReLU(), "add4"), *head("relu4"),
]  # fmt: skip
PREACTIVATION = [
    conv("conv0", "x", 3), ("bn1", nn.BatchNorm2d(4), "conv0"), ("relu1", nn.ReLU(), "bn1"), conv("conv1", "relu1"),
    ("cat", "concat", ("conv0", "conv1")), ("bn2", nn.BatchNorm2d(8), "cat"), ("relu2", nn.ReLU(), "bn2"),
    conv("conv2", "relu2", 8), ("bn3", nn.BatchNorm2d(4), "conv2"), ("relu3", nn.ReLU(), "bn3"), conv("conv3", "relu3"),
    ("last", nn.ReLU(), "conv3"), *head("last"),
]  # fmt: skip
ONE_CONV_BLOCK = [
    conv("conv0", "x", 3), ("relu0", nn.ReLU(), "conv0"), conv("conv1", "relu0"), ("relu1", nn.ReLU(), "conv1"),
    conv("conv2", "relu1"), ("add", "add", ("conv2", "relu1")), ("relu2", nn.ReLU(), "add"),
    conv("conv3", "relu2"), ("relu3", nn.ReLU(), "conv3"), *head("relu3"),
]  # fmt: skip
DENSE = [
    conv("conv0", "x", 3), ("relu0", nn.ReLU(), "conv0"), ("pool", nn.AdaptiveAvgPool2d(1), "relu0"), ("flat", "flatten", "pool"),
    ("fc0", nn.Linear(4, 5), "flat"), ("bn0", nn.BatchNorm1d(5), "fc0"), ("fcr0", nn.ReLU(), "bn0"),
    ("fc1", nn.Linear(5, 6), "fcr0"), ("fcr1", nn.ReLU(), "fc1"), ("fc2", nn.Linear(6, 3), "fcr1"),
]  # fmt: skip
NETS = {
    "chain": CHAIN, "residual": RESIDUAL, "preactivation": PREACTIVATION, "one-conv-block": ONE_CONV_BLOCK, "dense": DENSE,
    **{f"random-{seed}": random_ops(seed) for seed in range(8)},
}  # fmt: skip


def make(ops, variant="selective", **options):
    if variant in ("stochastic", "contrast"):
        options["generator"] = torch.Generator().manual_seed(0)
    model = golden_nets.build(ops) if isinstance(ops, str) else GraphNet(copy.deepcopy(ops))
    return fc.ISNet(randomise(model), variant, check="never", **options)


# ---- products with phi ---------------------------------------------------------------------------------------------------


def test_a_chain():
    net = make(CHAIN)
    assert rows(net)["conv2"] == "conv^T_phi"
    assert rows(net)["conv1"] == "conv^T"  # into the first layer's rule
    assert "relu1" not in rows(net)
    (line,) = [line.split() for line in str(net.plan("cpu")).splitlines() if line.startswith("conv2")]
    assert line == ["conv2", "conv_relu", "conv^T_phi", "epsilon(0.01)", "linear_act:reference,", "transposed_phi:reference"]


def test_with_a_skip():
    """The block's convolution takes the skip; where both consumers are products, the later one takes the other's result."""
    found = rows(make(RESIDUAL))
    assert found["conv4"] == found["conv2"] == found["conv3"] == "conv^T_phi"
    assert found["down"] == "conv^T"
    instr = {i.layer: i for i in relevance_of(make(RESIDUAL)) if i.op == "conv^T_phi"}
    down = next(i for i in relevance_of(make(RESIDUAL)) if i.layer == "down" and i.op == "conv^T")
    assert instr["conv3"].operands[7] == Slot(down.outs[0])
    assert instr["conv4"].operands[7] is None


def test_with_the_batch_norm_before():
    found = rows(make(PREACTIVATION))
    assert found["conv2"] == "conv^T_phi_bn"
    assert found["conv3"] == "conv^T_phi"


def test_dense_layers():
    found = rows(make(DENSE))
    assert found["fc2"] == found["fc1"] == "linear^T_phi"
    assert found["fc0"] == "linear^T"


def test_two_rules_on_one_row():
    net = make(CHAIN, rules={"conv2": Epsilon(0.1), "relu1": Epsilon(0.2)})
    (row,) = [row for row in net.plan().rows if row.layer == "conv2"]
    assert (row.relevance, row.rule) == ("conv^T_phi", "epsilon(0.1) | epsilon(0.2)")


def test_not_where_the_product_has_other_readers():
    found = rows(make(CHAIN, supervise=("relu1",)))
    assert found["conv2"] == "conv^T"
    assert "phi_scale" in found["relu1"]


def test_not_for_dual():
    """Where both rules meet, one pass for both is worth more."""
    found = relevance_of(make(CHAIN, "dual"))
    assert not [i for i in found if i.op == "conv^T_phi"]
    assert [i for i in found if i.op == "dual_phi"]


def test_sums_without_a_phi():
    """Into a max pool: what the block gives and what goes past it; but not where the two read the same."""
    pooled = [conv("stem", "x", 3), ("relu", nn.ReLU(), "stem"), ("max", nn.MaxPool2d(2), "relu")]
    ops = [*pooled, *((n, what, "max" if source == "relu0" else source) for n, what, source in CHAIN[2:])]
    block = [*ops[:6], ("add", "add", ("conv2", "max")), ("relu2", nn.ReLU(), "add"), *head("relu2")]
    found = relevance_of(make(block))
    assert [i.layer for i in found if i.op == "conv^T_add"] == ["conv1"]
    one = [*pooled, conv("conv2", "max"), ("add", "add", ("conv2", "max")), ("relu2", nn.ReLU(), "add"), conv("conv3", "relu2")]
    found = relevance_of(make([*one, ("relu3", nn.ReLU(), "conv3"), *head("relu3")]))
    assert not [i for i in found if i.op == "conv^T_add"]
    assert [i.layer for i in found if option(i, "alias")] == ["conv2"]


def test_other_rules_stay():
    net = make(CHAIN, rules={"conv2": fc.rules.WSquare()})
    assert rows(net)["conv2"].split()[-1] == "conv^T"
    assert not [i for i in relevance_of(net) if i.layer == "conv2" and i.kernel]


# ---- handing over --------------------------------------------------------------------------------------------------------


def product(s, out, *behind, **options):
    return Instr("conv^T", None, (Slot(s), None, None, (), None, *behind), (out,), "conv", "", "transposed_phi", tuple(options.items()))


def phi(g, out, a=30, eps=0.1, skip=None, *behind):
    return Instr("phi_scale", None, (Slot(g), Slot(a), eps, skip, *behind), (out,), "relu", kernel="phi_scale")


def reads(*slots, out=90):
    return Instr("add", None, tuple(map(Slot, slots)), (out,), "add")


def handed(*instrs, protected=()):
    """``(what makes s, the others)`` after the pass."""
    _, after, _ = fan_out((), instrs, frozenset(protected), 100)
    return after[0], after[1:]


def test_phi_is_handed_over():
    for eps in (0.1, Slot(31)):
        maker, (reader,) = handed(phi(0, 1, eps=eps), product(1, 2))
        assert maker.options == (("handed_over", True),)
        assert reader.operands == (Slot(1), None, None, (), None, None, 0.0, None, None, None, (Slot(30), eps))
        assert (reader.outs, reader.options) == ((2,), ())


def test_a_product_hands_over_and_takes():
    first, (second, third) = handed(product(0, 1, Slot(30), 0.1), product(1, 2, Slot(31), 0.2, Slot(7)), product(2, 3))
    assert option(first, "handed_over")
    assert second.operands[5:] == (Slot(31), 0.2, Slot(7), None, None, (Slot(30), 0.1))
    assert option(second, "handed_over")
    assert third.operands[-1] == (Slot(31), 0.2)
    assert not option(third, "handed_over")


def test_the_other_readers_get_an_alias():
    maker, (reader, add, phi2) = handed(phi(0, 1), product(1, 2), reads(1, 5, 1), phi(3, 4, 40, 0.1, Slot(1)))
    assert maker.outs == (1,)
    assert (reader.outs, reader.options) == ((2, 100), (("alias", True),))
    assert slots_in(add.operands) == [100, 5, 100]
    assert phi2.operands[3] == Slot(100)


@pytest.mark.parametrize(
    ("instrs", "protected"),
    [
        ([phi(0, 1), reads(1), product(1, 2)], ()),  # another one reads it first
        ([phi(0, 1), product(1, 2)], (1,)),  # callers read it
        ([phi(0, 1, 30, 0.1, None, Slot(8)), product(1, 2)], ()),  # it is no s, but that through a BatchNorm
        ([phi(0, 1, 30, 0.1, None, Slot(8), Slot(9)), product(1, 2)], ()),
        ([phi(0, 1), product(1, 2, Slot(40), 0.1, Slot(1))], ()),  # the same map twice
        ([phi(0, 1), product(5, 2, Slot(40), 0.1, Slot(1))], ()),  # read as a skip
        ([product(0, 1), product(1, 2)], ()),  # no phi
        ([phi(0, 1)], ()),
    ],
)
def test_not_handed_over(instrs, protected):
    _, after, _ = fan_out((), tuple(instrs), frozenset(protected), 100)
    assert not any(option(i, "handed_over") or option(i, "alias") for i in after)
    assert all(type(operand) is not tuple or not operand for i in after for operand in i.operands)


def test_who_reads_the_activation():
    """The reader's share of ``a``'s gradient counts, that of whoever handed over does not."""
    forward = (Instr("bn_relu", None, (Slot(0),), (30, 31, 32), "bn", kernel="bn_act"), reads(30, out=33))
    (bn, conv), (maker, reader), _ = fan_out(forward, (phi(40, 41), product(41, 42)), frozenset(), 100)
    assert bn.outs == (30, 31, 32, 100)
    assert conv.operands == (Slot(100),)
    assert maker.operands[1] == Slot(30)
    assert reader.operands[-1] == (Slot(30), 0.1)


@pytest.mark.parametrize(("ops", "pairs"), [(CHAIN, 1), (RESIDUAL, 3), (PREACTIVATION, 1), (ONE_CONV_BLOCK, 1), (DENSE, 2)])
def test_in_a_program(ops, pairs):
    """Every phi that is handed over has one reader of its result, which has its epsilon; nobody else has a source."""
    found = relevance_of(make(ops))
    makers = [i for i in found if option(i, "handed_over")]
    assert len(makers) == pairs
    for maker in makers:
        (reader,) = [i for i in found if maker.outs[0] in slots_in(i.operands)]
        assert reader.operands[0] == Slot(maker.outs[0])
        assert reader.operands[10][1] == maker.operands[2 if maker.kernel == "phi_scale" else 6]
    assert sum(len(i.operands) > 10 for i in found if i.kernel == "transposed_phi") == pairs


# ---- results -------------------------------------------------------------------------------------------------------------


def separate(monkeypatch):
    """Programs as they were: every product, every phi a Function of its own."""
    ours = (fuse_linear.transposed_phi, fuse_linear.transposed_add)
    patterns = tuple(pattern for pattern in fuse.PATTERNS if pattern not in ours)
    assert len(patterns) < len(fuse.PATTERNS)
    monkeypatch.setattr(fuse, "PATTERNS", patterns)
    monkeypatch.setattr(program, "fan_out", lambda forward, relevance, protected, slots: (forward, relevance, slots))


def step(ops, variant, size=9, training=True, frozen="", **options):
    net = make(ops, variant, **options).train(training)
    for name, p in net.model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    x = rand(3, 3, size, size, seed=1).requires_grad_()
    out = net(x, relevance=True)
    maps = [out.heatmaps, *out.hidden.values()]
    (sum((r**2).sum() + r.sum() for r in maps) + (out.logits**2).sum()).backward()
    grads = {"x": x.grad} | {n: p.grad for n, p in net.model.named_parameters() if p.grad is not None}
    return [out.logits, *maps], grads


def same(monkeypatch, *args, **options):
    got, grads = step(*args, **options)
    with monkeypatch.context() as patch:
        separate(patch)
        want, want_grads = step(*args, **options)
    for g, w in zip(got, want):
        close(g, w, 1e-12)
    close_grads(grads, want_grads, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ops", NETS.values(), ids=NETS)
def test_results_are_those_of_separate_ops(monkeypatch, ops, variant):
    same(monkeypatch, ops, variant)


OPTIONS = {
    "eval": {"training": False},
    "relative": {"eps": Epsilon(0.1, relative=True)},
    "no epsilon": {"eps": Epsilon(0.0)},
    "no zB": {"first_layer": "epsilon"},
    "frozen weights": {"frozen": "weight"},
    "frozen convolutions": {"frozen": "conv"},
    "epsilon_plus": {"rules": "epsilon_plus"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ops", [RESIDUAL, PREACTIVATION, DENSE], ids=["residual", "preactivation", "dense"])
def test_options(monkeypatch, ops, options):
    for variant in ("selective", "original"):
        same(monkeypatch, ops, variant, **options)


@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_golden_nets(monkeypatch, name):
    same(monkeypatch, name, "selective", 16 if "seq" in name else 32)


def test_inner_maps(monkeypatch):
    """Of a ReLU, of a sum (whose map is read before it goes on), and of a BatchNorm."""
    same(monkeypatch, RESIDUAL, "selective", supervise=("relu2", "add:2", "bn1"))


@pytest.mark.parametrize("maps", [1, 2, 3])
def test_chunks_are_computed_again(monkeypatch, maps):
    """Original's classes in parts, with checkpoints; each part has its own hand-overs."""
    monkeypatch.setattr(fc.ISNet, "_chunk", lambda self, env, all_maps: maps)
    same(monkeypatch, RESIDUAL, "original")


def test_relevance_runs_again_on_a_copy():
    net = make(RESIDUAL, "original")
    built = net._programs[True][0]
    x = rand(2, 3, 9, 9).requires_grad_()
    env = built.run_forward(net.model, x)
    start = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    heatmaps = [built.run_relevance(list(env), {"epsilon": start})[built.lowered.heatmaps["epsilon"]] for _ in range(2)]
    first, second = (torch.autograd.grad((h**2).sum(), x, retain_graph=True)[0] for h in heatmaps)
    both = torch.autograd.grad(sum((h**2).sum() for h in heatmaps), x)[0]
    assert torch.equal(first, second)
    close(both, 2 * first)


@pytest.mark.parametrize("ops", [CHAIN, RESIDUAL, PREACTIVATION, DENSE], ids=["chain", "residual", "preactivation", "dense"])
def test_autocast(monkeypatch, ops):
    """Bit for bit the logits and heatmaps of separate ops; gradients in float32, no further from float64."""

    def half():
        net = make(ops).float()
        x = rand(3, 3, 9, 9, seed=1).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x, relevance=True, target=1)
        ((out.heatmaps.float() ** 2).sum() + (out.logits.float() ** 2).sum()).backward()
        return out, {"x": x.grad} | {n: p.grad for n, p in net.model.named_parameters()}

    out, grads = half()
    with monkeypatch.context() as patch:
        separate(patch)
        want, usual = half()
    assert torch.equal(out.logits, want.logits)
    assert torch.equal(out.heatmaps, want.heatmaps)
    assert out.heatmaps.dtype == want.heatmaps.dtype
    assert all(g.dtype == torch.float32 for g in grads.values())
    exact = make(ops)
    x = rand(3, 3, 9, 9, seed=1).float().double().requires_grad_()
    out = exact(x, relevance=True, target=1)
    ((out.heatmaps**2).sum() + (out.logits**2).sum()).backward()
    for name, g in ({"x": x.grad} | {n: p.grad for n, p in exact.model.named_parameters()}).items():
        if g.any():
            assert error(grads[name], g) <= 2 * error(usual[name], g) + torch.finfo(torch.bfloat16).eps, name


def test_gradients_of_some_inputs():
    """`torch.autograd.grad` for one weight gives what backward gives for it."""
    net = make(RESIDUAL)
    x = rand(3, 3, 9, 9)
    params = dict(net.model.named_parameters())

    def loss():
        out = net(x, relevance=True)
        return (out.heatmaps**2).sum() + (out.logits**2).sum()

    loss().backward()
    for name in ("conv0.weight", "bn1.weight", "conv4.weight", "down.weight", "fc.bias"):
        (found,) = torch.autograd.grad(loss(), params[name])
        close(found, params[name].grad, 1e-12)
