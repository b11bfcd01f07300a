"""A bias put into any image folder: it stands in the background, tells what it should, and the experiment runs from end to end."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from benchmarks.experiments import image_folder, scenes
from benchmarks.experiments.image_folder import CELLS, biased, load, mark_patterns, put_backgrounds, put_marks
from benchmarks.experiments.jobs import read_rows
from benchmarks.experiments.tasks import Images
from fisnet_cuda.demo import images as demo_images
from fisnet_cuda.demo.digits import Originals, load_originals
from fisnet_cuda.demo.images import write_images
from fisnet_cuda.errors import InputError


def grey(n: int = 6, channels: int = 1, size: int = 48) -> Images:
    masks = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    masks[:, :, 12:36, 12:36] = 255
    return Images(torch.full((n, channels, size, size), 100, dtype=torch.uint8), torch.arange(n) % 3, masks)


@pytest.mark.parametrize("channels", [1, 3])
def test_marks_of_classes_differ_in_a_quarter_of_their_cells(channels):
    patterns = mark_patterns(100, channels).flatten(1)
    apart = torch.cdist(patterns, patterns, p=1) + 99 * torch.eye(100)
    assert apart.min() >= channels * CELLS * CELLS / 4


def test_a_mark_stands_whole_in_the_background_where_there_is_room():
    images = grey()
    marked, room = put_marks(images, images.labels, 3, seed=0)
    assert (room == 1).all()
    changed = marked.images != images.images
    assert not changed[images.masks > 0].any()
    assert (changed.sum((1, 2, 3)) == 8 * 8).all()  # 48 / 6, and neither 0 nor 255 is 100
    for one, label in zip(marked.images, images.labels):
        y, x = (int(i.min()) for i in torch.nonzero(one[0] != 100, as_tuple=True))
        cells = one[:, y : y + 8 : 2, x : x + 8 : 2] / 255
        assert torch.equal(cells, mark_patterns(3, 1)[label])
    assert torch.equal(put_marks(images, torch.full((6,), -1), 3, seed=0)[0].images, images.images)


def test_without_room_the_foreground_stays_as_it_is():
    images = grey()
    images.masks[:, :, :, :46] = 255  # two columns of background
    marked, room = put_marks(images, images.labels, 3, seed=0)
    assert torch.allclose(room, torch.tensor(2 / 8))
    assert torch.equal(marked.images[..., :46], images.images[..., :46])
    assert (marked.images[..., 46:] != 100).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_backgrounds_are_swapped_around_the_foreground(channels):
    images = grey(channels=channels)
    swapped = put_backgrounds(images, images.labels, seed=0)
    inside = (images.masks > 0).expand_as(images.images)
    assert (swapped.images[inside] == 100).all()
    assert swapped.images[~inside].float().std() > 5


@pytest.mark.parametrize("kind", ["mark", "background"])
def test_the_three_sets_differ(kind):
    images = grey()
    found = {bias: biased(images, 3, kind, bias, 0)[0].images for bias in ("biased", "unbiased", "confounded")}
    assert all((found[a] != found[b]).flatten(1).any(1).all() for a, b in (("biased", "unbiased"), ("biased", "confounded")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scenes.write_folder(tmp_path_factory.mktemp("data") / "scenes", classes=3, images=12, size=32)


@pytest.mark.parametrize("kind", ["mark", "background"])
def test_quick_run_of_a_folder_with_masks_by_path(folder, tmp_path, kind):
    arguments = ["--path", str(folder / "images"), "--masks", str(folder / "masks"), "--name", "scenes", "--bias", kind, "--size", "32"]
    assert image_folder.main([*arguments, "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / f"image_folder-scenes-{kind}-quick.csv")
    assert [row["system"] for row in rows] == list(image_folder.DEFAULT)
    assert all(row["steps_done"] == 3 and 0 <= row["accuracy_confounded"] <= 100 for row in rows)
    page = (tmp_path / f"image_folder-scenes-{kind}-quick.md").read_text()
    assert "3 classes; images: 24 train, 6 val, 6 test; 3x32x32." in page
    other = "" if kind == "mark" else " --bias background"
    assert f"image_folder --path images --masks masks --name scenes{other} --size 32 --quick --seeds 1`" in page
    assert str(folder.parent) not in page + (tmp_path / f"image_folder-scenes-{kind}-quick.csv").read_text()
    assert (tmp_path / f"image_folder-scenes-{kind}-quick.png").stat().st_size > 10_000


def test_the_demos_digits(tmp_path, monkeypatch):
    """A CSV table with test groups: each test image counts once, without the demo's own square."""

    def few(seed):
        return tuple(Originals(o.pixels[::6], o.labels[::6], o.index[::6]) for o in load_originals(seed))

    monkeypatch.setattr(demo_images, "load_originals", few)
    table = write_images(tmp_path / "digits", drawings=1)
    task = load(str(table), None, 32, 1, "background", 50)
    assert task.classes == 10
    assert len(task.train) == 50
    assert task.train.images.shape[1:] == (1, 32, 32)
    assert list(task.tests) == ["biased", "unbiased", "confounded"]
    assert {len(images) for images in task.tests.values()} == {min(50, len(few(0)[1]))}


def test_what_is_wrong_is_told_in_a_line(folder, tmp_path, capsys):
    assert image_folder.main(["--path", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image_folder: ")
    assert "nothing" in line
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="no image with a mask"):
        load(str(folder / "images"), str(tmp_path / "masks"), 32, 3, "mark", 50)
