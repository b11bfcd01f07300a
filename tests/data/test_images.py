"""Pixels of every kind of file, masks as annotation tools write them, geometry, and files that cannot be read."""

import os
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from data import make
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from real_data import cxr_tb

import fisnet_cuda as fc
from fisnet_cuda.data.images import MASK_KINDS, close_files, read_image, read_mask, read_pixels, read_sample
from fisnet_cuda.data.samples import ArrayItem, Sample
from fisnet_cuda.data.sources import list_samples
from fisnet_cuda.data.spec import FITS, InputSpec
from fisnet_cuda.errors import InputError

RAMP = (np.arange(20 * 30).reshape(20, 30) * 255 // 599).astype(np.uint8)
DISC = (np.hypot(*np.mgrid[-15:15, -15:15]) < 9).astype(np.uint8)


def spec(h=20, w=30, channels=1, **options):
    return InputSpec((h, w), channels, ("a", "b"), **options)


def read(path, channels=1, **options):
    return read_image(path, spec(channels=channels, **options)).numpy()


def mask_of(path, size=30, **options):
    return read_mask(path, spec(size, size), **options)


def refused(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_grey_in_every_mode_is_the_same_image(tmp_path, mode):
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    path = make.save(tmp_path / f"a.{suffix}", RAMP, mode)
    tolerance = 1 if mode in ("CMYK", "YCbCr") else 0
    for channels in (1, 3):
        image = read(path, channels)
        assert image.shape == (channels, 20, 30) and image.dtype == np.uint8
        assert abs(image.astype(int) - RAMP).max() <= tolerance, mode


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "pgm", "PNG", "npy"])
def test_lossless_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, RAMP)
    else:
        Image.fromarray(RAMP).save(path)
    assert (read(path)[0] == RAMP).all()


def test_one_bit_palette_and_transparent_files(tmp_path):
    make.save(tmp_path / "1.png", DISC * 255, "1")
    assert (read_image(tmp_path / "1.png", spec(30, 30))[0].numpy() == DISC * 255).all()
    colours = Image.fromarray(DISC, "P")
    colours.putpalette([10, 20, 30, 200, 100, 0])
    colours.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png", spec(30, 30, 3)).numpy()
    assert (image[:, 0, 0] == (10, 20, 30)).all() and (image[:, 15, 15] == (200, 100, 0)).all()


def test_sixteen_bits_by_window_and_by_the_bits_that_hold_values(tmp_path):
    wide = RAMP.astype(np.uint16) * 16  # 12 bits
    for suffix in ("png", "tif", "npy"):
        path = tmp_path / f"a.{suffix}"
        np.save(path, wide) if suffix == "npy" else Image.fromarray(wide).save(path)
        assert abs(read(path)[0].astype(int) - np.rint(wide / 4095 * 255)).max() == 0
        assert (read(path, window=(0, 4080))[0] == RAMP).all()
        assert (read(path, window=(1000, 1001))[0] == 255 * (wide > 1000)).all()
    hounsfield = wide.astype(np.int16) - 1024
    np.save(tmp_path / "ct.npy", hounsfield)
    assert "window" in refused(read, tmp_path / "ct.npy")
    assert (read(tmp_path / "ct.npy", window=(-1024, 3056))[0] == RAMP).all()
    np.save(tmp_path / "big.npy", wide.astype(">u2"))
    assert (read(tmp_path / "big.npy", window=(0, 4080))[0] == RAMP).all()
    assert (read(make.save(tmp_path / "8.png", RAMP), window=(0, 51))[0] == np.rint(np.minimum(RAMP / 51, 1) * 255)).all()


