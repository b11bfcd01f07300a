"""`net(x, relevance=True)` against the independent oracle (explicit layer matrices, float64): every variant and rule, in train
mode too, on the golden topologies and on random small networks; heatmaps, and gradients of a random functional of them."""

import functools

import golden_nets
import oracles
import pytest
import torch
from helpers import GraphNet, close, close_grads, randn, random_ops, randomise
from torch import nn

import fisnet_cuda as fc

E = 0.01
LOW, HIGH = (-2.0, -1.5, -1.0), (2.0, 2.5, 3.0)  # bounds of normalised images, per channel


def images(n, size, seed=0):
    """Inputs of both signs, inside the bounds."""
    unit = torch.rand(n, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = (torch.tensor(b, dtype=torch.float64).view(3, 1, 1) for b in (LOW, HIGH))
    return low + (high - low) * unit


def compare(model, oracle, net, x, hidden=None, target=None, seed=1):
    """Logits, maps, inner maps, and d (random functional of all maps) / d (x, parameters).

    ``oracle(x)`` returns an `oracles.Explanation`; ``hidden`` maps layer names to the oracle's op names.
    """
    results, hidden = [], hidden or {}
    for run in (lambda v: net(v, relevance=True, target=target), oracle):
        v = x.clone().requires_grad_()
        out = run(v)
        maps = [out.heatmaps, *(out.hidden[n] for n in (hidden if run is not oracle else hidden.values()))]
        functional = sum((m * randn(*m.shape, seed=seed + i)).sum() for i, m in enumerate(maps))
        inputs = {"x": v, **dict(model.named_parameters())}
        found = torch.autograd.grad(functional, list(inputs.values()), allow_unused=True)
        grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(inputs.items(), found)}
        results.append((out.logits, maps, grads))
    (logits, maps, grads), (want_logits, want_maps, want_grads) = results
    assert all(m.any() for m in want_maps), "a dead network shows nothing"
    close(logits, want_logits, what="logits")
    for name, got, want in zip(["heatmaps", *hidden], maps, want_maps):
        close(got, want, what=name)
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            # a channel with gamma = 0: the positive part of a weight has a kink there and no one gradient
            for grads_of in (grads, want_grads):
                grads_of[f"{name}.weight"] = torch.where(m.weight == 0, 0.0, grads_of[f"{name}.weight"])
    close_grads(grads, want_grads)


def dual(graph, **options):
    """Dual's two maps side by side: `explain_zplus` and `explain_epsilon` of all logits."""
    first = options.pop("first_layer", "zb")
    shared = {k: options[k] for k in ("low", "high", "hidden") if k in options}

    def run(x):
        plus = oracles.explain_zplus(graph, x, E, first_layer="zb" if first == "zb" else "zplus", **shared)
        epsilon = oracles.explain_epsilon(graph, x, oracles.all_logits, E, first_layer=first, **options)
        hidden = {k: torch.cat([plus.hidden[k], epsilon.hidden[k]], 1) for k in plus.hidden}
        return oracles.Explanation(epsilon.logits, torch.cat([plus.heatmaps, epsilon.heatmaps], 1), hidden)

    return run


def explain(graph, variant, x, **options):
    """The oracle's run of a variant. Stochastic's class is a target of the caller's."""
    if variant == "dual":
        return dual(graph, **options)
    start = {"selective": oracles.selective(), "original": oracles.original}[variant]
    return lambda v: oracles.explain_epsilon(graph, v, start, E, **options)


# ---- the golden topologies, with BatchNorm scales of both signs --------------------------------------------------------


@functools.cache
def _topology(name):
    model = randomise(golden_nets.build(name), seed=3)
    return model, oracles.Net(golden_nets.ops(name, model))


