"""A run folder without the hours: a net of a few filters, trained for moments on images whose corner gives the class away."""

import csv
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from torch import nn

from fisnet_cuda.data.module import MaskedImageData
from fisnet_cuda.data.split import write_manifest
from fisnet_cuda.train.module import ISNetModule


def _make():
    """tests/data/make.py, whose name is not a package's."""
    spec = spec_from_file_location("fisnet_tests_data_make", Path(__file__).parents[1] / "data" / "make.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = _make()


def net(num_classes=2, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 8 * 8, num_classes),
    )  # fmt: skip


def folders(root):
    """A biased data set as CSV with a mask for all, groups in its test split, and one without the mark; 32 x 32 grey images."""
    rows = []
    for group, mark, n, seed in (("biased", True, 96, 0), ("unbiased", False, 24, 1)):
        images, masks, labels = make.arrays(n, 32, 2, seed=seed, mark=mark)
        for i in range(n):
            name = f"{group}/{i:03}.png"
            make.save(root / "images" / name, images[i])
            make.save(root / "masks" / name, masks[i])
            split = "test" if group == "unbiased" or i % 4 == 3 or i % 4 == 2 else "train"
            rows.append([f"images/{name}", f"masks/{name}", make.CLASSES[labels[i]], split, group])
    with open(root / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "mask", "label", "split", "group"], *rows])
    return root / "data.csv"


def run_folder(folder, data_file, variant="standard", epochs=8, seed=0, **options):
    """``best.ckpt``, ``config.yaml`` and ``split.csv`` as `fisnet-cuda fit` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"path": str(data_file), "size": 32, "channels": 1, "batch_size": 8, "augment": "none"}
    data = MaskedImageData(**settings, seed=seed)
    torch.manual_seed(seed)
    module = ISNetModule(data.spec, backbone=f"{__name__}.net", variant=variant, lr=0.05, seed=seed, **options)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=_Prepared(data))
    trainer.save_checkpoint(folder / "best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "data": settings}))
    write_manifest(folder / "split.csv", data.listing, data.splits, data.store.hashes)
    return folder


class _Prepared:
    def __init__(self, data):
        self.data, self.loader = data, data.train_dataloader()

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (self.data.prepare(batch) for batch in self.loader)
