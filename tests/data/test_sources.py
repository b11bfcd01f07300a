"""Listing data sets: every form in which people keep them, odd names, and errors that name the file and the line."""

import gzip
import json
import os
import shutil
import unicodedata

import h5py
import numpy as np
import pytest
from data import make
from real_data import cxr_tb, mnist

from fisnet_cuda.data.images import read_mask, read_pixels
from fisnet_cuda.data.sources import list_samples
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import InputError

SPEC = InputSpec((32, 32), 1, ("a", "b"))
PIXEL = np.full((4, 4), 9, np.uint8)


def tree(root, *names):
    """Image files of these names."""
    for name in names:
        if name.endswith((".txt", ".DS_Store")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        else:
            make.save(root / name, PIXEL)
    return root


def pairs(listing):
    """name -> the mask's path below the root, for masks that are files."""
    return {s.name: s.mask and os.path.relpath(s.mask, listing.root).replace(os.sep, "/") for s in listing.samples}


def refused(*args, **options) -> str:
    with pytest.raises(InputError) as error:
        list_samples(*args, **options)
    text = str(error.value)
    assert "\n" not in text and text.isprintable(), "one printable line"
    return text


# ---- folders -------------------------------------------------------------------------------------------------


def test_every_form_lists_the_same_samples(tmp_path):
    forms = {
        "folder": make.folder(tmp_path / "folder"),
        "suffix": make.suffix(tmp_path / "suffix"),
        "csv": make.table(tmp_path / "csv"),
        "hdf5": make.hdf5(tmp_path / "a.h5"),
        "npz": make.npz(tmp_path / "a.npz"),
    }
    want = sorted(tuple(map(bytes, parts)) for parts in zip(*make.arrays()[:2]))
    for form, path in forms.items():
        listing = list_samples(path)
        assert listing.form == form and listing == list_samples(str(path), form=form)
        assert len(listing.samples) == 24 == len({s.name for s in listing.samples})
        assert [s.label for s in listing.samples].count(0) == 12 and len(listing.classes) == 2
        got = [(read_pixels(s.image).values, read_mask(s.mask, SPEC).mask.numpy()) for s in listing.samples]
        assert sorted((image.tobytes(), mask.tobytes()) for image, mask in got) == want, form
        assert not listing.images_without_mask + listing.masks_without_image + listing.ignored


def test_the_masks_folder_may_lie_anywhere(tmp_path):
    make.folder(tmp_path)
    shutil.move(tmp_path / "masks", tmp_path / "elsewhere")
    assert list_samples(tmp_path / "images", tmp_path / "elsewhere").images_without_mask == ()
    assert len(list_samples(tmp_path / "images").images_without_mask) == 24  # and is not guessed then
    shutil.move(tmp_path / "elsewhere", tmp_path / "images" / "deep")  # inside the images: no class of its own
    listing = list_samples(tmp_path / "images", tmp_path / "images" / "deep")
    assert listing.classes == ("disc", "square") and listing.images_without_mask == ()


def test_masks_beside_a_folder_called_images(tmp_path):
    make.folder(tmp_path)
    assert list_samples(tmp_path / "images").images_without_mask == ()


def test_a_mask_may_have_another_extension_suffix_or_a_flat_folder(tmp_path):
    tree(tmp_path, "images/a/1.PNG", "images/a/2.jpg", "images/b/3.tif", "masks/1.png", "masks/2_mask.png", "masks/3.gif")
    want = {"images/a/1.PNG": "masks/1.png", "images/a/2.jpg": "masks/2_mask.png", "images/b/3.tif": "masks/3.gif"}
    assert pairs(list_samples(tmp_path)) == want


@pytest.mark.parametrize(
    "layout",
    [
        ("train/a/1.png", "train/b/2.png", "val/a/3.png", "test/b/4.png"),
        ("Training/a/1.png", "Training/b/2.png", "validation/a/3.png", "testing/b/4.png"),
    ],
)
def test_splits_may_be_folders(tmp_path, layout):
    listing = list_samples(tree(tmp_path, *layout))
    assert [s.split for s in sorted(listing.samples, key=lambda s: s.name[-5:])] == ["train", "train", "val", "test"]
    assert listing.classes == ("a", "b")


@pytest.mark.parametrize("inner", ["{split}/{kind}/{rest}", "{kind}/{split}/{rest}"])
def test_splits_and_masks_nest_either_way(tmp_path, inner):
    rows = [("train", "a/1.png"), ("train", "b/1.png"), ("test", "a/1.png")]
    tree(tmp_path, *(inner.format(split=s, kind=k, rest=r) for s, r in rows for k in ("images", "masks")))
    listing = list_samples(tmp_path)
    want = {inner.format(split=s, kind="images", rest=r): inner.format(split=s, kind="masks", rest=r) for s, r in rows}
    assert pairs(listing) == want and listing.classes == ("a", "b")
    assert {s.name: s.split for s in listing.samples} == {name: "train" if "train" in name else "test" for name in want}


def test_a_class_may_be_called_mask(tmp_path):
    tree(tmp_path, "mask/1.png", "mask/2.png", "no_mask/1.png")
    listing = list_samples(tmp_path)
    assert listing.classes == ("mask", "no_mask") and len(listing.samples) == 3


def test_masks_in_a_folder_beside_the_classes(tmp_path):
    tree(tmp_path, "a/1.png", "b/2.png", "masks/a/1.png", "masks/b/2.png")
    listing = list_samples(tmp_path)
    assert listing.classes == ("a", "b") and pairs(listing) == {"a/1.png": "masks/a/1.png", "b/2.png": "masks/b/2.png"}


def test_what_is_not_used_is_named_with_the_reason(tmp_path):
    tree(tmp_path, "images/a/1.png", "images/b/2.png", "masks/a/1.png", "masks/b/7.png")
    tree(tmp_path, "images/.DS_Store", "images/a/._1.png", "images/a/notes.txt", "images/.git/x.png", "extra/9.png")
    (tmp_path / "images/b/gone.png").symlink_to("nothing.png")
    (tmp_path / "images/b/loop").symlink_to(tmp_path / "images")
    listing = list_samples(tmp_path)
    assert listing.images_without_mask == ("images/b/2.png",) and listing.masks_without_image == ("masks/b/7.png",)
    assert sorted(listing.ignored) == sorted(
        [
            "extra/9.png: beside the folders of images and masks, in none of them",
            "images/.DS_Store: hidden",
            "images/.git: hidden",
            "images/a/._1.png: hidden",
            "images/a/notes.txt: not an image (.txt)",
            "images/b/gone.png: a link to nothing",
            "images/b/loop: a link to a folder that is read already",
        ]
    )


def test_classes_nest_and_sort_as_numbers(tmp_path):
    tree(tmp_path, "10/p1/x.png", "10/p2/x.png", "9/p1/x.png", "2/x.png")
    listing = list_samples(tmp_path)
    assert listing.classes == ("2", "9", "10")
    assert [(s.name, s.label) for s in listing.samples] == [("2/x.png", 0), ("9/p1/x.png", 1), ("10/p1/x.png", 2), ("10/p2/x.png", 2)]
    assert list_samples(tree(tmp_path / "words", "c10/x.png", "c9/x.png")).classes == ("c9", "c10")


def test_unlabelled_images_are_for_prediction(tmp_path):
    listing = list_samples(tree(tmp_path, "1.png", "2.png"))
    assert listing.classes == () and [s.label for s in listing.samples] == [None, None]
    assert list_samples(tmp_path, classes=["a", "b"]).classes == ("a", "b")
    make.folder(tmp_path / "labelled")
    unlabelled = list_samples(tmp_path / "labelled", labels=False, classes=["a", "b"])
    assert {s.label for s in unlabelled.samples} == {None} and unlabelled.classes == ("a", "b")


def test_same_stems_with_other_extensions(tmp_path):
    tree(tmp_path, "images/a/1.png", "images/a/1.jpg", "masks/a/1.png")
    listing = list_samples(tmp_path)
    assert pairs(listing) == {"images/a/1.jpg": None, "images/a/1.png": "masks/a/1.png"}
    os.rename(tmp_path / "masks/a/1.png", tmp_path / "masks/a/1.bmp")
    assert "fits several images (images/a/1.jpg, images/a/1.png)" in refused(tmp_path)


def test_ambiguous_masks_are_refused(tmp_path):
    tree(tmp_path / "two", "images/a/1.png", "masks/a/1.bmp", "masks/a/1.tif")
    assert "has several masks (masks/a/1.bmp, masks/a/1.tif)" in refused(tmp_path / "two")
    tree(tmp_path / "flat", "images/a/1.png", "images/b/1.png", "masks/1.png")
    assert "fits several images" in refused(tmp_path / "flat")


def test_names_that_are_spelled_in_two_ways(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Röntgenbild é") for form in ("NFC", "NFD"))
    tree(tmp_path, f"images/{composed}/{composed}.png", f"masks/{decomposed}/{decomposed}.png", "images/b, c/x y#1'.png")
    listing = list_samples(tmp_path)
    assert len(listing.images_without_mask) == 1 and composed in listing.classes and not listing.masks_without_image


def test_names_that_are_no_text(tmp_path):
    tree(tmp_path, "a/ok.png", "a/line\nbreak.png")
    try:
        with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb") as file:
            file.write((tmp_path / "a/ok.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    names = [s.name for s in list_samples(tmp_path).samples]
    assert sorted(names) == ["a/\\xff.png", "a/line\\nbreak.png", "a/ok.png"]
    assert all(read_pixels(s.image).values.shape == (4, 4) for s in list_samples(tmp_path).samples)


def test_suffix_with_several_masks_and_strays(tmp_path):
    tree(tmp_path, "a/1.png", "a/1_mask.png", "a/1_mask_1.png", "b/2.png", "b/3_mask.png", "b/4.png", "b/4_mask.jpg")
    listing = list_samples(tmp_path)
    assert listing.form == "suffix"
    assert pairs(listing) == {"a/1.png": "a/1_mask.png", "b/2.png": None, "b/4.png": "b/4_mask.jpg"}
    assert listing.masks_without_image == ("b/3_mask.png",)
    assert listing.ignored == ("a/1_mask_1.png: a further mask of an image (one an image is read: merge them)",)
    other = list_samples(tree(tmp_path / "other", "1.png", "1-seg.png"), mask_suffix="-seg")
    assert pairs(other) == {"1.png": "1-seg.png"}


def test_folders_that_make_no_sense_are_refused(tmp_path):
    tree(tmp_path / "mixed", "a/1.png", "b/2.png", "preview.png")
    assert "1 of the 3 images" in refused(tmp_path / "mixed") and "preview.png" in refused(tmp_path / "mixed")
    tree(tmp_path / "none", "a/1.txt")
    assert "no image (PNG, JPEG" in refused(tmp_path / "none")
    tree(tmp_path / "apart", "images/a/case1.png", "masks/a/kase1.png")
    assert "did you mean 'a/kase1.png'" in refused(tmp_path / "apart")
    (tmp_path / "apart" / "empty").mkdir()
    assert "did you mean 'images'" in refused(tmp_path / "apart" / "imges")
    assert "masks folder" in refused(tmp_path / "mixed", tmp_path / "nothing")
    assert "is a file" in refused(tmp_path / "mixed" / "preview.png" / "x")
    assert "one image" in refused(tmp_path / "mixed" / "preview.png")
    assert "form='suffix'" in refused(tmp_path / "mixed", tmp_path / "mixed")
    assert "did you mean 'folder'" in refused(tmp_path, form="folders")


# ---- tables --------------------------------------------------------------------------------------------------


def write(root, text, encoding="utf-8", name="data.csv"):
    tree(root, "images/1.png", "images/2.png", "images/a, b.png", "masks/1.png", "masks/2.png")
    (root / name).write_bytes(text.encode(encoding))
    return root / name


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("image,mask,label\nimages/1.png,masks/1.png,0\nimages/2.png,masks/2.png,1\n", "utf-8-sig"),
        ("image;mask;label\r\n\r\nimages/1.png;masks/1.png;0\r\n;;\r\nimages/2.png;masks/2.png;1", "utf-8"),
        ("\n Image \t MASK\tLabel\nimages/1.png\tmasks/1.png\t0.0\nimages/2.png\tmasks/2.png\t1.0\n", "utf-16"),
        ('"image","note","mask","label"\n"images/1.png","x, y",masks/1.png,0\nimages/2.png,"two\nlines",masks/2.png,1\n', "utf-8"),
        ("image,mask,label,,\n1.png,1.png,0,,\nimages\\2.png,masks\\2.png,1,,\n", "utf-8"),
    ],
)
def test_tables_as_programs_write_them(tmp_path, text, encoding):
    listing = list_samples(write(tmp_path, text, encoding))
    assert listing.classes == ("0", "1") and [s.label for s in listing.samples] == [0, 1]
    assert pairs(listing) == {"images/1.png": "masks/1.png", "images/2.png": "masks/2.png"}


def test_all_columns_absolute_paths_and_gaps(tmp_path):
    path = write(tmp_path, "")
    text = f'image,mask,label,split,group\n{tmp_path}/images/1.png,,TB ,Train,p1\n"images/a, b.png",nan,NaN,,\n2.png,2.png,normal,valid,2.0\n'
    path.write_text(text)
    first, second, third = list_samples(path).samples
    assert (first.name, first.mask, first.label, first.split, first.group) == ("images/1.png", None, 0, "train", "p1")
    assert (second.name, second.mask, second.label, second.split, second.group) == ("images/a, b.png", None, None, None, None)
    assert (third.name, third.mask, third.label, third.split, third.group) == ("images/2.png", tmp_path / "masks/2.png", 1, "val", "2")
    assert list_samples(path).classes == ("TB", "normal")


def test_masks_of_a_table_are_found_by_name(tmp_path):
    path = write(tmp_path, "file,label\n1.png,0\na, b.png,1\n".replace("a, b.png", '"a, b.png"'))
    tree(tmp_path, "masks/stray.png")
    listing = list_samples(path, columns={"image": "file"})
    assert pairs(listing) == {"images/1.png": "masks/1.png", "images/a, b.png": None}
    assert listing.masks_without_image == ("masks/stray.png",)  # masks/2.png has an image, which this table does not list
    assert list_samples(tmp_path, columns={"image": "file"}) == listing  # the folder around it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("image,label\n", "names no images"),
        (
            "imag,label\n1.png,0\n",
            "has no column 'image' for the image: it has imag, label; name one with columns={'image': ...}; did you",
        ),
        ("image,label\n1.png\n", "line 2: 1 fields, but the header has 2"),
        ("image,label\n\n1.png,0\na, b.png,1\n", "line 4: 3 fields"),
        ("image,label\n1.png,0\n3.png,0\n4.png,0\n", "line 3: image 3.png not found in "),
        ("image,mask,label\n1.png,x.png,0\n", "line 2: mask x.png not found in "),
        ("image,label\n1.png,0\nimages/1.png,1\n", "line 3 names images/1.png again, after line 2"),
        ("image,label,split\n1.png,0,tarin\n", "line 2: split 'tarin' is none of train, val, test; did you mean 'train'?"),
        ("image,label,label\n1.png,0,1\n", "2 columns called 'label'"),
        ("image,label\n,0\n", "line 2: no image is named"),
        ("image,label\nimages/\0.png,0\n", "no text file"),
    ],
)
def test_errors_in_tables_name_the_line(tmp_path, text, said):
    path = write(tmp_path, text)
    message = refused(path)
    assert said in message and str(path) in message


