"""Pixels are decoded once, kept in memory or on disk, and never stale; what cannot be read is named."""

import errno
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from data import make

from fisnet_cuda.data import store as store_module
from fisnet_cuda.data.images import read_image, read_mask
from fisnet_cuda.data.sources import list_samples
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.data.store import Store, cache_folder
from fisnet_cuda.errors import InputError

SPEC = InputSpec((20, 16), 3, ("disc", "square"), mean=(0.5,), std=(0.5,))


@pytest.fixture
def data(tmp_path):
    """Eight images, the last one without a mask."""
    root = make.folder(tmp_path / "data", n=8, size=32)
    (root / "masks" / "square" / "007.png").unlink()
    return root


@pytest.fixture
def listing(data):
    return list_samples(data)


def same(a, b):
    tensors = ("images", "masks", "has_mask", "labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and a.facts == b.facts


class TestMemory:
    def test_holds_what_read_image_and_read_mask_give(self, listing):
        store = Store.build(listing, SPEC)
        assert len(store) == 8
        assert store.images.shape == (8, 3, 20, 16)
        assert store.masks.shape == (8, 1, 20, 16)
        assert store.nbytes == 8 * 4 * 20 * 16
        for i, sample in enumerate(listing.samples):
            assert torch.equal(store.images[i], read_image(sample.image, SPEC))
            if sample.mask is not None:
                assert torch.equal(store.masks[i], read_mask(sample.mask, SPEC).mask)
        assert store.has_mask.tolist() == [True] * 7 + [False]
        assert not store.masks[7].any()
        assert store.labels.tolist() == [0] * 4 + [1] * 4
        assert store.facts[0][1:4] == (32, 32, "L")

    def test_one_thread_or_many(self, listing):
        assert same(Store.build(listing, SPEC, workers=1), Store.build(listing, SPEC, workers=5))

    def test_equal_pictures_have_equal_hashes(self, data, listing):
        from PIL import Image

        Image.open(data / "images" / "disc" / "000.png").save(data / "images" / "square" / "copy.bmp")
        store = Store.build(list_samples(data), SPEC)
        names = [sample.name for sample in list_samples(data).samples]
        assert len(set(store.hashes)) == len(names) - 1
        assert store.hashes[names.index("images/square/copy.bmp")] == store.hashes[0]

    def test_mask_options_arrive(self, listing):
        few, plain, many = (Store.build(listing, SPEC, mask_threshold=t).masks for t in (1.0, 0.5, 0.01))
        assert all(set(masks.unique().tolist()) == {0, 255} for masks in (few, plain, many))
        assert (few == 255).sum() < (plain == 255).sum() < (many == 255).sum()
        soft = Store.build(listing, SPEC, soft_masks=True).masks
        assert len(soft.unique()) > 2
        inverted = Store.build(listing, SPEC, invert_masks=True).masks
        assert ((inverted[:7] == 0) == (plain[:7] == 255)).float().mean() > 0.95
        assert not inverted[7].any(), "no mask is no mask, inverted or not"
        chosen = Store.build(listing, SPEC, mask_values=[0]).masks
        assert torch.equal(chosen[:7], inverted[:7])

    def test_too_large_for_the_memory(self, listing, monkeypatch):
        monkeypatch.setattr(store_module, "_free_memory", lambda: 5000)
        with pytest.raises(InputError, match="cache='disk'"):
            Store.build(listing, SPEC)


class TestUnreadable:
    def test_one_is_named(self, data, listing):
        (data / "images" / "disc" / "002.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"002\.png"):
            Store.build(listing, SPEC)

    def test_many_are_counted_and_the_first_named(self, data, listing):
        for sample in listing.samples[:7]:
            sample.image.write_bytes(b"no image")
        with pytest.raises(InputError, match="7 of 8 samples cannot be read") as error:
            Store.build(listing, SPEC)
        text = str(error.value)
        assert "\n" not in text
        assert "and 2 more" in text
        assert "000.png" in text
        assert text.count(".png") == 5

    def test_nothing_is_left_on_the_disk(self, data, listing, tmp_path):
        (data / "images" / "disc" / "002.png").write_bytes(b"no image")
        with pytest.raises(InputError):
            Store.build(listing, SPEC, cache="disk", cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


class TestDisk:
    @pytest.fixture
    def build(self, tmp_path):
        def build(listing, spec=SPEC, **options):
            return Store.build(listing, spec, cache="disk", cache_dir=tmp_path / "cache", **options)

        return build

    def test_is_the_same_as_memory(self, listing, build):
        assert same(build(listing), Store.build(listing, SPEC))

    def test_is_read_again_without_decoding(self, listing, build, monkeypatch):
        first = build(listing)
        monkeypatch.setattr(store_module, "read_sample", lambda *_, **__: pytest.fail("decoded again"))
        again = build(listing)
        assert same(first, again)
        assert again.folder == first.folder
        # what does not change the pixels does not matter
        assert same(build(listing, replace(SPEC, mean=(0.1,))), first)

    @pytest.mark.parametrize(
        ("spec", "options"),
        [
            ({"size": (16, 20)}, {}),
            ({"channels": 1}, {}),
            ({"fit": "crop"}, {}),
            ({"window": (0, 100)}, {}),
            ({}, {"invert_masks": True}),
            ({}, {"soft_masks": True}),
            ({}, {"mask_threshold": 0.3}),
        ],
    )
    def test_other_settings_other_folder(self, listing, build, spec, options):
        spec = replace(SPEC, **spec)
        build(listing)
        found = build(listing, spec, **options)
        assert same(found, Store.build(listing, spec, **options))
        assert len(list(found.folder.parent.iterdir())) == 2

    def test_a_changed_file_is_decoded_again(self, data, listing, build):
        first = build(listing)
        file = listing.samples[0].image
        before = file.stat()
        values = np.zeros((32, 32), np.uint8)
        make.save(file, values)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert not build(listing).images[0].any()
        assert first.images[0].any()

    def test_a_changed_mask_or_order_too(self, listing, build):
        build(listing)
        swapped = replace(listing, samples=listing.samples[::-1])
        assert same(build(swapped), Store.build(swapped, SPEC))
        listing.samples[0].mask.write_bytes(listing.samples[5].mask.read_bytes())
        assert same(build(listing), Store.build(listing, SPEC))

    def test_labels_are_not_kept(self, listing, build):
        build(listing)
        relabelled = replace(listing, samples=tuple(replace(sample, label=None) for sample in listing.samples))
        assert build(relabelled).labels.tolist() == [-1] * 8

    @pytest.mark.parametrize("name", ["images.npy", "masks.npy", "store.json"])
    @pytest.mark.parametrize("content", [None, b"", b"{}", "half"])
    def test_a_broken_one_is_made_again(self, listing, build, name, content):
        folder = build(listing).folder
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
        assert same(build(listing), Store.build(listing, SPEC))

    def test_another_process_may_be_faster(self, listing, build, monkeypatch):
        decode = store_module._Decoder.__call__

        def late(self, *tensors):
            monkeypatch.setattr(store_module._Decoder, "__call__", decode)
            build(listing)  # the other process
            return decode(self, *tensors)

        monkeypatch.setattr(store_module._Decoder, "__call__", late)
        store = build(listing)
        assert same(store, Store.build(listing, SPEC))
        assert [path.name for path in store.folder.parent.iterdir()] == [store.folder.name]

    def test_pickles_without_its_pixels(self, listing, build):
        store = build(listing)
        content = pickle.dumps(store)
        assert len(content) < store.nbytes
        assert same(pickle.loads(content), store)

    def test_a_full_disk_is_one_line(self, listing, build, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(store_module.os, "posix_fallocate", full)
        with pytest.raises(InputError, match=r"No space left on device; name another folder by cache_dir"):
            build(listing)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_file_is_no_folder(self, listing, tmp_path):
        (tmp_path / "cache").write_text("")
        with pytest.raises(InputError, match="cache is a file"):
            Store.build(listing, SPEC, cache="disk", cache_dir=tmp_path / "cache")

    def test_a_file_that_is_gone(self, listing, build):
        listing.samples[3].image.unlink()
        with pytest.raises(InputError, match=listing.samples[3].image.name):
            build(listing)

    def test_where_it_lies(self, monkeypatch, tmp_path):
        monkeypatch.delenv("FISNET_DATA_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "fisnet_cuda" / "data"
        monkeypatch.setenv("FISNET_DATA_CACHE", str(tmp_path / "x"))
        assert cache_folder() == tmp_path / "x"
        assert cache_folder("y").name == "y"

    def test_what_is_written_is_json(self, listing, build):
        meta = json.loads((build(listing).folder / "store.json").read_text())
        assert meta["format"] == store_module.FORMAT
        assert len(meta["facts"]) == 8


def test_array_entries(tmp_path):
    listing = list_samples(make.npz(tmp_path / "a.npz", n=6))
    memory = Store.build(listing, SPEC)
    disk = Store.build(listing, SPEC, cache="disk", cache_dir=tmp_path / "cache")
    assert same(memory, disk)
    assert memory.images.any()
    assert len(set(memory.hashes)) == 6


def test_an_unknown_cache_is_named(listing):
    with pytest.raises(InputError, match="memory, disk"):
        Store.build(listing, SPEC, cache="ram")


def test_progress_only_where_there_is_something_to_wait_for(listing, capsys):
    Store.build(listing, SPEC)
    assert capsys.readouterr().err == ""
    many = replace(listing, samples=listing.samples * 30)
    Store.build(many, SPEC)
    assert "reading images" in capsys.readouterr().err
    Store.build(many, SPEC, progress=False)
    assert capsys.readouterr().err == ""
