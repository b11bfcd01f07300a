"""`Store`: every image and mask decoded once, at the network's size, in memory or in a file on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import make_folder, write_json
from ..progress import Progress
from .images import Facts, read_sample
from .samples import ArrayItem, Listing, Sample
from .spec import InputSpec

__all__ = ["CACHES", "Store", "cache_folder"]

CACHES = ("memory", "disk")
FORMAT = 1  # of what lies on disk; raise it whenever the same files would be decoded to other pixels
SHOWN = 5  # unreadable files that an error names


class Store:
    """The pixels of a data set as the network takes them, but for the normalisation: uint8, all of one size.

    Usually made by `Store.build`. ``store.images[i]`` belongs to ``listing.samples[i]``.

    Args:
        images: uint8 ``[n, C, H, W]``.
        masks: uint8 ``[n, 1, H, W]``, 255: foreground; 0 everywhere where there is none.
        has_mask: bool ``[n]``.
        labels: int64 ``[n]``, -1: unknown.
        facts: what was found when each sample was decoded, for the report; empty where nobody decoded anything.
        folder: where the arrays lie on disk; None: in memory.
    """

    def __init__(
        self,
        images: Tensor,
        masks: Tensor,
        has_mask: Tensor,
        labels: Tensor,
        facts: Sequence[Facts] = (),
        folder: Path | None = None,
    ) -> None:
        self.images, self.masks, self.has_mask, self.labels = images, masks, has_mask, labels
        self.facts, self.folder = tuple(facts), folder

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hashes(self) -> tuple[str, ...]:
        """sha256 (hex) of each decoded image before it was resized: equal for equal pixels, whatever the file's name or format."""
        return tuple(one.sha256 for one in self.facts)

    @property
    def nbytes(self) -> int:
        """Size of images and masks, bytes."""
        return self.images.numel() + self.masks.numel()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.folder is not None:  # a worker maps the same file instead of getting a copy of it
            del state["images"], state["masks"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            self.images, self.masks = _map(self.folder / "images.npy"), _map(self.folder / "masks.npy")

    @classmethod
    def build(
        cls,
        listing: Listing,
        spec: InputSpec,
        *,
        cache: str | None = "memory",
        cache_dir: str | Path | None = None,
        mask_threshold: float = 0.5,
        soft_masks: bool = False,
        invert_masks: bool = False,
        mask_values: Sequence[int] | None = None,
        workers: int | None = None,
        progress: bool = True,
    ) -> Store:
        """Decode everything, or take what an earlier run left on disk.

        Args:
            listing: the samples.
            spec: size, channels, fit and window of the images; its mean and std are not applied here.
            cache: "memory" (or None); or "disk": two files in a folder of ``cache_dir``, named by a hash of names, sizes and times of
                all files and of everything that decoding depends on, so that what is stale is never read. They are mapped, not
                read: the system keeps in memory what it has room for, and processes share it. Old ones stay until they are deleted.
            cache_dir: for "disk"; None: ``$FISNET_DATA_CACHE``, or the user's cache folder.
            mask_threshold: where masks are cut into foreground and background, in (0, 1].
            soft_masks: keep values in between instead of cutting.
            invert_masks: masks are white where the background is.
            mask_values: which label or palette values of the mask are foreground; None: everything but 0.
            workers: threads; None: one a core.
            progress: show a line of progress on standard error.

        Returns:
            The store; on "disk" its tensors must not be written to.

        Raises:
            InputError: files that cannot be read (the first of them by name, and how many), no room in memory or on the disk.
        """
        cache = cache or "memory"
        if cache not in CACHES:
            raise InputError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        masks = {
            "threshold": mask_threshold,
            "soft": soft_masks,
            "invert": invert_masks,
            "foreground": None if mask_values is None else list(mask_values),
        }
        decode = _Decoder(listing.samples, spec, masks, workers or _cores(), progress)
        if cache == "memory":
            return cls._in_memory(listing, spec, decode)
        return cls._on_disk(listing, spec, decode, cache_folder(cache_dir), masks)

    @classmethod
    def _in_memory(cls, listing: Listing, spec: InputSpec, decode: _Decoder) -> Store:
        n = len(listing.samples)
        need, free = n * (spec.channels + 1) * spec.size[0] * spec.size[1], _free_memory()
        if free is not None and need > 0.9 * free:
            raise InputError(
                f"{n} images of {spec.size[0]}x{spec.size[1]} take {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are "
                f"free: keep them on the disk, cache='disk', or take a smaller size"
            )
        images = torch.zeros(n, spec.channels, *spec.size, dtype=torch.uint8)
        masks = torch.zeros(n, 1, *spec.size, dtype=torch.uint8)
        facts = decode(images, masks)
        return cls(images, masks, *_known(listing), facts)

    @classmethod
    def _on_disk(cls, listing: Listing, spec: InputSpec, decode: _Decoder, root: Path, options: Mapping[str, Any]) -> Store:
        folder = root / _key(listing.samples, spec, options)
        found = _open(folder, listing)
        if found is not None:
            return found
        make_folder(root)
        try:
            temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
        except OSError as error:
            raise InputError(f"cannot write into {root}: {error.strerror}; name another folder by cache_dir") from None
        try:
            arrays = []
            for name, channels in (("images", spec.channels), ("masks", 1)):
                shape = (len(listing.samples), channels, *spec.size)
                _reserve(temporary / f"{name}.npy", shape)
                arrays.append(np.load(temporary / f"{name}.npy", mmap_mode="r+"))
            facts = decode(*(torch.from_numpy(array) for array in arrays))
            for array in arrays:
                array.flush()
            del arrays, array
            write_json(temporary / "store.json", {"format": FORMAT, "facts": [one._asdict() for one in facts]})
            temporary.chmod(0o755)
            if folder.exists():  # broken, or another process was faster
                found = _open(folder, listing)
                if found is not None:
                    return found
                shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.exists():
                    raise
        except OSError as error:
            raise InputError(f"cannot keep the images in {root}: {error.strerror or error}; name another folder by cache_dir") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = _open(folder, listing)
        if found is None:
            raise InputError(f"{folder} was changed while it was written: delete it and start again")
        return found


class _Decoder:
    """Decodes all samples into given tensors, several at a time."""

    def __init__(
        self, samples: Sequence[Sample], spec: InputSpec, masks: Mapping[str, Any], workers: int, progress: bool
    ) -> None:
        self.samples, self.spec, self.masks, self.workers, self.progress = samples, spec, masks, workers, progress

    def __call__(self, images: Tensor, masks: Tensor) -> list[Facts]:
        n = len(self.samples)
        facts: dict[int, Facts] = {}
        wrong: dict[int, str] = {}
        # a line only where there is something to wait for
        shown = Progress("reading images", n) if self.progress and n >= 200 else None
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:  # decoding and resizing leave the GIL
            jobs = {pool.submit(self._one, i, images, masks): i for i in range(n)}
            try:
                for done, job in enumerate(as_completed(jobs), start=1):
                    try:
                        facts[jobs[job]] = job.result()
                    except InputError as error:
                        wrong[jobs[job]] = str(error)
                    if shown is not None:
                        shown.update(done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if wrong:
            raise InputError(_unreadable([wrong[i] for i in sorted(wrong)], n))
        return [facts[i] for i in range(n)]

    def _one(self, i: int, images: Tensor, masks: Tensor) -> Facts:
        image, mask, facts = read_sample(self.samples[i], self.spec, **self.masks)
        images[i] = image
        if mask is not None:
            masks[i] = mask
        return facts


def _unreadable(errors: Sequence[str], n: int) -> str:
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{len(errors)} of {n} samples cannot be read: {'; '.join(errors[:SHOWN])}{more}"


def _known(listing: Listing) -> tuple[Tensor, Tensor]:
    """``(has_mask, labels)``, which need no pixels."""
    has_mask = torch.tensor([sample.mask is not None for sample in listing.samples], dtype=torch.bool)
    labels = torch.tensor([-1 if sample.label is None else sample.label for sample in listing.samples], dtype=torch.int64)
    return has_mask, labels


# ---- on disk -------------------------------------------------------------------------------------------------


def cache_folder(path: str | Path | None = None) -> Path:
    """Where ``cache="disk"`` keeps its files: ``path``, ``$FISNET_DATA_CACHE``, or ``fisnet_cuda/data`` in the user's cache folder.

    Example:
        >>> cache_folder("/data/cache").as_posix()
        '/data/cache'
    """
    if path is not None:
        return Path(path).expanduser()
    if os.environ.get("FISNET_DATA_CACHE"):
        return Path(os.environ["FISNET_DATA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fisnet_cuda" / "data"


def _key(samples: Iterable[Sample], spec: InputSpec, options: Mapping[str, Any]) -> str:
    """A hash of everything that the pixels depend on."""
    states: dict[Path, tuple[str, int, int]] = {}

    def state(ref: Path | ArrayItem | None) -> list[Any] | None:
        if ref is None:
            return None
        file = ref.file if isinstance(ref, ArrayItem) else ref
        if file not in states:
            try:
                found = file.stat()
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror}") from None
            states[file] = (str(file.resolve()), found.st_size, found.st_mtime_ns)
        return [*states[file], *(ref[1:] if isinstance(ref, ArrayItem) else ())]

    content = {
        "format": FORMAT,
        "spec": [list(spec.size), spec.channels, spec.fit, spec.window and list(spec.window)],
        "masks": dict(options),
        "samples": [[state(sample.image), state(sample.mask)] for sample in samples],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """An npy file of uint8 zeros whose space on the disk is really there: a full disk is an error now, not a crash later."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        begin, size = file.tell(), int(np.prod(shape))
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), begin, size)
        else:
            file.truncate(begin + size)


def _map(path: Path) -> Tensor:
    # copy-on-write: writes would stay in this process, and torch does not warn of a read-only array
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _open(folder: Path, listing: Listing) -> Store | None:
    """The store in a folder, or None where there is none, or none that is whole."""
    try:
        meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        images, masks = _map(folder / "images.npy"), _map(folder / "masks.npy")
        facts = [Facts(**one) for one in meta["facts"]]
        if meta["format"] != FORMAT or not len(images) == len(masks) == len(facts) == len(listing.samples):
            return None
        return Store(images, masks, *_known(listing), facts, folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


# ---- the machine ---------------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return 1024 * int(found["MemAvailable"]) if "MemAvailable" in found else None