def test_more_errors_in_tables(tmp_path):
    path = write(tmp_path, "image,label\n1.png,0\nRöntgen.png,0\n", "latin-1")
    assert "line 3: not UTF-8" in refused(path)
    path.write_text("image,label\n1.png,0\n3.png,0\n4.png,0\n")
    assert "nor is one more; did you mean '" in refused(path)
    path.write_text("image,label,site\n1.png,0,x\n")
    assert "no column 'sites' for the group" in refused(path, columns={"group": "sites"}) and "'site'" in refused(
        path, columns={"group": "sites"}
    )
    assert "columns has no 'images'" in refused(path, columns={"images": "file"})
    path.write_text("image,label\n1.png,tb\n2.png,normal\n")
    assert "did you mean 'TB'" in refused(path, classes=["normal", "TB"])
    assert "twice" in refused(path, classes=["TB", "TB"])
    (tmp_path / "other.csv").write_text("image,label\n1.png,0\n")
    assert "several tables" in refused(tmp_path)


def test_names_for_numbered_labels(tmp_path):
    path = write(tmp_path, "image,label\n1.png,1\n2.png,0\n")
    assert [s.label for s in list_samples(path, classes=["normal", "TB"]).samples] == [1, 0]
    assert [s.label for s in list_samples(path, classes=["1", "0"]).samples] == [0, 1]
    assert "1 images are of the class '1', which is not among the classes normal" in refused(path, classes=["normal"])


