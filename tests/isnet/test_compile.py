"""Nothing depends on values: whole training steps under fake tensors, and compiled without a graph break."""

import contextlib

import golden_nets
import pytest
import torch
from helpers import GraphNet, close, close_grads, rand, randomise
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fisnet_cuda as fc
from fisnet_cuda.isnet import module as isnet_module

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")
SIZE = {"seq": 16, "seqbn": 16, "vgg": 16, "resnet18s": 32, "densenets": 32}


# ---- fake tensors: any .item(), bool(tensor) or shape that depends on data raises ----------------------------------------


@contextlib.contextmanager
def fake(net):
    """Fake parameters and buffers in place of the real ones; no real tensor may meet them."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        for m in net.modules():
            for name, p in list(m._parameters.items()):
                if p is not None:
                    m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
            for name, b in list(m._buffers.items()):
                if b is not None:
                    m._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
        yield


def fake_batch(size, n=4):
    return torch.empty(n, 3, size, size), torch.empty(n, dtype=torch.long), torch.empty(n, 1, size, size)


def fake_step(net, loss, size):
    """Forward, loss, backward, clipping and optimizer, as in the authors' recipe."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y, masks = fake_batch(size)
    for _ in range(2):
        total, _ = loss(net(x, relevance=True), y, masks)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert all(p.grad is not None for n, p in net.named_parameters())


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_no_host_sync_in_a_training_step(name, variant, check):
    net, loss = fc.ISNet(golden_nets.build(name), variant, check=check), fc.ISNetLoss(check=check)
    with fake(net):
        fake_step(net, loss, SIZE[name])


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "selective", "select": "random", "generator": torch.Generator()},
        {"variant": "stochastic", "generator": torch.Generator()},
        {"variant": "contrast", "generator": torch.Generator()},
        {"variant": "contrast", "multilabel": True},
        {"variant": "original", "max_map_bytes": 1},
        {"variant": "selective", "eps": fc.rules.Epsilon(0.01, relative=True)},
        {"variant": "dual", "input_low": (-1.0, -2.0, -3.0), "input_high": 4.0},
        {"variant": "dual", "first_layer": "epsilon"},
        {"variant": "selective", "supervise": ("layer1", "layer3")},
        {"variant": "selective", "multilabel": True},
        *({"variant": "original", "rules": preset} for preset in fc.rules.presets()),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values())[:40],
)
def test_no_host_sync_with_any_option(options):
    net, loss = fc.ISNet(golden_nets.build("resnet18s"), **options), fc.ISNetLoss()
    with fake(net):
        fake_step(net, loss, 32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["int", "tensor"])
def test_no_host_sync_with_a_target(variant, target):
    net = fc.ISNet(golden_nets.build("seqbn"), variant)
    with fake(net):
        x, y, _ = fake_batch(16)
        net(x, relevance=True, target=1 if target == "int" else y).heatmaps.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_everything_is_made_on_the_models_device(name, variant):
    """A training step on the meta device: a helper tensor left on the CPU would not fit."""
    torch.manual_seed(0)
    net = fc.ISNet(golden_nets.build(name), variant, check="never").to("meta")
    out = net(torch.empty(4, 3, SIZE[name], SIZE[name], device="meta"), relevance=True)
    ((out.heatmaps**2).sum() + out.logits.sum()).backward()
    assert {t.device.type for t in (out.logits, out.heatmaps, out.explained)} == {"meta"}
    assert all(p.grad.device.type == "meta" for p in net.parameters())


@pytest.mark.parametrize("planted", [lambda t: t.sum().item(), lambda t: bool(t.min() < 0), lambda t: t[t > 0]])
def test_the_guard_catches_a_planted_sync(monkeypatch, planted):
    real = isnet_module.eta_gradient

    def syncing(logits, *rest):
        planted(logits.detach())
        return real(logits, *rest)

    monkeypatch.setattr(isnet_module, "eta_gradient", syncing)
    net, loss = fc.ISNet(golden_nets.build("seq"), "selective"), fc.ISNetLoss()
    with fake(net), pytest.raises((DataDependentOutputException, RuntimeError), match=r"item|_local_scalar_dense|nonzero|dynamic"):
        fake_step(net, loss, 16)


