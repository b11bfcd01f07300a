"""Small trainings for the tests, in processes of their own that can be killed: made data, the package's module and callbacks."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fisnet_cuda.data.sampler import EpochBatches, EpochLoader
from fisnet_cuda.data.samples import Listing, Sample
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.train.callbacks import callbacks
from fisnet_cuda.train.module import ISNetModule

SPEC = InputSpec((12, 12), 1, ("a", "b"))


class Net(nn.Module):
    """Convolutions and, as asked for, BatchNorm and dropout: what a resume can go wrong with."""

    def __init__(self, num_classes: int = 2, in_channels: int = 1, norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.head(self.drop(x))


class Subset:
    """Made images: the class is a bright spot in the mask, and, by a spurious corner, outside of it."""

    def __init__(self, n: int, seed: int, all_masks: bool) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 2
        self.images = torch.randint(0, 90, (n, 1, 12, 12), generator=draw, dtype=torch.uint8)
        self.masks = torch.zeros(n, 1, 12, 12, dtype=torch.uint8)
        self.masks[:, :, 4:9, 4:9] = 255
        self.images[self.labels == 1, :, 5:8, 5:8] += 120
        self.images[self.labels == 1, :, :2, :2] += 160
        self.indices = torch.arange(n)
        self.store = SimpleNamespace(has_mask=(torch.arange(n) % 5 != 0) | all_masks)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        i = torch.as_tensor(positions)
        has_mask = self.store.has_mask[i]
        mask = self.masks[i] * has_mask.view(-1, 1, 1, 1)
        return {"image": self.images[i], "mask": mask, "has_mask": has_mask, "label": self.labels[i], "index": i}


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


class Data(pl.LightningDataModule):
    """What the callbacks use of a MaskedImageData, on made images."""

    def __init__(
        self, n: int = 26, n_val: int = 10, batch_size: int = 4, workers: int = 0, noise: float = 0.1, all_masks: bool = False
    ) -> None:
        super().__init__()
        self.batch_size, self.workers, self.noise = batch_size, workers, noise
        self.sets = {"train": Subset(n, 1, all_masks), "val": Subset(n_val, 2, all_masks)}
        names = tuple(Sample(f"{i}.png", Path(f"{i}.png"), label=i % 2) for i in range(max(n, n_val)))
        self.listing, self.spec = Listing(names, SPEC.classes, Path("."), "folder"), SPEC
        self.splits = ["train", "val"]

    @property
    def _rank(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def _loader(self, name: str, batches: EpochBatches, workers: int = 0) -> EpochLoader:
        options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        return EpochLoader(self.sets[name], batches, whole_batch, **options)

    def subset(self, name: str) -> Subset:
        return self.sets[name]

    def loader(self, name: str) -> EpochLoader:
        return self._loader(name, EpochBatches(len(self.sets[name]), self.batch_size))

    def train_dataloader(self) -> EpochLoader:
        kind = {"seed": 3, "shuffle": True, "drop_last": True, **self._rank}
        return self._loader("train", EpochBatches(len(self.sets["train"]), self.batch_size, **kind), self.workers)

    def val_dataloader(self) -> EpochLoader:
        return self._loader("val", EpochBatches(len(self.sets["val"]), self.batch_size, **self._rank))

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "image": SPEC.normalise(batch["image"]), "mask": batch["mask"].float() / 255}

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        batch = self.prepare(batch)
        if self.trainer.training and self.noise:  # augmentation, by torch's own generator
            batch["image"] = (batch["image"] + self.noise * torch.randn_like(batch["image"])).clamp(0, 1)
        return batch


class Kill(pl.Callback):
    """kill -9 at a given place: ("batch", epoch, batch), ("validation", epoch, batch) or ("epoch", epoch)."""

    def __init__(self, place: tuple[Any, ...]) -> None:
        self.place = place

    def _at(self, *place: Any) -> None:
        if place == self.place:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._at("batch", trainer.current_epoch, batch_idx)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._at("validation", trainer.current_epoch, batch_idx)

    def on_train_epoch_start(self, trainer, module):
        self._at("epoch", trainer.current_epoch - 1)


class Twin(ISNetModule):
    """An ISNetModule whose own numbers are logged by Lightning's means, too: those that it forgets in a resume."""

    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        self.log("train/mean", result["total"], on_epoch=True, on_step=False, batch_size=len(batch["label"]), sync_dist=True)
        self.log("train/max", result["total"], on_epoch=True, on_step=False, reduce_fx="max")
        return result

    def on_train_epoch_end(self):
        self.log("train/at_the_end", float(self.current_epoch))