HIDDEN = {
    "seqbn": {"2": "2", "5": "5"},
    "vgg": {"features.1": "features.1", "classifier.1": "classifier.1"},
    "resnet18s": {"layer1": "layer1.1.relu2", "layer3": "layer3.1.relu2"},
    "densenets": {"features.transition1.relu": "features.transition1.relu", "features.fReLU": "features.fReLU"},
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("name", ["seqbn", "vgg", "resnet18s", "densenets"])
def test_topology(name, variant, mode):
    model, graph = _topology(name)
    model.train(mode == "train")
    hidden = {k: v for k, v in HIDDEN[name].items() if variant != "dual" or name != "seqbn"}
    net = fc.ISNet(model, variant, input_low=LOW, input_high=HIGH, supervise=hidden, check="never")
    x = images(2, (16, 16))
    options = {"low": LOW, "high": HIGH, "hidden": tuple(hidden.values())}
    compare(model, explain(graph, variant, x, **options), net, x, hidden)


# ---- random networks ---------------------------------------------------------------------------------------------------


def random_net(seed, bn=True):
    ops = random_ops(seed, bn)
    model = randomise(GraphNet(ops), seed)
    return model, oracles.Net(ops)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_random_network_in_train_mode(seed, variant):
    model, graph = random_net(seed)
    model.train()
    x = images(3, (9, 9), seed)
    net = fc.ISNet(model, variant, input_low=LOW, input_high=HIGH, check="never")
    compare(model, explain(graph, variant, x, low=LOW, high=HIGH), net, x)


@pytest.mark.parametrize("seed", range(17, 25))
@pytest.mark.parametrize("variant", ["original", "dual"])
def test_random_network_without_zb(seed, variant):
    """z+ and epsilon down to an input of both signs, in eval mode; the nets of the first half have no BatchNorm."""
    model, graph = random_net(seed, bn=seed >= 21)
    model.eval()
    x = images(2, (9, 9), seed)
    net = fc.ISNet(model, variant, first_layer="epsilon", check="never")
    compare(model, explain(graph, variant, x, first_layer="epsilon"), net, x)


@pytest.mark.parametrize("seed", range(24, 30))
@pytest.mark.parametrize("first_layer", ["zb", "epsilon"])
def test_relative_epsilon(seed, first_layer):
    """e = 0.1 rms(a) in the ReLUs; z^B keeps an absolute one."""
    model, graph = random_net(seed)
    relative = fc.rules.Epsilon(0.1, relative=True)
    first = fc.rules.ZB(LOW, HIGH, 0.1) if first_layer == "zb" else None
    rules = fc.rules.RuleMap(conv=relative, linear=relative, first=first)
    net = fc.ISNet(model.train(seed % 2 == 0), "selective", rules=rules, check="never")
    options = {"first_layer": first_layer, "low": LOW, "high": HIGH, "relative": True}
    compare(model, lambda v: oracles.explain_epsilon(graph, v, oracles.selective(), 0.1, **options), net,
            images(3, (9, 9), seed))  # fmt: skip


def test_relative_epsilon_by_argument():
    model, graph = random_net(24)
    eps = fc.rules.Epsilon(0.01, relative=True)
    net = fc.ISNet(model.train(), "selective", eps=eps, input_low=LOW, input_high=HIGH, check="never")
    options = {"low": LOW, "high": HIGH, "relative": True}
    compare(model, lambda v: oracles.explain_epsilon(graph, v, oracles.selective(), 0.01, **options), net,
            images(3, (9, 9)))  # fmt: skip


@pytest.mark.parametrize("seed", [1, 4, 8])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_epsilon_of_every_size(seed, eps):
    model, graph = random_net(seed)
    model.train()
    x = images(2, (9, 9), seed)
    net = fc.ISNet(model, "selective", eps=eps, first_layer="epsilon", check="never")
    compare(model, lambda v: oracles.explain_epsilon(graph, v, oracles.selective(), eps, "epsilon"), net, x)


@pytest.mark.parametrize("seed", [2, 5])
def test_gamma_of_zero_has_its_gradient(seed):
    """Under epsilon nothing has a kink at gamma = 0: every gradient counts."""
    model, graph = random_net(seed)
    assert any((m.weight == 0).any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    x = images(3, (9, 9), seed)
    net = fc.ISNet(model.train(), "selective", first_layer="epsilon", check="never")
    results = []
    for out in (net(x, relevance=True), oracles.explain_epsilon(graph, x, oracles.selective(), E, "epsilon")):
        value = (out.heatmaps * randn(*out.heatmaps.shape)).sum()
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        results.append({n: g for (n, _), g in zip(model.named_parameters(), found) if g is not None})
    close_grads(*results)


@pytest.mark.parametrize("variant", ["selective", "stochastic"])
@pytest.mark.parametrize("eta_eps", [1e-2, 1e-7])
def test_start(variant, eta_eps):
    """Selective's eta with other t; Stochastic explains the logit that it drew."""
    model, graph = random_net(0)
    x = images(4, (9, 9))
    net = fc.ISNet(model.eval(), variant, eta_eps=eta_eps, input_low=LOW, input_high=HIGH, check="never")
    if variant == "selective":
        start = oracles.selective(eta_eps)
        compare(model, lambda v: oracles.explain_epsilon(graph, v, start, E, low=LOW, high=HIGH), net, x)
        return
    out = net(x, relevance=True)
    want = oracles.explain_epsilon(graph, x, oracles.classes(out.explained), E, low=LOW, high=HIGH)
    close(out.heatmaps, want.heatmaps)


def contrast(n, classes, multilabel, seed):
    """Weights as ISNet draws them from a generator of this seed, written anew: a direction of length 1, without its mean where there
    are three classes or more."""
    v = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).to(torch.float64)
    v = v if multilabel or classes == 2 else v - v.sum(1, keepdim=True) / classes
    return (v / (v * v).sum(1, keepdim=True).sqrt()).unsqueeze(1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("multilabel", [False, True])
def test_contrast(seed, multilabel):
    """Ours: the map of a random combination of the logits, whose weights are constants."""
    model, graph = random_net(seed)
    classes = model(images(2, (9, 9))).shape[1]
    start = contrast(3, classes, multilabel, 5)
    options = {"first_layer": "epsilon"} if seed % 2 else {"low": LOW, "high": HIGH}
    first = {"first_layer": "epsilon"} if seed % 2 else {"input_low": LOW, "input_high": HIGH}
    generator = torch.Generator().manual_seed(5)
    net = fc.ISNet(model.train(seed % 4 < 2), "contrast", multilabel=multilabel, generator=generator, check="never", **first)
    compare(model, lambda v: oracles.explain_epsilon(graph, v, start, E, **options), net, images(3, (9, 9), seed))


@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_target(variant):
    """Given classes, several a sample: epsilon maps of their logits, with Dual too."""
    model, graph = random_net(3)
    target = torch.tensor([[0, 2], [1, 1], [2, 0]])
    net = fc.ISNet(model.train(), variant, input_low=LOW, input_high=HIGH, check="never")
    start = oracles.classes(target)
    compare(model, lambda v: oracles.explain_epsilon(graph, v, start, E, low=LOW, high=HIGH), net,
            images(3, (9, 9)), target=target)  # fmt: skip


@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_dropout(variant):
    """Relevance goes back through the mask that the forward drew."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.ReLU(),
                                    nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 25, 3)))  # fmt: skip
    x = images(2, (9, 9))

    def oracle(v):
        torch.manual_seed(0)
        masks = [nn.functional.dropout(torch.ones(2, *shape, dtype=v.dtype), p) for shape, p in (((4, 7, 7), 0.5), ((100,), 0.3))]
        ops = [(n, masks.pop(0) if isinstance(m, nn.Dropout) else m, str(int(n) - 1) if n != "0" else "x")
               for n, m in model.named_children()]  # fmt: skip
        return explain(oracles.Net(ops), variant, v, low=LOW, high=HIGH)(v)

    net = fc.ISNet(model.train(), variant, input_low=LOW, input_high=HIGH, check="never")

    def seeded(v, **options):
        torch.manual_seed(0)
        return net(v, **options)

    compare(model, oracle, seeded, x)


@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.LayerNorm((4, 7, 7))], ids=["group", "layer"])
def test_norms_of_a_sample(norm, variant):
    """GroupNorm and LayerNorm: affine maps of each sample, statistics detached."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(),
                          nn.Flatten(), nn.Linear(4 * 25, 3))  # fmt: skip
    for p in randomise(model)[1].parameters():
        p.data = randn(*p.shape, seed=3)
    graph = oracles.Net.chain(model)
    net = fc.ISNet(model, variant, first_layer="epsilon", check="never")
    compare(model, explain(graph, variant, None, first_layer="epsilon"), net, images(2, (9, 9)))


# ---- rules -------------------------------------------------------------------------------------------------------------

RULES = {
    "epsilon": (fc.rules.Epsilon(E), ("epsilon", {"e": E})),
    "zplus": (fc.rules.ZPlus(E), ("zplus", {"e": E})),
    "gamma": (fc.rules.Gamma(0.3, E), ("gamma", {"gamma": 0.3, "e": E})),
    "alpha_beta": (fc.rules.AlphaBeta(2.0, 1.0, E), ("alpha_beta", {"alpha": 2.0, "beta": 1.0, "e": E})),
    "w2": (fc.rules.WSquare(E), ("w2", {"e": E})),
    "flat": (fc.rules.Flat(E), ("flat", {"e": E})),
    "zb": (fc.rules.ZB(LOW, HIGH, E), ("zb", {"low": LOW, "high": HIGH, "e": E})),
}


def chain(bn=True, pool=None, seed=0):
    """conv [bn] ReLU (pool) conv [bn] ReLU flatten dense ReLU dense."""
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(3)] if bn else []
    layers = [nn.Conv2d(3, 4, 3, 2, 1), *norms[:1], nn.ReLU(), *([pool] if pool else [])]
    layers += [nn.Conv2d(4, 3, 3, padding=1), *norms[1:], nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    model(torch.zeros(2, 3, 9, 9))
    return randomise(model, seed)


def rules_net(model, rules, graph_rules, target, training):
    """The package's net and the oracle's run for a mapping of op names to rules."""
    graph = oracles.Net.chain(model)
    model.train(training)
    net = fc.ISNet(model, "original", rules=rules, check="never")

    def start(logits):
        return oracles.classes(target)(logits) * logits[:, None]

    return net, lambda v: oracles.explain_rules(graph, v, start, graph_rules)


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma", "alpha_beta", "w2", "flat"])
def test_rule_everywhere(rule, training, bn):
    """One rule for all layers, or all but the first.

    (The oracle's ratio form takes BatchNorm's statistics as constants in z, where epsilon in gradient form uses the
    forward's own activation: in train mode the random networks above compare epsilon.)
    """
    if rule == "epsilon" and training and bn:
        return
    model = chain(bn)
    ours, theirs = RULES[rule]
    maps = [n for n, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    target = torch.tensor([0, 2, 1])
    for first in (rule, "zb"):
        graph_rules = dict.fromkeys(maps, theirs) | {maps[0]: RULES[first][1]}
        if rule == "epsilon":
            graph_rules[maps[-1]] = ("epsilon", {"e": 0.0})
        rules = fc.rules.RuleMap(conv=ours, linear=ours, first=RULES[first][0])
        net, oracle = rules_net(model, rules, graph_rules, target, training)
        compare(model, oracle, net, images(3, (9, 9)), target=target)


@pytest.mark.parametrize("middle", ["epsilon", "zplus", "gamma", "alpha_beta", "w2", "flat"])
@pytest.mark.parametrize("dense", ["epsilon", "zplus", "gamma", "alpha_beta", "w2", "flat"])
def test_rules_side_by_side(middle, dense):
    """Every rule behind every other: what one hands on (relevance, or relevance per unit) the next can take."""
    model = chain()
    maps = [n for n, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    chosen = dict(zip(maps, ("w2", middle, dense, "gamma")))
    target = torch.tensor([1, 0, 2])
    rules = {n: RULES[r][0] for n, r in chosen.items()}
    graph_rules = {n: RULES[r][1] for n, r in chosen.items()}
    net, oracle = rules_net(model, rules, graph_rules, target, False)
    compare(model, oracle, net, images(3, (9, 9)), target=target)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)], ids=["max", "avg"])
