"""The rules as data: what users may write for ``rules=``, the presets, which rule serves which layer, messages."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import rules
from fisnet_cuda.rules import AlphaBeta, Epsilon, Flat, Gamma, RuleMap, WSquare, ZPlus

MAKERS = {
    "Epsilon": lambda: Epsilon(0.1), "ZPlus": lambda: ZPlus(0.1), "ZB": lambda: rules.ZB(-1.0, 2.0, 0.1),
    "Gamma": lambda: Gamma(0.5, 0.1), "AlphaBeta": lambda: AlphaBeta(3.0, 2.0, 0.1), "WSquare": lambda: WSquare(0.1),
    "Flat": lambda: Flat(0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_rules_are_frozen_values(name):
    rule = MAKERS[name]()
    assert rule == MAKERS[name]()
    assert hash(rule) == hash(MAKERS[name]())
    assert rule != type(rule)()
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.eps = 0.2
    assert repr(rule).startswith(f"{name}(")


def test_defaults_are_those_of_the_papers():
    assert Epsilon() == Epsilon(eps=0.01, relative=False)
    assert ZPlus().eps == rules.ZB().eps == 0.01
    assert (rules.ZB().low, rules.ZB().high) == (0.0, 1.0)
    assert AlphaBeta() == AlphaBeta(alpha=2.0, beta=1.0)
    assert Gamma().gamma == 0.25


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Epsilon("1"), TypeError, "eps must be a number, got str"),
        (lambda: Epsilon(True), TypeError, "eps must be a number, got bool"),
        (lambda: ZPlus(-1e-9), ValueError, "eps must be finite and >= 0, got -1e-09"),
        (lambda: WSquare(float("inf")), ValueError, "eps must be finite"),
        (lambda: Flat(float("nan")), ValueError, "eps must be finite"),
        (lambda: Gamma(-0.1), ValueError, "gamma must be >= 0, got -0.1"),
        (lambda: Gamma(float("nan")), ValueError, "gamma must be >= 0, got nan"),
        (lambda: Gamma("0.1"), TypeError, "gamma must be a number, got str"),
        (lambda: AlphaBeta(2.0, 2.0), ValueError, "alpha - beta must be 1 with both >= 0, got alpha=2.0, beta=2.0"),
        (lambda: AlphaBeta(0.5, -0.5), ValueError, "both >= 0"),
        (lambda: AlphaBeta("2", 1.0), TypeError, "alpha must be a number, got str"),
        (lambda: rules.ZB(1.0, 1.0), ValueError, r"low must be below high, got low=1.0, high=1.0 \(channel 0\)"),
        (lambda: rules.ZB((0, 0, 2), 1), ValueError, r"got low=2.0, high=1.0 \(channel 2\)"),
        (lambda: rules.ZB((0, 0), (1, 1, 1)), ValueError, "low has 2 channels and high has 3"),
        (lambda: rules.ZB(float("nan"), 1.0), ValueError, "low must be below high"),
        (lambda: rules.ZB((), 1.0), ValueError, "low must be a number or one per channel, got an empty"),
        (lambda: rules.ZB("01", 2.0), TypeError, "low must be a number or one per channel, got str"),
        (lambda: rules.ZB(None, 2.0), TypeError, "low must be a number or one per channel, got NoneType"),
    ],
)
def test_wrong_parameters(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_bounds_may_be_anything_with_numbers():
    assert rules.ZB([-1, -2], (1, 2)) == rules.ZB((-1.0, -2.0), (1.0, 2.0))
    assert rules.ZB(torch.tensor([-1.0, -2.0]), 3).low == (-1.0, -2.0)
    hash(rules.ZB([0, 0, 0], 1))


# ---- resolve ---------------------------------------------------------------------------------------------------------

DEFAULT = RuleMap(conv=Epsilon(0.5), linear=Epsilon(0.5), first=rules.ZB(0, 2))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, DEFAULT),
        (RuleMap(conv=ZPlus()), RuleMap(conv=ZPlus())),
        (Gamma(), RuleMap(conv=Gamma(), linear=Gamma(), first=rules.ZB(0, 2))),
        (rules.ZB(-1, 1), RuleMap(conv=Epsilon(0.5), linear=Epsilon(0.5), first=rules.ZB(-1, 1))),
        ("epsilon_plus", RuleMap(conv=ZPlus(), linear=Epsilon())),
        ({"conv": ZPlus()}, RuleMap(conv=ZPlus(), linear=Epsilon(0.5), first=rules.ZB(0, 2))),
        ({"linear": Flat(), "first": None}, RuleMap(conv=Epsilon(0.5), linear=Flat(), first=None)),
        (
            {"features.*": ZPlus(), "conv": Gamma()},
            RuleMap(Gamma(), Epsilon(0.5), rules.ZB(0, 2), (("features.*", ZPlus()),)),
        ),
    ],
)
def test_resolve(given, expected):
    assert rules.resolve(given, DEFAULT) == expected


def test_named_rules_go_before_the_defaults_own():
    base = RuleMap(layers=(("a", Flat()),))
    assert rules.resolve({"a": ZPlus()}, base).named("a") == ZPlus()
    assert rules.resolve({"b": ZPlus()}, base).named("a") == Flat()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("epsilon-plus", ValueError, "unknown preset 'epsilon-plus'; the presets are alpha2_beta1, epsilon, "),
        (3, TypeError, r"rules must be a rule, a preset's name, a mapping \{layer: rule\} or a RuleMap, got int"),
        ({"conv": "zplus"}, TypeError, "rules: 'conv' must be one of Epsilon, ZPlus, .* got 'zplus'"),
        ({"layer1": None}, TypeError, "rules: 'layer1' must be one of Epsilon"),
        ({"conv": None}, TypeError, "rules: 'conv' must be one of Epsilon"),
        ({3: ZPlus()}, TypeError, "rules: a layer's name must be a str, got int"),
        (Epsilon, TypeError, "rules must be a rule"),
    ],
)
def test_resolve_errors(given, error, text):
    with pytest.raises(error, match=text):
        rules.resolve(given, DEFAULT)


def test_patterns():
    given = RuleMap(layers=(("layer1.*", ZPlus()), ("layer1.0.conv1", Flat()), ("fc", Gamma())))
    assert given.named("layer1.0.conv1") == ZPlus(), "the first match wins"
    assert given.named("fc") == Gamma()
    assert given.named("fc2") is None
    assert given.unmatched(["layer1.x", "conv"]) == ["layer1.0.conv1", "fc"]


def test_presets():
    for name, preset in rules.presets().items():
        assert rules.resolve(name) == preset
    assert rules.presets()["epsilon_gamma_box"].first == rules.ZB()
    assert rules.presets()["gradient_x_input"].conv == Epsilon(0.0)


# ---- which layer gets which rule -------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body((self.stem(x) + self.other(x)).relu()).mean((2, 3)))


def rule_of(net, layer):
    (row,) = (r for r in net.plan().rows if r.layer == layer)
    return row.rule


def test_every_layer_that_reads_the_input_is_a_first_layer():
    net = fc.ISNet(Branches(), "original", rules={"conv": ZPlus(0.1), "linear": Gamma(0.5), "first": Flat()})
    assert rule_of(net, "stem") == rule_of(net, "other") == "flat"
    assert rule_of(net, "body.0") == "z+(0.1)"
    assert rule_of(net, "fc") == "gamma(0.5)"


def test_names_and_globs():
    net = fc.ISNet(Branches(), "original", rules={"body.*": AlphaBeta(), "stem": WSquare(), "fc": Epsilon(0.3, relative=True)})
    assert rule_of(net, "body.0") == "alpha2beta1"
    assert rule_of(net, "stem") == "w^2"
    assert rule_of(net, "other") == "zB[0, 1]"
    assert "epsilon(0.3 rms)" in rule_of(net, "fc")


def test_a_batch_norms_name_is_its_convolutions():
    net = fc.ISNet(Branches(), "original", rules={"body.1": Flat()})
    assert rule_of(net, "body.0") == "flat"


def test_unknown_layer():
    with pytest.raises(ValueError, match=r"rules: no layer matches 'body.9'. Did you mean 'body.\d'.* lists the layers"):
        fc.ISNet(Branches(), rules={"body.9": Flat()})
