"""What is measured while training: means over an epoch, and how well a split is classified, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

__all__ = ["HEATMAP_TERMS", "Mean", "Scores", "log_odds"]

HEATMAP_TERMS = ("heatmap", "background", "foreground", "background_share")


class Mean(Metric):
    """A weighted mean over batches and processes; without a host sync until `compute`, NaN when nothing was counted.

    Example:
        >>> mean = Mean()
        >>> mean.update(torch.tensor(1.0), torch.tensor(3))
        >>> mean.update(torch.tensor(5.0), torch.tensor(1))
        >>> mean.compute()
        tensor(2., dtype=torch.float64)
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # [weighted sum, weight]; float64, so that an epoch's many steps lose nothing, where the device has it
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("sums", default=torch.zeros(2, dtype=dtype), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        weight = weight.to(self.sums.dtype)
        self.sums = self.sums + torch.stack([value.detach().to(self.sums.dtype) * weight, weight])

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]

    @staticmethod
    def update_all(means: list[Mean], values: list[Tensor], weights: list[Tensor]) -> None:
        """`update` of many at once, in a few launches: this is done in every step of a training."""
        dtype = means[0].sums.dtype
        weight = torch.stack(weights).to(dtype)
        rows = torch.stack([torch.stack(values).to(dtype) * weight, weight], 1)
        torch._foreach_add_([mean.sums for mean in means], list(rows.unbind()))
        for mean in means:
            mean._update_count, mean._computed = mean._update_count + 1, None


class Scores(Metric):
    """Classification loss, heatmap terms, accuracy, balanced accuracy, macro-F1 and AUROC of a split, each sample counted once.

    Samples of unknown label (-1) count for the heatmap terms only. Balanced accuracy is the mean recall of the classes that occur,
    macro-F1 the mean over classes that occur or were predicted, AUROC one against the rest, mean over the classes that have both
    positives and negatives (NaN when none has).

    Args:
        classes: number of logits.
    """

    full_state_update = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("terms", default=torch.zeros(1 + len(HEATMAP_TERMS), 2, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("confusion", default=torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")
        # scores (`log_odds`) and label of a sample in a row, flattened: a process without samples can take part with an empty one
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor, weight: Tensor, terms: Tensor | None, with_mask: Tensor) -> None:
        """``loss``: sum of the classification loss and ``weight`` what to divide it by; ``terms [4]``: means over ``with_mask``."""
        dtype = self.terms.dtype
        rows = [torch.stack([loss.to(dtype), weight.to(dtype)])]
        count = with_mask.to(dtype) if terms is not None else None
        for i in range(len(HEATMAP_TERMS)):
            rows.append(self.terms.new_zeros(2) if count is None else torch.stack([terms[i].to(dtype) * count, count]))
        self.terms = self.terms + torch.stack(rows)
        known = labels >= 0
        logits, labels = logits[known].float(), labels[known]
        pairs = labels * self.classes + logits.argmax(1)
        self.confusion = self.confusion + torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
        self.rows.append(torch.cat([log_odds(logits), labels.float().unsqueeze(1)], 1).flatten())

    def compute(self) -> dict[str, Tensor]:
        confusion = self.confusion.double() if self.terms.dtype == torch.float64 else self.confusion.float()
        hits, actual, told = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        means = self.terms[:, 0] / self.terms[:, 1].clamp(min=1e-12)
        results = {"classification": means[0]}
        if bool(self.terms[1, 1] > 0):
            results.update(zip(HEATMAP_TERMS, means[1:]))
        results["accuracy"] = hits.sum() / actual.sum()
        results["balanced_accuracy"] = (hits / actual)[actual > 0].mean()
        results["macro_f1"] = (2 * hits / (actual + told))[actual + told > 0].mean()
        results["auroc"] = self._auroc()
        return results

    def _auroc(self) -> Tensor:
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows) if self.rows else self.terms.new_zeros(0)
        rows = rows.view(-1, self.classes + 1)
        labels = rows[:, -1].long()
        values = []
        for c in range(self.classes):
            positive = labels == c
            if positive.any() and not positive.all():
                # ranks, since binary_auroc takes what is not in [0, 1] through a sigmoid, which saturates
                distinct, rank = rows[:, c].unique(return_inverse=True)
                values.append(binary_auroc(rank.to(self.terms.dtype) / len(distinct), positive.long()))
        return torch.stack(values).mean() if values else rows.new_tensor(float("nan"))


def log_odds(logits: Tensor) -> Tensor:
    """``log P_c - log(1 - P_c)`` of logits ``[N, C]``: sorts samples as the probabilities do, which soon are 1.0 for all in float32.

    Example:
        >>> log_odds(torch.tensor([[100.0, 0.0], [90.0, 0.0]]))
        tensor([[ 100., -100.],
                [  90.,  -90.]])
    """
    logp = logits.log_softmax(1)
    top = logits.argmax(1, keepdim=True)
    rest = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)  # of all others: 1 - P of the top one would cancel
    return (logp - torch.log1p(-logp.exp())).scatter(1, top, logits.gather(1, top) - rest)