def test_lists_of_dicts(tmp_path):
    write(tmp_path, "")
    image, mask = tmp_path / "images/1.png", tmp_path / "masks/1.png"
    second = {"image": str(tmp_path / "images/2.png"), "label": np.int64(0), "group": 3, "split": "test"}
    for first in (
        {"image": image, "mask": mask, "label": 1},
        {"image": image, "seg": mask, "label": 1.0},
        {"image": str(image), "label": str(mask), "class": "1"},
    ):
        listing = list_samples([first, second])
        assert listing.form == "list" and listing.classes == ("0", "1")
        assert [(s.mask, s.label, s.group, s.split) for s in listing.samples] == [(mask, 1, None, None), (None, 0, "3", "test")]
    decathlon = {"name": "x", "training": [{"image": "images/1.png", "label": "masks/1.png"}], "test": ["images/2.png"]}
    (tmp_path / "data.json").write_text(json.dumps(decathlon))
    listing = list_samples(tmp_path / "data.json")
    assert [(s.name, s.split, s.mask is None) for s in listing.samples] == [
        ("images/1.png", "train", False),
        ("images/2.png", "test", True),
    ]


def test_errors_in_lists(tmp_path):
    write(tmp_path, "")
    assert "item 0 has no 'image': it has img; name the key with columns={'image': ...}; did you mean 'img'?" in refused([{"img": "x"}])
    assert "item 1: image nothing.png not found" in refused([{"image": tmp_path / "images/1.png"}, {"image": "nothing.png"}])
    assert "item 0: a dict" in refused([3])
    assert "names no images" in refused([])
    assert "label must be a text or a number, got list" in refused([{"image": tmp_path / "images/1.png", "label": [1, 2]}])
    assert "path or a list" in refused(3)
    (tmp_path / "data.json").write_text('[{"image": \n}]')
    assert "line 2: no JSON" in refused(tmp_path / "data.json")
    (tmp_path / "data.json").write_text("3")
    assert "must hold a list of dicts" in refused(tmp_path / "data.json")


