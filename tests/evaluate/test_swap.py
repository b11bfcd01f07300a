"""The background swap: composites, donors, and what it says of classifiers that read only one half of the image."""

import math

import numpy as np
import pytest
import torch

from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate import BackgroundSwap, background_swap, choose_donors, fill_foreground, swap_backgrounds
from fisnet_cuda.evaluate.metrics import paired_difference
from fisnet_cuda.evaluate.swap import FULL, GAP, QUIET, USED, choose_images, default_margin, mask_kinds, plan_swap, swap_sums


def noise(n=6, channels=3, size=(13, 17), seed=0):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def blobs(n=6, size=(13, 17), seed=1):
    """Hard masks of ragged shape, none empty, none full."""
    M = (noise(n, 1, size, seed) > 0.6).float()
    M[:, :, 0, 0], M[:, :, -1, -1] = 0, 1
    return M


# ---- composites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (13, 17), (1, 5), (28, 28)])
def test_what_is_filled_lies_within_the_background_and_the_background_stays(size):
    x, M = noise(size=size), blobs(size=size)
    x = torch.where(M > 0, 50.0, x)  # an object that no mean could hide
    filled = fill_foreground(x, M)
    assert torch.equal(filled[(M == 0).expand_as(x)], x[(M == 0).expand_as(x)])
    background = torch.where(M > 0, torch.nan, x)
    for i in range(len(x)):
        for c in range(3):
            kept = background[i, c][~background[i, c].isnan()]
            assert kept.min() - 1e-6 <= filled[i, c].min()
            assert filled[i, c].max() <= kept.max() + 1e-6


def test_the_filling_does_not_know_the_object():
    x, M = noise(), blobs()
    other = torch.where(M > 0, noise(seed=5) * 9 - 4, x)
    assert torch.equal(fill_foreground(x, M), fill_foreground(other, M))


def test_the_filling_is_what_is_near():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:] = 1
    M = torch.zeros_like(x)
    M[..., 12:20, 4:8], M[..., 12:20, 24:28] = 1, 1
    filled = fill_foreground(x, M)
    assert filled[..., 12:20, 4:8].max() < 0.2
    assert filled[..., 12:20, 24:28].min() > 0.8
    M = torch.ones_like(x)
    M[..., :2], M[..., -2:] = 0, 0  # nearly all is a hole: from the one side's value to the other's
    row = fill_foreground(x, M)[0, 0, 9]
    assert (row.diff() >= 0).all()
    assert row[3] < 0.1
    assert row[16] == pytest.approx(0.5, abs=0.1)
    assert row[-4] > 0.9


