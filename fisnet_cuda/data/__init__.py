"""Images, masks and labels from disk to batches; needs the extra ``train``.

Data flow one way: `list_samples` finds what there is, `split` divides it, `Store` decodes it once, `MaskedImages` and
`EpochLoader` make batches of it, `Augmentation` moves images and masks together. `MaskedImageData` is all of that.
"""

from __future__ import annotations

from .._lazy import lazy

# nothing is imported before it is asked for: listing files needs no Lightning
_HOMES = {
    "ArrayItem": "samples",
    "Augmentation": "transforms",
    "DataReport": "report",
    "EpochBatches": "sampler",
    "EpochLoader": "sampler",
    "InputSpec": "spec",
    "Listing": "samples",
    "MaskedImageData": "module",
    "MaskedImages": "dataset",
    "Sample": "samples",
    "Store": "store",
    "list_samples": "sources",
    "read_image": "images",
    "read_manifest": "split",
    "read_mask": "images",
    "write_manifest": "split",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy(__name__, _HOMES)
