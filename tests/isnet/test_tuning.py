"""C1 and C2: the authors' numbers, the equation over a plain list of values, and what it leaves alone."""

from types import SimpleNamespace

import golden_nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisnet_cuda.isnet.loss import ISNetLoss
from fisnet_cuda.isnet.module import ISNet
from fisnet_cuda.isnet.tuning import tune_c1_c2
from fisnet_cuda.isnet.variants import VARIANTS

CUT = golden_nets.arrays("cut")
RULES = ["e", "e_multi", "z+e"]


class Maps:
    """Stands for an ISNet: its maps have the total |R| that the batch says, in two pixels of unlike sign."""

    def __init__(self, layers=("input",), variant="selective"):
        self.layers, self.variant = layers, variant

    def __call__(self, x, relevance):
        assert relevance
        assert not torch.is_grad_enabled()
        maps = {
            layer: torch.stack([-0.25 * v, 0.75 * v], -1).view(*v.shape, 1, 1, 2)
            for layer, v in zip(self.layers, x.unbind(1), strict=True)
        }
        return SimpleNamespace(heatmaps=maps.pop("input"), hidden=maps)


def batches(values, size=5):
    """values {layer: [N, K]} as batches [n, layer, K], the last one smaller."""
    return torch.stack(list(values.values()), 1).split(size)


def expected(v):
    """Section 5, for totals v [N, K'] in numpy."""
    mean, std = v.mean(0), v.std(0, ddof=1)
    c1 = np.maximum(mean / 5, mean - 3 * std)
    return c1, np.minimum(25 * c1, mean + 3 * std)


