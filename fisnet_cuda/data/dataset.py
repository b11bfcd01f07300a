"""`MaskedImages`: part of a `Store` as PyTorch's data sets are, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Batch", "MaskedImages", "as_it_is"]

Batch = dict[str, Tensor]


class MaskedImages(Dataset[Batch]):
    """Some samples of a store, in a given order.

    A batch is a dict of tensors: ``image`` uint8 ``[B, C, H, W]``, ``mask`` uint8 ``[B, 1, H, W]`` (255: foreground; 0 where there
    is no mask), ``has_mask`` bool ``[B]``, ``label`` int64 ``[B]`` (-1: unknown), ``index`` int64 ``[B]`` (into the store and
    ``listing.samples``). Picklable; a store on disk is not copied into workers.

    Args:
        store: the decoded data.
        indices: which samples of it, ints; None: all.

    Example:
        >>> from fisnet_cuda.data.store import Store
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> store = Store(images, images[:, :1], torch.ones(4, dtype=torch.bool), torch.tensor([0, 1, 0, 1]))
        >>> subset = MaskedImages(store, [3, 1])
        >>> batch = subset.__getitems__([0, 1])  # positions in the subset, as a DataLoader asks for them
        >>> len(subset), batch["index"].tolist(), batch["image"].shape
        (2, [3, 1], torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, store: Store, indices: Sequence[int] | Tensor | None = None) -> None:
        self.store = store
        self.indices = torch.arange(len(store)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if len(self.indices) and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < len(store):
            raise IndexError(f"indices must be from 0 to {len(store) - 1}, those of the store")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Labels of the samples, int64 ``[len(self)]``, -1: unknown; what a sampler balances by."""
        return self.store.labels[self.indices]

    def __getitem__(self, position: int) -> Batch:
        """One sample, without the axis ``B``."""
        return {key: value[0] for key, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """A batch; what `torch.utils.data.DataLoader` calls."""
        index = self.indices[torch.as_tensor(positions, dtype=torch.int64)]
        store = self.store
        return {
            "image": store.images.index_select(0, index),
            "mask": store.masks.index_select(0, index),
            "has_mask": store.has_mask[index],
            "label": store.labels[index],
            "index": index,
        }


def as_it_is(batch: Batch) -> Batch:
    """The ``collate_fn`` of data that come as batches."""
    return batch
