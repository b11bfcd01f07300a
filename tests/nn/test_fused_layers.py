"""The drop-in layers: the same numbers as the layers inside, the user's own modules, and found by the tracer."""

import copy

import pytest
import torch
from torch import nn

import fisnet_cuda as fc


def bn(channels, kind=nn.BatchNorm2d, seed=0):
    """A BatchNorm with running statistics and some negative scales."""
    g = torch.Generator().manual_seed(seed)
    layer = kind(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels, generator=g))
        layer.bias.copy_(torch.randn(channels, generator=g))
        layer.running_mean.copy_(torch.randn(channels, generator=g))
        layer.running_var.copy_(torch.rand(channels, generator=g) + 0.5)
    return layer


CASES = {
    "conv_bn_relu_1d": (lambda: [nn.Conv1d(3, 4, 3), bn(4, nn.BatchNorm1d)], fc.nn.ConvBNReLU, (5, 3, 9)),
    "conv_bn_relu_2d": (lambda: [nn.Conv2d(3, 4, 3, bias=False), bn(4)], fc.nn.ConvBNReLU, (5, 3, 6, 7)),
    "conv_bn_relu_3d": (lambda: [nn.Conv3d(2, 4, 2), bn(4, nn.BatchNorm3d)], fc.nn.ConvBNReLU, (2, 2, 4, 3, 5)),
    "conv_relu": (lambda: [nn.Conv2d(3, 4, 3, padding=1)], fc.nn.ConvReLU, (5, 3, 6, 7)),
    "bn_relu": (lambda: [bn(3)], fc.nn.BNReLU, (5, 3, 6, 7)),
    "linear_relu": (lambda: [nn.Linear(7, 4)], fc.nn.LinearReLU, (5, 2, 7)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers_inside(name, training):
    make, layer, shape = CASES[name]
    parts = make()
    plain = nn.Sequential(*copy.deepcopy(parts), nn.ReLU()).train(training)
    fused = layer.from_modules(*parts).train(training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = plain(x1), fused(x2)
    assert torch.equal(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    assert torch.equal(x2.grad, x1.grad)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(fused.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(b, c) for b, c in zip(fused.buffers(), plain.buffers(), strict=True))


def test_residual_block_end():
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), bn(3)
    layer = fc.nn.ConvBNReLU.from_modules(conv, norm)
    x, skip = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    want = torch.relu(copy.deepcopy(norm)(conv(x)) + skip)
    assert torch.equal(layer(x, skip), want)
    assert torch.equal(fc.nn.AddReLU.from_modules(nn.ReLU())(x, skip), torch.relu(x + skip))


@pytest.mark.parametrize(("pool", "shape"), [
    (nn.MaxPool1d(3, 2, 1), (2, 3, 9)),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 3, 8, 9)),
    (nn.MaxPool2d(2, dilation=2), (2, 3, 8, 9)),
    (nn.MaxPool3d(2), (2, 3, 4, 5, 6)),
])  # fmt: skip
def test_max_pool(pool, shape):
    x = torch.randn(shape)
    assert torch.equal(fc.nn.MaxPool.from_modules(pool)(x), pool(x))


def test_holds_the_users_modules():
    conv, norm = nn.Conv2d(3, 4, 3), bn(4)
    layer = fc.nn.ConvBNReLU.from_modules(conv, norm)
    assert layer.conv is conv
    assert layer.bn is norm
    assert set(layer.state_dict()) == {f"conv.{k}" for k in conv.state_dict()} | {f"bn.{k}" for k in norm.state_dict()}


class ByHand(nn.Module):
    """A residual net from fused layers."""

    def __init__(self):
        super().__init__()
        self.stem = fc.nn.ConvBNReLU.from_modules(nn.Conv2d(3, 4, 3, padding=1, bias=False), bn(4))
        self.pool = fc.nn.MaxPool.from_modules(nn.MaxPool2d(2))
        self.block = fc.nn.ConvBNReLU.from_modules(nn.Conv2d(4, 4, 3, padding=1, bias=False), bn(4, seed=1))
        self.pre = fc.nn.BNReLU.from_modules(bn(4, seed=2), nn.ReLU())
        self.conv = fc.nn.ConvReLU.from_modules(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.end = fc.nn.AddReLU.from_modules()
        self.dense = fc.nn.LinearReLU.from_modules(nn.Linear(64, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.block(x, x)
        x = self.end(self.conv(self.pre(x)), x)
        return self.head(self.dense(x.flatten(1)))


class Written(ByHand):
    """The same net spelled out, on the same modules."""

    def forward(self, x):
        def relu(t):
            return torch.relu(t)

        x = self.pool.pool(relu(self.stem.bn(self.stem.conv(x))))
        x = relu(self.block.bn(self.block.conv(x)) + x)
        x = relu(relu(self.conv.conv(relu(self.pre.bn(x)))) + x)
        return self.head(relu(self.dense.linear(x.flatten(1))))


@pytest.mark.parametrize("variant", ["selective", "original", "dual"])
@pytest.mark.parametrize("training", [True, False])
def test_found_by_the_tracer(variant, training):
    torch.manual_seed(0)
    hand = ByHand().double().train(training)
    written = Written().double().train(training)
    written.load_state_dict(hand.state_dict())
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    results = []
    for model in (hand, written):
        out = fc.ISNet(model, variant, check="never")(x, relevance=True)
        out.heatmaps.square().sum().backward()
        results.append((out.logits, out.heatmaps, [p.grad for p in model.parameters()]))
    (logits, maps, grads), (logits_w, maps_w, grads_w) = results
    assert torch.equal(logits, logits_w)
    torch.testing.assert_close(maps, maps_w, rtol=1e-10, atol=1e-12)
    for g, w in zip(grads, grads_w, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10 * w.abs().max().item())
    layers = fc.ISNet(hand, variant).layers()
    assert "stem.conv" in layers
    assert "block.relu" in layers


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: fc.nn.ConvBNReLU.from_modules(nn.Linear(1, 1), bn(1)), TypeError, ["conv", "Linear"]),
    (lambda: fc.nn.ConvBNReLU.from_modules(nn.Conv2d(1, 2, 1), bn(3)), ValueError, ["bn", "3", "2"]),
    (lambda: fc.nn.BNReLU.from_modules(nn.ReLU()), TypeError, ["bn", "ReLU"]),
    (lambda: fc.nn.LinearReLU.from_modules(nn.Linear(1, 1), nn.GELU()), TypeError, ["relu", "GELU"]),
    (lambda: fc.nn.MaxPool.from_modules(nn.AvgPool2d(2)), TypeError, ["pool", "AvgPool2d"]),
    (lambda: fc.nn.MaxPool.from_modules(nn.MaxPool2d(2, return_indices=True)), ValueError, ["return_indices"]),
])  # fmt: skip
def test_says_what_is_wrong(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words)
