"""Images, masks and labels from disk to batches; needs the extra ``train``.

Data flow one way: `list_samples` finds what there is, `split` divides it, `Store` decodes it once, `MaskedImages` and
`EpochLoader` make batches of it, `Augmentation` moves images and masks together. `MaskedImageData` is all of that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> the module it lives in; nothing is imported before it is asked for, and listing files needs no Lightning
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
