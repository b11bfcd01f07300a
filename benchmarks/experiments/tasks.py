"""What is learned: images with labels and masks, in memory, and the test sets that tell whether a shortcut was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Augment", "Images", "Task", "batches", "epoch_steps"]

# (images [N, C, H, W], masks [N, 1, H, W], generator) -> the same, changed at random
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Images:
    """Images with what is known of them.

    Attributes:
        images: ``[N, C, H, W]`` float32 in [0, 1] or uint8.
        labels: ``[N]`` int64.
        masks: ``[N, 1, H, W]`` of the same dtype as the images, 1 (255) = foreground.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        n = len(self.labels)
        if len(self.images) != n or self.masks.shape != (n, 1, *self.images.shape[2:]):
            shapes = f"images {tuple(self.images.shape)}, labels {n} and masks {tuple(self.masks.shape)}"
            raise ValueError(f"{shapes} do not belong together")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.images[index], self.labels[index], self.masks[index])

    def floats(self) -> Images:
        """Images and masks as float32 in [0, 1], channels_last."""

        def wide(x: Tensor) -> Tensor:
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            return x.contiguous(memory_format=torch.channels_last)

        return Images(wide(self.images), self.labels, wide(self.masks))

    def to(self, device: torch.device | str) -> Images:
        """All three tensors on a device."""
        return Images(self.images.to(device), self.labels.to(device), self.masks.to(device))


@dataclass(frozen=True)
class Task:
    """A classification task whose training images hold a shortcut in the background.

    Attributes:
        name: of the task.
        classes: how many.
        train: what nets are trained on: the shortcut always works.
        val: images of the same kind, never trained on: what validation signals may use.
        tests: name -> test set. The first one is of the training's kind ("biased"); in the others the shortcut is gone or wrong.
        nets: names of `benchmarks.experiments.nets` that fit the images.
        augment: changes a training batch at random; None: nothing does.
        notes: what a reader of the results must know.
    """

    name: str
    classes: int
    train: Images
    val: Images
    tests: Mapping[str, Images]
    augment: Augment | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.train.images.shape[2:])

    def to(self, device: torch.device | str) -> Task:
        """The task with its tensors on a device."""
        if torch.device(device) == self.train.images.device:
            return self
        tests = {name: images.to(device) for name, images in self.tests.items()}
        return Task(self.name, self.classes, self.train.to(device), self.val.to(device), tests, self.augment, self.notes)


def epoch_steps(task: Task, batch: int) -> int:
    """Steps of one epoch; a last batch that is not full is left for the next epoch."""
    return max(1, len(task.train) // batch)


def batches(task: Task, batch: int, seed: int) -> Iterator[Images]:
    """Training batches without end: every image once before any comes again; order and augmentation hang on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(task.train), generator=generator)])
        picks, queue = queue[:batch], queue[batch:]
        chosen = task.train[picks.to(task.train.labels.device)].floats()
        if task.augment is not None:
            chosen = Images(*_augmented(task.augment, chosen, generator)).floats()
        yield chosen


def _augmented(augment: Augment, chosen: Images, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    images, masks = augment(chosen.images, chosen.masks, generator)
    return images, chosen.labels, masks
