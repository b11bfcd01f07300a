"""The chest X-ray experiment: who is trained on and tested on, what is done to the images, and the command from end to end."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from benchmarks.experiments import chest_xray as xray
from benchmarks.experiments.jobs import read_rows
from benchmarks.experiments.tasks import batches
from fisnet_cuda.errors import InputError
from tests import real_data

COUNTS = {("shenzhen", 0): 24, ("shenzhen", 1): 10, ("montgomery", 0): 9, ("montgomery", 1): 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two bright lungs on noise, so that every image is known again; Montgomery has black borders."""
    root = tmp_path_factory.mktemp("cxr")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    random, rows = np.random.default_rng(0), []
    for (site, label), count in COUNTS.items():
        for i in range(count):
            name = f"{site}_{label}_{i}.png"
            x, m = random.integers(90, 140, (96, 96)).astype(np.uint8), np.zeros((96, 96), bool)
            m[20:76, 16:40] = m[20:76, 56:80] = True
            x[m] += 60 if label else 20
            if site == "montgomery":
                x[:, :10] = x[:, -10:] = 0
            Image.fromarray(x).save(root / "images" / name)
            Image.fromarray(m).save(root / "masks" / name)
            rows.append((name, site, label))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "site", "label"), *rows])
    return root


def groups_of(folder: Path) -> tuple[tuple[str, int], ...]:
    return xray.read_folder(str(folder), 32)[1]


class TestReading:
    def test_sizes_dtypes_and_groups(self, folder):
        images, groups = xray.read_folder(str(folder), 32)
        assert images.images.shape == (51, 1, 32, 32)
        assert images.images.dtype == images.masks.dtype == torch.uint8
        assert set(images.masks.unique().tolist()) == {0, 255}
        assert {group: groups.count(group) for group in COUNTS} == COUNTS
        assert images.labels.tolist() == [label for _, label in groups]

    def test_a_mask_pixel_is_lung_where_half_of_its_area_is(self, folder):
        # rows 20 to 75 of 96 in cells of 3: cell 6, rows 18 to 20, is lung by a third
        mask = xray.read_folder(str(folder), 32)[0].masks[0, 0]
        assert (mask[6, 8], mask[7, 8]) == (0, 255)

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda root: (root / "labels.csv").unlink(), "cannot read labels.csv"),
            (lambda root: (root / "masks" / "shenzhen_0_3.png").unlink(), "shenzhen_0_3.png: cannot be read"),
            (lambda root: (root / "labels.csv").write_text("file,site,label\na.png,berlin,0\n"), "line 2"),
            (lambda root: (root / "labels.csv").write_text("file,site,label\n"), "0 images of site shenzhen, label 0"),
        ],
    )
    def test_what_is_wrong_is_told_in_one_line(self, folder, tmp_path, spoil, says):
        root = Path(shutil.copytree(folder, tmp_path / "copy"))
        spoil(root)
        with pytest.raises(InputError, match=says) as error:
            xray.read_folder(str(root), 32)
        assert "\n" not in str(error.value)