@dataclass
class Job:
    """A training: where, of what, and how it ends."""

    run: Path
    kill: tuple[Any, ...] | None = None
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    resume: bool = True
    double: bool = False
    port: int | None = None
    rank: int = 0
    world: int = 1


def fit(job: Job) -> None:
    """Trains, from ``last.ckpt`` where there is one."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    if job.port:  # as torchrun does it
        rank = str(job.rank)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "WORLD_SIZE": str(job.world), "RANK": rank, "LOCAL_RANK": rank,
            "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(job.world), "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        job.trainer = {"strategy": "ddp", "devices": job.world, **job.trainer}
    backbone = {"backbone": f"{__name__}.Net", "channels_last": False}
    module = Twin(SPEC, **(backbone | {"lr": 0.05, "seed": 5} | job.module))
    if job.double:
        module.double()
    own = callbacks(job.run, **({"figures_every": 0} | job.callbacks))
    last = job.run / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[*own, *([Kill(job.kill)] if job.kill else [])],
        **(
            {"max_epochs": 3, "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
            | {"use_distributed_sampler": False, "gradient_clip_val": 1.0, "deterministic": True, "devices": 1}
            | job.trainer
        ),
    )
    data = Data(**job.data)
    if job.double:
        prepare = data.prepare
        data.prepare = lambda batch: {k: v.double() if v.is_floating_point() else v for k, v in prepare(batch).items()}
    trainer.fit(module, data, ckpt_path=last if job.resume and last.exists() else None, weights_only=True)


def _child(job: Job) -> None:
    try:
        fit(job)
    except BaseException:
        (job.run.parent / f"{job.run.name}-{job.rank}.error").write_text(traceback.format_exc())
        raise


_context = multiprocessing.get_context("forkserver")  # imports once, then forks: a process costs little
_context.set_forkserver_preload([__name__])


def start(job: Job) -> multiprocessing.Process:
    """A process that trains."""
    process = _context.Process(target=_child, args=(job,))
    process.start()
    return process


def train(run: Path, *, kills: tuple[tuple[Any, ...], ...] = (), world: int = 1, **options: Any) -> Path:
    """Trains in one process or several; killed at each place in turn, started again each time, and then let run to its end."""
    for kill in (*kills, None):
        port = _free_port() if world > 1 else None
        jobs = [Job(run, kill, port=port, rank=rank, world=world, **options) for rank in range(world)]
        processes = [start(job) for job in jobs]
        for process in processes:
            process.join(120)
        errors = [error.read_text() for error in run.parent.glob(f"{run.name}-*.error")]
        codes = [process.exitcode for process in processes]
        wanted = [-signal.SIGKILL if kill else 0] * world
        assert codes == wanted, f"killed at {kill}: exit codes {codes}\n" + "\n".join(errors)
    return run


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv, without the seconds."""
    rows = list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text())))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def state(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """All of a checkpoint but clocks."""
    found = torch.load(run / name, weights_only=True)
    folder = found["callbacks"]["fisnet_cuda.RunFolder"]
    folder.pop("seconds")
    for row in folder["rows"]:
        row.pop("seconds")
    return found


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}/{k}: only in one" for k in a.keys() ^ b.keys()]
        return keys + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    else:
        same = type(a) is type(b) and repr(a) == repr(b)
    return [] if same else [f"{path}: {a!r} != {b!r}"]
