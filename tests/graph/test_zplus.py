"""Dual's two maps of networks whose parts meet in rarer ways, beside the independent oracle: values and gradients."""

import random

import oracles
import pytest
import torch
from helpers import GraphNet, close, close_grads, rand, randomise
from torch import nn

import fisnet_cuda as fc

E = 0.01
CASES = {}


def mean(v):
    return v.mean((2, 3))


def case(ops, shape=(3, 3, 6, 6), first_layers=("zb", "epsilon"), modes=(False, True), **others):
    """Register a network beside its ops: words are layers in a row ("relu..." and "flatten" what they say), ``others`` what a
    word means if not a layer, or ``(what, inputs)``."""

    def register(cls):
        CASES[cls.__name__] = cls, ops.split(), shape, first_layers, modes, others
        return cls

    return register


class Net(nn.Module):
    """Layers by name: what `layers` returns."""

    def __init__(self):
        super().__init__()
        for name, layer in self.layers().items():
            self.add_module(name, layer)


def conv(c_in=4, c_out=4, **kwargs):
    return nn.Conv2d(c_in, c_out, 3, **{"padding": 1, **kwargs})


@case("conv relu mean bn1 relu1 head", mean=mean)
class MeanThenBatchNorm(Net):
    def layers(self):
        return {"conv": conv(3), "bn1": nn.BatchNorm1d(4), "head": nn.Linear(4, 3)}

    def forward(self, x):
        return self.head(self.bn1(self.conv(x).relu().mean((2, 3))).relu())


@case("conv mean bn1 relu1 head", mean=mean)
class MeanOfSignedValuesThenBatchNorm(Net):
    layers = MeanThenBatchNorm.layers

    def forward(self, x):
        return self.head(self.bn1(self.conv(x).mean((2, 3))).relu())


@case("conv relu pool flatten bn1 head")
class PoolFlattenBatchNorm(Net):
    """The "BNNeck"."""

    def layers(self):
        return {
            "conv": conv(3), "pool": nn.AvgPool2d(3), "bn1": nn.BatchNorm1d(16), "head": nn.Linear(16, 3)
        }  # fmt: skip

    def forward(self, x):
        return self.head(self.bn1(self.pool(self.conv(x).relu()).flatten(1)))


@case("conv flatten bn1 relu head", first_layers=["epsilon"])  # into z^B it would fold right behind the layer alone
class FlattenBatchNorm(Net):
    def layers(self):
        return {"conv": conv(3, 2, bias=False), "bn1": nn.BatchNorm1d(72), "head": nn.Linear(72, 3)}

    def forward(self, x):
        return self.head(self.bn1(self.conv(x).flatten(1)).relu())


@case("conv relu conv2 add bn relu2 mean head", add=("add", ("conv2", "relu")), mean=mean)
class BatchNormBehindASum(Net):
    def layers(self):
        return {"conv": conv(3), "conv2": conv(), "bn": nn.BatchNorm2d(4), "head": nn.Linear(4, 3)}

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(self.bn(self.conv2(x) + x).relu().mean((2, 3)))


@case("conv bn relu half conv2 minus relu2 flatten head", half=lambda v: 0.5 * v, minus=lambda v: -0.7 * v)
class Scales(Net):
    def layers(self):
        return {"conv": conv(3), "bn": nn.BatchNorm2d(4), "conv2": conv(), "head": nn.Linear(144, 3)}

    def forward(self, x):
        x = self.bn(self.conv(x)).relu() * 0.5
        return self.head((self.conv2(x) * -0.7).relu().flatten(1))


@case("conv pool bn relu mean head", mean=mean)
class BatchNormBehindASignedPool(Net):
    def layers(self):
        return {"conv": conv(3), "pool": nn.AvgPool2d(2, 1), "bn": nn.BatchNorm2d(4), "head": nn.Linear(4, 3)}

    def forward(self, x):
        return self.head(self.bn(self.pool(self.conv(x))).relu().mean((2, 3)))


@case("fc bn relu fc2 bn2 relu2 head", shape=(5, 6))
class Dense(Net):
    """The first layer's BatchNorm is part of z^B, behind a dense layer too."""

    def layers(self):
        return {
            "fc": nn.Linear(6, 8), "bn": nn.BatchNorm1d(8), "fc2": nn.Linear(8, 7, bias=False), "bn2": nn.BatchNorm1d(7),
            "head": nn.Linear(7, 3),
        }  # fmt: skip

    def forward(self, x):
        return self.head(self.bn2(self.fc2(self.bn(self.fc(x)).relu())).relu())


