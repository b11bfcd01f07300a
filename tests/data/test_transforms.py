"""Images and masks move together; values stay in range; draws hang on a seed; wrong options are named."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kornia")

from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.data.transforms import OPTIONS, PRESETS, Augmentation, prepare
from fisnet_cuda.errors import InputError

GEOMETRY = ("flip", "vertical_flip", "rotate", "translate", "scale")


def smooth(n=3, size=24, seed=0):
    """Images without detail, which interpolation changes little, [n, 1, size, size] in [0, 1]."""
    return F.interpolate(torch.rand(n, 1, 5, 5, generator=torch.Generator().manual_seed(seed)), size, mode="bilinear")


def disc(size=32, radius=8, at=(16, 16)):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (((rows - at[0]) ** 2 + (columns - at[1]) ** 2) < radius**2).float().expand(4, 1, size, size).clone()


options = st.fixed_dictionaries(
    {},
    optional={
        "flip": st.sampled_from([0, 0.5, 1]),
        "vertical_flip": st.sampled_from([0, 0.5, 1]),
        "rotate": st.floats(0, 180),
        "translate": st.floats(0, 0.5),
        "scale": st.floats(0, 0.5),
    },
)
everything = st.fixed_dictionaries({key: st.floats(0, min(most, 2.0)) for key, (most, _) in OPTIONS.items()})


class TestTogether:
    @settings(max_examples=30)
    @given(options, st.integers(0, 2**40), st.sampled_from([1, 3]))
    def test_an_image_that_is_its_mask_stays_so(self, chosen, seed, channels):
        mask = smooth()
        image, moved = Augmentation("none", soft_masks=True, **chosen)(mask.expand(-1, channels, -1, -1), mask, seed)
        torch.testing.assert_close(image, moved.expand_as(image), rtol=0, atol=1e-5)

    @settings(max_examples=20)
    @given(options, st.integers(0, 2**40))
    def test_so_does_a_binary_one_but_for_its_rim(self, chosen, seed):
        mask = disc()
        image, moved = Augmentation(chosen)(mask, mask, seed)
        assert set(moved.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(moved, (image >= 0.5).float())

    @pytest.mark.parametrize("preset", ["light", "strong"])
    def test_presets_change_image_and_mask(self, preset):
        mask = disc(at=(10, 12))
        image, moved = Augmentation(preset)(mask, mask, seed=0)
        assert not torch.equal(moved, mask)
        assert not torch.equal(image, mask)
        assert not torch.equal(moved[0], moved[1])  # each sample its own draw

    def test_geometry_is_what_it_is_called(self):
        image, mask = torch.rand(2, 3, 16, 16), disc(16, 4, (4, 8))[:2]
        flipped, moved = Augmentation({"flip": 1.0})(image, mask)
        assert torch.equal(flipped, image.flip(-1))
        assert torch.equal(moved, mask.flip(-1))
        flipped, moved = Augmentation({"vertical_flip": 1.0})(image, mask)
        assert torch.equal(flipped, image.flip(-2))
        assert torch.equal(moved, mask.flip(-2))

    def test_shifts_are_no_larger_than_asked_for(self):
        def centres(mask):
            rows = torch.arange(32.0).view(1, 1, 32, 1)
            return (mask * rows).sum((1, 2, 3)) / mask.sum((1, 2, 3))

        mask, augment = disc(radius=5), Augmentation({"translate": 0.125})
        shifts = torch.cat([centres(augment(mask, mask, seed)[1]) - centres(mask) for seed in range(25)])
        assert 2.0 < shifts.abs().max() <= 4.6  # 0.125 * 32, and half a pixel of rounding

    def test_what_comes_in_is_black_and_background(self):
        image, mask = Augmentation({"translate": 0.4})(torch.ones(8, 1, 16, 16), torch.ones(8, 1, 16, 16), seed=2)
        assert (image[mask == 0] <= 0.5).all()
        assert (mask == 0).any()

    @settings(max_examples=20)
    @given(everything, st.integers(0, 2**40))
    def test_values_stay_in_range_and_no_mask_stays_none(self, chosen, seed):
        image, mask = torch.rand(3, 3, 12, 12), disc(12, 4, (6, 6))[:3]
        mask[1] = 0
        image, mask = Augmentation(chosen)(image, mask, seed)
        assert image.shape == (3, 3, 12, 12)
        assert mask.shape == (3, 1, 12, 12)
        for values in (image, mask):
            assert values.dtype == torch.float32
            assert values.isfinite().all()
            assert 0 <= values.min() <= values.max() <= 1
        assert not mask[1].any()

    def test_soft_masks_are_cut_unless_they_mean_something(self):
        mask = smooth()
        assert len(Augmentation("light", soft_masks=True)(mask, mask, 0)[1].unique()) > 10
        assert len(Augmentation("light")(mask, mask, 0)[1].unique()) == 2

    def test_intensity_leaves_the_mask_alone(self):
        image, mask = torch.rand(2, 1, 8, 8), disc(8, 3, (4, 4))[:2]
        changed, same = Augmentation({"brightness": 0.3, "contrast": 0.5, "noise": 0.1, "blur": 1.0})(image, mask, 0)
        assert torch.equal(same, mask)
        assert not torch.equal(changed, image)

    def test_brightness_and_contrast_are_what_they_are_called(self):
        grey, mask = torch.full((64, 1, 2, 2), 0.5), torch.zeros(64, 1, 2, 2)
        brighter = Augmentation({"brightness": 0.2})(grey, mask, 0)[0] - 0.5
        assert 0.15 < brighter.abs().max() <= 0.2 + 1e-6
        assert torch.allclose(Augmentation({"contrast": 0.5})(grey, mask, 0)[0], grey)  # about mid-grey
        contrast = (Augmentation({"contrast": 0.5})(grey + 0.2, mask, 0)[0] - 0.5) / 0.2
        assert 0.5 - 1e-5 <= contrast.min() < 0.6
        assert 1.4 < contrast.max() <= 1.5 + 1e-5


class TestDraws:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_the_same_seed_gives_the_same_bits(self, preset):
        image, mask, augment = torch.rand(4, 3, 20, 20), disc(20, 6, (10, 10)), Augmentation(preset)
        first = augment(image, mask, seed=5)
        torch.rand(7)
        again, other = augment(image, mask, seed=5), augment(image, mask, seed=6)
        assert all(map(torch.equal, first, again))
        assert torch.equal(first[0], other[0]) is (preset == "none")

    def test_a_seed_leaves_torchs_generator_alone(self):
        augment = Augmentation("strong")
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        augment(torch.rand(2, 1, 8, 8, generator=torch.Generator()), torch.zeros(2, 1, 8, 8), seed=5)
        assert torch.equal(torch.rand(4), expected)

    def test_without_a_seed_it_is_torchs(self):
        image, mask, augment = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16), Augmentation("strong")
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(augment(image, mask)[0])
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    @pytest.mark.parametrize("preset", PRESETS)
    def test_autocast_makes_no_difference(self, preset):
        image, mask, augment = torch.rand(2, 3, 16, 16), disc(16, 4, (8, 8))[:2], Augmentation(preset)
        expected = augment(image, mask, seed=0)
        with torch.autocast("cpu", torch.bfloat16):
            found = augment(image, mask, seed=0)
        assert found[0].dtype == found[1].dtype == torch.float32
        assert all(map(torch.equal, expected, found))

    def test_inputs_are_not_written_to(self):
        image, mask = torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
        before = image.clone(), mask.clone()
        for preset in PRESETS:
            Augmentation(preset)(image, mask, seed=0)
        assert torch.equal(image, before[0])
        assert torch.equal(mask, before[1])

    def test_an_empty_batch_stays_one(self):
        image, mask = Augmentation("strong")(torch.rand(0, 3, 8, 8), torch.rand(0, 1, 8, 8), seed=0)
        assert image.shape == (0, 3, 8, 8)
        assert mask.shape == (0, 1, 8, 8)


class TestOptions:
    def test_presets_and_what_is_over_them(self):
        assert len(Augmentation("none")) == 0
        assert Augmentation("light", flip=0.5).options == {**Augmentation("light").options, "flip": 0.5}
        assert Augmentation({"preset": "light", "rotate": 0}).options["rotate"] == 0
        assert Augmentation({"rotate": 3}).options["translate"] == 0
        assert Augmentation({"flip": True}).options["flip"] == 0.5
        assert Augmentation("light").options["flip"] == 0, "left is not right in medical images"
        assert "rotate=5" in repr(Augmentation("light"))

    @pytest.mark.parametrize(
        ("preset", "text"),
        [
            ("lihgt", "augment must be one of none, light, strong"),
            ({"preset": "heavy"}, "'heavy'"),
            ({"rotation": 5}, "'rotate'"),
            ({"rotate": 181}, "0 to 180"),
            ({"rotate": -1}, "rotate"),
            ({"scale": "big"}, "'big'"),
            ({"scale": float("nan")}, "nan"),
            ({"rotate": True}, "rotate must be a number"),
        ],
    )
    def test_wrong_ones_are_named_in_one_line(self, preset, text):
        with pytest.raises(InputError, match=text) as error:
            Augmentation(preset)
        assert "\n" not in str(error.value)

    def test_integers_are_refused(self):
        with pytest.raises(TypeError, match="uint8"):
            Augmentation("light")(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4))


class TestPrepare:
    SPEC = InputSpec((8, 8), 3, ("a", "b"), mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))

    def batch(self):
        image = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        mask = (disc(8, 3, (4, 4))[:2] * 255).byte()
        return {"image": image, "mask": mask, "label": torch.tensor([0, 1]), "name": "kept"}

    def test_normalises_and_keeps_the_rest(self):
        batch = self.batch()
        ready = prepare(batch, self.SPEC)
        torch.testing.assert_close(ready["image"], self.SPEC.normalise(batch["image"]))
        assert ready["mask"].unique().tolist() == [0, 1]
        assert ready["name"] == "kept"
        assert batch["image"].dtype == torch.uint8, "the loader's batch is left as it was"
        assert prepare(ready, self.SPEC)["image"] is ready["image"]

    def test_augments_before_it_normalises(self):
        batch, augment = self.batch(), Augmentation("strong")
        ready = prepare(batch, self.SPEC, augment, seed=1)
        image, mask = augment(batch["image"].float() / 255, batch["mask"].float() / 255, 1)
        torch.testing.assert_close(self.SPEC.denormalise(ready["image"]), image, rtol=0, atol=1e-6)
        assert torch.equal(ready["mask"], mask)
        low, high = torch.tensor(self.SPEC.low), torch.tensor(self.SPEC.high)
        assert (ready["image"].amin((0, 2, 3)) >= low - 1e-5).all(), "the bounds of the z^B rule hold"
        assert (ready["image"].amax((0, 2, 3)) <= high + 1e-5).all()