def test_plain_backgrounds_are_continued_and_normalisation_commutes():
    M = blobs()
    x = torch.where(M > 0, noise(), torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1))
    torch.testing.assert_close(fill_foreground(x, M), torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1).expand_as(x))
    spec = InputSpec((13, 17), 3, ("a", "b"), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.1))
    x, donors = noise(), noise(seed=3)
    apart = swap_backgrounds(spec.normalise(x), M, spec.normalise(donors), blobs(seed=4))
    torch.testing.assert_close(apart, spec.normalise(swap_backgrounds(x, M, donors, blobs(seed=4))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_foreground_and_dtype_are_kept_exactly(dtype):
    x, donors = noise().to(dtype), noise(seed=3).to(dtype)
    M, donors_M = blobs(), blobs(seed=4)
    swapped = swap_backgrounds(x, M, donors, donors_M)
    assert swapped.dtype == dtype
    assert torch.equal(swapped[(M == 1).expand_as(x)], x[(M == 1).expand_as(x)])
    free = ((M == 0) & (donors_M == 0)).expand_as(x)
    assert torch.equal(swapped[free], donors[free])
    assert torch.equal(swap_backgrounds(x, M, x, M), x)  # its own background is no other


def test_soft_masks_blend_and_are_holes_wherever_they_are_above_0():
    x, donors = noise(1), torch.full((1, 3, 13, 17), 0.5)
    M = torch.full((1, 1, 13, 17), 0.25)
    torch.testing.assert_close(swap_backgrounds(x, M, donors, torch.zeros_like(M)), 0.25 * x + 0.375)
    soft = torch.zeros(1, 1, 13, 17)
    soft[..., 4:9, 4:9] = 0.1
    donors[..., 4:9, 4:9] = 99.0  # seen at 90 % if the mask were taken by its value
    torch.testing.assert_close(fill_foreground(donors, soft), torch.full_like(donors, 0.5))


def test_an_image_without_background_is_zero_and_finite():
    x = noise(1)
    assert torch.equal(fill_foreground(x, torch.ones(1, 1, 13, 17)), torch.zeros_like(x))


def test_shapes_and_dtypes_are_refused():
    x, M = noise(), blobs()
    with pytest.raises(InputError, match="masks"):
        fill_foreground(x, M[:, 0])
    with pytest.raises(InputError, match="floating point"):
        fill_foreground((x * 255).byte(), M)
    with pytest.raises(InputError, match="donors_x"):
        swap_backgrounds(x, M, x[:3], M[:3])


# ---- donors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_donors_are_others_of_the_right_class(seed):
    rng = np.random.default_rng(seed)
    labels, usable = torch.as_tensor(rng.integers(0, 7, 60)), torch.as_tensor(rng.random(60) > 0.2)
    labels[0], usable[0] = 9, True  # alone in its class
    same, other = choose_donors(labels, usable, seed)
    places = torch.arange(60)
    has = same >= 0
    assert not has[0]
    assert not (has & ~usable).any()
    assert not (other[~usable] >= 0).any()
    assert (same[has] != places[has]).all()
    assert (labels[same[has]] == labels[has]).all()
    assert usable[same[has]].all()
    assert len(same[has].unique()) == int(has.sum())  # everybody gives once
    assert (other[usable] >= 0).all()
    assert (labels[other[usable]] != labels[usable]).all()
    assert usable[other[usable]].all()
    again = choose_donors(labels, usable, seed)
    assert torch.equal(again[0], same)
    assert torch.equal(again[1], other)
    assert not torch.equal(choose_donors(labels, usable, seed + 1)[1], other)


def test_other_classes_are_equally_likely_however_large():
    labels = torch.tensor([0] * 3000 + [1] * 10 + [2] * 990)
    _, other = choose_donors(labels, torch.ones(4000, dtype=torch.bool))
    assert float((labels[other[:3000]] == 1).double().mean()) == pytest.approx(0.5, abs=0.04)


def test_one_class_has_no_other():
    same, other = choose_donors(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool))
    assert (same >= 0).all()
    assert (other == -1).all()


def test_images_are_drawn_in_pairs():
    labels, usable = torch.arange(3000) % 1000, torch.arange(3000) != 5
    drawn = choose_images(labels, usable, 512, seed=1)
    assert 511 <= len(drawn) <= 512
    assert 5 not in drawn
    assert (labels[drawn].bincount() != 1).all()
    assert torch.equal(drawn, choose_images(labels, usable, 512, seed=1))
    assert not torch.equal(drawn, choose_images(labels, usable, 512, seed=2))
    assert choose_images(labels, usable, 9999).tolist() == usable.nonzero()[:, 0].tolist()


# ---- what it says --------------------------------------------------------------------------------------------------------


def marked(n=120, classes=4, size=16, seed=0):
    """Noise with the class's bright column in the background and its bright row in the foreground."""
    x = noise(n, 1, (size, size), seed) * 0.2
    labels = torch.arange(n) % classes
    M = torch.zeros(n, 1, size, size)
    M[:, :, 4:12, 6:13] = 1
    x[torch.arange(n), 0, 15, labels] = 1
    x[torch.arange(n), 0, 5 + labels, 9] = 1
    return x, M, labels


def reads_background(x):
    return 20 * x[:, 0, 15, :4]


def reads_foreground(x):
    return 20 * x[:, 0, 5:9, 9]


def test_a_classifier_that_reads_only_the_background_follows_it():
    result = background_swap(reads_background, *marked())
    assert (result.n, result.plain.value, result.same.value, result.other.value) == (120, 1, 1, 0)
    assert (result.gap.value, result.follows.value, result.chance) == (1, 1, 0)
    assert result.shift > 0.99
    assert result.gap.low > 0.9  # though all images agree
    assert result.warns
    assert "the classifier uses the background" in result.says()
    assert "100 % of the answers follow" in result.says()


def test_a_classifier_that_reads_only_the_foreground_is_not_moved():
    result = background_swap(reads_foreground, *marked())
    assert (result.plain.value, result.same.value, result.other.value, result.gap.value) == (1, 1, 1, 0)
    assert (result.follows.value, result.shift) == (0, 0)
    assert not result.warns
    assert result.says().startswith("accuracy holds: 100 % with another image's background of the same class, 100 %")


def test_a_classifier_that_knows_the_outline_of_the_donors_object_is_not_taken_in():
    # the object is a wide or a tall box on a textured background: holes are smooth, and their outline could be read
    n, size = 80, 24
    x, labels, M = noise(n, 1, (size, size)), torch.arange(n) % 2, torch.zeros(n, 1, size, size)
    M[labels == 0, :, 8:16, 3:21] = 1
    M[labels == 1, :, 3:21, 8:16] = 1
    x[(M > 0)] = 0.5

    def reads_smoothness(x):
        rough = (x[:, 0] - torch.nn.functional.avg_pool2d(x, 3, 1, 1)[:, 0]).abs()
        wide, tall = rough[:, 10:14, 3:6].mean((1, 2)), rough[:, 3:6, 10:14].mean((1, 2))
        return torch.stack([-wide, -tall], 1) * 20

    def accuracy(donors):
        return float((reads_smoothness(swap_backgrounds(x, M, x[donors], M[donors])).argmax(1) == labels).double().mean())

    same, other = choose_donors(labels, torch.ones(n, dtype=torch.bool))
    assert accuracy(same) - accuracy(other) > 0.5  # each donor with its own hole
    result = background_swap(reads_smoothness, x, M, labels)
    assert result.plain.value == 1
    assert abs(result.gap.value) <= 0.05  # both donors with both


def test_batches_seeds_and_known_logits():
    x, M, labels = marked()

    def half(x):
        return reads_background(x) * 0.5 + reads_foreground(x) * 0.5

    whole = background_swap(half, x, M, labels)
    for other in (
        background_swap(half, x, M, labels, batch_size=7),
        background_swap(half, x, M, labels, logits=half(x), device="cpu"),
        background_swap(half, x, M.bool(), labels),
    ):
        close = {"shift": pytest.approx(whole.shift), "share_of_image_swapped": pytest.approx(whole.shown)}
        assert other.to_dict() == whole.to_dict() | close
    plan = plan_swap(labels, mask_kinds(M))
    parts = sum(swap_sums(half, lambda at: (x[at], M[at]), plan, part=slice(rank, None, 3)) for rank in range(3))
    assert BackgroundSwap.of(parts, plan.guessing).gap == whole.gap
    state = torch.get_rng_state()
    background_swap(half, x, M, labels, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_who_is_left_out_is_counted():
    x, M, labels = marked(40)
    M[0], M[1], M[2:4] = 0, 1, 0
    labels[4], labels[5] = -1, 4
    has = torch.ones(40, dtype=torch.bool)
    has[2:4] = False
    seen = []

    def predict(x):
        seen.append(x)
        return torch.nn.functional.pad(reads_background(x), (0, 1))

    result = background_swap(predict, x, M, labels, has_mask=has)
    assert result.left_out == {
        "without a mask": 2, "whose mask has no foreground": 1, "whose mask has no background": 1, "without a label": 1,
        "alone in their class": 1,
    }  # fmt: skip
    assert result.n == 34
    nearly = torch.ones(1, 1, 16, 16)
    nearly[..., 0, 0] = 0  # gone once the hole is wider
    assert mask_kinds(nearly).tolist() == [FULL]
    assert mask_kinds(nearly, margin=0).tolist() == [USED]
    assert [default_margin((s, s)) for s in (28, 112, 224)] == [1, 1, 2]


@pytest.mark.parametrize("n", [0, 6])
def test_nothing_to_test(n):
    x, M, labels = marked(n)
    result = background_swap(reads_background, x, M, torch.zeros_like(labels))
    assert result.n == 0
    assert math.isnan(result.gap.value)
    assert not result.warns
    assert "nothing could be tested" in result.says()
    assert ("6 images without an image of another class" in result.says()) == (n == 6)


def of(n, same, other, plain=None, follows=0):
    return BackgroundSwap.of([n, same if plain is None else plain, same, other, other, follows, 0, 1, 1], guessing=0.1)


def test_the_heatmap_is_crossed_with_it():
    leaks = of(500, 490, 300, follows=150)
    assert leaks.warns
    quiet = leaks.says(share=0.001, variant="selective")
    assert "The heatmap is quiet (0.1 % of its relevance in the background) but the classifier is not clean" in quiet
    assert "--preset steady" in quiet
    assert "variant (stochastic, contrast, original)" in quiet
    assert "variant (contrast, original)" in leaks.says(share=0.001, variant="stochastic")
    assert "shows it, too (60 %" in leaks.says(share=0.6, variant="dual")
    assert "quiet" not in leaks.says(share=QUIET, variant="dual")
    assert "--variant stochastic" in leaks.says(share=0.001, variant="standard")
    assert "quiet" not in of(500, 490, 489).says(share=0.001)


def test_who_was_trained_on_swaps_is_told_so():
    clean, leaks = of(500, 490, 489), of(500, 490, 300, follows=150)
    assert clean.says(trained=True).endswith("Backgrounds were swapped in training, too: this is no independent witness.")
    assert "witness" not in clean.says()
    for variant, share in (("standard", 0.001), ("dual", 0.001), ("dual", 0.6)):
        assert "swap backgrounds in training (--data.swap_background 0.5)" in leaks.says(share, variant)
        assert "swap_background" not in leaks.says(share, variant, trained=True)
        assert "witness" not in leaks.says(share, variant, trained=True), "a gap in spite of that is no less of a gap"


def test_few_images_warn_of_nothing():
    few = of(20, 18, 16)
    assert few.gap.value > GAP
    assert not few.warns
    assert "not decided, too few images (20)" in few.says()
    assert "not decided, too few images (20)" in of(20, 20, 20).says()  # none fell, but up to 16 points are not ruled out
    assert "accuracy holds" in of(40, 40, 40).says()
    assert "nothing that could fall" in of(100, 11, 8).says()
    assert "Pasting alone costs 40 points" in of(100, 55, 54, plain=95).says()


def test_paired_interval_holds_what_it_promises():
    """95 % of all test sets, for correlated answers near the edge, where Wald's interval fails."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        both, first, second, _ = rng.multinomial(60, [0.93, 0.05, 0.005, 0.015])
        e = paired_difference(int(both), int(first), int(second), 60)
        held += e.low <= 0.045 <= e.high
    assert 0.93 <= held / 2000 <= 0.995
    e, turned = paired_difference(40, 9, 2, 60), paired_difference(40, 2, 9, 60)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-e.value, -e.high, -e.low))
    assert math.isnan(paired_difference(0, 0, 0, 0).value)
