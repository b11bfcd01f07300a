"""The report: each thing that is wrong with a data set is counted and named, and nothing else is."""

import json
import shutil

import numpy as np
import pytest
from data import make
from real_data import cxr_tb

import fisnet_cuda as fc
from fisnet_cuda.data.images import read_sample
from fisnet_cuda.data.report import DataReport
from fisnet_cuda.data.sources import list_samples
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.data.split import split
from fisnet_cuda.files import write_json


def report_of(listing, splits=None, keep_groups=False, **options):
    spec = InputSpec((32, 32), 1, listing.classes)
    facts = [read_sample(sample, spec, **options).facts for sample in listing.samples]
    return DataReport.make(listing, split(listing) if splits is None else splits, facts, keep_groups=keep_groups)


def problem(report, word):
    """The one problem with this word in it."""
    found = [text for text in report.problems() if word in text]
    assert len(found) == 1, (word, report.problems())
    return found[0]


def test_nothing_wrong(tmp_path):
    report = report_of(list_samples(make.folder(tmp_path)))
    assert report.problems() == []
    assert report.counts == {"train": {"disc": 8, "square": 8}, "val": {"disc": 2, "square": 2}, "test": {"disc": 2, "square": 2}}
    assert (report.images, report.pairs, report.mask_kinds, report.sizes, report.modes) == (
        24,
        24,
        {"binary": 24},
        {(32, 32): 24},
        {"L": 24},
    )
    assert report.foreground[0] < report.foreground[1] < report.foreground[2] < 0.3
    assert report.mask_report == fc.check_masks([np.array(m) for m in make.arrays()[1] > 0])
    assert "nothing wrong" in str(report)


def test_copies(tmp_path):
    make.folder(tmp_path)
    images = tmp_path / "images"
    shutil.copy(images / "disc/000.png", images / "disc/copy.png")  # leaks
    shutil.copy(images / "disc/002.png", images / "square/copy.png")  # the other class
    shutil.copy(images / "disc/004.png", images / "disc/again.png")
    listing = list_samples(tmp_path)
    names = [s.name for s in listing.samples]
    splits = ["train"] * len(names)
    splits[names.index("images/disc/copy.png")] = "test"
    splits[names.index("images/square/copy.png")] = "ood"
    splits[names.index("images/square/001.png")] = "val"
    report = report_of(listing, splits)
    assert sorted(report.leaks) == [
        (("train", "images/disc/000.png"), ("test", "images/disc/copy.png")),
        (("train", "images/disc/002.png"), ("ood", "images/square/copy.png")),
    ]
    assert "2 images are in more than one split (train and test: 1, train and ood: 1): images/disc/000.png (train) = " in problem(
        report, "LEAK"
    )
    assert report.repeats == (("images/disc/004.png", "images/disc/again.png"),)
    assert "1 image repeats another one" in problem(report, "repeats")
    assert report.contradictions == ((("disc", "images/disc/002.png"), ("square", "images/square/copy.png")),)
    assert "1 image has a copy of another class" in problem(report, "another class")
    assert "without a mask" in problem(report, "3 images are")
    assert report.problems()[0].startswith("LEAK")


def test_images_in_no_split_leak_nowhere(tmp_path):
    make.folder(tmp_path)
    shutil.copy(tmp_path / "images/disc/000.png", tmp_path / "images/disc/copy.png")
    listing = list_samples(tmp_path)
    splits = ["" if s.name.endswith("copy.png") else "train" for s in listing.samples]
    assert report_of(listing, splits).leaks == ()


