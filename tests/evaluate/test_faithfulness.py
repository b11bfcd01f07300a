"""Insertion and deletion against a loop of one image a time, and where the answer is known."""

import pytest
import torch
from torch import nn

from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate.faithfulness import CURVES, Options, areas, blurred, curves, pixel_order

SPEC = InputSpec((6, 8), 1, ("a", "b"), mean=(0.25,), std=(0.5,))


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def example(n=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, 1, 6, 8), torch.randn(n, 1, 6, 8), torch.arange(n) % 2


class OnePixel(nn.Module):
    """Class 1 if pixel (2, 3) is bright, class 0 otherwise; sure of it."""

    def forward(self, x):
        z = 40 * (x[:, 0, 2, 3] - 0.5)
        return torch.stack([-z, z], 1)


@pytest.mark.parametrize("deletion", ["black", "mean", "blur"])
def test_curves_are_those_of_a_loop(deletion):
    x, R, target = example()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    options = Options(steps=5, deletion=deletion, sigma=1.0, batch_size=7)
    got = curves(model, x, R, target, SPEC, options, generators(3))
    low = {"black": torch.full_like(x, -0.5), "mean": x.mean((2, 3), keepdim=True).expand_as(x), "blur": blurred(x, 1.0)}[deletion]
    for n in range(3):
        by_relevance = sorted(range(48), key=lambda p: -R[n, 0].flatten()[p].item())
        by_chance = torch.randperm(48, generator=torch.Generator().manual_seed(n)).argsort().tolist()
        for name in CURVES:
            order = by_chance if name.endswith("random") else by_relevance
            start, end = (blurred(x, 1.0)[n], x[n]) if name.startswith("insertion") else (x[n], low[n])
            for step in range(6):
                image = start.flatten().clone()
                chosen = order[: round(48 * step / 5)]
                image[chosen] = end.flatten()[chosen]
                p = model(image.view(1, 1, 6, 8)).double().softmax(1)[0, target[n]]
                assert got[name][n, step].item() == pytest.approx(p.item(), abs=1e-6)


def test_the_pixel_that_decides_is_found_in_one_step():
    x = torch.zeros(1, 1, 6, 8)
    x[0, 0, 2, 3] = 1.5
    R = torch.zeros(1, 1, 6, 8)
    R[0, 0, 2, 3] = 1.0
    options = Options(steps=48, insertion="black")
    got = curves(OnePixel(), x, R, torch.tensor([1]), SPEC, options, generators(1))
    assert areas(got["insertion"], 48).item() == pytest.approx(1 - 0.5 / 48, abs=1e-6)
    assert areas(got["deletion"], 48).item() == pytest.approx(0.5 / 48, abs=1e-6)
    place = torch.randperm(48, generator=generators(1)[0])[2 * 8 + 3].item()  # of the pixel in the random order
    assert areas(got["insertion_random"], 48).item() == pytest.approx(1 - (place + 0.5) / 48, abs=1e-6)


def test_the_wrong_order_is_worse():
    x, _, target = example(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    weight = (model[1].weight[target] - model[1].weight[1 - target]).view(4, 1, 6, 8)
    options = Options(steps=12, insertion="mean", deletion="mean")
    R = weight * (x - x.mean((2, 3), keepdim=True))
    good, bad = (curves(model, x, sign * R, target, SPEC, options, generators(4)) for sign in (1, -1))
    assert (areas(good["insertion"], 48) > areas(bad["insertion"], 48)).all()
    assert (areas(good["deletion"], 48) < areas(bad["deletion"], 48)).all()


def test_batches_make_no_difference():
    x, R, target = example()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    one, many = (curves(model, x, R, target, SPEC, Options(steps=6, batch_size=b), generators(3)) for b in (1, 100))
    for name in CURVES:
        assert one[name] == pytest.approx(many[name], abs=1e-6)


def test_order_and_blur():
    R = torch.tensor([[[[1.0, 3.0], [2.0, 3.0]]]])
    assert pixel_order(R).tolist() == [[3, 0, 2, 1]]  # equal ones in reading order
    point = torch.zeros(1, 2, 21, 21)
    point[0, 1, 10, 10] = 1
    spread = blurred(point, 2.0)
    assert spread[0, 0].abs().max() == 0  # channels do not mix
    assert spread[0, 1].sum().item() == pytest.approx(1, abs=1e-5)
    assert spread[0, 1, 10, 10] == spread.max()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"samples": -1}, {"deletion": "white"}, {"sigma": 0.0}, {"batch_size": 0}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).replace("_", ".")):
        Options(**wrong)
