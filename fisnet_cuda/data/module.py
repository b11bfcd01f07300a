"""`MaskedImageData`: a data set on disk as Lightning, or a loop of your own, wants it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ..errors import InputError
from .backgrounds import EMPTY, USED, mask_kinds
from .dataset import MaskedImages, as_it_is
from .sampler import EpochBatches, EpochLoader
from .samples import SPLITS, Listing
from .sources import list_samples
from .spec import InputSpec
from .split import split
from .store import CACHES, Store
from .transforms import Augmentation, prepare

if TYPE_CHECKING:
    from .report import DataReport

__all__ = ["MaskedImageData"]


class MaskedImageData(LightningDataModule):
    """Images with foreground masks and labels, from disk to normalised batches on the training device.

    Files are listed at once: ``listing``, ``splits`` and ``spec`` (size, classes, normalisation: what a network must know) are there
    after construction. ``setup()`` decodes every image and mask once, to uint8 of the network's size; from then on an epoch is
    indexing, and augmentation runs on whole batches on the device, image and mask together.

    With Lightning, hand it to ``trainer.fit(module, datamodule=data)``. Without:

    .. code-block:: python

        import fisnet_cuda as fc
        from fisnet_cuda.data import MaskedImageData

        data = MaskedImageData("xray/images", masks="xray/masks", size=224, channels=1, batch_size=16)
        data.setup()
        print(data.report)  # pairs, classes, masks that look wrong, images that are in two splits
        net = fc.ISNet(my_model, input_low=data.spec.low, input_high=data.spec.high)
        train = data.train_dataloader()
        for epoch in range(30):
            train.set_epoch(epoch)
            for batch in train:
                batch = data.prepare({k: v.to(device) for k, v in batch.items()}, augment=True)
                out = net(batch["image"], relevance=True)
                total, parts = loss(out, batch["label"], batch["mask"], has_mask=batch["has_mask"])
        for batch in map(data.prepare, data.loader("test")):  # in order, not augmented
            ...

    A batch is a dict: ``image`` float32 ``[B, C, H, W]``, normalised; ``mask`` float32 ``[B, 1, H, W]``, 1: foreground (0 everywhere
    where there is none); ``has_mask`` bool ``[B]``; ``label`` int64 ``[B]``, -1: unknown; ``index`` int64 ``[B]`` into
    ``listing.samples``. Before `prepare` (Lightning calls it by itself) ``image`` and ``mask`` are uint8.

    Everything random hangs on ``seed``: the split; the order, on seed and epoch; the augmentation of a batch, on seed, epoch and the
    samples in it. None of them looks at torch's generators when Lightning trains, so runs that are resumed anywhere see the same.

    Args:
        path: a folder, CSV, JSON, HDF5, npz or idx file, or a list of dicts; see `fisnet_cuda.data.list_samples` for the forms.
        masks: folder of the masks, parallel to that of the images; None: found beside them.
        form: "auto", "folder", "csv", "suffix", "list", "hdf5", "npz" or "idx".
        mask_suffix: what a mask's name has more than its image's, in the form "suffix".
        columns: other names for the columns image, mask, label, split, group of a CSV, or the keys of a list.
        keys: other names for the arrays of HDF5 and npz files.
        mask_from: "nonzero": pixels above 0 are the foreground where there is no mask (MNIST).
        classes: their names in the order of the logits; None: those found, sorted.
        size: height and width in pixels, or one number for both.
        channels: 1 or 3.
        mean, std: normalisation ``(image - mean) / std`` of images in [0, 1], one number or one a channel.
        fit: "squash", "pad" or "crop" images of another shape.
        window: intensities that become 0 and 1, for 16-bit, integer and float images.
        mask_threshold: where masks are cut into foreground and background, in (0, 1].
        soft_masks: keep mask values in between.
        invert_masks: the masks are white where the background is.
        mask_values: which label or palette values are foreground; None: all but 0.
        fractions: shares of training, validation and test, where the data do not say.
        keep_groups: never tear a group (a patient) apart.
        train, val, test: other data that serve as this split: a path, or a dict with ``path`` and any of ``masks``, ``form``,
            ``mask_suffix``, ``columns``, ``keys``, ``mask_from``.
        tests: name -> further test sets (out of distribution, another hospital), given as ``test``; evaluated, never trained on.
        batch_size: samples a batch in each process.
        workers: processes that assemble batches; 0 is fastest for decoded data. Threads that decode at the start are not meant.
        cache: "memory" or "disk"; see `Store.build`. With several processes, "disk" is decoded once and shared.
        cache_dir: for "disk"; None: ``$FISNET_DATA_CACHE``, or the user's cache folder.
        augment: "none", "light", "strong", or options of `Augmentation`: ``{"preset": "light", "flip": 0.5}``.
        swap_background: probability with which a training image, in each step anew, gets the background of another image of the
            batch, of any class, whose own object is filled in: then the background tells nothing. Its mask stays. 0: never. Works
            alone (variant standard) and with every ISNet; images without a mask are left alone.
        balance: draw every class equally often.
        seed: see above.
        labels: False: ignore labels, for prediction on images whose folders are no classes.

    Attributes:
        spec: the `InputSpec`.
        listing: all samples, those of ``train``, ``val``, ``test`` and ``tests`` included.
        splits: for each sample "train", "val", "test", the name of its test set in ``tests``, or "": without a label, in no split.
        store: the decoded pixels, after ``setup()``.
        report: what was found, a `DataReport` (``print`` it), after ``setup()``.

    Raises:
        InputError: nothing found, files that cannot be read, options that contradict each other.
    """

    def __init__(
        self,
        path: str | list[dict[str, Any]],
        masks: str | None = None,
        form: str = "auto",
        mask_suffix: str = "_mask",
        columns: dict[str, str] | None = None,
        keys: dict[str, str] | None = None,
        mask_from: str | None = None,
        classes: list[str] | None = None,
        size: int | list[int] = 224,
        channels: int = 3,
        mean: float | list[float] = 0.0,
        std: float | list[float] = 1.0,
        fit: str = "squash",
        window: list[float] | None = None,
        mask_threshold: float = 0.5,
        soft_masks: bool = False,
        invert_masks: bool = False,
        mask_values: list[int] | None = None,
        fractions: list[float] = [0.7, 0.15, 0.15],  # noqa: B006  (never changed; jsonargparse shows it)
        keep_groups: bool = False,
        train: str | dict[str, Any] | None = None,
        val: str | dict[str, Any] | None = None,
        test: str | dict[str, Any] | None = None,
        tests: dict[str, str | dict[str, Any]] | None = None,
        batch_size: int = 16,
        workers: int = 0,
        cache: str = "memory",
        cache_dir: str | None = None,
        augment: str | dict[str, Any] = "light",
        swap_background: float = 0.0,
        balance: bool = False,
        seed: int = 0,
        labels: bool = True,
    ) -> None:
        super().__init__()
        _check(batch_size=batch_size, workers=workers, cache=cache, mask_threshold=mask_threshold, seed=seed)
        if isinstance(swap_background, bool) or not 0 <= swap_background <= 1:
            raise InputError(f"swap_background must be a probability from 0 (never) to 1, got {swap_background}")
        if len(fractions) != 3:
            raise InputError(f"fractions must be three numbers, shares of train, val and test, got {fractions}")
        self.batch_size, self.workers, self.balance, self.seed = batch_size, workers, balance, seed
        self.keep_groups = keep_groups
        self.augmentation = Augmentation(augment, soft_masks=soft_masks)
        self.swap_background = float(swap_background)
        self.listing = list_samples(
            path, masks, form, mask_suffix=mask_suffix, columns=columns, keys=keys, mask_from=mask_from, classes=classes, labels=labels
        )  # fmt: skip
        self.spec = InputSpec(
            size=(size, size) if isinstance(size, int) else tuple(size),
            channels=channels,
            classes=self.listing.classes,
            mean=_numbers(mean),
            std=_numbers(std),
            fit=fit,
            window=None if window is None else tuple(window),
        )
        others = {name: given for name, given in zip(SPLITS, (train, val, test)) if given is not None}
        self.tests = tuple(tests or {})
        self.listing, self.splits = _with_others(self.listing, others, tests or {}, labels, tuple(fractions), seed, keep_groups)
        self._decoding = {
            "cache": cache,
            "cache_dir": cache_dir,
            "mask_threshold": mask_threshold,
            "soft_masks": soft_masks,
            "invert_masks": invert_masks,
            "mask_values": mask_values,
        }
        self._store: Store | None = None

    # ---- pixels ----------------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """The decoded pixels; decoded now, if that was not done yet."""
        if self._store is None:
            self._store = Store.build(self.listing, self.spec, **self._decoding, progress=self._rank()[0] == 0)
        return self._store

    @cached_property
    def report(self) -> DataReport:
        """What was found in the data; ``print`` it."""
        from .report import DataReport

        return DataReport.of(self.listing, self.splits, self.store, self.keep_groups)

    def prepare_data(self) -> None:
        """Decode into the cache on disk, once a machine; Lightning calls it."""
        if self._decoding["cache"] == "disk":
            _ = self.store

    def setup(self, stage: str | None = None) -> None:
        """Decode everything, and check that there is what ``stage`` needs.

        Args:
            stage: "fit", "validate", "test", "predict"; None: anything will do.

        Raises:
            InputError: files that cannot be read; for "fit", no training images with labels, or fewer than two classes.
        """
        if stage == "fit":
            self._check_fit()
        _ = self.store
        if stage == "fit" and self.swap_background:
            self._check_swap()

    def _check_fit(self) -> None:
        if len(self.spec.classes) < 2:
            raise InputError(
                f"training needs at least two classes, and {self.listing.root} has {len(self.spec.classes)} "
                f"({', '.join(self.spec.classes) or 'no labels'}): put images in one folder a class, or name a label column"
            )
        if not self._indices("train"):
            raise InputError(f"there are no images to train on in {self.listing.root}: all are in other splits, or have no label")

    def _check_swap(self) -> None:
        """Whether any background can be swapped: it takes an object to paste and another image whose background is known."""
        given = f"swap_background is {self.swap_background:g}"
        if self.batch_size < 2:
            raise InputError(f"{given}, and a batch of one image has no other background to give: set batch_size to 2 or more")
        subset = self.subset("train")
        masked = subset.indices[subset.store.has_mask[subset.indices]]
        if not len(masked):
            raise InputError(
                f"{given}, and none of the {len(subset)} training images has a mask: say where the masks are, or leave it out"
            )
        objects = known = 0
        for part in masked.split(64):  # ends, as a rule, with the first one
            kinds = mask_kinds(self.store.masks[part])
            objects += int((kinds == USED).sum())
            known += int(((kinds == USED) | (kinds == EMPTY)).sum())
            if objects and known > 1:
                return
        raise InputError(
            f"{given}, and there is nothing to swap: of the {len(masked)} masks of training images {objects} have both foreground and "
            f"background, {known} any background; look at the data report, or leave it out"
        )

    # ---- subsets ---------------------------------------------------------------------------------------------

    def subsets(self) -> dict[str, MaskedImages]:
        """What is evaluated: "test", its groups as "test/<group>" (where there are several), and each of ``tests``."""
        return {name: MaskedImages(self.store, indices) for name, indices in self._subset_indices().items()}

    def subset(self, name: str) -> MaskedImages:
        """Any subset: "train", "val", "all", or a name of `subsets`.

        Raises:
            InputError: there is no such subset, or it is empty.
        """
        found = {
            "all": list(range(len(self.listing.samples))),
            **{key: self._indices(key) for key in SPLITS},
            **self._subset_indices(),
        }
        if not found.get(name):
            raise InputError(f"there are no images in {name!r}; there are some in {', '.join(k for k, v in found.items() if v)}")
        return MaskedImages(self.store, found[name])

    def loader(self, name: str, batch_size: int | None = None) -> EpochLoader:
        """All samples of a subset in order, each once in every process, as uint8 batches for `prepare`; never augmented.

        Args:
            name: see `subset`.
            batch_size: other than the one for training.
        """
        subset = self.subset(name)
        return self._loader(subset, EpochBatches(len(subset), batch_size or self.batch_size))

    def train_dataloader(self) -> EpochLoader:
        """Training batches of this process; call ``set_epoch`` on it in a loop of your own."""
        subset = self.subset("train")
        rank, world = self._rank()
        batches = EpochBatches(
            subset.labels if self.balance else len(subset), self.batch_size,
            seed=self.seed, shuffle=True, drop_last=True, balance=self.balance, rank=rank, world=world,
        )  # fmt: skip
        return self._loader(subset, batches)

    def val_dataloader(self) -> EpochLoader | list[Any]:
        """This process's share of the validation split, each sample once; an empty list where there is none."""
        return self._evaluation("val") if self._indices("val") else []

    def test_dataloader(self) -> EpochLoader:
        """This process's share of the test split, each sample once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EpochLoader:
        """This process's share of all samples, whatever their split."""
        return self._evaluation("all")

    def _evaluation(self, name: str) -> EpochLoader:
        subset = self.subset(name)
        rank, world = self._rank()
        return self._loader(subset, EpochBatches(len(subset), self.batch_size, rank=rank, world=world))

    def _loader(self, subset: MaskedImages, batches: EpochBatches) -> EpochLoader:
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available(), "persistent_workers": self.workers > 0}
        return EpochLoader(subset, batches, as_it_is, **options)

    def _indices(self, name: str) -> list[int]:
        return [i for i, s in enumerate(self.splits) if s == name]

    def _subset_indices(self) -> dict[str, list[int]]:
        found = {"test": self._indices("test")}
        groups: dict[str, list[int]] = {}
        for i in found["test"]:
            group = self.listing.samples[i].group
            if group is not None:
                groups.setdefault(group, []).append(i)
        if len(groups) > 1:
            found |= {f"test/{group}": groups[group] for group in sorted(groups)}
        found |= {name: self._indices(name) for name in self.tests}
        return {name: indices for name, indices in found.items() if indices}

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # ---- batches ---------------------------------------------------------------------------------------------

    def prepare(self, batch: Mapping[str, Any], augment: bool = False, seed: int | None = None) -> dict[str, Any]:
        """A batch of a loader as the network takes it, on the device it is on.

        Args:
            batch: from a loader.
            augment: as in training, backgrounds swapped by ``swap_background``.
            seed: of the augmentation; None: torch's CPU generator.

        Returns:
            A new dict: ``image`` normalised and ``mask`` in [0, 1], both float32, whatever autocast says; where backgrounds are
            swapped, bool ``swapped`` ``[B]``; the rest as it was. A batch that is prepared already comes back as it is.
        """
        if not augment:
            return prepare(batch, self.spec)
        return prepare(batch, self.spec, self.augmentation, seed, self.swap_background)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Seeds the augmentation while the batch is still on the CPU; Lightning calls it."""
        # Not from torch's generators: Lightning calls this before on_train_batch_start, where training reseeds them.
        if self.trainer is None or not self.trainer.training or not (len(self.augmentation) or self.swap_background):
            return batch
        return {**batch, "seed": _draw(self.seed, self.trainer.current_epoch, batch["index"])}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises on the device, and augments in training; Lightning calls it."""
        seed = batch.pop("seed", None)
        return self.prepare(batch, augment=seed is not None, seed=seed)