def test_bad_masks(tmp_path):
    make.folder(tmp_path)
    masks = tmp_path / "masks/disc"
    hole = np.full((32, 32), 255, np.uint8)
    hole[8:24, 8:24] = 0
    speck = np.zeros((320, 320), np.uint8)
    speck[100, 100] = 255
    make.save(masks / "000.png", 0 * hole), make.save(masks / "002.png", 0 * hole + 255), make.save(masks / "004.png", hole)
    make.save(masks / "006.png", speck), make.save(masks / "008.png", np.kron(hole, np.ones((2, 1), np.uint8)))
    make.save(masks / "010.png", np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    make.save(masks / "012.png", (255 - hole) // 255 * np.uint8(2) + np.tri(32, dtype=np.uint8))
    make.save(masks / "stray.png", hole)
    (masks / "014.png").unlink()
    report = report_of(list_samples(tmp_path))
    names = {"empty": "000", "full": "002", "lost": "006", "other": "008"}
    assert {state: list(report.bad_masks[state]) for state in names} == {state: [f"images/disc/{n}.png"] for state, n in names.items()}
    assert report.bad_masks["inverted"] == ("images/disc/004.png", "images/disc/008.png")
    assert (report.mask_report.empty, report.mask_report.full, report.mask_report.inverted, report.mask_report.without) == (1, 1, 2, 1)
    assert (report.pairs, report.scaled_masks) == (23, 1)
    assert "1 of 23 masks is empty (nothing is foreground): images/disc/000.png" in problem(report, "nothing is foreground")
    assert "2 of 23 masks are apparently inverted" in problem(report, "inverted")
    assert "1 of 23 masks is of another shape" in problem(report, "shape")
    for word in (
        "without background",
        "empty after resizing",
        "grey levels",
        "labels or colours",
        "is without a mask",
        "mask is without",
    ):
        problem(report, word)
    assert "stray.png" in problem(report, "without an image")
    assert report.foreground[0] == 0
    assert report.foreground[2] == 1


def test_classes_and_labels(tmp_path):
    path = make.table(tmp_path, 48, classes=3, splits=True, mask=False)
    lines = path.read_text().splitlines()
    (tmp_path / "data.csv").write_text("\n".join([lines[0], *(line.replace("cross,test", "cross,val") for line in lines[1:])]))
    assert "test has no image of cross" in problem(report_of(list_samples(path)), "no image of")
    lines = [line.replace("disc", "Square", 1) for line in lines[:3]] + [line.replace(",disc,", ",,") for line in lines[3:]]
    path.write_text("\n".join(lines))
    report = report_of(list_samples(path))
    assert "'Square' and 'square' differ by case only" in problem(report, "case only")
    assert "15 images are without a label" in problem(report, "label")
    assert report.counts[""] == {"Square": 0, "cross": 0, "square": 0, "": 15}
    assert "classes are unequal" not in " ".join(report.problems())
    listing = list_samples(path)
    names = [None if sample.label is None else listing.classes[sample.label] for sample in listing.samples]
    uneven = ["" if name is None else "train" if name != "cross" or i < 4 else "test" for i, name in enumerate(names)]
    assert "classes are unequal" in problem(report_of(listing, uneven), "unequal")


def test_groups(tmp_path):
    listing = list_samples(make.table(tmp_path, 48, groups=3))
    report = report_of(listing)
    assert {name: sum(row.values()) for name, row in report.groups.items()} == {"g0": 16, "g1": 16, "g2": 16}
    assert report.torn_groups == ("g0", "g1", "g2")
    assert report.problems() == []
    assert "LEAK: 3 groups are in more than one split" in problem(report_of(listing, keep_groups=True), "LEAK")
    coupled = list_samples(make.table(tmp_path / "coupled", 48, groups=48), columns={"group": "label"})
    text = problem(report_of(coupled), "SHORTCUT")
    assert "disc (disc), square (square)" in text
    patients = report_of(list_samples(make.table(tmp_path / "patients", 48, groups=16)))
    assert "16, 2 to 4 images each" in str(patients)
    assert "several splits (keep_groups" in str(patients)
    assert not patients.problems()


def test_ignored_files_and_mixed_depths(tmp_path):
    make.folder(tmp_path)
    (tmp_path / "images/notes.txt").touch()
    (tmp_path / "images/.hidden.png").touch()
    make.save(tmp_path / "elsewhere/x.png", np.zeros((3, 3), np.uint8))
    make.save(tmp_path / "images/disc/000.png", np.arange(1024, dtype=np.uint16).reshape(32, 32))
    report = report_of(list_samples(tmp_path))
    assert "1 file left out, beside the folders of images and masks" in problem(report, "left out")
    assert "8 bits and of more" in problem(report, "window")
    assert "3 files: " in str(report)
    assert "1 hidden" in str(report)


def test_json_and_text(tmp_path):
    make.folder(tmp_path)
    shutil.copy(tmp_path / "images/disc/000.png", tmp_path / "images/square/copy.png")
    report = report_of(list_samples(tmp_path))
    assert json.loads(write_json(tmp_path / "r.json", report.to_dict()).read_text()) == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["problems"] == report.problems()
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    assert "\n\n\n" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_facts_may_be_dicts_and_must_fit():
    from pathlib import Path

    from fisnet_cuda.data.images import Facts
    from fisnet_cuda.data.samples import Listing, Sample

    listing = Listing((Sample("a", Path("a"), None, 0),), ("x",), Path(), "folder")
    fact = Facts("00", 3, 4, "L")
    assert DataReport.make(listing, ["train"], [fact]) == DataReport.make(listing, ["train"], [fact._asdict()], ["00"])
    with pytest.raises(ValueError, match="facts"):
        DataReport.make(listing, ["train"], [])


def test_chest_xrays():
    listing = list_samples(cxr_tb(), columns={"image": "file", "group": "site"}, classes=["normal", "TB"])
    report = report_of(listing)
    assert report.problems() == []
    assert (report.images, report.pairs, report.mask_kinds) == (704, 704, {"binary": 704})
    assert 0.05 < report.foreground[0] < report.foreground[1] < report.foreground[2] < 0.5
    # the protocol in which the site gives the class away
    pairs = {("shenzhen", 0): "train", ("montgomery", 1): "train"}
    shortcut = report_of(listing, [pairs.get((s.group, s.label), "test") for s in listing.samples])
    assert "montgomery (TB), shenzhen (normal)" in problem(shortcut, "SHORTCUT")
