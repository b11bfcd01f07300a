"""The forward's linear maps with bias, BatchNorm, skip and ReLU: what is joined, and that results stay what they were."""

import copy

import golden_nets
import pytest
import torch
from graph import fused, truth, zoo
from helpers import GraphNet, close, close_grads, rand, random_ops, randomise
from torch import nn

import fisnet_cuda as fc


def net(ops, **options):
    return fc.ISNet(randomise(GraphNet(ops)), **{"variant": "selective", "check": "never", **options})


def tail(last, c=4):
    return [("mean", nn.AdaptiveAvgPool2d(1), last), ("flat", "flatten", "mean"), ("head", nn.Linear(c, 3), "flat")]


def plain():
    """Without BatchNorm: layer and ReLU, and a block whose sum has a ReLU."""
    return [
        ("stem", nn.Conv2d(3, 4, 3), "x"),
        ("relu0", nn.ReLU(), "stem"),
        ("conv", nn.Conv2d(4, 4, 3, 1, 1), "relu0"),
        ("add", "add", ("conv", "relu0")),
        ("relu1", nn.ReLU(), "add"),
        ("left", nn.Conv2d(4, 4, 1), "relu1"),
        ("right", nn.Conv2d(4, 4, 3, 1, 1, groups=2), "relu1"),
        ("add2", "add", ("left", "right")),
        ("relu2", nn.ReLU(), "add2"),
        *tail("relu2")[:-1],
        ("fc", nn.Linear(4, 5), "flat"),
        ("relu3", nn.ReLU(), "fc"),
        ("head", nn.Linear(5, 3), "relu3"),
    ]


def normed():
    return [
        ("stem", nn.Conv2d(3, 4, 3, bias=False), "x"),
        ("bn0", nn.BatchNorm2d(4), "stem"),
        ("relu0", nn.ReLU(), "bn0"),
        ("conv", nn.Conv2d(4, 4, 3, 1, 1), "relu0"),
        ("bn", nn.BatchNorm2d(4), "conv"),
        ("down", nn.Conv2d(4, 4, 1), "relu0"),
        ("bn_down", nn.BatchNorm2d(4), "down"),
        ("add", "add", ("bn", "bn_down")),
        ("relu1", nn.ReLU(), "add"),
        ("conv2", nn.Conv2d(4, 4, 3, 2, 1, groups=2), "relu1"),
        ("bn2", nn.BatchNorm2d(4), "conv2"),
        *tail("bn2")[:-1],
        ("fc", nn.Linear(4, 5), "flat"),
        ("bn3", nn.BatchNorm1d(5), "fc"),
        ("relu3", nn.ReLU(), "bn3"),
        ("head", nn.Linear(5, 3), "relu3"),
    ]


def ops_of(net):
    return [i.op for i in fused.instructions(net)[0] if i.op not in ("size", "shape")]


def test_what_is_joined():
    pool = ["avg_pool", "reshape"]
    assert ops_of(net(plain())) == ["conv_relu", "conv_add_relu", "conv", "conv_add_relu", *pool, "linear_relu", "linear"]
    joined = ["conv_bn_relu", "conv_bn", "conv_bn_add_relu", "conv_bn", *pool, "linear_bn_relu", "linear"]
    assert sorted(ops_of(net(normed()))) == sorted(joined)


def test_what_others_read_stays():
    """A layer whose own map is wanted, or that two BatchNorms read, or whose sum goes on without a ReLU."""
    assert "conv_add_relu" not in ops_of(net(plain()[:5] + tail("relu1"), supervise=("conv",)))
    wanted = ops_of(net(normed(), supervise=("conv",)))
    assert "conv" in wanted
    assert "bn_add_relu" in wanted


