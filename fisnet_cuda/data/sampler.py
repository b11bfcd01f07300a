"""Which samples make up which batch: `EpochBatches`, and `EpochLoader`, the loader that stops and goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError

__all__ = ["EpochBatches", "EpochLoader"]


class EpochBatches(Sampler[list[int]]):
    """A batch sampler whose order is a pure function of the seed and the epoch.

    Global batches of ``batch_size * world`` positions are cut from the epoch's order, and process ``rank`` takes every
    ``world``-th position of each. So, step by step, ``world`` processes with batch B see together exactly what one process with
    batch ``world * B`` sees, and equal numbers of samples each, which makes the mean of their gradients the gradient of the mean.

    =======  =========  ============================================================================================
    shuffle  drop_last
    =======  =========  ============================================================================================
    True     True       training: whole global batches only, as many steps on every process
    True     False      training in one process, the last batch smaller (refused for several processes)
    False    False      evaluation: every sample exactly once over all processes, nothing padded; processes may
                        differ by one batch, and by one sample in the last
    False    True       whole batches in order
    =======  =========  ============================================================================================

    Args:
        labels_or_n: the number of samples, or their class indices (needed by ``balance``).
        batch_size: samples a batch in this process.
        seed: >= 0.
        shuffle: draw another order every epoch; False: 0, 1, 2, ... always.
        drop_last: leave out what does not fill a global batch (other samples every epoch, when shuffled).
        balance: every class takes the same share of the epoch, to a sample. An epoch stays as long as the data; classes that are
            too small are repeated, whole rounds of all their samples at a time, and classes that are too large are seen in part.
        rank, world: this process and the number of processes.

    Raises:
        InputError: nothing to draw from; fewer samples than processes, or than one global batch with ``drop_last``; ``balance``
            without labels; or a shuffled order for several processes without ``drop_last`` (they would take unequal numbers of
            steps and wait for each other for ever).

    Example:
        >>> one = EpochBatches(10, 4, shuffle=True, drop_last=True, seed=1)
        >>> a, b = (EpochBatches(10, 2, shuffle=True, drop_last=True, seed=1, rank=r, world=2) for r in (0, 1))
        >>> [sorted(x) for x in one] == [sorted(x + y) for x, y in zip(a, b)]
        True
    """

    def __init__(
        self,
        labels_or_n: int | Sequence[int] | Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        balance: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        labels = None if isinstance(labels_or_n, int) else np.asarray(labels_or_n, dtype=np.int64).reshape(-1)
        n = labels_or_n if isinstance(labels_or_n, int) else len(labels)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0 ... world - 1, got rank={rank}, world={world}")
        if n < 1:
            raise InputError("there are no samples to make batches of")
        if drop_last and n < batch_size * world:
            processes = f" in each of {world} processes" if world > 1 else ""
            raise InputError(f"batch_size is {batch_size}{processes} and there are only {n} samples: lower batch_size")
        if shuffle and not drop_last and world > 1:
            raise InputError("drop_last=False would give the processes unequal numbers of training steps: drop_last=True")
        if not shuffle and n < world:
            raise InputError(f"{n} samples cannot be shared by {world} processes: use fewer processes")
        if balance and (labels is None or not shuffle):
            raise InputError("balance=True needs the labels of the samples, and shuffle=True")
        if balance and labels.min() < 0:
            raise InputError(f"balance=True needs a label of every sample, and {int((labels < 0).sum())} have none: balance=False")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.shuffle, self.drop_last, self.balance = shuffle, drop_last, balance
        self.rank, self.world = rank, world
        self.epoch = 0
        self._members = [np.flatnonzero(labels == c) for c in np.unique(labels)] if balance else []
        self._resumed: tuple[int, int] | None = None  # epoch and batch that the next pass starts with

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning calls ``set_epoch`` on the sampler of a batch sampler, not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes."""
        self.epoch = epoch

    def order(self, epoch: int | None = None) -> np.ndarray:
        """All positions in the order in which that epoch takes them, before they are cut into batches, int64 ``[n]``."""
        if not self.shuffle:
            return np.arange(self.n)
        draw = np.random.default_rng((self.seed, self.epoch if epoch is None else epoch))
        if not self.balance:
            return draw.permutation(self.n)
        classes = len(self._members)
        shares = np.full(classes, self.n // classes)
        shares[draw.permutation(classes)[: self.n % classes]] += 1  # what is over goes to other classes every epoch
        parts = []
        for members, share in zip(self._members, shares):
            rounds = [draw.permutation(members) for _ in range(-(-share // len(members)))]
            parts.append(np.concatenate([*rounds, members[:0]])[:share])
        return draw.permutation(np.concatenate(parts))

    def __len__(self) -> int:
        """Batches of a whole epoch in this process, wherever a pass begins."""
        whole, rest = divmod(self.n, self.batch_size * self.world)
        return whole + (not self.drop_last and rest > self.rank)

    def __iter__(self) -> Iterator[list[int]]:
        order, step = self.order(), self.batch_size * self.world
        start, self._resumed = self.start, None
        for batch in range(start, len(self)):
            yield order[batch * step : (batch + 1) * step][self.rank :: self.world].tolist()

    @property
    def start(self) -> int:
        """The batch that the next pass starts with: 0, but for the first one after `load_state_dict`."""
        epoch, batch = self._resumed or (self.epoch, 0)
        return batch if epoch == self.epoch else 0

    def state_dict(self, position: int = 0) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with batch ``position`` of this epoch; the same on every process."""
        return {**self._identity(), "epoch": self.epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next pass where ``state`` says, if it is a pass through the same epoch.

        Raises:
            InputError: the data or the global batch are others, so that "the batches done" has no meaning here.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise InputError(
                    f"the checkpoint was saved in the middle of an epoch with {key.replace('_', ' ')} {state[key]}, and now it is "
                    f"{mine}: set it back, or start a new run from these weights"
                )
        self.epoch = state["epoch"]
        self._resumed = (state["epoch"], state["position"])

    def _identity(self) -> dict[str, Any]:
        step = self.batch_size * self.world
        return {"samples": self.n, "global_batch": step, "seed": self.seed, "shuffle": self.shuffle, "balance": self.balance}


class EpochLoader:
    """Batches of a dataset, resumable: ``state_dict`` says how many batches of the epoch were handed out, and after
    ``load_state_dict`` the next pass goes on behind them, without reading those again.

    It is what ``train_dataloader()`` returns. Lightning sees an iterable with a length and, by ``state_dict`` and
    ``load_state_dict``, a *stateful* one, whose state it keeps in the checkpoint (lightning/pytorch/loops/fit_loop.py). It is not
    a ``DataLoader``, but has one inside, since Lightning builds those anew with samplers of its own.

    * Handed out, not read: with workers, batches are read ahead of the training. Lightning asks for a batch when it is about to
      train on it, so that in ``on_train_batch_end``, where checkpoints in mid-epoch are taken, the two numbers agree.
    * A pass starts when its first batch is asked for, not when ``iter`` is called: Lightning calls ``iter`` before it says which
      epoch it is.
    * The length is that of the whole epoch, also in a pass that starts in the middle.

    Args:
        dataset: has ``__getitem__`` or ``__getitems__``.
        batches: which samples; its ``rank`` and ``world`` are this process's.
        collate: list of samples -> batch; None: torch's own. Where ``__getitems__`` makes whole batches, pass a function that returns
            what it gets.
        options: of ``DataLoader``: ``num_workers``, ``pin_memory``, ``persistent_workers``, ...

    Example:
        >>> loader = EpochLoader(range(6), EpochBatches(6, 2, shuffle=False, drop_last=False))
        >>> first = next(iter(loader)); state = loader.state_dict()
        >>> again = EpochLoader(range(6), EpochBatches(6, 2, shuffle=False, drop_last=False))
        >>> again.load_state_dict(state)
        >>> [batch.tolist() for batch in again], [batch.tolist() for batch in again]
        ([[2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]])
    """

    def __init__(
        self, dataset: Dataset[Any], batches: EpochBatches, collate: Callable[[Any], Any] | None = None, **options: Any
    ) -> None:
        self.dataset = dataset
        self.batch_sampler = batches
        self._loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options)
        self._position = 0

    @property
    def sampler(self) -> EpochBatches:
        """What Lightning calls ``set_epoch`` on."""
        return self.batch_sampler

    @property
    def batch_size(self) -> int:
        """Samples a batch in this process."""
        return self.batch_sampler.batch_size

    @property
    def num_workers(self) -> int:
        """Processes that read ahead."""
        return self._loader.num_workers

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes; for loops without Lightning."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing below runs before the first batch is asked for
        self._position = self.batch_sampler.start
        for batch in self._loader:
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out in it."""
        return self.batch_sampler.state_dict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on behind the batches of ``state``, if it is a pass through the same epoch.

        Raises:
            InputError: the data, the seed or the global batch are others.
        """
        self.batch_sampler.load_state_dict(state)
        self._position = state["position"]
