"""Backgrounds swapped at random in a batch: who takes part, what is pasted, and what the draws hang on."""

from __future__ import annotations

import pytest
import torch

from fisnet_cuda.data.backgrounds import default_margin, dilate, mask_kinds, paste, swap_at_random, swap_backgrounds


def batch(n=12, size=16, channels=2, seed=0):
    """Image i is the number i in the foreground and i + 100 in the background; the objects' places differ."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.zeros(n, 1, size, size)
    for i in range(n):
        y, x = torch.randint(2, size - 8, (2,), generator=generator).tolist()
        M[i, :, y : y + 6, x : x + 6] = 1
    numbers = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    return torch.where(M > 0, numbers, numbers + 100).expand(n, channels, size, size).contiguous(), M


def swapped(x, M, P=1.0, seed=0, **options):
    return swap_at_random(x, M, P, generator=torch.Generator().manual_seed(seed), **options)


def givers(mixed, M):
    """Whose background each image has."""
    return [int(image[0][mask[0] == 0].unique().item()) - 100 for image, mask in zip(mixed, M)]


def test_every_object_stands_on_another_background_and_none_is_given_twice():
    x, M = batch()
    mixed, which = swapped(x, M)
    assert which.all()
    assert torch.equal(mixed[M.expand_as(x) > 0], x[M.expand_as(x) > 0])
    found = givers(mixed, M)  # one number a background: nothing of the donor's object is left, nor of its rim
    assert sorted(found) == list(range(len(x)))
    assert all(giver != i for i, giver in enumerate(found))


@pytest.mark.parametrize("seed", range(4))
def test_who_takes_and_who_gives(seed):
    x, M = batch(8)
    M[0], M[1] = 0, 0  # 0: empty, 1: none
    x[0] = 100
    M[2], M[3, :, 1:] = 1, 1  # full; full once the hole is wider
    has_mask = torch.arange(8) != 1
    assert mask_kinds(M, has_mask).tolist() == [1, 3, 2, 2, 0, 0, 0, 0]
    mixed, which = swapped(x, M, seed=seed, has_mask=has_mask)
    assert not which[:4].any()
    assert torch.equal(mixed[~which], x[~which])
    assert which[4:].all()
    found = givers(mixed[4:], M[4:])
    assert len(set(found)) == 4
    assert set(found) <= {0, 4, 5, 6, 7}
    assert all(giver != i for i, giver in enumerate(found, 4))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_batches(n):
    x, M = batch(n)
    mixed, which = swapped(x, M)
    assert which.tolist() == [n > 1] * n
    if n < 2:
        assert torch.equal(mixed, x)
    else:
        assert givers(mixed, M) == [1, 0]


def test_the_only_one_that_takes_part_stays():
    x, M = batch(4)
    mixed, which = swapped(x, M, has_mask=torch.tensor([False, False, True, False]))
    assert not which.any()
    assert torch.equal(mixed, x)


def test_probability_and_draws():
    x, M = batch(400, size=12)
    shares = {P: swapped(x, M, P)[1].double().mean().item() for P in (0.0, 0.3, 1.0)}
    assert shares == {0.0: 0.0, 0.3: pytest.approx(0.3, abs=0.07), 1.0: 1.0}
    state = torch.get_rng_state()
    first, again, other = (swapped(x, M, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    torch.manual_seed(3)
    own = swap_at_random(x, M, 0.5)[1]
    torch.manual_seed(3)
    assert torch.equal(swap_at_random(x, M, 0.5)[1], own)


def test_all_donors_are_equally_likely():
    x, M = batch(4)
    counts = torch.zeros(4, 4)
    for seed in range(200):
        for taker, giver in enumerate(givers(swapped(x, M, seed=seed)[0], M)):
            counts[taker, giver] += 1
    assert (counts.diag() == 0).all()
    assert (counts[~torch.eye(4, dtype=torch.bool)] / 200 - 1 / 3).abs().max() < 0.13


def test_soft_masks_blend():
    x, M = batch(2)
    M = M * 0.25
    x = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    mixed, _ = swapped(x, M)
    margin = default_margin(M.shape[-2:])
    holes = dilate(M.flip(0) > 0, margin).float()
    assert torch.equal(mixed, swap_backgrounds(x, M, x.flip(0), holes))
    inside = (M > 0) & (holes == 0)  # the donor as it is
    torch.testing.assert_close(mixed[inside.expand_as(x)], (0.25 * x + 0.75 * x.flip(0))[inside.expand_as(x)])


def test_paste_takes_the_backgrounds_as_they_were():
    x, M = batch(3)
    rows, donors = torch.tensor([0, 1]), torch.tensor([1, 0])
    mixed = paste(x, M, rows, donors)
    assert givers(mixed, M) == [1, 0, 2]
    assert torch.equal(mixed[rows], swap_backgrounds(x[rows], M[rows], x[donors], M[donors]))
    assert torch.equal(x, batch(3)[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 9), (20, 13)])
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 25])
def test_dilate_is_every_pixel_within_the_radius(shape, radius):
    mask = torch.rand(3, 1, *shape, generator=torch.Generator().manual_seed(0)) > 0.9
    y, x = (v.double() for v in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    near = (y[..., None, None] - y) ** 2 + (x[..., None, None] - x) ** 2 <= radius**2  # [H, W, H, W]
    assert torch.equal(dilate(mask, radius), torch.einsum("hwij,ncij->nchw", near.double(), mask.double()) > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_draws_are_those_of_the_cpu():
    x, M = batch(32)
    here, there = swapped(x, M, 0.5), swapped(x.cuda(), M.cuda(), 0.5)
    assert torch.equal(here[1], there[1].cpu())
    torch.testing.assert_close(here[0], there[0].cpu())