@case("conv relu conv2 gn relu2 flatten head", modes=[False])
class GroupNorm(Net):
    def layers(self):
        return {"conv": conv(3), "conv2": conv(), "gn": nn.GroupNorm(2, 4), "head": nn.Linear(144, 3)}

    def forward(self, x):
        return self.head(self.gn(self.conv2(self.conv(x).relu())).relu().flatten(1))


@case("fc relu fc2 ln relu2 flatten head", shape=(3, 2, 6), modes=[False])
class LayerNorm(Net):
    def layers(self):
        return {"fc": nn.Linear(6, 5), "fc2": nn.Linear(5, 4), "ln": nn.LayerNorm(4), "head": nn.Linear(8, 3)}

    def forward(self, x):
        return self.head(self.ln(self.fc2(self.fc(x).relu())).relu().flatten(1))


@case("conv pool relu conv2 bn pool2 relu2 mean head", mean=mean)
class PoolBeforeReLU(Net):
    """As in LeNet; in the first layer too."""

    def layers(self):
        return {
            "conv": conv(3), "pool": nn.MaxPool2d(3, 2, 1), "conv2": conv(), "bn": nn.BatchNorm2d(4), "pool2": nn.MaxPool2d(2, 1),
            "head": nn.Linear(4, 3),
        }  # fmt: skip

    def forward(self, x):
        x = self.pool(self.conv(x)).relu()
        return self.head(self.pool2(self.bn(self.conv2(x))).relu().mean((2, 3)))


@case("conv relu conv2 pool bn relu2 conv3 cat bn2 relu3 mean head", cat=("concat", ("pool", "conv3")), mean=mean)
class Transition(Net):
    """torchvision's DenseNet: an average of signed values, normalised by several."""

    def layers(self):
        return {
            "conv": conv(3), "conv2": conv(), "pool": nn.AvgPool2d(2), "bn": nn.BatchNorm2d(4), "conv3": conv(4, 2),
            "bn2": nn.BatchNorm2d(6), "head": nn.Linear(6, 3),
        }  # fmt: skip

    def forward(self, x):
        x = self.pool(self.conv2(self.conv(x).relu()))
        return self.head(self.bn2(torch.cat([x, self.conv3(self.bn(x).relu())], 1)).relu().mean((2, 3)))


@case("conv relu out mean", mean=mean)
class LogitsFromAMean(Net):
    def layers(self):
        return {"conv": conv(3), "out": conv(4, 3)}

    def forward(self, x):
        return self.out(self.conv(x).relu()).mean((2, 3))


@case("conv relu out pool flatten")
class LogitsFromAPool(Net):
    def layers(self):
        return {"conv": conv(3), "out": conv(4, 3), "pool": nn.AvgPool2d(6)}

    def forward(self, x):
        return self.pool(self.out(self.conv(x).relu())).flatten(1)


def oracle(model, words, others):
    found, last = [], "x"
    for word in words:
        what, inputs = others.get(word), last
        if isinstance(what, tuple):
            what, inputs = what
        if what is None:
            what = "relu" if word.startswith("relu") else word if word == "flatten" else model.get_submodule(word)
        found.append((word, what, inputs))
        last = word
    return oracles.Net(found)


