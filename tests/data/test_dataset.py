"""Batches hold the samples that were asked for, and travel to workers."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from fisnet_cuda.data.dataset import MaskedImages, as_it_is
from fisnet_cuda.data.store import Store


@pytest.fixture
def store():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (7, 3, 4, 5), generator=draw, dtype=torch.uint8)
    masks = torch.randint(256, (7, 1, 4, 5), generator=draw, dtype=torch.uint8)
    return Store(images, masks, torch.arange(7) % 2 == 0, torch.tensor([0, 1, 2, 0, 1, 2, -1]))


def test_a_batch_is_what_was_asked_for(store):
    subset = MaskedImages(store, [6, 2, 4])
    batch = subset.__getitems__([2, 0])
    assert batch["index"].tolist() == [4, 6]
    assert torch.equal(batch["image"], store.images[[4, 6]])
    assert torch.equal(batch["mask"], store.masks[[4, 6]])
    assert batch["has_mask"].tolist() == [True, True]
    assert batch["label"].tolist() == [1, -1]
    dtypes = {key: value.dtype for key, value in batch.items()}
    assert dtypes == {
        "image": torch.uint8, "mask": torch.uint8, "has_mask": torch.bool, "label": torch.int64, "index": torch.int64,
    }  # fmt: skip
    assert subset.labels.tolist() == [-1, 2, 1]
    assert len(subset) == 3


def test_one_sample_has_no_batch_axis(store):
    sample = MaskedImages(store)[3]
    assert torch.equal(sample["image"], store.images[3])
    assert sample["label"].item() == 0
    assert sample["index"].shape == ()


def test_a_batch_is_a_copy(store):
    before = store.images.clone()
    MaskedImages(store).__getitems__([0, 1])["image"].zero_()
    assert torch.equal(store.images, before)


@pytest.mark.parametrize("indices", [[7], [-1], [0, 9]])
def test_samples_that_are_not_there(store, indices):
    with pytest.raises(IndexError, match="0 to 6"):
        MaskedImages(store, indices)


def test_none_at_all(store):
    assert len(MaskedImages(store, [])) == 0


def test_pickles(store):
    again = pickle.loads(pickle.dumps(MaskedImages(store, [5, 1])))
    assert torch.equal(again.__getitems__([0, 1])["image"], store.images[[5, 1]])


def test_workers_give_the_same(store):
    subset = MaskedImages(store, [6, 5, 4, 3])
    alone, helped = (list(DataLoader(subset, 3, collate_fn=as_it_is, num_workers=workers)) for workers in (0, 1))
    assert [batch["index"].tolist() for batch in helped] == [[6, 5, 4], [3]]
    for a, b in zip(alone, helped):
        assert all(torch.equal(a[key], b[key]) for key in a)