@pytest.mark.parametrize("rule", RULES)
def test_golden(rule):
    """The authors round each v to float32 before they accumulate: so do we here, and then agree to 1e-10."""
    variant = "dual" if rule == "z+e" else "original"
    layers = ("input", "layer1")
    values = {layer: CUT[f"{rule}/{layer}/values"].float() for layer in layers}
    if variant == "original":
        values = {layer: v.mean(1, keepdim=True) for layer, v in values.items()}
    values = {layer: v.double() for layer, v in values.items()}
    c1, c2 = tune_c1_c2(Maps(layers, variant), batches(values))
    for layer in layers:
        torch.testing.assert_close(c1[layer], CUT[f"{rule}/{layer}/C1"], rtol=1e-10, atol=0)
        torch.testing.assert_close(c2[layer], CUT[f"{rule}/{layer}/C2"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_golden_values_as_they_are(rule):
    """All K maps, not rounded: the same to float32."""
    layers = ("input", "layer1")
    values = {layer: CUT[f"{rule}/{layer}/values"] for layer in layers}
    c1, c2 = tune_c1_c2(Maps(layers, "dual" if rule == "z+e" else "original"), batches(values))
    for layer in layers:
        torch.testing.assert_close(c1[layer], CUT[f"{rule}/{layer}/C1"], rtol=3e-7, atol=0)
        torch.testing.assert_close(c2[layer], CUT[f"{rule}/{layer}/C2"], rtol=3e-7, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(2, 40),
    K=st.integers(1, 3),
    size=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
    offset=st.sampled_from([1e-3, 1.0, 1e4]),
    variant=st.sampled_from(["selective", "dual"]),
    seed=st.integers(0, 2**31),
)
def test_equation(N, K, size, spread, offset, variant, seed):
    generator = torch.Generator().manual_seed(seed)
    v = offset * (1 + spread * torch.rand(N, K, generator=generator, dtype=torch.float64))
    c1, c2 = tune_c1_c2(Maps(variant=variant), batches({"input": v}, size))
    per_map = v if variant == "dual" else v.mean(1, keepdim=True)
    for got, wanted in zip((c1, c2), expected(per_map.numpy()), strict=True):
        assert got["input"].dtype == torch.float64
        np.testing.assert_allclose(got["input"].numpy(), wanted, rtol=1e-12)


def test_a_large_mean_does_not_swallow_the_spread():
    """Squares accumulated without Welford's centring would lose all digits of this variance."""
    v = 1e9 + torch.arange(20.0, dtype=torch.float64).view(-1, 1)
    c1, _ = tune_c1_c2(Maps(), batches({"input": v}, 3))
    wanted, _ = expected(v.numpy())
    assert 1e9 - c1["input"].item() == pytest.approx(1e9 - wanted.item(), rel=1e-6)


def test_narrow_and_wide_distributions_take_each_branch():
    narrow = tune_c1_c2(Maps(), [torch.tensor([[[9.0]], [[11.0]], [[10.0]]], dtype=torch.float64)])
    assert [c["input"].item() for c in narrow] == pytest.approx([7, 13])
    wide = tune_c1_c2(Maps(), [torch.tensor([[[0.1]], [[100.0]], [[0.1]], [[0.1]]], dtype=torch.float64)])
    assert wide[0]["input"].item() == pytest.approx(100.3 / 4 / 5)
    assert wide[1]["input"].item() == pytest.approx(25 * 100.3 / 4 / 5)


def test_half_precision_maps_are_summed_in_float64():
    x = torch.full((4, 1, 1, 100, 100), 1.5, dtype=torch.bfloat16)
    x[:2] += 0.5
    net = lambda x, relevance: SimpleNamespace(heatmaps=x, hidden={})  # noqa: E731
    c1, _ = tune_c1_c2(net, [x])
    assert c1["input"].item() == expected(np.array([[20000.0], [20000], [15000], [15000]]))[0].item()


def test_batches_of_every_form():
    v = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    wanted = tune_c1_c2(Maps(), [v])
    forms = [[(v, torch.zeros(3))], [[v, None, None]], ((part, 0) for part in v.split(1)), [v[:0], v]]
    for form in forms:
        got = tune_c1_c2(Maps(), form)
        torch.testing.assert_close(got, wanted)


def test_the_result_goes_into_the_loss():
    values = {"input": torch.rand(9, 2) + 1, "features.3": torch.rand(9, 2) + 5}
    c1, c2 = tune_c1_c2(Maps(tuple(values), "dual"), batches(values))
    loss = ISNetLoss(c1=c1, c2=c2)
    out = Maps(tuple(values), "dual")
    with torch.no_grad():
        shown = out(batches(values)[0], relevance=True)
    shown.logits = torch.zeros(5, 3)
    total, parts = loss(shown, torch.zeros(5).long(), torch.tensor([[[0, 1]]]).expand(5, 1, 2))
    assert total.isfinite()
    assert list(parts.layers) == list(values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_tuned(variant):
    """The equation over the totals of a network's own maps, random draws included; the loss takes the result."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    model, x = nn.Sequential(*layers).double(), torch.rand(20, 3, 8, 8, dtype=torch.float64)

    def net():
        return ISNet(model, variant, supervise=("1",), generator=torch.Generator().manual_seed(1))

    c1, c2 = tune_c1_c2(net(), x.split(20))
    out = net()(x, relevance=True)
    for layer, maps in {"input": out.heatmaps, **out.hidden}.items():
        v = maps.detach().abs().flatten(2).sum(2)
        want = expected((v if variant == "dual" else v.mean(1, keepdim=True)).numpy())
        np.testing.assert_allclose(c1[layer], want[0], rtol=1e-9)
        np.testing.assert_allclose(c2[layer], want[1], rtol=1e-9)
    total, _ = ISNetLoss(c1=c1, c2=c2)(out, torch.zeros(20).long(), torch.ones(20, 1, 8, 8).tril())
    assert total.isfinite()


def test_progress_is_reported():
    seen = []
    tune_c1_c2(Maps(), torch.rand(7, 1, 1).split(3), progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 6), (3, 7)]


class Net(torch.nn.Module):
    """BatchNorm changes in train mode; the last layer is frozen in eval mode by its user."""

    variant = "selective"

    def __init__(self):
        super().__init__()
        self.bn, self.frozen = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)

    def forward(self, x, relevance):
        assert not self.training
        return SimpleNamespace(heatmaps=self.frozen(self.bn(x)).unsqueeze(1), hidden={})


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails):
    net = Net()
    net.frozen.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        tune_c1_c2(net, [torch.rand(4, 1, 3, 3), "broken"] if fails else [torch.rand(4, 1, 3, 3)])
    except TypeError:
        assert fails
    assert (net.training, net.bn.training, net.frozen.training) == (True, True, False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ([], ValueError, "batches must have at least 2 samples, got 0"),
        ([torch.ones(1, 1, 1)], ValueError, "at least 2 samples, got 1"),
        ([torch.zeros(4, 1, 1)], ValueError, "heatmaps at 'input' are all zero, so C1 would be 0; train"),
        ([torch.full((4, 1, 1), torch.nan)], ValueError, "heatmaps at 'input' are not finite"),
        ([torch.full((4, 1, 1), torch.inf)], ValueError, "heatmaps at 'input' are not finite"),
        (["image.png"], TypeError, "batches must yield tensors, or tuples that start with one, got str"),
        ([{"x": torch.ones(2)}], TypeError, "got dict"),
        ([()], TypeError, "got tuple"),
    ],
)
def test_errors(data, error, text):
    with pytest.raises(error, match=text):
        tune_c1_c2(Maps(), data)