# ---- torch.compile -------------------------------------------------------------------------------------------------------


def train_step(net, loss, compiled, data):
    def forward(x, y, masks):
        out = net(x, relevance=True)
        total, parts = loss(out, y, masks)
        return out.logits, out.heatmaps, total, parts.background

    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    net.zero_grad()
    torch.manual_seed(0)
    logits, heatmaps, total, background = run(*data)
    total.backward()
    grads = {n: p.grad.clone() for n, p in net.model.named_parameters()}
    return run, (logits.detach(), heatmaps.detach(), total.detach(), background.detach()), grads


def dense_and_residual():
    """One residual sum, one concatenation before a BatchNorm, one overlapping pool."""
    return [
        ("stem", nn.Conv2d(3, 4, 3, 2, 1), "x"),
        ("stem_relu", nn.ReLU(), "stem"),
        ("pool", nn.MaxPool2d(3, 2, 1), "stem_relu"),
        ("conv", nn.Conv2d(4, 4, 3, 1, 1, bias=False), "pool"),
        ("bn", nn.BatchNorm2d(4), "conv"),
        ("add", "add", ("bn", "pool")),
        ("relu", "relu", "add"),
        ("new", nn.Conv2d(4, 2, 1), "relu"),
        ("cat", "concat", ("relu", "new")),
        ("cat_bn", nn.BatchNorm2d(6), "cat"),
        ("cat_relu", nn.ReLU(), "cat_bn"),
        ("mean", nn.AdaptiveAvgPool2d(1), "cat_relu"),
        ("flat", "flatten", "mean"),
        ("head", nn.Linear(6, 3), "flat"),
    ]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("original", {}),
        ("selective", {}),
        ("stochastic", {}),
        ("dual", {}),
        ("contrast", {}),
        ("selective", {"eps": fc.rules.Epsilon(0.01, relative=True), "supervise": ("relu",), "first_layer": "epsilon"}),
        ("original", {"rules": "epsilon_gamma_box", "max_map_bytes": None}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)),
)
def test_compiled_without_a_graph_break(variant, options):
    """Logits, heatmaps, losses and gradients of a compiled training step; a second call compiles nothing."""
    torch._dynamo.reset()
    model = randomise(GraphNet(dense_and_residual())).train()
    batch = rand(3, 3, 16, 16), torch.tensor([0, 1, 2]), (rand(3, 1, 16, 16) > 0.7).double()
    net, loss = fc.ISNet(model, variant, **options), fc.ISNetLoss()
    _, want, want_grads = train_step(net, loss, False, batch)
    run, got, grads = train_step(net, loss, True, batch)
    for name, g, w in zip(("logits", "heatmaps", "total", "background"), got, want):
        close(g, w, what=name)
    close_grads(grads, want_grads)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(*batch)


def test_compiled_relevance_without_gradients():
    torch._dynamo.reset()
    model, data = golden_nets.load("seqbn")
    net = fc.ISNet(model, "dual")
    with torch.no_grad():
        want = net(data["x"], relevance=True).heatmaps
        got = torch.compile(lambda x: net(x, relevance=True).heatmaps, fullgraph=True, backend="aot_eager")(data["x"])
    close(got, want)


def test_compiled_module():
    """`torch.compile(net)` itself, as users write it."""
    torch._dynamo.reset()
    model, data = golden_nets.load("seq")
    net = fc.ISNet(model)
    want = net(data["x"], relevance=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got = compiled(data["x"], relevance=True)
    close(got.heatmaps, want.heatmaps)
    assert torch.equal(got.explained, want.explained)
    close(compiled(data["x"]), want.logits)