def compare(model, graph, x, first_layer):
    """Both maps and the gradients of a functional of them."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):  # a scale of 0 is a kink of the positive part
            m.weight.data = torch.where(m.weight == 0, 0.5, m.weight)
    out = fc.ISNet(model, variant="dual", eps=E, first_layer=first_layer)(x, relevance=True)
    plus = oracles.explain_zplus(graph, x, E, first_layer="zb" if first_layer == "zb" else "zplus")
    epsilon = oracles.explain_epsilon(graph, x, oracles.all_logits, E, first_layer=first_layer)
    want = torch.cat([plus.heatmaps, epsilon.heatmaps], 1)
    assert want.any()
    close(out.logits, plus.logits, what="logits")
    close(out.heatmaps[:, 0], want[:, 0], what="z+")
    close(out.heatmaps[:, 1], want[:, 1], what="epsilon")
    weights = rand(*want.shape, seed=2, low=-1.0)
    params = dict(model.named_parameters())
    found = []
    for R in (out.heatmaps, want):
        grads = torch.autograd.grad((R * weights).sum(), list(params.values()), allow_unused=True, retain_graph=True)
        found.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads)})
    close_grads(*found, 1e-9)


@pytest.mark.parametrize(
    ("name", "training", "first_layer"),
    [(n, mode, first) for n, (_, _, _, firsts, modes, _) in CASES.items() for mode in modes for first in firsts],
)
def test_against_the_oracle(name, training, first_layer):
    cls, words, shape, _, _, others = CASES[name]
    model = randomise(cls(), 3).train(training)
    compare(model, oracle(model, words, others), rand(*shape, seed=1), first_layer)


def any_order(seed):
    """Ops in any order that shapes allow: pools before ReLUs, sums of what is at hand, BatchNorms behind anything but each
    other. The stem is a plain one: which of several readers is the first ReLU would be a matter of definition."""
    rng = random.Random(seed)
    ops, shapes, normal = [], {"x": (3, 8)}, set()

    def add(kind, what, inputs, channels, size):
        name = f"{kind}{len(ops)}"
        ops.append((name, what, inputs))
        shapes[name] = channels, size
        if kind == "bn" or (kind == "cat" and not normal.isdisjoint(inputs)):
            normal.add(name)
        return name

    last = add("conv", conv(3), "x", 4, 8)
    last = add("relu", nn.ReLU(), add("bn", nn.BatchNorm2d(4), last, 4, 8) if rng.random() < 0.5 else last, 4, 8)
    known = [last]
    for _ in range(rng.randint(4, 9)):
        c, size = shapes[last]
        kind = rng.choice(["conv", "conv", "bn", "relu", "relu", "max", "avg", "add", "cat"])
        if kind == "conv":
            out = rng.choice([2, 4])
            last = add(kind, conv(c, out, bias=rng.random() < 0.5), last, out, size)
        elif kind == "bn" and last not in normal:
            last = add(kind, nn.BatchNorm2d(c), last, c, size)
        elif kind == "relu":
            last = add(kind, nn.ReLU(), last, c, size)
        elif kind == "max" and size >= 4:
            last = add(kind, nn.MaxPool2d(3, 2, 1), last, c, (size + 1) // 2)
        elif kind == "avg" and size >= 4:
            last = add(kind, nn.AvgPool2d(2), last, c, size // 2)
        elif kind == "add":
            last = add(kind, "add", (last, rng.choice([n for n in known if shapes[n] == (c, size)])), c, size)
        elif kind == "cat":
            other = rng.choice([n for n in known if shapes[n][1] == size])
            last = add(kind, "concat", (last, other), c + shapes[other][0], size)
        known.append(last)
    c, size = shapes[last]
    if rng.random() < 0.7:
        last, size = add("pool", nn.AdaptiveAvgPool2d(1), last, c, 1), 1
    last = add("flatten", "flatten", last, c * size**2, 0)
    add("head", nn.Linear(c * size**2, 3), last, 3, 0)
    return ops


@pytest.mark.parametrize("seed", range(16))
def test_random_networks(seed):
    torch.manual_seed(seed)
    ops = any_order(seed)
    model = randomise(GraphNet(ops), seed).train(seed % 2 == 0)
    compare(model, oracles.Net(ops), rand(2, 3, 8, 8, seed=seed), ("zb", "epsilon")[seed // 2 % 2])


def test_shift_by_a_constant():
    """x + c: the constant is a bias, its positive part takes a share."""
    first, head = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = first, head

        def forward(self, x):
            return self.head(self.first(x).relu() - 0.2 + 0.3)

    x = rand(5, 4)
    a = first(x).relu()
    values = [a, a - 0.2, a + 0.1]
    W, W_minus = head.weight.clamp(min=0), head.weight.clamp(max=0)
    up, down = values[2].clamp(min=0), values[2].clamp(max=0)
    R = up @ W.T + down @ W_minus.T + head.bias.clamp(min=0)  # the start
    R = (up * W + down * W_minus) * R / (R + E)
    R = values[1].clamp(min=0) * R / (values[1].clamp(min=0) + 0.3 + E)
    R = a * R / (a + E)
    P, P_minus = first.weight.clamp(min=0), first.weight.clamp(max=0)
    want = x.clamp(min=0) * ((R / (x @ P.T + first.bias.clamp(min=0) + E)) @ P)
    assert not (x < 0).any()
    assert P_minus.any()
    got = fc.ISNet(Shifted(), variant="dual", first_layer="epsilon", eps=E)(x, relevance=True).heatmaps[:, 0]
    close(got, want, what="heatmap")
