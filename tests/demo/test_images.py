"""The digits as files: what the README tells newcomers to try the command line on."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from fisnet_cuda.demo import images

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    table = images.write_images(tmp_path_factory.mktemp("digits"), drawings=1)
    with table.open() as file:
        return table.parent, list(csv.DictReader(file))


def pixels(folder, name):
    return np.asarray(Image.open(folder / name))


def test_no_scan_is_in_two_splits(data):
    _, rows = data
    scans: dict[str, set[str]] = {}
    for r in rows:
        scans.setdefault(r["split"], set()).add(r["image"].split("/")[-1].split("_")[0])
    assert set(scans) == {"train", "val", "test"}
    assert len(scans["train"] | scans["val"] | scans["test"]) == sum(map(len, scans.values())) == 1797
    assert all({r["label"] for r in rows if r["split"] == split} == set("0123456789") for split in scans)


def test_groups_differ_in_their_squares_only(data):
    folder, rows = data
    by_group = {group: {r["image"].split("/")[-1]: r for r in rows if r["split"] == "test" and r["group"] == group}
                for group in ("biased", "unbiased", "confounded")}  # fmt: skip
    assert by_group["biased"].keys() == by_group["unbiased"].keys() == by_group["confounded"].keys()
    for name in list(by_group["biased"])[:40]:
        biased, unbiased, confounded = (by_group[group][name] for group in by_group)
        assert biased["label"] == unbiased["label"] == confounded["label"]
        a, b, c = (pixels(folder, r["image"]) for r in (biased, unbiased, confounded))
        mask = pixels(folder, unbiased["mask"]) > 0
        assert (a == b)[mask].all()
        assert (c == b)[mask].all()
        assert (a != b).sum() == (c != b).sum() == 9
        assert (a != c).any()


def test_every_file_is_there_and_masks_hold_the_digit(data):
    folder, rows = data
    assert all((folder / r[kind]).is_file() for r in rows for kind in ("image", "mask"))
    for r in rows[::500]:
        mask, image = pixels(folder, r["mask"]), pixels(folder, r["image"])
        assert set(np.unique(mask)) == {0, 255}
        assert image[mask == 255].mean() > 60


def test_the_same_seed_gives_the_same_files(tmp_path, data):
    folder, rows = data
    images.write_images(tmp_path, drawings=1)
    assert (tmp_path / "digits.csv").read_bytes() == (folder / "digits.csv").read_bytes()
    assert all((tmp_path / r["image"]).read_bytes() == (folder / r["image"]).read_bytes() for r in rows[::100])


@pytest.mark.parametrize(("arguments", "words"), [(["--drawings", "0"], "drawings must be"), (["--size", "8"], "size must be")])
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, words):
    assert images.main([str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_larger_images_keep_the_square_out_of_the_mask(tmp_path):
    images.write_images(tmp_path, drawings=1, size=64)
    with (tmp_path / "digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    for r in rows[::200]:
        assert pixels(tmp_path, r["image"]).shape == (64, 64)
        assert not pixels(tmp_path, r["mask"])[:, :10].any()
