"""A small net with max pools and a pooled head: through the kernels it gives the reference's maps and gradients."""

import pytest
import torch
from helpers import close, close_grads, rand, randn, randomise
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import _backend

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def net():
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        ),
        seed=1,
    )  # fmt: skip


def step(isnet, x):
    """Logits, maps and all gradients of a loss on both."""
    x = x.detach().requires_grad_()
    out = isnet(x, relevance=True)
    loss = (out.heatmaps * randn(*out.heatmaps.shape, seed=3).to(x)).sum() + out.logits.square().sum()
    loss = loss + out.heatmaps.square().sum()
    isnet.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in isnet.named_parameters()} | {"x": x.grad}
    return out.logits.detach(), out.heatmaps.detach(), gradients


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first_layer", ["zb", "epsilon"])
@pytest.mark.parametrize("variant", ["selective", "dual", "original"])
def test_maps_and_gradients(device, variant, first_layer, training, layout):
    model = net().to(device, memory_format=layout).train(training)
    x = rand(2, 3, 14, 11, seed=2).to(device).contiguous(memory_format=layout)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = {}
    for backend in ("auto", "reference"):
        model.load_state_dict(state)  # running statistics move
        found[backend] = step(fc.ISNet(model, variant, first_layer=first_layer, backend=backend).train(training), x)
    (logits, maps, gradients), (want_logits, want_maps, want_gradients) = found["auto"], found["reference"]
    close(logits, want_logits, what="logits")
    close(maps, want_maps, what="heatmaps")
    close_grads(gradients, want_gradients)


@pytest.mark.parametrize(
    ("variant", "first_layer", "expected"),
    [
        ("selective", "zb", ["max_pool:cuda", "max_pool_scatter:cuda", "max_pool_scatter_phi:cuda", "pooled_phi:cuda"]),
        ("selective", "epsilon", ["max_pool:cuda", "max_pool_scatter_phi:cuda", "pooled_phi:cuda"]),
        ("dual", "zb", ["max_pool:cuda", "max_pool_scatter:cuda", "pooled_dual_phi:cuda", "plus_start:cuda"]),
    ],
)
def test_the_plan_shows_what_runs(device, variant, first_layer, expected):
    plan = str(fc.ISNet(net(), variant, first_layer=first_layer).plan("cuda"))
    assert all(kernel in plan for kernel in expected), plan
    assert "avg_pool^T " not in plan, "fused with what follows"


def test_the_plan_shows_a_pool_that_the_kernel_does_not_serve(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plan = str(fc.ISNet(model, first_layer="epsilon").plan("cuda"))
    assert "max_pool:reference" in plan
    assert "max_pool_scatter_phi:reference" in plan
    assert _backend.implementation("max_pool", "auto", torch.device("cuda")) == "cuda"
