"""Background share and pointing game against loops over pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisnet_cuda.evaluate.attention import background_share, dilate, pointing_game


def maps(seed, n=3, channels=2, height=7, width=9, soft=False):
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(n, channels, height, width, generator=generator)
    M = torch.rand(n, 1, height, width, generator=generator)
    return R, M if soft else (M > 0.7).float()


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30)
def test_background_share_is_its_definition(seed, soft):
    R, M = maps(seed, soft=soft)
    got = background_share(R, M)
    for n in range(len(R)):
        outside = total = 0.0
        for c in range(R.shape[1]):
            for y in range(R.shape[2]):
                for x in range(R.shape[3]):
                    outside += abs(R[n, c, y, x].item()) * (1 - M[n, 0, y, x].item())
                    total += abs(R[n, c, y, x].item())
        assert got[n].item() == pytest.approx(outside / total, abs=1e-6)
    assert background_share(-3 * R, M) == pytest.approx(got)
    assert got + background_share(R, 1 - M) == pytest.approx(torch.ones(len(R), dtype=torch.float64))


def test_a_heatmap_of_zeros_has_no_share_and_no_point():
    R, M = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert background_share(R, M).isnan().all()
    pointing = pointing_game(R, M)
    assert not pointing.hit.any()
    assert not pointing.positive.any()


@given(st.integers(0, 10**6), st.integers(0, 4))
@settings(max_examples=30)
def test_pointing_game_is_its_definition(seed, tolerance):
    R, M = maps(seed)
    R = torch.nn.functional.one_hot(R.sum(1).flatten(1).argmax(1), 63).view(3, 1, 7, 9) * 2.0 - 1  # one positive pixel
    got = pointing_game(R, M, tolerance)
    for n in range(3):
        y, x = divmod(int(R[n, 0].flatten().argmax()), 9)
        inside = [(i, j) for i in range(7) for j in range(9) if M[n, 0, i, j] >= 0.5]
        near = lambda a, b, inside=inside: any(math.dist((a, b), p) <= tolerance for p in inside)  # noqa: E731
        assert got.hit[n].item() == near(y, x)
        assert got.chance[n].item() == pytest.approx(sum(near(i, j) for i in range(7) for j in range(9)) / 63)


def test_relevance_against_the_class_is_not_pointed_at():
    R = torch.tensor([[[[5.0, 1.0, -50.0]], [[-9.0, 0.0, 1.0]]]])  # sums over channels: -4, 1, -49
    assert pointing_game(R, torch.tensor([[[[0.0, 1.0, 0.0]]]])).hit.item()
    assert not pointing_game(R, torch.tensor([[[[1.0, 0.0, 1.0]]]])).hit.item()


def test_dilation_is_a_disc():
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[0, 0, 4, 4] = True
    for radius in (1, 2, 3, 4):
        y, x = torch.meshgrid(torch.arange(9) - 4, torch.arange(9) - 4, indexing="ij")
        assert (dilate(mask, radius)[0, 0] == (y**2 + x**2 <= radius**2)).all()
