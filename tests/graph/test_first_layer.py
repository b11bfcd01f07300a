"""Where the first layer is when it is not the first op: constants, padding, reshapes in front of it, and what has none."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close, rand, randomise
from torch import nn

import fisnet_cuda as fc

MEAN, STD = torch.tensor([0.4, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.3, -0.25], dtype=torch.float64)


class Prefixed(nn.Module):
    """``body`` behind a function of the input."""

    def __init__(self, body, prefix, **buffers):
        super().__init__()
        self.body, self.prefix = body, prefix
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.body(self.prefix(self, x))


def convnet(c_in=3, features=16, padding=1, **kwargs):
    return randomise(nn.Sequential(
        nn.Conv2d(c_in, 4, 3, 2, padding, **kwargs), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(features, 3),
    ))  # fmt: skip


def maps(model, x, variant="dual", rearrange=lambda R: R, **options):
    """Heatmaps, rearranged, and gradients of a functional of them."""
    out = fc.ISNet(model, variant=variant, **options)(x, relevance=True)
    R = rearrange(out.heatmaps)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((R * rand(*R.shape, seed=9, low=-1)).sum(), params, allow_unused=True)
    return R, [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]


def same(got, want):
    close(got[0], want[0], what="heatmaps")
    scale = max(w.abs().max() for w in want[1])
    for g, w in zip(got[1], want[1]):
        assert (g.reshape(w.shape) - w).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("variant", ["selective", "original", "dual"])
@pytest.mark.parametrize("training", [False, True])
def test_normalisation_inside_is_bounds_outside(variant, training):
    """(x - mean) / std in forward gives what normalised inputs with normalised bounds give."""
    body, x = convnet().train(training), rand(3, 3, 8, 8)
    view = MEAN.view(3, 1, 1), STD.view(3, 1, 1)
    model = Prefixed(body, lambda m, v: (v - m.mean) / m.std, mean=view[0], std=view[1]).train(training)
    ends = torch.stack([(0 - MEAN) / STD, (1 - MEAN) / STD])
    bounds = {"input_low": ends.min(0).values, "input_high": ends.max(0).values}
    same(maps(model, x, variant), maps(body, (x - view[0]) / view[1], variant, **bounds))


def test_functions_of_buffers_are_constants_too():
    body, x = convnet(), rand(2, 3, 8, 8)
    model = Prefixed(body, lambda m, v: 2 * v - m.ones.sum(0) / m.ones.numel(), ones=torch.ones(3, dtype=torch.float64))
    same(maps(model, x), maps(body, 2 * x - 1, input_low=-1, input_high=1))


def test_padding_in_front_is_padding_inside():
    body, x = convnet(padding=0), rand(2, 3, 8, 8, low=-1)
    inside = convnet(padding=1)
    bounds = {"input_low": (-1.0, -2.0, -1.5), "input_high": 1.0}
    want = maps(inside, x, **bounds)
    same(maps(nn.Sequential(nn.ZeroPad2d(1), *body), x, **bounds), want)
    same(maps(Prefixed(body, lambda m, v: F.pad(v, (1, 1, 1, 1))), x, **bounds), want)


def test_reflected_borders_return_what_they_get():
    body, x = convnet(padding=0), rand(2, 3, 8, 8)
    pad = nn.ReflectionPad2d(1)
    got = fc.ISNet(nn.Sequential(pad, *body), input_low=-0.5)(x, relevance=True, target=1).heatmaps
    want = fc.ISNet(body, input_low=-0.5)(pad(x), relevance=True, target=1).heatmaps
    leaf = x.clone().requires_grad_()
    close(got[:, 0], torch.autograd.grad(pad(leaf), leaf, want[:, 0])[0])  # the sum over the copies of a pixel


def test_flatten_in_front_of_a_dense_layer():
    """The same as a convolution over the whole image, bounds a channel."""
    x, bounds = rand(4, 3, 4, 5), {"input_low": (-0.5, 0.0, -1.0), "input_high": (1.5, 1.0, 1.0)}
    dense = randomise(nn.Sequential(nn.Flatten(), nn.Linear(60, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    whole = nn.Sequential(nn.Conv2d(3, 6, (4, 5)), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)).double()
    state = {("0" if k[0] == "1" else k[0] if k[0] != "2" else "1") + k[1:]: v for k, v in dense.state_dict().items()}
    state["0.weight"] = state["0.weight"].view(6, 3, 4, 5)
    whole.load_state_dict(state)
    for variant in ("selective", "dual"):
        same(maps(dense, x, variant, **bounds), maps(whole, x, variant, **bounds))


def test_grey_images_repeated():
    body, x = convnet(), rand(2, 1, 8, 8)
    want = maps(body, x.repeat(1, 3, 1, 1), rearrange=lambda R: R.sum(2, keepdim=True), input_low=-0.2)
    for prefix in (
        lambda m, v: v.repeat(1, 3, 1, 1), lambda m, v: torch.cat([v, v, v], 1), lambda m, v: v.expand(-1, 3, -1, -1)
    ):  # fmt: skip
        same(maps(Prefixed(body, prefix), x, input_low=-0.2), want)


def test_slices_and_shuffles_in_front():
    body, x = convnet(4), rand(2, 2, 18, 16)
    model = Prefixed(body, lambda m, v: F.pixel_unshuffle(v[:, :1, 1:-1].transpose(2, 3), 2))
    got = maps(model, x, input_low=-0.2)

    def back(R):
        return F.pad(F.pixel_shuffle(R, 2).transpose(3, 4), (0, 0, 1, 1, 0, 1))

    same(got, maps(body, F.pixel_unshuffle(x[:, :1, 1:-1].transpose(2, 3), 2), rearrange=back, input_low=-0.2))


def test_dropout_in_front():
    """Bounds of what dropout makes of the input; in eval mode it is not there."""
    body, x = convnet(), rand(2, 3, 8, 8, low=0.1)
    model = Prefixed(nn.Sequential(nn.Dropout(0.5), *body), lambda m, v: v)
    same(maps(model.eval(), x, input_low=0.1), maps(body.eval(), x, input_low=0.1))
    model.train()
    torch.manual_seed(0)
    got = maps(model, x, input_low=0.1)
    torch.manual_seed(0)
    same(got, maps(body, F.dropout(x, 0.5), input_low=0.0, input_high=2.0))


def test_several_first_layers():
    """Every convolution that reads the input is one; their maps add up."""

    class Two(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b, self.head = a, b, nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(torch.cat([self.a(x).relu(), self.b(x - 0.5).relu()], 1).mean((2, 3)))

    torch.manual_seed(0)
    a, b = (nn.Conv2d(2, 2, 3, padding=1).double() for _ in range(2))
    x, none = rand(2, 2, 5, 5), nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
    nn.init.zeros_(none.weight)
    both = Two(a, b)

    def heatmap(first, second):
        model = Two(first, second)
        model.head = both.head
        return fc.ISNet(model)(x, relevance=True, target=0).heatmaps

    close(heatmap(a, b), heatmap(a, none) + heatmap(none, b))
    assert str(fc.ISNet(both).plan()).count("zB[0, 1]") == 2


@pytest.mark.parametrize(("first", "name"), [
    (nn.BatchNorm2d(3), "0: batch_norm"), (nn.GroupNorm(1, 3), "0: norm"), (nn.MaxPool2d(2), "0: pool_max"),
    (nn.AvgPool2d(2), "0: pool_avg"), (nn.ReLU(), "0: relu"), (nn.Upsample(scale_factor=2, mode="bilinear"), "0: linear_map"),
])  # fmt: skip
def test_other_first_ops_are_refused(first, name):
    """A rule for the first layer that would silently not be used."""
    model = nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for variant in ("selective", "dual"):
        with pytest.raises(fc.UnsupportedModelError, match=rf"^{name} reads the input.*zB\[0, 1\].*first_layer='epsilon'"):
            fc.ISNet(model, variant=variant)
    with pytest.raises(fc.UnsupportedModelError, match="the rule of the first layer, flat,"):
        fc.relevance(model, torch.rand(2, 3, 8, 8), rules="epsilon_plus_flat")
    out = fc.ISNet(model, first_layer="epsilon")(torch.rand(2, 3, 8, 8), relevance=True)
    assert torch.isfinite(out.heatmaps).all()


def test_a_skip_from_the_input_and_a_learned_scale_are_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.ones(3, 1, 1)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head((x + self.conv(x)).relu().mean((2, 3)))

    with pytest.raises(fc.UnsupportedModelError, match=r"^add: add reads the input"):
        fc.ISNet(Skip())
    model = Skip()
    model.forward = lambda x: model.head(model.conv(x * model.scale).relu().mean((2, 3)))
    with pytest.raises(fc.UnsupportedModelError, match=r"^mul: constant reads the input"):
        fc.ISNet(model)


def test_what_does_not_reach_the_logits_does_not_count():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            self.bn(x)  # statistics only
            return self.head(self.conv(x).relu().mean((2, 3)))

    model, x = Unused(), torch.rand(2, 3, 8, 8)
    fc.ISNet(model)(x, relevance=True)
    assert model.bn.num_batches_tracked == 1


def test_flat_and_w2_go_through_constants_unchanged():
    """x / 2: what the first layer's rule gives h is what x gets."""
    body, x = convnet().eval(), rand(2, 3, 8, 8)
    model = Prefixed(body, lambda m, v: v / 2 + 0.1).eval()
    for first in (fc.rules.Flat(), fc.rules.WSquare()):
        rules = fc.rules.RuleMap(first=first)
        close(fc.relevance(model, x, 0, rules), fc.relevance(body, x / 2 + 0.1, 0, rules))
