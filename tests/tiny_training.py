"""A network and a data module small enough to train in a test: grey 12 x 12 images of two classes, told by a square's brightness."""

import lightning.pytorch as pl
import torch
from torch import nn

from fisnet_cuda.data.spec import InputSpec

SPEC = InputSpec((12, 12), 1, ("dark", "bright"))
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip


def net(num_classes=2, in_channels=1, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(6, num_classes),
    )  # fmt: skip


def samples(n, seed):
    """Of every fourth sample there is no mask."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    image = torch.randint(0, 100, (n, 1, 12, 12), generator=generator, dtype=torch.uint8)
    image[:, :, 3:7, 4:9] += (label * 120).view(-1, 1, 1, 1).to(torch.uint8)
    mask = torch.zeros_like(image)
    mask[:, :, 2:8, 3:10] = 255
    has_mask = torch.arange(n) % 4 != 3
    return {"image": image, "mask": mask * has_mask.view(-1, 1, 1, 1), "has_mask": has_mask, "label": label, "index": torch.arange(n)}


class Batches:
    """An epoch of batches in an order of its own, taken up at ``start`` by the first iterator; every rank takes its slice."""

    def __init__(self, data, batch_size, shuffle, rank=0, world=1, start=0):
        self.data, self.batch_size, self.shuffle, self.start = data, batch_size, shuffle, start
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    batch_sampler = None

    @property
    def sampler(self):  # Lightning tells a loader's sampler the epoch
        return self

    def __len__(self):
        mine = (len(self.data["label"]) - self.rank + self.world - 1) // self.world
        return -(-mine // self.batch_size)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def __iter__(self):
        n = len(self.data["label"])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.epoch)) if self.shuffle else torch.arange(n)
        start, self.start = self.start, 0
        for index in order[self.rank :: self.world].split(self.batch_size)[start:]:
            yield {key: value[index] for key, value in self.data.items()}


class Data(pl.LightningDataModule):
    """``start``: batches of the first epoch that a resumed training has behind it. ``noise``: of the augmentation."""

    def __init__(self, spec=SPEC, batch_size=4, train=16, val=10, start=0, noise=0.02):
        super().__init__()
        self.spec, self.batch_size, self.start, self.noise = spec, batch_size, start, noise
        self.train, self.val = samples(train, 0), samples(val, 1)
        self.drawn = []

    def _batches(self, data, **options):
        world = {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer is not None else {}
        return Batches(data, self.batch_size, **options, **world)

    def train_dataloader(self):
        return self._batches(self.train, shuffle=True, start=self.start)

    def val_dataloader(self):
        return self._batches(self.val, shuffle=False)

    test_dataloader = predict_dataloader = val_dataloader

    def loader(self, split, batch_size=None):
        return Batches(getattr(self, split), batch_size or self.batch_size, shuffle=False)

    def prepare(self, batch):
        return {**batch, "image": self.spec.normalise(batch["image"]), "mask": batch["mask"].float() / 255}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = self.prepare(batch)
        if self.trainer.training:
            noise = torch.rand_like(batch["image"])
            self.drawn.append(float(noise.sum()))
            batch["image"] = (batch["image"] + self.noise * noise).clamp(0, 1)
        return batch