def _draw(seed: int, epoch: int, index: Tensor) -> int:
    """The seed of a batch's augmentation: a function of what is in it, so that prefetching, resuming or the number of steps a batch
    takes make no difference, and processes, which have other samples, draw differently."""
    content = f"{seed}/{epoch}/".encode() + index.cpu().numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "little")


def _numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)


def _check(*, batch_size: int, workers: int, cache: str, mask_threshold: float, seed: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise InputError(f"workers must be at least 0, got {workers}")
    if cache not in CACHES:
        raise InputError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    if not 0 < mask_threshold <= 1:
        raise InputError(f"mask_threshold must lie in (0, 1], got {mask_threshold}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")


# ---- several sources -----------------------------------------------------------------------------------------

_SOURCE = ("path", "masks", "form", "mask_suffix", "columns", "keys", "mask_from")


def _with_others(
    main: Listing, serving: Mapping[str, Any], tests: Mapping[str, Any], labels: bool, fractions: tuple[float, ...], seed: int,
    keep_groups: bool,
) -> tuple[Listing, list[str]]:  # fmt: skip
    """The main listing followed by those that serve a split and by further test sets; and the split of every sample."""
    for name in serving:
        declared = [sample.name for sample in main.samples if sample.split == name]
        if declared:
            raise InputError(
                f"{main.root} declares a split {name!r} itself ({len(declared)} images) and {name}= names other data for it: give the "
                f"latter in tests=, or take the split out of the former"
            )
    for name in tests:
        if name in (*SPLITS, "all") or name.startswith("test/"):
            raise InputError(f"a test set cannot be called {name!r}: give it another name in tests=")
    listings = {name: _other(name, given, main.classes, labels) for name, given in {**serving, **tests}.items()}
    # what other data serve takes no share of the main ones
    shares = [0.0 if name in serving else share for name, share in zip(SPLITS, fractions)]
    if not sum(shares) > 0:
        raise InputError("nothing is left for path to be: fractions of the splits that other data do not serve are all 0")
    if serving:
        shares = [share / sum(shares) for share in shares]
    splits = list(split(main, tuple(shares), seed, keep_groups))
    samples = list(main.samples)
    for name, listing in listings.items():
        declared = name if name in serving else None
        samples += [replace(sample, name=f"{name}:{sample.name}", split=declared) for sample in listing.samples]
        splits += [name] * len(listing.samples)
    everything = [main, *listings.values()]
    return (
        replace(
            main,
            samples=tuple(samples),
            images_without_mask=tuple(sample.name for sample in samples if sample.mask is None),
            masks_without_image=tuple(name for one in everything for name in one.masks_without_image),
            ignored=tuple(name for one in everything for name in one.ignored),
        ),
        splits,
    )


def _other(name: str, given: str | Mapping[str, Any], classes: tuple[str, ...], labels: bool) -> Listing:
    options = {"path": given} if isinstance(given, (str, os.PathLike)) else dict(given)
    unknown = [key for key in options if key not in _SOURCE]
    if unknown or "path" not in options:
        what = f"has no option {unknown[0]!r}" if unknown else "needs a path"
        raise InputError(f"{name}: {what}; a test set or split is a path, or a dict of {', '.join(_SOURCE)}")
    return list_samples(options.pop("path"), **options, classes=classes or None, labels=labels)