def test_floats(tmp_path):
    Image.fromarray(RAMP / np.float32(255)).save(tmp_path / "a.tif")
    assert (read(tmp_path / "a.tif")[0] == RAMP).all()
    for values, said in (
        (RAMP.astype(np.float32), "window=[0, 255]"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.full((2, 2), np.inf), "window"),
    ):
        np.save(tmp_path / "a.npy", values)
        assert said in refused(read, tmp_path / "a.npy")
    np.save(tmp_path / "half.npy", (RAMP / 255).astype(np.float16))
    assert abs(read(tmp_path / "half.npy")[0].astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright_and_so_do_their_masks(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the inverse, as PIL's Transpose
    stored = Image.fromarray(np.kron(DISC[:, :12], np.ones((2, 2), np.uint8)) * 255)
    upright = stored
    stored = stored if turn is None else stored.transpose(Image.Transpose(turn))
    stored.save(tmp_path / "a.png", exif=exif)
    want = np.array(upright)
    got = read_pixels(tmp_path / "a.png").values
    assert got.shape == want.shape and (got == want).all()
    assert (mask_of(tmp_path / "a.png").mask == mask_of(make.save(tmp_path / "b.png", want)).mask).all()


def test_colours(tmp_path):
    colour = np.zeros((20, 30, 3), np.uint8)
    colour[:10, :, 0], colour[10:, :, 1] = 200, 100
    path = make.save(tmp_path / "a.png", colour)
    assert (read(path, 3) == colour.transpose(2, 0, 1)).all()
    assert (read(path)[0] == np.where(np.arange(20)[:, None] < 10, 60, 59)).all()
    for values in (colour, colour.transpose(2, 0, 1), colour / 255):
        np.save(tmp_path / "a.npy", values)
        assert (read(tmp_path / "a.npy", 3) == colour.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("fit", FITS)
@given(size=st.tuples(st.integers(1, 50), st.integers(1, 50)), goal=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_every_size_fits(tmp_path_factory, fit, size, goal):
    path = tmp_path_factory.getbasetemp() / "size.npy"
    np.save(path, np.full(size, 200, np.uint8))
    image = read_image(path, spec(*goal, fit=fit))
    assert image.shape == (1, *goal)
    mask = read_mask(path, spec(*goal, fit=fit)).mask
    if fit == "pad":
        assert set(image.unique().tolist()) <= {0, 200} and ((mask > 0) == (image > 0)).all()
        rows, columns = (image[0] > 0).any(1).sum().item(), (image[0] > 0).any(0).sum().item()
        assert rows == goal[0] or columns == goal[1]
    else:
        assert (image == 200).all() and (mask == 255).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(40, 40), (64, 40), (30, 90)])
def test_image_and_mask_move_together(tmp_path, fit, size):
    """Whatever the fit, and with a mask of another resolution, bright pixels are where the mask is."""
    rows, columns = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    shape = ((abs(rows - 0.45) < 0.2) & (abs(columns - 0.55) < 0.2)).astype(np.uint8) * 255
    make.save(tmp_path / "image.png", shape)
    image = read_image(tmp_path / "image.png", spec(32, 32, fit=fit))
    for zoom in (1, 2, 3):
        make.save(tmp_path / "mask.png", np.kron(shape, np.ones((zoom, zoom), np.uint8)))
        read = read_mask(tmp_path / "mask.png", spec(32, 32, fit=fit), image_size=size)
        assert ((image > 127) != (read.mask > 0)).float().mean() < 0.04
        sample = read_sample(Sample("x", tmp_path / "image.png", tmp_path / "mask.png"), spec(32, 32, fit=fit))
        assert sample.facts.mask_size == ("same" if zoom == 1 else "scaled") and (sample.mask == read.mask).all()
        assert sample.facts.share == pytest.approx(read.mask.float().mean().item() / 255)


def test_resizing_does_not_alias(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    image = read_image(make.save(tmp_path / "a.png", stripes), spec(64, 64)).float()
    assert abs(image[:, 2:-2, 2:-2] - 127.5).max() < 16


# ---- masks ---------------------------------------------------------------------------------------------------


def save_mask(path, kind):
    """DISC as one kind of mask."""
    if kind == "1":
        return make.save(path, DISC * 255, "1")
    if kind in ("L", "LA", "RGB", "RGBA", "I;16"):
        return make.save(path, DISC.astype(np.uint16) * 65535 if kind == "I;16" else DISC * 255, None if kind == "I;16" else kind)
    if kind in ("0/1", "0/100"):
        return make.save(path, DISC * int(kind[2:]))
    if kind == "palette":
        image = Image.fromarray(DISC * 3, "P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 64, 0, 0])
    elif kind == "palette, black last":
        image = Image.fromarray(1 - DISC, "P")
        image.putpalette([255, 0, 0, 0, 0, 0])
    elif kind == "palette, no black":
        image = Image.fromarray(DISC, "P")
        image.putpalette([255, 255, 255, 255, 0, 0])
    elif kind == "colour":
        image = Image.fromarray(DISC[..., None] * np.array([64, 0, 0], np.uint8))
    elif kind == "alpha":
        image = Image.fromarray(np.concatenate([np.zeros((30, 30, 3), np.uint8), DISC[..., None] * 255], 2))
    elif kind == "labels":
        labels = DISC.copy()
        labels[15:] *= 2
        image = Image.fromarray(labels)
    image.save(path)
    return path


KINDS = {
    "1": "binary", "L": "binary", "LA": "binary", "RGB": "binary", "RGBA": "binary", "I;16": "binary", "0/1": "binary",
    "0/100": "binary", "palette": "palette", "palette, black last": "palette", "palette, no black": "palette",
    "colour": "colour", "alpha": "alpha", "labels": "labels",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(tmp_path, kind):
    read = mask_of(save_mask(tmp_path / "m.png", kind))
    assert read.kind == KINDS[kind] and read.kind in MASK_KINDS and read.state == "ok" and read.size == (30, 30)
    assert read.mask.dtype == torch.uint8 and (read.mask[0].numpy() == DISC * 255).all()
    assert (mask_of(tmp_path / "m.png", invert=True).mask[0].numpy() == 255 - DISC * 255).all()


def test_anti_aliased_soft_and_jpeg_masks(tmp_path):
    big = np.kron(DISC, np.ones((7, 7), np.uint8)) * 255
    smooth = np.array(Image.fromarray(big).resize((100, 100), Image.Resampling.LANCZOS))
    blurred = np.rint(255 * np.exp(-(np.hypot(*np.mgrid[-15:15, -15:15]) ** 2) / 100)).astype(np.uint8)
    assert mask_of(make.save(tmp_path / "a.png", smooth)).kind == "anti-aliased"
    assert abs(mask_of(tmp_path / "a.png").mask[0].numpy() / 255.0 - DISC).mean() < 0.03
    make.save(tmp_path / "a.jpg", smooth)
    assert mask_of(tmp_path / "a.jpg").kind == "anti-aliased"
    path = make.save(tmp_path / "s.png", blurred)
    assert mask_of(path).kind == "soft" and (mask_of(path).mask[0].numpy() == 255 * (blurred >= 127.5)).all()
    assert (mask_of(path, threshold=0.9).mask[0].numpy() == 255 * (blurred >= 229.5)).all()
    assert (mask_of(path, soft=True).mask[0].numpy() == blurred).all()
    assert (mask_of(path, soft=True, invert=True).mask[0].numpy() == 255 - blurred).all()
    np.save(tmp_path / "s.npy", blurred / 255)
    assert (mask_of(tmp_path / "s.npy").mask == mask_of(path).mask).all()
    for bad in (0, 1.5, float("nan")):
        assert "(0, 1]" in refused(mask_of, path, threshold=bad)


def test_chosen_values(tmp_path):
    values = np.zeros((30, 30), np.uint8)
    values[:10], values[10:20] = 1, 2
    for path in (make.save(tmp_path / "l.png", values), make.save(tmp_path / "rgb.png", np.stack([values] * 3, 2))):
        assert (mask_of(path, foreground=[2]).mask[0].numpy() == 255 * (values == 2)).all()
        assert (mask_of(path, foreground=[2]).kind, mask_of(path).kind) == ("values", "labels")
    image = Image.fromarray(values, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "p.png")
    assert (mask_of(tmp_path / "p.png", foreground=(1,)).mask[0].numpy() == 255 * (values == 1)).all()
    path = make.save(tmp_path / "c.png", np.stack([values, 0 * values, values], 2) * 9)
    assert "coloured" in refused(mask_of, path, foreground=[1])


def test_states_are_those_of_check_masks(tmp_path):
    hole = 1 - DISC
    tiny = np.zeros((300, 300), np.uint8)
    tiny[150, 150] = 1
    for values, state in ((DISC, "ok"), (0 * DISC, "empty"), (0 * DISC + 1, "full"), (hole, "inverted"), (tiny, "lost")):
        for scale in (1, 255):
            path = make.save(tmp_path / "m.png", values * scale)
            assert mask_of(path).state == state
            # bars of padding are background, and hide nothing
            assert read_mask(path, spec(30, 60, fit="pad")).state == state
    with pytest.warns(fc.FisnetWarning):
        report = fc.check_masks(torch.from_numpy(np.stack([DISC, 0 * DISC, 0 * DISC + 1, hole])))
    assert (report.empty, report.full, report.inverted) == (1, 1, 1)


def test_masks_without_a_meaning_are_refused(tmp_path):
    for values, said in (
        (np.full((3, 3), np.nan), "NaN"),
        (np.array([[0, -1]]), "from -1 to 0"),
        (np.array([[0.0, 1.5]]), "from 0 to 1.5"),
    ):
        np.save(tmp_path / "m.npy", values)
        assert said in refused(mask_of, tmp_path / "m.npy") and str(tmp_path / "m.npy") in refused(mask_of, tmp_path / "m.npy")
    np.save(tmp_path / "m.npy", DISC * 255.0)  # whole numbers as floats
    assert (mask_of(tmp_path / "m.npy").mask[0].numpy() == DISC * 255).all()
    np.save(tmp_path / "m.npy", DISC > 0)
    assert (mask_of(tmp_path / "m.npy").mask[0].numpy() == DISC * 255).all()


def test_a_mask_of_another_shape_is_said(tmp_path):
    make.save(tmp_path / "i.png", RAMP), make.save(tmp_path / "m.png", DISC)
    read = read_sample(Sample("x", tmp_path / "i.png", tmp_path / "m.png"), spec())
    assert read.facts.mask_size == "other" and read.mask.shape == (1, 20, 30)


# ---- hashes, arrays, what cannot be read ---------------------------------------------------------------------


def test_equal_pictures_have_equal_hashes(tmp_path):
    def sha(path):
        return read_sample(Sample("x", path), spec(8, 8)).facts.sha256

    make.save(tmp_path / "a.png", RAMP), make.save(tmp_path / "b.bmp", RAMP), make.save(tmp_path / "c.png", RAMP, "RGB")
    make.save(tmp_path / "d.png", RAMP, "RGBA"), np.save(tmp_path / "e.npy", RAMP.astype(np.int64))
    assert len({sha(tmp_path / name) for name in ("a.png", "b.bmp", "c.png", "d.png", "e.npy")}) == 1
    (
        make.save(tmp_path / "f.png", RAMP.T.copy()),
        make.save(tmp_path / "g.png", RAMP.reshape(30, 20)),
        make.save(tmp_path / "h.png", RAMP ^ 1),
    )
    assert len({sha(tmp_path / name) for name in ("a.png", "f.png", "g.png", "h.png")}) == 4


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = make.save(tmp_path / "ok.png", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).read_bytes()
    Image.fromarray(RAMP).save(tmp_path / "ok.jpg")
    contents = {
        "cut.png": whole[: len(whole) // 2], "cut.jpg": (tmp_path / "ok.jpg").read_bytes()[:-40], "empty.png": b"", "text.png": b"hello",
        "crc.png": whole[:60] + b"\0\0\0\0" + whole[64:], "head.png": whole[:20], "bad.npy": b"\x93NUMPY nonsense", "bad.tif": b"II*\0" + b"\xff" * 40,
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for call in (read_image, read_mask):
            message = refused(call, tmp_path / name, spec())
            assert message.startswith(f"cannot read the image {tmp_path / name}: ") and len(message) > 30 + len(str(tmp_path)), name
    assert "the file is empty" in refused(read, tmp_path / "empty.png")
    assert "did you mean 'ok.png'" in refused(read, tmp_path / "okk.png")
    (tmp_path / "folder.png").mkdir()
    assert "folder" in refused(read, tmp_path / "folder.png")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    assert "o.npy" in refused(read, tmp_path / "o.npy")
    for shape in ((0, 3), (4,), (2, 2, 2), (1, 2, 3, 4)):
        np.save(tmp_path / "s.npy", np.zeros(shape))
        assert str(list(shape)) in refused(read, tmp_path / "s.npy")


def test_arrays_are_read_again_when_the_file_has_changed(tmp_path):
    for path in (tmp_path / "a.npz", tmp_path / "a.h5"):
        for value in (1, 2):
            values = np.full((3, 4, 4), value, np.uint8)
            if path.suffix == ".npz":
                np.savez(path, images=values)
            else:
                path.unlink(missing_ok=True)
                with h5py.File(path, "w") as file:
                    file["images"] = values
            os.utime(path, ns=(time.time_ns(), time.time_ns() + value * 10**9))
            assert (read_pixels(ArrayItem(path, "images", 2)).values == value).all()
        assert "entry 3" in refused(read_pixels, ArrayItem(path, "images", 3))
        assert "masks" in refused(read_pixels, ArrayItem(path, "masks", 0))
        path.unlink()
        assert str(path) in refused(read_pixels, ArrayItem(path, "images", 0))
    close_files()


def test_threads_and_forks_read_the_same(tmp_path):
    listing = list_samples(make.hdf5(tmp_path / "a.h5", 24))
    images = make.arrays(24)[0]
    wrong = []

    def look():
        for i in list(range(24)) * 5:
            if not (read_pixels(listing.samples[i].image).values == images[i]).all():
                wrong.append(i)

    threads = [threading.Thread(target=look) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
    loader = torch.utils.data.DataLoader(range(24), batch_size=None, num_workers=2, multiprocessing_context="fork",
                                         collate_fn=lambda i: read_pixels(listing.samples[i].image).values)  # fmt: skip
    assert all((got == want).all() for got, want in zip(loader, images))


def test_chest_xrays():
    listing = list_samples(cxr_tb(), columns={"image": "file", "group": "site"})
    for sample in listing.samples[::29]:
        read = read_sample(sample, InputSpec((64, 64), 3, listing.classes))
        assert read.image.shape == (3, 64, 64) and read.facts.mask_kind == "binary" and read.facts.mask_state == "ok"
        assert 0.05 < read.facts.share < 0.5 and (read.facts.height, read.facts.width, read.facts.mode) == (224, 224, "L")
        stored = np.array(Image.open(sample.mask).convert("L"))
        assert (read_mask(sample.mask, spec(224, 224)).mask[0].numpy() == stored).all()
