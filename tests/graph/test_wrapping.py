"""A wrapped model stays the user's: attributes, modes, keys, copies; and the program follows what changes on it."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from graph import truth, zoo
from graph.zoo import Net, conv
from torch import nn

import fisnet_cuda as fc

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# each kind of thing that a program holds: host calls, casts, constants, functional weights, modes, fused layers
PORTABLE = (
    "Shapes", "Slices", "Casts", "Constants", "NormalisesItsInput", "FunctionalWeights", "FunctionalPools", "Dropouts",
    "GreyRepeated", "FrozenDropout", "StochasticDepth", "FusedLayers", "Parametrized", "norm_layer", "act_gelu", "first_shuffle",
)  # fmt: skip


def heatmaps(net, x, **options):
    torch.manual_seed(5)
    return net(x, relevance=True, **options).heatmaps


@pytest.mark.parametrize("name", PORTABLE)
def test_copies(name):
    """deepcopy gives a net of its own; its programs pickle, and compare equal to those of another wrapping."""
    make, x = zoo.build(name)
    net = fc.ISNet(make(), variant="dual", first_layer="epsilon", check="never")
    twin = copy.deepcopy(net)
    assert torch.equal(heatmaps(twin, x), heatmaps(net, x))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    assert not torch.equal(heatmaps(twin, x), heatmaps(net, x))
    again = pickle.loads(pickle.dumps(net._programs))
    for mode in (True, False):
        assert again[mode][0].graph == net._programs[mode][0].graph == twin._programs[mode][0].graph


class Stateful(Net):
    """Writes on itself in forward."""

    def make(self):
        self.conv = conv()
        self.calls, self.seen, self.last, self.stats = 0, [], None, {"mean": 0}

    def body(self, x):
        self.calls += 1
        self.seen.append(x)
        self.last, self.stats["mean"] = x, x.mean(1)
        self.new = random.choice([1])
        return F.relu(self.conv(x))


def test_what_forward_writes_is_undone():
    """While tracing, that is: a plain call writes as ever."""
    model = Stateful().train()
    model.conv.eval()
    before = truth.snapshot(model)
    python_state, state = random.getstate(), torch.get_rng_state()
    with pytest.raises(fc.UnsupportedModelError, match="draws random numbers"):
        fc.ISNet(model)
    assert truth.snapshot(model) == before
    assert random.getstate() == python_state
    model.body = lambda x: setattr(model, "last", x) or model.seen.append(x) or model.conv(x).relu()
    before = truth.snapshot(model)
    net = fc.ISNet(model)
    assert truth.snapshot(model) == before
    net(X, relevance=True)
    assert truth.snapshot(model) == before
    net(X)
    assert len(model.seen) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_train_method_of_the_users_is_not_called():
    """Tracing sets flags alone; side effects of train() are the user's business."""

    class Counting(Net):
        called = 0

        def train(self, mode=True):
            Counting.called += 1
            return super().train(mode)

        def body(self, x):
            return x

    model = Counting()
    Counting.called = 0
    fc.ISNet(model)
    fc.relevance(model, X)
    assert Counting.called == 0


def test_forward_replaced_on_the_instance():
    """As monkey-patching libraries do, on the model and on a layer."""
    model = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    model[1].forward = lambda x: F.leaky_relu(x, 0.5)
    assert torch.equal(fc.ISNet(model)(X, relevance=True).logits, model(X))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x)) * 2))
    assert torch.equal(fc.ISNet(model)(X, relevance=True).logits, model(X))


def test_settings_are_read_when_it_runs():
    """BatchNorm's momentum and a dropout's rate may be scheduled."""
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 3))
    plain = copy.deepcopy(model)
    net = fc.ISNet(model)
    for m in (model, plain):
        m[1].momentum, m[3].p = 0.7, 0.6
    torch.manual_seed(0)
    want = plain(X)
    torch.manual_seed(0)
    assert torch.equal(net(X, relevance=True).logits, want)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


def test_keys():
    """state_dict is the model's own, inside another module too, whatever the model's children are called."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
            self.net = nn.Linear(256, 3)

        def forward(self, x):
            return self.net(self.model(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = fc.ISNet(Inner()), nn.Linear(1, 1)

    net = fc.ISNet(Inner())
    assert list(net.state_dict()) == list(net.model.state_dict())
    assert "model.0.weight" in net.state_dict()
    assert "net.weight" in net.state_dict()
    other = Inner()
    net.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    other.load_state_dict(net.state_dict())

    outer, state = Outer(), Outer().state_dict()
    assert list(state) == [f"net.{k}" for k in other.state_dict()] + ["other.weight", "other.bias"]
    assert str(outer.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(v, state[k]) for k, v in outer.state_dict().items())
    assert {k for k, _ in outer.named_parameters()} == {
        f"net.model.{k}" for k, _ in other.named_parameters()
    } | {"other.weight", "other.bias"}  # fmt: skip
    del state["net.model.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        outer.load_state_dict(state)


def test_functional_call():
    """torch.func.functional_call swaps the parameters that the program reads."""
    net = fc.ISNet(nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)))
    doubled = {k: 2 * p.detach() for k, p in net.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(net, doubled, (X,), {"relevance": True})
        for p in net.parameters():
            p.mul_(2)
        want = net(X, relevance=True)
    assert torch.equal(out.heatmaps, want.heatmaps)
    assert torch.equal(out.logits, want.logits)


def test_dtype_conversion():
    """.to(dtype) after wrapping, buffers that forward computes with included."""
    make, x = zoo.build("NormalisesItsInput")
    net = fc.ISNet(make()).to(torch.float64)
    out = net(x.double(), relevance=True)
    assert out.heatmaps.dtype == out.logits.dtype == torch.float64
    assert torch.equal(out.logits, net.model(x.double()))


def test_spectral_norm_iterates_as_often_as_the_model():
    """Once a call of the layer: a shared one twice, and relevance not at all."""

    class Shared(Net):
        def make(self):
            self.conv = torch.nn.utils.parametrizations.spectral_norm(conv())

        def body(self, x):
            return F.relu(self.conv(F.relu(self.conv(x))))

    torch.manual_seed(0)
    model = Shared().train()
    plain = copy.deepcopy(model)
    net = fc.ISNet(model)
    for _ in range(2):
        want = plain(X)
        assert torch.equal(net(X, relevance=True).logits, want)
    for (name, got), (_, value) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(got, value), name


def test_shared_weights_get_both_gradients():
    """Of a shared convolution, what two separate ones of equal weight get together."""
    make, x = zoo.build("SharedLayers")
    model, x = make().double().eval(), x.double()

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = (copy.deepcopy(m) for m in (model.stem, model.conv, model.conv, model.head))

        def forward(self, x):
            return self.head(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x)))))).mean((2, 3)))

    apart, grads = Apart(), []
    for m in (model, apart):
        heatmaps(fc.ISNet(m, check="never"), x, target=1).square().sum().backward()
        grads.append({k: p.grad for k, p in m.named_parameters() if p.grad is not None})
    assert grads[0]["conv.weight"].abs().max() > 0
    torch.testing.assert_close(grads[0]["conv.weight"], grads[1]["a.weight"] + grads[1]["b.weight"], rtol=1e-10, atol=0)