class TestEqualise:
    def test_any_monotonic_change_of_grey_is_gone(self):
        x = torch.randint(0, 100, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(xray.equalise(x), xray.equalise(2 * x + 17))

    def test_ranks_are_even(self):
        x = torch.randperm(256, generator=torch.Generator().manual_seed(0)).byte().view(1, 1, 16, 16)
        assert xray.equalise(x).float().mean().item() == pytest.approx(128, abs=1)


class TestSplit:
    @pytest.mark.parametrize("seed", [0, 7])
    def test_no_image_is_in_two_sets(self, folder, seed):
        groups = groups_of(folder)
        parts = xray.split(groups, seed)
        everything = torch.cat([part for group in parts.values() for part in group])
        assert sorted(everything.tolist()) == list(range(len(groups)))
        for group, own in parts.items():
            assert {groups[i] for part in own for i in part.tolist()} == {group}

    def test_sizes(self, folder):
        train, val, test = xray.split(groups_of(folder), 0)["shenzhen", 0]
        assert (len(train), len(val), len(test)) == (14, 4, 6)

    def test_it_hangs_on_the_seed(self, folder):
        groups = groups_of(folder)
        first, again, other = (xray.split(groups, seed)["shenzhen", 0][2].sort().values for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def members(images, found) -> list[int]:
    """Which of all images they are."""
    keys = {bytes(x.numpy().tobytes()): i for i, x in enumerate(found)}
    return [keys[bytes(x.numpy().tobytes())] for x in images.images]


class TestTask:
    @pytest.mark.parametrize("seed", [0, 3])
    def test_the_pairing_is_swapped_and_nothing_is_seen_twice(self, folder, seed):
        groups, task = groups_of(folder), xray.load(str(folder), seed, size=32)
        pixels = xray.equalise(xray.read_folder(str(folder), 32)[0].images)
        sets = {"train": task.train, "val": task.val, **task.tests}
        found = {name: members(images, pixels) for name, images in sets.items()}
        for name in ("train", "val", "same"):
            assert {groups[i] for i in found[name]} == set(xray.TRAINED)
        assert {groups[i] for i in found["swapped"]} == set(xray.SWAPPED)
        assert len(found["swapped"]) == COUNTS["shenzhen", 1] + COUNTS["montgomery", 0]
        for a, b in itertools.combinations(found.values(), 2):
            assert not set(a) & set(b)
        for name, images in sets.items():
            assert images.labels.tolist() == [groups[i][1] for i in found[name]]

    def test_an_epoch_is_balanced_and_holds_every_image(self, folder):
        task = xray.load(str(folder), 0, size=32)
        assert task.train.labels.bincount().tolist() == [14, 14]
        assert len({x.numpy().tobytes() for x in task.train.images}) == 14 + 5  # of Montgomery's 8: 2 to test on, 1 to validate
        source = batches(task, 28, seed=0)
        assert next(source).labels.bincount().tolist() == [14, 14]

    def test_the_fair_control_trains_on_all_four_groups(self, folder):
        task = xray.load(str(folder), 0, "fair", 32)
        assert task.train.labels.bincount().tolist() == [28, 28]
        assert len(task.tests["swapped"]) == 2 + 2  # a quarter of 10 and of 9
        train = {x.numpy().tobytes() for x in task.train.images}
        assert not any(x.numpy().tobytes() in train for images in task.tests.values() for x in images.images)

    def test_controls_see_only_their_part(self, folder):
        background = xray.load(str(folder), 0, "background", 32).tests["swapped"]
        assert (background.images[background.masks > 0] == 0).all()
        assert (background.images[background.masks == 0] > 0).any()
        outline = xray.load(str(folder), 0, "outline", 32).tests["swapped"]
        assert torch.equal(outline.images, outline.masks)
        with pytest.raises(ValueError, match="view"):
            xray.load(str(folder), 0, "lung", 32)


class TestAugment:
    def test_image_and_mask_move_together(self):
        masks = torch.zeros(16, 1, 32, 32)
        masks[:, :, 10:22, 6:16] = 1
        images, moved = xray.augment(masks.clone(), masks, torch.Generator().manual_seed(0))
        middle = (images.amax((2, 3), keepdim=True) + images.amin((2, 3), keepdim=True)) / 2
        assert ((images > middle) == (moved > 0)).float().mean() > 0.98  # gamma moves the edge by less than a pixel
        assert (moved != masks).flatten(1).any(1).all()

    def test_values(self):
        generator = torch.Generator().manual_seed(0)
        images, masks = xray.augment(torch.rand(8, 1, 20, 20), (torch.rand(8, 1, 20, 20) > 0.5).float(), generator)
        assert 0 <= images.min() < images.max() <= 1
        assert set(masks.unique().tolist()) <= {0.0, 1.0}

    def test_it_hangs_on_the_generator_alone(self):
        x = torch.rand(4, 1, 16, 16)
        a, b, c = (xray.augment(x, x.round(), torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_balanced_accuracy_by_hand():
    logits = torch.tensor([[2.0, 1], [1, 2], [2, 1], [2, 1], [0, 1]])
    assert xray.balanced_accuracy(logits, torch.tensor([0, 0, 0, 0, 1])) == pytest.approx(50 * (3 / 4 + 1))


class TestCommand:
    def test_quick_from_end_to_end(self, folder, tmp_path, capsys):
        arguments = ["--data", str(folder), "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
        assert xray.main([*arguments, "--systems", "standard", "stochastic", "masked"]) == 0
        path = tmp_path / "chest_xray-quick.csv"
        rows = read_rows(path)
        assert [(row["system"], row["view"]) for row in rows] == [
            ("standard", "shortcut"), ("stochastic", "shortcut"), ("masked", "shortcut"),
            *(("standard", view) for view in ("background", "outline", "fair")),
        ]  # fmt: skip
        for row in rows:
            for column in ("auroc_same", "auroc_swapped", "auroc_within", "balanced_same", "balanced_swapped", "share"):
                assert 0 <= row[column] <= 100
        before = path.read_bytes()
        assert path.with_suffix(".png").stat().st_size > 1000
        assert xray.main([*arguments, "--draw"]) == 0
        assert path.read_bytes() == before
        assert "Stochastic ISNet" in capsys.readouterr().out

    def test_every_system_has_a_row_for_every_seed(self):
        run = xray.Run("small", 2, Path("."), "cpu", 1, 1, False)
        rows = xray.jobs(run)
        assert {row["system"] for row in rows} == set(xray.NAMES)
        assert [row["seed"] for row in rows] == sorted([0, 1] * (len(rows) // 2))

    def test_a_size_of_its_own_has_files_of_its_own(self, folder, tmp_path, capsys):
        arguments = ["--data", str(folder), "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path), "--size", "16"]
        assert xray.main([*arguments, "--systems", "masked"]) == 0
        assert [row["size"] for row in read_rows(tmp_path / "chest_xray-16-quick.csv")] == [16]

    def test_wrong_data_are_told_before_anything_runs(self, tmp_path, capsys):
        assert xray.main(["--data", str(tmp_path), "--quick", "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("chest_xray: --data")
        assert "labels.csv" in line


def test_the_real_images():
    groups = xray.read_folder(str(real_data.cxr_tb()), 32)[1]
    assert [groups.count(group) for group in (*xray.TRAINED, *xray.SWAPPED)] == [279, 58, 287, 80]
    task = xray.load(str(real_data.cxr_tb()), 0, size=32)
    # mean brightness names the hospital before, not after
    assert len(task.tests["swapped"]) == 367
    assert task.train.images.float().mean((1, 2, 3)).std() < 3
