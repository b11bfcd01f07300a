"""Whole networks whose linear maps run as fused ops, by candidate 0 over the kernels: what the reference path gives."""

import golden_nets
import pytest
import torch
from graph import fused
from helpers import error
from kernels.test_network import EXACT, SIZE, random_net, same, step

import fisnet_cuda as fc


@pytest.mark.parametrize("variant", ["dual", "selective"])
@pytest.mark.parametrize("seed", range(4))
def test_random_networks(monkeypatch, device, seed, variant):
    options = {"train": seed % 2 == 0, "layout": (torch.contiguous_format, torch.channels_last)[seed // 2]}
    want = step(random_net(seed), variant, device, "reference", **options)
    calls = fused.forced(monkeypatch)
    same(step(random_net(seed), variant, device, "auto", **options), want, EXACT)
    assert variant == "selective" or {"dual_fprop", "dual_transposed_phi"} <= set(calls)


def test_adjoints_change_hands(monkeypatch, device):
    """Layers in a row: the adjoint of `dual_phi` runs with the products of the layer before."""

    def build():
        return golden_nets.build("seqbn")

    options = {"size": SIZE["seqbn"], "layout": torch.channels_last}
    want = step(build, "dual", device, "reference", **options)
    calls = fused.forced(monkeypatch)
    same(step(build, "dual", device, "auto", **options), want, EXACT)
    assert "dual_fprop_adjoint" in calls


@pytest.mark.parametrize("name", ["vgg", "resnet18s"])
def test_inference(monkeypatch, device, name):
    """BatchNorms with running statistics behind their maps, in one op each."""
    model = golden_nets.build(name).to(device, torch.float64).eval()
    x = torch.rand(2, 3, SIZE[name], SIZE[name], dtype=torch.float64, device=device)
    for variant in ("dual", "selective"):
        net = fc.ISNet(model, variant, check="never")
        with torch.no_grad():
            want = fc.ISNet(model, variant, check="never", backend="reference")(x, relevance=True)
            with monkeypatch.context() as m:
                calls = fused.forced(m)
                got = net(x, relevance=True)
        assert "linear_act" in calls
        assert error(got.logits, want.logits) <= EXACT
        assert error(got.heatmaps, want.heatmaps) <= EXACT