# ---- arrays --------------------------------------------------------------------------------------------------


def test_hdf5_with_a_group_a_sample(tmp_path):
    listing = list_samples(make.hdf5(tmp_path / "a.h5", per_sample=True))
    images, masks, labels = make.arrays()
    assert [s.name for s in listing.samples][:3] == ["a.h5:case0", "a.h5:case1", "a.h5:case2"] and listing.classes == ("disc", "square")
    for i, sample in enumerate(listing.samples):
        assert (read_pixels(sample.image).values == images[i]).all() and (
            read_mask(sample.mask, SPEC).mask[0].numpy() == masks[i]
        ).all()
        assert sample.label == labels[i]


def test_hdf5_in_other_shapes(tmp_path):
    images, masks, labels = make.arrays(6)
    with h5py.File(tmp_path / "splits.h5", "w") as file:
        for name, part in (("train", slice(0, 4)), ("valid", slice(4, 6))):
            file[f"{name}/x"], file[f"{name}/seg"], file[f"{name}/y"] = images[part], masks[part], labels[part, None].astype(float)
        file["train/patient"] = [b"p1", b"p1", b"p2", b"\xc3\xa9"]
        file["valid/patient"] = [b"p3", b"p3"]
        file["classes"] = ["normal", "TB"]
    listing = list_samples(tmp_path / "splits.h5", keys={"group": "patient"})
    assert [s.split for s in listing.samples] == ["train"] * 4 + ["val"] * 2 and listing.classes == ("normal", "TB")
    assert [s.group for s in listing.samples] == ["p1", "p1", "p2", "é", "p3", "p3"] and [s.label for s in listing.samples] == [
        0,
        1,
    ] * 3
    assert len({s.name for s in listing.samples}) == 6
    with h5py.File(tmp_path / "named.h5", "w") as file:
        for i in range(6):
            file[f"images/c{i}"], file[f"masks/c{i}"] = images[i], masks[i]
            file[f"images/c{i}"].attrs["label"] = int(labels[i])
        file["masks/c9"] = masks[0]
    listing = list_samples(tmp_path / "named.h5")
    assert [s.name for s in listing.samples] == [f"named.h5:c{i}" for i in range(6)] and [s.label for s in listing.samples] == [
        0,
        1,
    ] * 3
    assert listing.ignored == ("named.h5:masks/c9: belongs to no image",)
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        file["study/images"] = images
        file["numbers"] = [3, 4]
    listing = list_samples(tmp_path / "deep.h5")
    assert len(listing.samples) == 6 and listing.ignored == ("deep.h5:numbers: an array of unknown meaning",)