@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma", "alpha_beta"])
def test_rules_around_pools(rule, pool):
    """z+ divides in pools too; any other rule passes through them."""
    model = chain(pool=pool)
    ours, theirs = RULES[rule]
    graph_rules = {n: theirs for n, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}
    graph_rules |= {n: theirs for n, m in model.named_children() if rule == "zplus" and m is pool}
    if rule == "epsilon":
        graph_rules[list(graph_rules)[-1]] = ("epsilon", {"e": 0.0})
    target = torch.tensor([0, 2, 1])
    rules = fc.rules.RuleMap(conv=ours, linear=ours)
    net, oracle = rules_net(model, rules, graph_rules, target, rule != "epsilon")
    compare(model, oracle, net, images(3, (9, 9)), target=target)


@pytest.mark.parametrize("bn", [True, False])
def test_gamma_of_zero_is_epsilon(bn):
    """The same maps and the same gradients, biases included."""
    model = chain(bn).eval()
    x, results = images(3, (9, 9)), []
    for conv in (fc.rules.Gamma(0.0, E), fc.rules.Epsilon(E)):
        R = fc.ISNet(model, "original", rules=fc.rules.RuleMap(conv=conv), check="never")(x, relevance=True).heatmaps
        found = torch.autograd.grad((R * randn(*R.shape)).sum(), list(model.parameters()), allow_unused=True)
        named = zip(model.named_parameters(), found)
        # (a folded weight has a kink where its channel's gamma is 0)
        results.append((R, {n: torch.where(p == 0, 0.0, torch.zeros_like(p) if g is None else g) for (n, p), g in named}))
    close(results[0][0], results[1][0])
    close_grads(results[0][1], results[1][1])


