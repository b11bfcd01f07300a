"""A sample's map is its own: given the statistics, it depends neither on the rest of the batch nor on the batch's size."""

import copy
import functools

import golden_nets
import pytest
import torch
from helpers import close, rand, randomise
from torch import nn

import fisnet_cuda as fc

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")
NAMES = ("seqbn", "vgg", "resnet18s", "densenets")
EPS = {"absolute": 0.01, "relative": fc.rules.Epsilon(0.01, relative=True)}


@functools.cache
def _model(name):
    return randomise(golden_nets.build(name), seed=1)


def images(n, seed=0):
    return rand(n, 3, 16, 16, seed=seed)


def explain(model, variant, x, eps="absolute", target=None, **options):
    generator = torch.Generator().manual_seed(0)
    net = fc.ISNet(model, variant, eps=EPS[eps], check="never", generator=generator, **options)
    return net(x, relevance=True, target=target)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_eval_mode(name, variant, eps):
    """Other samples, other numbers of samples, other places in the batch: the same map, not divided by anything."""
    model, x = _model(name).eval(), images(4)
    target = torch.tensor([0, 1, 2, 0]) if variant in ("stochastic", "contrast") else None  # its draws depend on the place

    def maps(samples, t=target):
        return explain(model, variant, samples, eps, None if target is None else t).heatmaps

    want = maps(x)
    other = torch.cat([x[:2], 100 * images(2, seed=9)])
    close(maps(other)[:2], want[:2], what="other samples beside it")
    close(maps(x[:1], target[:1] if target is not None else None), want[:1], what="alone")
    order = torch.tensor([2, 0, 3, 1])
    close(maps(x[order], target[order] if target is not None else None), want[order], what="in another order")


@pytest.mark.parametrize("first_layer", ["zb", "epsilon"])
@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("name", ["seqbn", "resnet18s", "densenets"])
def test_relevance_does_not_mix_samples_in_train_mode(name, variant, first_layer):
    """What is explained of one sample leaves the maps of the others alone, bit for bit."""
    model, x = _model(name).train(), images(3)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])
    maps = [explain(copy.deepcopy(model), variant, x, target=t, first_layer=first_layer).heatmaps for t in (a, b)]
    assert torch.equal(maps[0][:2], maps[1][:2])
    assert not torch.equal(maps[0][2], maps[1][2])


def with_statistics_of(model, x):
    """The model in eval mode, its running statistics replaced by the batch's own: mean and biased variance."""
    twin = copy.deepcopy(model).train()
    counts = {}

    def count(module, inputs):
        counts[module] = inputs[0].numel() // inputs[0].shape[1]

    hooks = [m.register_forward_pre_hook(count) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in counts.keys() | {m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)}:
        m.momentum = 1.0
    twin(x)
    for hook in hooks:
        hook.remove()
    for m, n in counts.items():
        m.running_var.mul_((n - 1) / n)  # PyTorch keeps the unbiased one
    return twin.eval()


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("first_layer", ["zb", "epsilon"])
@pytest.mark.parametrize("variant", ["original", "selective", "dual"])
@pytest.mark.parametrize("name", ["seqbn", "resnet18s", "densenets"])
def test_train_mode_uses_the_batch_through_its_statistics_alone(name, variant, first_layer, eps):
    """Given the biased batch statistics, one sample alone in eval mode has the same map, inner maps included."""
    model, x = _model(name), images(3)
    inner = {"seqbn": "5", "resnet18s": "layer2", "densenets": "features.fReLU"}[name]
    supervise = () if variant == "dual" and name == "seqbn" else (inner,)
    together = explain(copy.deepcopy(model).train(), variant, x, eps, first_layer=first_layer, supervise=supervise)
    frozen = with_statistics_of(model, x)
    for n in range(3):
        alone = explain(frozen, variant, x[n : n + 1], eps, first_layer=first_layer, supervise=supervise)
        close(alone.logits, together.logits[n : n + 1], what="logits")
        close(alone.heatmaps, together.heatmaps[n : n + 1], what="heatmaps")
        for layer in supervise:
            close(alone.hidden[layer], together.hidden[layer][n : n + 1], what=layer)


@pytest.mark.parametrize("variant", ["original", "selective", "dual"])
def test_a_batch_twice_as_large_has_the_same_maps(variant):
    """Every sample twice: the same statistics, so the same maps; the explained quantity is summed, never averaged."""
    model, x = _model("resnet18s"), images(2)
    once = explain(copy.deepcopy(model).train(), variant, x).heatmaps
    twice = explain(copy.deepcopy(model).train(), variant, torch.cat([x, x])).heatmaps
    close(twice, torch.cat([once, once]))