def test_npz_in_other_shapes(tmp_path):
    listing = list_samples(make.npz(tmp_path / "mnist.npz", mnist=True))
    assert [s.split for s in listing.samples] == ["train"] * 18 + ["test"] * 6 and len({s.name for s in listing.samples}) == 24
    images, _, labels = make.arrays(6)
    np.savez(tmp_path / "xy.npz", x=images, y=np.eye(3)[labels + 1])
    assert list_samples(tmp_path / "xy.npz").classes == ("1", "2")
    np.savez(
        tmp_path / "med.npz",
        **{f"{s}_{k}": v for s in ("train", "val", "test") for k, v in (("images", images), ("labels", labels[:, None]))},
    )
    assert [s.split for s in list_samples(tmp_path / "med.npz").samples] == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
    np.savez(tmp_path / "x.npz", scans=images)
    assert [s.label for s in list_samples(tmp_path / "x.npz", keys={"image": "scans"}).samples] == [None] * 6
    assert "it holds scans; name one with keys={'image': ...}" in refused(tmp_path / "x.npz")
    assert "no array 'scan' for the image: it holds scans; did you mean 'scans'?" in refused(tmp_path / "x.npz", keys={"image": "scan"})


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    images, masks, labels = make.arrays(6)
    for arrays, said in (
        ({"images": images, "labels": labels[:5]}, "labels has the shape [5], and there are 6 images"),
        ({"images": images.reshape(6, -1), "labels": labels}, "must be images [n, height, width]"),
        ({"images": images, "labels": np.eye(6) + np.eye(6)[::-1]}, "one label an image"),
        ({"images": images, "x": images}, "two arrays for the image, images and x"),
        ({"images": images, "labels": np.array([b"\xff"] * 6)}, "not UTF-8"),
        ({"images": images, "splits": ["train"] * 5 + ["tset"]}, "sample 5: split 'tset' is none"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        assert said in refused(tmp_path / "a.npz"), said
    np.savez(tmp_path / "o.npz", images=images, labels=np.array([{}] * 6, dtype=object))
    assert "Python objects" in refused(tmp_path / "o.npz")
    for name in ("b.npz", "b.h5", "b-idx3-ubyte"):
        (tmp_path / name).write_bytes(b"nonsense that is long enough")
        assert str(tmp_path / name) in refused(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        assert str(tmp_path / name) in refused(tmp_path / name)
    assert "keys={'mask': ...}" in refused(make.npz(tmp_path / "c.npz"), tmp_path)
    assert "keys has no 'images'" in refused(tmp_path / "c.npz", keys={"images": "x"})
    whole = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(tmp_path / "c.npz")


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    root = make.idx(tmp_path, packed=packed)
    listing = list_samples(root, mask_from="nonzero")
    images, _, labels = make.arrays()
    assert listing.form == "idx" and [s.split for s in listing.samples] == ["train"] * 18 + ["test"] * 6
    assert [s.label for s in listing.samples] == labels.tolist() and not listing.images_without_mask
    for i in (0, 17, 18, 23):
        assert (read_pixels(listing.samples[i].image).values == images[i]).all()
        assert (read_mask(listing.samples[i].mask, SPEC).mask[0].numpy() == 255 * (images[i] > 0)).all()
    one = next(root.glob("t10k-images*"))
    assert [s.label for s in list_samples(one).samples] == labels[18:].tolist()
    content = one.read_bytes()
    one.write_bytes(content[:-3] if not packed else gzip.compress(gzip.decompress(content)[:-3]))
    assert "cut off" in refused(root)


def test_nonzero_masks_of_files(tmp_path):
    values = np.zeros((32, 32), np.uint8)
    values[3:9, 4:20] = 7
    make.save(tmp_path / "a/1.png", values)
    sample = list_samples(tmp_path, mask_from="nonzero").samples[0]
    assert (read_mask(sample.mask, SPEC).mask[0].numpy() == 255 * (values > 0)).all()
    assert "mask_from" in refused(tmp_path, mask_from="zero")


def test_other_kinds_of_files_are_refused_with_advice(tmp_path):
    for name, said in (("a.dcm", "convert"), ("a.nii.gz", "convert"), ("a.zip", "suffix is .zip"), ("a", "suffix is none")):
        (tmp_path / name).touch()
        assert said in refused(tmp_path / name)


# ---- real data -----------------------------------------------------------------------------------------------


def test_chest_xrays():
    root = cxr_tb()
    for path in (root, root / "labels.csv"):
        listing = list_samples(path, columns={"image": "file", "group": "site"}, classes=["normal", "TB"])
        assert listing.form == "csv" and len(listing.samples) == 704 and listing.classes == ("normal", "TB")
        assert not listing.images_without_mask + listing.masks_without_image + listing.ignored
        counts = [sum((s.group, s.label) == key for s in listing.samples) for key in (("shenzhen", 1), ("montgomery", 0))]
        assert counts == [287, 80]
        assert all(s.mask.name == s.image.name for s in listing.samples)


def test_mnist():
    listing = list_samples(mnist(), mask_from="nonzero")
    assert len(listing.samples) == 70_000 and listing.classes == tuple("0123456789") and listing.samples[-1].split == "test"
