"""Whole ISNets on the kernels: logits, heatmaps, loss, gradients and statistics are those of the reference path."""

from collections import Counter

import golden_nets
import pytest
import torch
from helpers import GraphNet, error, rand, random_ops, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisnet_cuda as fc
from fisnet_cuda.graph.kinds import batch_norm
from fisnet_cuda.rules import Epsilon

VARIANTS = ("selective", "stochastic", "contrast", "dual", "original")
EXACT = 1e-9  # relative, float64: sums in another order
SIZE = {"seq": 16, "seqbn": 16, "vgg": 16, "resnet18s": 32, "densenets": 32}


class Operators(TorchDispatchMode):
    """How often each of the extension's operators ran, and how many elements BatchNorms read for their statistics."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.measured = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fisnet":
            self.seen[func._opname] += 1
        if func._opname == "bn_statistics":
            self.measured += args[0].numel()
        return func(*args, **(kwargs or {}))


def step(build, variant, device, backend, dtype=torch.float64, size=9, train=True, layout=torch.contiguous_format, **options):
    """One training step: everything it computes, by name."""
    torch.manual_seed(0)
    model = build().to(device, dtype).to(memory_format=layout).train(train)
    generator = torch.Generator(device).manual_seed(3)
    net = fc.ISNet(model, variant, backend=backend, generator=generator, **options)
    loss = fc.ISNetLoss(d=0.9, c1=0.1, c2=2.0, backend=backend)
    x = rand(3, 3, size, size, seed=1).to(device, dtype).contiguous(memory_format=layout)
    masks = (rand(3, 1, size, size, seed=2) > 0.5).to(device, dtype)
    out = net(x, relevance=True)
    total, _ = loss(out, torch.tensor([0, 1, 2], device=device), masks)
    total.backward()
    results = {"logits": out.logits, "heatmaps": out.heatmaps, "loss": total}
    results |= {f"heatmap of {name}": value for name, value in out.hidden.items()}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    results |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {name: value.detach() for name, value in results.items()}


def same(got, want, bound):
    scale = max(float(v.abs().max()) for name, v in want.items() if name.startswith("gradient"))
    for name, value in want.items():
        if name.startswith("gradient"):  # a tiny gradient is the rounding of large ones
            assert float((got[name] - value).abs().max()) <= bound * scale, name
        else:
            assert error(got[name], value) <= bound, f"{name}: relative error {error(got[name], value):.3g}"


def random_net(seed):
    return lambda: randomise(GraphNet(random_ops(seed)), seed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(6))
def test_random_networks(device, seed, variant, layout):
    options = {"train": seed % 2 == 0, "layout": layout}
    want = step(random_net(seed), variant, device, "reference", **options)
    same(step(random_net(seed), variant, device, "auto", **options), want, EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_named_networks(device, name, variant):
    def build():
        return golden_nets.build(name)

    options = {"size": SIZE[name], "layout": torch.channels_last}
    want = step(build, variant, device, "reference", **options)
    with Operators() as operators:
        got = step(build, variant, device, "auto", **options)
    same(got, want, EXACT)
    assert "phi_scale" in operators.seen or variant == "dual"
    assert "phi_scale_backward" in operators.seen or variant == "dual"


def frozen(model):
    """One BatchNorm of a dense block in eval mode for good: its statistics are not the batch's."""
    norm = model.features.denseblock1.denselayer2.norm1.eval()
    norm.train = lambda mode=True: norm
    return model


def every_norm(**settings):
    def change(model):
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for name, value in settings.items():
                setattr(norm, name, value)
        return model

    return change


NORMS = {
    "plain": lambda model: model,
    "frozen": frozen,
    "cumulative": every_norm(momentum=None),
    "untracked": every_norm(track_running_stats=False),
    "without buffers": every_norm(track_running_stats=False, running_mean=None, running_var=None, num_batches_tracked=None),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
def test_dense_blocks_measure_a_channel_once(device, monkeypatch, change, layout):
    """The same statistics and the same operators as one BatchNorm at a time, over fewer elements."""

    def build():
        return change(golden_nets.build("densenets"))

    options = {"size": SIZE["densenets"], "layout": layout}
    want = step(build, "selective", device, "reference", **options)
    with Operators() as once:
        got = step(build, "selective", device, "auto", **options)
    same(got, want, EXACT)
    monkeypatch.setattr(batch_norm, "_known", lambda *_: None)
    with Operators() as each:
        step(build, "selective", device, "auto", **options)
    assert once.seen == each.seen
    assert once.measured < each.measured


OPTIONS = {
    "relative": {"eps": Epsilon(1e-2, relative=True)},
    "no z^B": {"first_layer": "epsilon"},
    "epsilon_plus": {"rules": "epsilon_plus"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(device, options):
    want = step(random_net(1), "selective", device, "reference", **options)
    same(step(random_net(1), "selective", device, "auto", **options), want, EXACT)


@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_float32(device, variant):
    """At most twice the error that the reference has in float32, plus rounding."""
    exact = step(random_net(2), variant, device, "reference")
    usual = step(random_net(2), variant, device, "reference", torch.float32)
    got = step(random_net(2), variant, device, "auto", torch.float32)
    scale = max(float(v.abs().max()) for name, v in exact.items() if name.startswith("gradient"))
    for name, want in exact.items():
        of = scale if name.startswith("gradient") else float(want.abs().max())
        errors = [float((r[name].double() - want).abs().max()) / (of or 1.0) for r in (got, usual)]
        assert errors[0] <= 2 * errors[1] + 16 * torch.finfo(torch.float32).eps, (name, errors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_step(device, variant):
    """The whole step is one graph that holds the extension's operators, and gives what eager gives."""
    net = fc.ISNet(random_net(4)(), variant, check="never").to(device)
    loss = fc.ISNetLoss(d=0.9, check="never")
    x, y = rand(2, 3, 9, 9, seed=5).to(device), torch.tensor([0, 2], device=device)
    masks = (rand(2, 1, 9, 9, seed=6) > 0.5).to(device, torch.float64)

    def run(x, y, masks):
        return loss(net(x, relevance=True), y, masks)[0]

    def gradients(fn):
        torch.manual_seed(7)
        net.zero_grad()
        fn(x, y, masks).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    net.eval()  # statistics stay as they are between the two runs
    want = gradients(run)
    torch._dynamo.reset()
    got = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) <= EXACT


def test_plan_names_the_kernels(device):
    net = fc.ISNet(golden_nets.build("resnet18s"), variant="dual")
    kernels = " ".join(row.kernel for row in net.plan(device).rows)
    assert {"bn_act:cuda", "zb:cuda", "max_pool:cuda"} <= set(kernels.replace(",", " ").split())
    assert "dual_transposed_phi:" in kernels