def test_presets_are_what_they_say():
    """"epsilon_plus" and the like, against the oracle with the rules spelled out."""
    model = chain().eval()
    maps = [n for n, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    x, target = images(3, (9, 9)).clamp(0, 1), torch.tensor([0, 1, 2])
    dense = {maps[2]: ("epsilon", {"e": 0.01}), maps[3]: ("epsilon", {"e": 0.0})}
    expected = {
        "epsilon_plus": {maps[0]: ("zplus", {"e": 0.01}), maps[1]: ("zplus", {"e": 0.01}), **dense},
        "epsilon_plus_flat": {maps[0]: ("flat", {"e": 1e-12}), maps[1]: ("zplus", {"e": 0.01}), **dense},
        "epsilon_alpha2_beta1_flat": {
            maps[0]: ("flat", {"e": 1e-12}), maps[1]: ("alpha_beta", {"alpha": 2.0, "beta": 1.0, "e": 1e-6}), **dense,
        },
        "epsilon_gamma_box": {
            maps[0]: ("zb", {"low": 0.0, "high": 1.0, "e": 0.01}), maps[1]: ("gamma", {"gamma": 0.25, "e": 1e-6}), **dense,
        },
        "epsilon_gamma_w2": {maps[0]: ("w2", {"e": 1e-12}), maps[1]: ("gamma", {"gamma": 0.25, "e": 1e-6}), **dense},
    }  # fmt: skip
    for preset, graph_rules in expected.items():
        _, oracle = rules_net(model, None, graph_rules, target, False)
        close(fc.relevance(model, x, target, preset), oracle(x).heatmaps, what=preset)
    close(fc.relevance(model, x, target, "gradient_x_input"), gradient_times_input(model, x, target))


def gradient_times_input(model, x, target):
    v = x.clone().requires_grad_()
    picked = model(v).gather(1, target[:, None]).sum()
    return (v * torch.autograd.grad(picked, v)[0]).detach().unsqueeze(1)