def compare(monkeypatch, model, x, grad=True, **options):
    """Without the patterns; with them, bit for bit; and with the fused ops switched on."""
    options = {"variant": "selective", "check": "never", **options}
    found = []
    for how in ("without", "with", "forced"):
        with monkeypatch.context() as m:
            if how == "without":
                fused.without(m)
            calls = fused.forced(m) if how == "forced" else []
            wrapped = fc.ISNet(copy.deepcopy(model), **options)
            found.append((wrapped, *fused.run(wrapped, x, grad)))
    (plain, want, want_grads), (joined, got, got_grads), (forced, fast, fast_grads) = found
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.heatmaps, want.heatmaps)
    close(fast.logits, want.logits)
    close(fast.heatmaps, want.heatmaps, 1e-9)
    if grad:
        close_grads(got_grads, want_grads, 1e-14)
        close_grads(fast_grads, want_grads, 1e-9)
    for other in (joined, forced):
        for (name, b), (_, c) in zip(other.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(b, c), name
    return calls


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ops", [plain, normed])
def test_results(monkeypatch, ops, training, grad):
    model = randomise(GraphNet(ops())).train(training)
    calls = compare(monkeypatch, model, rand(2, 3, 9, 9), grad).count("linear_act")
    # every layer with a ReLU; BatchNorms where their statistics are constants, but behind a dense layer
    assert calls == (4 if ops is plain else 4 if not training and not grad else 0)


@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_golden_networks(monkeypatch, name, grad, variant):
    model, data = golden_nets.load(name)
    calls = compare(monkeypatch, model, data["x"], grad, variant=variant)
    assert "linear_act" in calls or grad


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(monkeypatch, seed):
    model = randomise(GraphNet(random_ops(seed, bn=seed % 2 == 0)), seed).eval()
    compare(monkeypatch, model, rand(2, 3, 9, 9, seed=seed), seed % 4 < 2)


@pytest.mark.parametrize("name", [n for n, (_, _, o) in zoo.CASES.items() if o.get("piecewise_linear", True)][::4])
def test_spellings(monkeypatch, name):
    """Wrapped networks of every kind, fused ops switched on, beside autograd."""
    fused.forced(monkeypatch)
    make, x = zoo.build(name)
    truth.heatmaps(make, x, train=zoo.CASES[name][2].get("train_truth", True))


@pytest.mark.parametrize("track", ["no running statistics", "switched off", "momentum None"])
def test_statistics_of_every_kind(monkeypatch, track):
    model = randomise(GraphNet(normed()))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if track == "switched off":
                m.track_running_stats = False
            elif track == "momentum None":
                m.momentum = None
    if track == "no running statistics":
        model.bn = nn.BatchNorm2d(4, track_running_stats=False).double()
        model.bn2 = nn.BatchNorm2d(4, affine=False).double()
    for training in (True, False):
        for grad in (True, False):
            compare(monkeypatch, model.train(training), rand(2, 3, 9, 9), grad)


def test_mixed_precision_without_gradients(monkeypatch):
    model, data = golden_nets.load("resnet18s")
    found = fc.ISNet(model.float().eval(), "selective", check="never")
    x = data["x"].float()

    def heatmaps():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return found(x, relevance=True, target=0)

    want, exact = heatmaps(), found(x, relevance=True, target=0)
    calls = fused.forced(monkeypatch)
    got = heatmaps()
    assert "linear_act" in calls
    assert got.logits.dtype == want.logits.dtype
    assert (got.logits - exact.logits).norm() <= 2 * (want.logits - exact.logits).norm()
    assert (got.heatmaps - exact.heatmaps).norm() <= 2 * (want.heatmaps - exact.heatmaps).norm()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ops", [plain, normed])
def test_compiled_without_a_graph_break(monkeypatch, ops, grad):
    torch._dynamo.reset()
    fused.forced(monkeypatch, spy=False)  # a side effect that no compiler follows
    found, x = net(ops()).eval(), rand(2, 3, 9, 9)
    with torch.set_grad_enabled(grad):
        want = found(x, relevance=True)
        compiled = torch.compile(lambda x: found(x, relevance=True)[:2], fullgraph=True, backend="aot_eager")
        logits, heatmaps = compiled(x)
    close(logits.detach(), want.logits.detach())
    close(heatmaps.detach(), want.heatmaps.detach())
    if grad:
        (heatmaps.square().sum() + logits.sum()).backward()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(grad):
        compiled(x)
    torch._dynamo.reset()


def test_a_sum_of_two_shapes_is_refused():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head((self.conv(x) + x).relu().mean((2, 3)))

    with pytest.raises(ValueError, match="a sum of activations"):
        fc.ISNet(Broadcast(), check="never")(torch.rand(2, 3, 6, 6), relevance=True)
