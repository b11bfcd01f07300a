"""LRP without an ISNet: `fc.relevance`, `fc.check_conservation`, `fc.supported`; sums in closed form."""

import copy

import golden_nets
import oracles
import pytest
import torch
from helpers import close, rand, randn
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import reference

E = 0.01


def small(bias=True, bn=True):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6)] if bn else []
    layers = nn.Conv2d(3, 6, 3, padding=1, bias=bias), *norms, nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3, bias=bias)
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=bias)).double()


def images(n=3):
    return rand(n, 3, 8, 8)


# ---- relevance ---------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    """Modes of every module, running statistics, gradients and flags; the result is that of eval mode."""
    model, x = small(), images()
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [sorted(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    R = fc.relevance(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    assert [m.training for m in model.modules()] == before[1]
    for p, (flag, grad) in zip(model.parameters(), flags):
        assert p.requires_grad == flag
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert [sorted(vars(m)) for m in model.modules()] == hooks
    assert torch.equal(R, fc.relevance(model.eval(), x))


def test_dropout_is_off():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 2)).train()
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(fc.relevance(model, x), fc.relevance(model, x))


def test_target():
    model, x = small().eval(), images()
    maps = fc.ISNet(model, "original", first_layer="epsilon")(x, relevance=True)
    top = maps.logits.argmax(1)
    close(fc.relevance(model, x), maps.heatmaps[torch.arange(3), top].unsqueeze(1))
    close(fc.relevance(model, x, 1), maps.heatmaps[:, 1:2])
    close(fc.relevance(model, x, torch.tensor([3, 0, 1])), maps.heatmaps[torch.arange(3), [3, 0, 1]].unsqueeze(1))
    several = torch.tensor([[0, 1, 2]] * 3)
    close(fc.relevance(model, x, several), maps.heatmaps[:, :3])


def test_of_an_isnet():
    model, x = small(), images()
    net = fc.ISNet(model.train(), "dual")
    assert torch.equal(fc.relevance(net, x, 2), fc.relevance(model, x, 2))
    assert net.training


def test_gradients():
    """Differentiable with respect to the parameters and x, in eval mode; no graph without gradients."""
    model, x = small().eval(), images().requires_grad_()
    R = fc.relevance(model, x, 0)
    (R * randn(*R.shape)).sum().backward()
    want = copy.deepcopy(model)
    v = x.detach().clone().requires_grad_()
    out = oracles.explain_epsilon(oracles.Net.chain(want), v, oracles.classes(torch.zeros(3, dtype=torch.long)), E, "epsilon")
    (out.heatmaps * randn(*R.shape)).sum().backward()
    close(x.grad, v.grad)
    for p, q in zip(model.parameters(), want.parameters()):
        close(torch.zeros_like(p) if p.grad is None else p.grad, torch.zeros_like(q) if q.grad is None else q.grad)
    with torch.no_grad():
        assert not fc.relevance(model, x).requires_grad


@pytest.mark.parametrize("preset", sorted(fc.rules.presets()))
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_every_preset_on_every_topology(name, preset):
    model, data = golden_nets.load(name)
    R = fc.relevance(model, data["x"][:2], rules=preset)
    assert R.shape == (2, 1, *data["x"].shape[1:])
    assert torch.isfinite(R).all()
    assert R.any()


def test_gradient_times_input():
    """With epsilon 0 and no z^B the map is x . d logit / d x, and without biases it sums to the logit."""
    for name in golden_nets.NAMES:
        model, data = golden_nets.load(name)
        x = data["x"].clone().requires_grad_()
        logits = model(x)
        (g,) = torch.autograd.grad(logits[:, 1].sum(), x)
        close(fc.relevance(model, x, 1, fc.rules.Epsilon(0.0))[:, 0], (x * g).detach(), what=name)


def test_batch_size_never_scales_a_map():
    model, x = small().eval(), images(4)
    R = fc.relevance(model, x, 0)
    for n in (1, 2):
        close(fc.relevance(model, x[:n], 0), R[:n])
    close(fc.relevance(model, torch.cat([x, x]), 0), torch.cat([R, R]))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x: fc.relevance(lambda v: v, x), TypeError, r"model must be a torch.nn.Module, got function"),
        (lambda m, x: fc.relevance(m, [1]), TypeError, r"x must be a tensor .* got list"),
        (lambda m, x: fc.relevance(m, x.long()), TypeError, "x must be floating point, got torch.int64"),
        (lambda m, x: fc.relevance(m, x * torch.nan), ValueError, "x holds NaN or infinity"),
        (lambda m, x: fc.relevance(m, x, 9), ValueError, "target is 9 and the model has 4 classes"),
        (lambda m, x: fc.relevance(m, x, torch.tensor([0, 1, 9])), ValueError, "target holds 9 and the model has 4"),
        (lambda m, x: fc.relevance(m, x, rules="lrp"), ValueError, "rules: unknown preset 'lrp'; the presets are"),
        (lambda m, x: fc.relevance(m, x, rules={"7": 3}), TypeError, "rules: '7' must be one of Epsilon"),
        (lambda m, x: fc.relevance(m, x, rules={"layer": fc.rules.ZPlus()}), ValueError, "no layer matches 'layer'"),
        (lambda m, x: fc.relevance(m, x, backend="cuda"), RuntimeError, "backend='cuda'"),
        (lambda m, x: fc.relevance(nn.Sequential(m, nn.PReLU()), x), fc.UnsupportedModelError, "PReLU is not supported"),
        (lambda m, x: fc.check_conservation(3, x), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda m, x: fc.check_conservation(m, [1]), TypeError, r"x must be a tensor .* got list"),
        (lambda m, x: fc.check_conservation(m, x, 4), ValueError, "target is 4 and the model has 4 classes"),
        (lambda m, x: fc.check_conservation(m, x, torch.zeros(3, 2).long()), ValueError, r"one class a sample, got \(3, 2\)"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call(small(), images())


# ---- sums in closed form -----------------------------------------------------------------------------------------------

RULES = {
    "epsilon": fc.rules.Epsilon(E),
    "zplus": fc.rules.ZPlus(E),
    "gamma": fc.rules.Gamma(0.3, E),
    "alpha_beta": fc.rules.AlphaBeta(2.0, 1.0, E),
    "w2": fc.rules.WSquare(E),
    "flat": fc.rules.Flat(E),
    "zb": fc.rules.ZB(-1.0, 2.0, E),
}


def signs(z):
    return torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_what_one_layer_hands_on(rule, signed):
    """``sum R_in = sum R_out (z - b) / (z + e sign z)`` with the rule's own z, for a hidden layer behind a ReLU."""
    torch.manual_seed(1)
    layer, head = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    x = rand(4, 6, low=-1.0 if signed else 0.0, high=2.0)
    # the layer under test reads the input; the head hands on g, exactly
    rules = fc.rules.RuleMap(first=RULES[rule])
    got = fc.relevance(nn.Sequential(layer, nn.ReLU(), head), x, 1, rules)[:, 0].sum(1)
    z, W, b = layer(x), layer.weight, layer.bias
    R = z.relu() * head.weight[1]
    c = x[:, None, :] * W
    P, M = c.clamp(min=0).sum(-1), (-c).clamp(min=0).sum(-1)
    up, down = b.clamp(min=0), (-b).clamp(min=0)
    sign = signs(z)
    box = (x + 1)[:, None] * W.clamp(min=0) + (x - 2)[:, None] * W.clamp(max=0)
    bound = box.sum(-1) + b + up - 2 * -down
    fraction = {
        "epsilon": (z - b) / (z + E * sign),
        "zplus": P / (P + up + E),
        "alpha_beta": 2 * P / (P + up + E) - M / (M + down + E),
        "gamma": (P - M + 0.3 * torch.where(z < 0, -M, P)) / (z + 0.3 * torch.where(z < 0, -M - down, P + up) + E * sign),
        "w2": W.square().sum(1) / (W.square().sum(1) + E),
        "flat": torch.full_like(z, 6 / (6 + E)),
        "zb": box.sum(-1) / (bound + E * signs(bound)),
    }[rule]
    close(got, (R * fraction).sum(1).detach())


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma", "alpha_beta", "w2", "flat"])
@pytest.mark.parametrize("name", ["seq", "vgg", "resnet18s"])
def test_nothing_is_lost_without_biases_and_epsilon(name, rule):
    """All relevance arrives: through skips, overlapping pools, strides and BatchNorm without shift."""
    model, data = golden_nets.load(name)
    for m in model.modules():
        if getattr(m, "bias", None) is not None:
            m.bias.data.zero_()
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.zero_()
    chosen = {
        "epsilon": fc.rules.Epsilon(0.0), "zplus": fc.rules.ZPlus(0.0), "gamma": fc.rules.Gamma(0.3, 0.0),
        "alpha_beta": fc.rules.AlphaBeta(eps=0.0), "w2": fc.rules.WSquare(0.0), "flat": fc.rules.Flat(0.0),
    }[rule]  # fmt: skip
    rules = fc.rules.RuleMap(conv=chosen)
    if rule in ("w2", "flat"):  # these give relevance to units that no input moved: only where all relevance enters
        rules = fc.rules.RuleMap(conv=fc.rules.Epsilon(0.0), linear=fc.rules.Epsilon(0.0), first=chosen)
    else:
        rules = fc.rules.RuleMap(conv=chosen, linear=chosen)
    x = data["x"]
    R = fc.relevance(model, x, 0, rules)
    # alpha-beta loses 2 - 1 where an output has no contributions of one sign: it is measured where both exist
    if rule != "alpha_beta":
        close(R.flatten(1).sum(1), model(x)[:, 0].detach(), 1e-9)
    report = fc.check_conservation(model, x, 0, rules)
    assert report.violations == ()


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma", "alpha_beta"])
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_check_conservation(name, rule):
    model, data = golden_nets.load(name)
    report = fc.check_conservation(model, data["x"], data["y"].long(), RULES[rule])
    assert report.violations == ()
    R = fc.relevance(model, data["x"], data["y"].long(), RULES[rule])
    assert report.heatmap == pytest.approx(R.flatten(1).sum(1).mean().item(), rel=1e-10)
    explained = model(data["x"]).gather(1, data["y"].long()[:, None]).mean().item()
    assert report.explained == pytest.approx(explained, rel=1e-10)
    for row in report.layers:
        assert row.absorbed == pytest.approx(row.out - row.into)
        takes_nothing = row.kind in ("reshape", "concat", "permute", "pool_max", "pool_avg", "add")
        if rule == "zplus":  # pools and sums have an epsilon of their own, unless a BatchNorm is folded into them
            assert takes_nothing or not row.lossless
        else:
            assert row.lossless == takes_nothing
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "kind", "out", "into", "absorbed"]
    assert "must be 0" not in text


def test_check_conservation_finds_a_fault(monkeypatch):
    """A max pool that overwrites where windows overlap, as in LRP-Block, is named."""

    def overwriting(g, winners, in_size, pool=None):
        flat = g.new_zeros(*g.shape[:2], in_size[0] * in_size[1])
        return flat.scatter_(2, winners.flatten(2), g.flatten(2)).unflatten(2, in_size)

    monkeypatch.setattr(reference, "max_pool_scatter", overwriting)
    model = small()
    report = fc.check_conservation(model, images())
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.MaxPool2d))
    assert report.violations == (name,)
    assert "<- must be 0" in str(report)


def test_check_conservation_leaves_the_model_alone():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    fc.check_conservation(model, images())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_supported_names_layers_and_functions():
    text = fc.supported()
    for word in ("Conv2d", "BatchNorm2d", "MaxPool2d", "ConvBNReLU", "relu", "cat"):
        assert word in text
