"""The drop-in fused layers: the same numbers, keys, gradients and statistics as the layers inside, by hand and when traced."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.graph import build_graph

CONV, BN = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
SIZE = {1: (9,), 2: (7, 6), 3: (5, 4, 5)}


def conv(d, c_in=3, c_out=4, **kwargs):
    return CONV[d - 1](c_in, c_out, 3, **{"padding": 1, **kwargs})


def pairs():
    """``(name, fused layer's maker, the layers it stands for, number of inputs, shape)``."""
    found = []
    for d in (1, 2, 3):
        c, b = conv(d), BN[d - 1](4)
        options = {"padding": "same", "groups": 2, "bias": False} if d == 2 else {"padding_mode": "reflect"}
        found += [
            ("ConvBNReLU", (c, b), lambda m, x: F.relu(m[1](m[0](x))), (3, *SIZE[d])),
            ("ConvReLU", (conv(d, 4, **options),), lambda m, x: F.relu(m[0](x)), (4, *SIZE[d])),
            ("BNReLU", (BN[d - 1](3),), lambda m, x: F.relu(m[0](x)), (3, *SIZE[d])),
            ("MaxPool", (POOL[d - 1](3, 2, 1, 1, False, ceil_mode=d == 2),), lambda m, x: m[0](x), (3, *SIZE[d])),
        ]
    return [
        *found, ("BNReLU", (nn.BatchNorm1d(6),), lambda m, x: F.relu(m[0](x)), (6,)),
        ("BNReLU", (nn.BatchNorm2d(3, momentum=None, affine=False),), lambda m, x: F.relu(m[0](x)), (3, 5, 5)),
        ("BNReLU", (nn.BatchNorm2d(3, track_running_stats=False),), lambda m, x: F.relu(m[0](x)), (3, 5, 5)),
        ("LinearReLU", (nn.Linear(6, 4),), lambda m, x: F.relu(m[0](x)), (6,)),
        ("LinearReLU", (nn.Linear(6, 4, bias=False),), lambda m, x: F.relu(m[0](x)), (2, 5, 6)),
    ]  # fmt: skip


PAIRS = pairs()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("index", range(len(PAIRS)), ids=lambda i: f"{PAIRS[i][0]}{len(PAIRS[i][3]) - 1}d-{i}")
def test_equals_its_parts(index, training):
    name, parts, formula, shape = PAIRS[index]
    plain = nn.ModuleList(copy.deepcopy(p) for p in parts).train(training)
    layer = getattr(fc.nn, name).from_modules(*(copy.deepcopy(p) for p in parts)).train(training)
    grads = []
    for _ in range(2):  # statistics are cumulative
        x = torch.randn(4, *shape)
        results = []
        for module, fn in ((plain, lambda m, v: formula(m, v)), (layer, lambda m, v: m(v))):
            leaf = x.clone().requires_grad_()
            y = fn(module, leaf)
            y.square().sum().backward()
            results.append(y)
            grads.append([leaf.grad, *(p.grad for p in module.parameters())])
        assert torch.equal(*results)
    for a, b in zip(grads[-2], grads[-1]):
        torch.testing.assert_close(a, b)
    for (_, a), (_, b) in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b)


def test_residual_branches():
    x, y = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    layer = fc.nn.ConvBNReLU.from_modules(conv(2), nn.BatchNorm2d(4)).eval()
    assert torch.equal(layer(x, y), F.relu(layer.bn(layer.conv(x)) + y))
    assert torch.equal(fc.nn.AddReLU.from_modules(nn.ReLU())(y, x.mean() - y), F.relu(y + (x.mean() - y)))


def test_from_modules_keeps_the_modules():
    """The same objects, under plain names: optimizers and checkpoints of the parts fit."""
    c, b = conv(2), nn.BatchNorm2d(4)
    layer = fc.nn.ConvBNReLU.from_modules(c, b)
    assert layer.conv is c
    assert layer.bn is b
    assert [k for k, _ in layer.named_parameters()] == ["conv.weight", "conv.bias", "bn.weight", "bn.bias"]
    relu = nn.ReLU(inplace=True)
    for cls, parts, keys in (
        (fc.nn.ConvReLU, (conv(2), relu), ["conv.weight", "conv.bias"]),
        (fc.nn.BNReLU, (nn.BatchNorm1d(2), relu), ["bn.weight", "bn.bias"]),
        (fc.nn.LinearReLU, (nn.Linear(2, 2), relu), ["linear.weight", "linear.bias"]),
        (fc.nn.AddReLU, (relu,), []), (fc.nn.MaxPool, (nn.MaxPool1d(2),), []),
    ):  # fmt: skip
        assert [k for k, _ in cls.from_modules(*parts).named_parameters()] == keys


class Fused(nn.Module):
    """A small residual network of fused layers ..."""

    def __init__(self):
        super().__init__()
        n = fc.nn
        self.stem, self.pool = n.ConvBNReLU(conv(2, bias=False), nn.BatchNorm2d(4)), n.MaxPool(nn.MaxPool2d(3, 2, 1))
        self.a, self.b = n.BNReLU(nn.BatchNorm2d(4)), n.ConvReLU(conv(2, 4))
        self.c, self.add = n.ConvBNReLU(conv(2, 4), nn.BatchNorm2d(4)), n.AddReLU()
        self.fc, self.head = n.LinearReLU(nn.Linear(4, 5)), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.c(self.b(self.a(x)), skip=x)
        return self.head(self.fc(self.add(x, self.b(x)).mean((2, 3))))


class Apart(Fused):
    """... and the same written with torch.nn."""

    def forward(self, x):
        x = self.pool.pool(F.relu(self.stem.bn(self.stem.conv(x))))
        y = F.relu(self.b.conv(F.relu(self.a.bn(x))))
        x = F.relu(self.c.bn(self.c.conv(y)) + x)
        return self.head(F.relu(self.fc.linear(F.relu(x + F.relu(self.b.conv(x))).mean((2, 3)))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_tracing_finds_the_layers_inside(variant, training):
    torch.manual_seed(0)
    fused, apart = Fused().double().train(training), Apart().double().train(training)
    apart.load_state_dict(fused.state_dict())
    assert [(n.kind, n.inputs) for n in build_graph(fused, training).nodes] == [
        (n.kind, n.inputs) for n in build_graph(apart, training).nodes
    ]
    x, results = torch.rand(3, 3, 9, 9, dtype=torch.float64), []
    for model in (fused, apart):
        plain = copy.deepcopy(model)(x)
        out = fc.ISNet(model, variant=variant)(x, relevance=True)
        assert torch.equal(out.logits, plain)
        (out.heatmaps.square().sum() + out.logits.sum()).backward()
        results.append([out.heatmaps.detach(), out.logits.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_layers_of_the_plan():
    rows = {row.layer for row in fc.ISNet(Fused()).plan().rows}
    assert {"stem.conv", "pool.pool", "a.bn", "b.conv", "c.conv", "fc.linear", "head"} <= rows


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: fc.nn.ConvBNReLU(nn.Linear(2, 2), nn.BatchNorm1d(2)), TypeError,
     "conv must be one of torch.nn's Conv1d, Conv2d, Conv3d, got Linear"),
    (lambda: fc.nn.ConvBNReLU(conv(2), nn.GroupNorm(1, 4)), TypeError, "bn must be one of .*BatchNorm3d, got GroupNorm"),
    (lambda: fc.nn.ConvBNReLU(conv(2), nn.BatchNorm2d(3)), ValueError,
     "bn has 3 features and conv has 4 outputs: they must be equal"),
    (lambda: fc.nn.ConvReLU.from_modules(conv(2), nn.ELU()), TypeError, "relu must be one of torch.nn's ReLU, got ELU"),
    (lambda: fc.nn.BNReLU.from_modules(nn.BatchNorm2d(2), nn.Identity()), TypeError, "relu must be .*got Identity"),
    (lambda: fc.nn.LinearReLU(nn.Bilinear(2, 2, 2)), TypeError, "linear must be one of torch.nn's Linear, got Bilinear"),
    (lambda: fc.nn.LinearReLU.from_modules(nn.Linear(2, 2), nn.ReLU6()), TypeError, "relu must be .*got ReLU6"),
    (lambda: fc.nn.AddReLU.from_modules(nn.Linear(2, 2)), TypeError, "relu must be .*got Linear"),
    (lambda: fc.nn.MaxPool(nn.AvgPool2d(2)), TypeError, "pool must be one of .*MaxPool3d, got AvgPool2d"),
    (lambda: fc.nn.MaxPool(nn.MaxPool2d(2, return_indices=True)), ValueError, "use return_indices=False"),
])  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
