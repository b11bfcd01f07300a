"""`ISNetModule`: an ISNet, its loss and how it is trained, as a LightningModule."""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.spec import InputSpec
from ..errors import InputError, one_line
from ..isnet.loss import ISNetLoss, LossParts
from ..isnet.module import ISNet, ISNetOutput
from ..rules import RULES, Epsilon, Rule, presets
from .backbone import build_backbone, load_weights
from .scores import HEATMAP_TERMS, Mean, Scores

__all__ = ["OPTIMIZERS", "SCHEDULES", "VARIANTS", "ISNetModule"]

VARIANTS = ("stochastic", "selective", "dual", "original", "contrast", "standard")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("none", "cosine", "step", "plateau")
STATE = "isnet"  # the checkpoint's entry for what is neither a weight nor a setting
# What randomness is for: draws of one kind never depend on how many another kind made.
AUGMENT, STEP, EVALUATE = 0, 1, 2
TRAIN_MEANS = ("loss", "classification", "accuracy", *HEATMAP_TERMS, "swapped")  # checkpoints hold them in this order


class ISNetModule(pl.LightningModule):
    """Trains an `fisnet_cuda.ISNet` on batches of `fisnet_cuda.data.module.MaskedImageData`.

    A batch is a dict: ``image`` float ``[N, C, H, W]`` (normalised by ``spec``), ``mask`` float ``[N, 1, H, W]`` in [0, 1],
    ``has_mask`` bool ``[N]``, ``label`` int64 ``[N]`` (-1: not known; such samples train the heatmap only) and ``index`` int64 ``[N]``;
    where the data swap backgrounds, ``swapped`` bool ``[N]``, whose share is logged as train/swapped.

    Logits and heatmaps are computed by ``self.net`` inside `training_step`, so DDP, autocast, GradScaler and ``torch.compile`` see an
    ordinary forward. Every random draw of a step (augmentation, dropout, Stochastic's class, Contrast's weights) is a function of
    the seed, the epoch, the batch's number in it and the process's rank: training goes on bit by bit the same wherever it was stopped
    and resumed.

    In a checkpoint the model's own ``state_dict`` is found under "net."; settings are plain numbers, texts, lists and dicts.

    Args:
        spec: what an image is and how the classes are called, an `InputSpec` or its `to_dict`; the command line takes it from the data.
        backbone: import path of what makes the classifier, "package.module.callable" or "file.py:callable" (see `build_backbone`).
        backbone_args: its keyword arguments.
        weights: a file with a ``state_dict`` to start from.
        variant: "stochastic", "selective", "dual" or "original" of the papers, or "contrast", ours (see `ISNet`); "standard": the
            plain classifier, no heatmap loss.
        eps: epsilon of LRP-epsilon, in units of a pre-activation, or of its scale with ``relative_eps``.
        relative_eps: epsilon is relative to the scale (root mean square) of each layer's activations.
        eta_eps: ``t`` of Selective's eta.
        select: Selective's class: "lowest", "random" or "top".
        first_layer: "zb" (bounds of the input from ``spec``) or "epsilon".
        rules: a preset's name, or ``{layer or glob or "conv" | "linear" | "first": rule}`` with a rule as
            ``{"rule": "gamma", "gamma": 0.25}`` or a name alone.
        supervise: names of layers whose inner maps are supervised, too.
        P: weight of the heatmap loss in [0, 1], or ``{epoch: P}`` that names epoch 0.
        d: decay of the background loss's GWRP over pixels, in [0, 1]; 0 = maximum, 1 = mean; about the mean of the 1 / (1 - d) worst
            pixels. Larger is steadier, and sees a small mark less.
        E: a background of E times the foreground's mean relevance has the activation 1/2.
        w1: weight of the background loss.
        w2: weight of the foreground loss.
        c1: lower end of the natural range of a map's absolute relevance; replaced when it is tuned.
        c2: its upper end; likewise.
        foreground: what a map above c2 costs: "hybrid", "L2" or "L1".
        normalization: of the background loss, "absRoIMean", "RoIMean" or "none".
        d_loss: decay of the GWRP over layers, with ``supervise``.
        tune_epochs: so many epochs train the classifier alone, then C1 and C2 are set from its heatmaps (`TuneC1C2`).
        tune_batches: how many batches that uses, spread over the training split; None: all.
        optimizer: "sgd", as in the papers, "adam" or "adamw" (these want a smaller ``lr``, such as 1e-3).
        lr: learning rate.
        momentum: of SGD; Adam's and AdamW's beta_1.
        weight_decay: of the optimizer.
        schedule: of the learning rate: "none"; "cosine" to 0 at the last step; "step", a tenth of it from the middle of the steps
            on and a hundredth from three quarters on; "plateau", a tenth of it each time that val/loss has not fallen for 10 epochs.
        warmup_steps: the learning rate rises linearly to ``lr`` over so many optimizer steps.
        label_smoothing: of the cross entropy, in [0, 1).
        class_weights: of the cross entropy: None, "balanced" (by the training labels: n / (classes * n_c)) or one for each class.
        channels_last: memory layout of weights and images; the fast one.
        compile: ``torch.compile`` the network when training starts.
        seed: of the initial weights and of every step.

    Attributes:
        net: the `ISNet`; ``net.model`` is the backbone.
        loss: the `ISNetLoss`.
        spec: the `InputSpec`.
        tuning: True while the classifier is trained alone: val/loss is not comparable to what comes later.

    Raises:
        InputError: a setting cannot be used; says which and what to do.

    Example:
        >>> spec = InputSpec((16, 16), 1, ("normal", "TB"))
        >>> module = ISNetModule(spec, backbone="fisnet_cuda.nets.small", variant="selective")
        >>> module.explain(torch.rand(3, 1, 16, 16), target="predicted").heatmaps.shape
        torch.Size([3, 1, 1, 16, 16])
    """

    def __init__(
        self,
        spec: InputSpec | dict[str, Any] | None = None,
        backbone: str = "fisnet_cuda.nets.resnet18",
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        variant: str = "stochastic",
        eps: float = 0.01,
        relative_eps: bool = False,
        eta_eps: float = 0.01,
        select: str = "lowest",
        first_layer: str = "zb",
        rules: str | dict[str, Any] | None = None,
        supervise: list[str] | None = None,
        P: float | dict[int, float] = 0.7,
        d: float = 0.9,
        E: float = 1.0,
        w1: float = 1.0,
        w2: float = 3.0,
        c1: float | list[float] | dict[str, float | list[float]] = 1.0,
        c2: float | list[float] | dict[str, float | list[float]] = 25.0,
        foreground: str = "hybrid",
        normalization: str = "absRoIMean",
        d_loss: float = 0.8,
        tune_epochs: int = 0,
        tune_batches: int | None = None,
        optimizer: str = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: str = "none",
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        class_weights: str | list[float] | None = None,
        channels_last: bool = True,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if spec is None:
            raise InputError("spec is missing: ISNetModule must know the images and classes; pass the data module's .spec")
        self.spec = _spec(spec)
        settings["spec"] = self.spec.to_dict()
        settings["supervise"] = list(supervise or ())
        settings["backbone_args"] = dict(backbone_args or {})
        settings = plain(settings)
        # not save_hyperparameters(): under LightningCLI that takes the command line's view, with an InputSpec in it
        self._set_hparams(settings)
        self._hparams_initial = type(self.hparams)(settings)
        self._hparams_name = "kwargs"
        self._check(settings)

        self.variant, self.seed = variant, int(seed)
        with self._initial_randomness():
            model = build_backbone(backbone, backbone_args, self.spec)
        if weights is not None:
            load_weights(model, weights)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.net = self._make_net(model, settings)
        self._class_weights: list[float] | None = class_weights if isinstance(class_weights, list) else None
        self.classification = _Classification(label_smoothing, self._class_weights)
        self._logged = -1  # epoch whose means Lightning knows of
        self._seeded: tuple[int, int] | None = None  # epoch and batch that the random state is set for
        self._tuned: dict[str, dict[str, list[float]]] | None = None
        self._set_loss(c1, c2)
        self.train_means = nn.ModuleDict({name: Mean() for name in TRAIN_MEANS})
        self.val_scores, self.test_scores = Scores(len(self.spec.classes)), Scores(len(self.spec.classes))

    # ---- construction ------------------------------------------------------------------------------------------------

    def _check(self, settings: Mapping[str, Any]) -> None:
        for name, allowed in (("variant", VARIANTS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if settings[name] not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {settings[name]!r}")
        for name, low, high in (
            ("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf), ("label_smoothing", 0, 1),
            ("tune_epochs", 0, math.inf), ("warmup_steps", 0, math.inf),
        ):  # fmt: skip
            value = settings[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
                expected = f"in [{low}, {high}]" if high < math.inf else f"finite and >= {low}"
                raise InputError(f"{name} must be {expected}, got {value!r}")
        if settings["lr"] == 0:
            raise InputError("lr must be > 0: with 0 nothing is learned")
        if settings["tune_batches"] is not None and settings["tune_batches"] < 1:
            raise InputError(f"tune_batches must be at least 1, or left out for all batches, got {settings['tune_batches']}")
        if settings["tune_epochs"] and settings["variant"] == "standard":
            raise InputError("tune_epochs is for the heatmap loss, which variant 'standard' does not have: leave it out")
        weights = settings["class_weights"]
        if weights is None or weights == "balanced":
            return
        if isinstance(weights, str) or len(weights) != len(self.spec.classes) or min(weights) < 0 or max(weights) == 0:
            raise InputError(f"class_weights must be 'balanced' or one number >= 0 for each of the {len(self.spec.classes)} classes "
                             f"({', '.join(self.spec.classes[:10])}), got {weights!r}")  # fmt: skip

    def _make_net(self, model: nn.Module, settings: Mapping[str, Any]) -> ISNet:
        standard = settings["variant"] == "standard"
        example = torch.full((1, self.spec.channels, *self.spec.size), 0.5)
        parameter = next(model.parameters(), None)
        example = self.spec.normalise(example)
        try:
            return ISNet(
                model,
                # the plain classifier is explained, when it is asked for, by the logit of the class that it tells
                variant="selective" if standard else settings["variant"],
                select="top" if standard else settings["select"],
                multilabel=standard,
                eps=Epsilon(settings["eps"], relative=settings["relative_eps"]),
                eta_eps=settings["eta_eps"],
                first_layer=settings["first_layer"],
                input_low=self.spec.low,
                input_high=self.spec.high,
                supervise=settings["supervise"],
                rules=_rules(settings["rules"]),
                example_input=example.to(parameter) if parameter is not None else example,
            )
        except (TypeError, ValueError) as error:  # UnsupportedModelError, too: names the layer
            raise InputError(f"{settings['backbone']} as ISNet: {one_line(error)}") from error

    @contextmanager
    def _initial_randomness(self) -> Iterator[None]:
        """Initial weights are a function of the seed alone, and building a module leaves the caller's random state as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the GPUs, too
            yield

    def _set_loss(self, c1: Any, c2: Any) -> None:
        h = self.hparams
        try:
            loss = ISNetLoss(
                0.0 if self.variant == "standard" else h["P"], h["d"], h["E"], h["w1"], h["w2"], c1, c2, h["foreground"],
                h["normalization"], h["d_loss"], classification_loss=self.classification,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise InputError(one_line(error)) from error
        if hasattr(self, "loss"):
            loss.set_epoch(self.loss.epoch)
            loss.checked = self.loss.checked
        self.loss = loss.to(self.device)

    # ---- C1 and C2 ---------------------------------------------------------------------------------------------------

    @property
    def tuning(self) -> bool:
        """Whether the classifier is still trained alone, before C1 and C2 are tuned."""
        return self.hparams["tune_epochs"] > 0 and self._tuned is None

    @property
    def tuned(self) -> dict[str, dict[str, list[float]]] | None:
        """``{"c1": {layer: [value of each map]}, "c2": ...}`` once they are tuned, else None."""
        return self._tuned

    def set_ranges(self, c1: Mapping[str, Any], c2: Mapping[str, Any]) -> None:
        """C1 and C2 as `fisnet_cuda.tune_c1_c2` returns them; they go into checkpoints."""
        self._tuned = {
            name: {layer: [float(v) for v in values] for layer, values in given.items()} for name, given in (("c1", c1), ("c2", c2))
        }
        self._set_loss(self._tuned["c1"], self._tuned["c2"])

    # ---- running -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of prepared images."""
        return self.net(self._input(x))

    def explain(self, x: Tensor, target: Tensor | int | str | None = None, labels: Tensor | None = None) -> ISNetOutput:
        """Logits and heatmaps in eval mode, without gradients; modes and random state stay as they are.

        Args:
            x: prepared images ``[N, C, H, W]``, on any device.
            target: what is explained. None: what the variant explains in training ("standard": the predicted class);
                "predicted" or "label" (then ``labels`` are needed): that class's logit; or classes ``[N]``, ``[N, K]``, an int.
            labels: ``[N]``, where ``target="label"``; samples of unknown label (-1) are explained by the predicted class.

        Returns:
            An `ISNetOutput`: logits ``[N, C]``, heatmaps ``[N, K, C_in, H, W]``, explained classes ``[N, K]``.

        Raises:
            InputError: the target is not one of these.
        """
        x = self._input(x.to(self.device))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in devices)):
                generator.manual_seed(self._number(EVALUATE, 0, 0))  # torch.manual_seed would seed all other GPUs, too
            if isinstance(target, str):
                if target not in ("predicted", "label") or (target == "label" and labels is None):
                    raise InputError(f"target must be 'predicted', 'label' (with labels), classes or None, got {target!r}")
                predicted = self._logits(x).argmax(1)
                target = predicted if target == "predicted" else torch.where(labels.to(x.device) >= 0, labels.to(x.device), predicted)
            return self.net._explain(x, target, False)

    def _logits(self, x: Tensor) -> Tensor:
        modes = {module: module.training for module in self.net.modules()}
        try:
            self.net.eval()
            return self.net(x)
        finally:
            for module, training in modes.items():
                module.training = training

    def _input(self, x: Tensor) -> Tensor:
        parameter = next(self.net.parameters(), None)
        x = x.to(parameter.dtype) if parameter is not None else x
        return x.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] and x.dim() == 4 else x

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, labels = self._input(batch["image"]), batch["label"]
        if self.variant == "standard" or self.tuning:
            out, masks, has_mask = SimpleNamespace(logits=self.net(x), heatmaps=None), None, None
        else:
            out, masks, has_mask = self.net(x, relevance=True), batch["mask"], batch["has_mask"]
        P = self.loss.P_now
        total, parts = self._loss(out, labels, masks, has_mask)
        if masks is None and P > 0:  # the classifier alone, at its full weight
            with torch.autocast(total.device.type, enabled=False):
                total = self.classification(out.logits.float(), labels)
        with torch.no_grad():
            self._note_step(total, parts, out.logits, labels, masks is not None, batch.get("swapped"))
        self.log("loss", total.detach(), on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return {"loss": total, "total": total.detach()}

    def _loss(self, out: Any, labels: Tensor, masks: Tensor | None, has_mask: Tensor | None) -> tuple[Tensor, LossParts]:
        try:
            return self.loss(out, labels, masks, has_mask=has_mask)
        except ValueError as error:  # what its checks of the first batch have found
            raise InputError(one_line(error)) from error

    def _note_step(
        self, total: Tensor, parts: LossParts, logits: Tensor, labels: Tensor, heatmaps: bool, swapped: Tensor | None
    ) -> None:
        known = labels >= 0
        labelled, with_mask = known.sum(), parts.counts["with_mask"]
        samples = torch.full_like(labelled, len(labels))
        accuracy = ((logits.argmax(1) == labels) & known).sum() / labelled.clamp(min=1)
        noted = {"loss": (total, samples), "classification": (parts.classification, labelled), "accuracy": (accuracy, labelled)}
        if heatmaps:
            noted.update({name: (getattr(parts, name), with_mask) for name in HEATMAP_TERMS})
        if swapped is not None:
            noted["swapped"] = (swapped.float().mean(), samples)
        means = [self.train_means[name] for name in noted]
        Mean.update_all(means, [value.float() for value, _ in noted.values()], [weight for _, weight in noted.values()])
        if self._logged != self.current_epoch:  # once an epoch: Lightning asks a logged metric for its value at the end
            self._logged = self.current_epoch
            for name, mean in zip(noted, means):
                self.log(f"train/{name}", mean, on_step=False, on_epoch=True)

    def _evaluate(self, batch: Mapping[str, Tensor], scores: Scores) -> None:
        x, labels = self._input(batch["image"]), batch["label"]
        if self.tuning:
            logits, terms, with_mask = self.net(x), None, batch["has_mask"].sum()
        else:
            out = self.net(x, relevance=True)
            _, parts = self._loss(out, labels, batch["mask"], batch["has_mask"])
            logits, with_mask = out.logits, parts.counts["with_mask"]
            terms = torch.stack([getattr(parts, name) for name in HEATMAP_TERMS])
        with torch.autocast(logits.device.type, enabled=False):
            loss, weight = self.classification.terms(logits.float(), labels)
        scores.update(logits, labels, loss, weight, terms, with_mask)

    def _log_scores(self, scores: Scores, split: str) -> None:
        results = scores.compute()
        P = 0.0 if self.tuning else self.loss.P_now
        if self.variant == "standard":  # heatmap and foreground compare with C1 and C2, which are an ISNet's
            results = {name: value for name, value in results.items() if name not in ("heatmap", "foreground")}
        loss = (1 - P) * results["classification"] + P * results.get("heatmap", torch.zeros_like(results["classification"]))
        for name, value in {"loss": loss, **results}.items():
            shown = name in ("loss", "accuracy")
            # every process has the same number already; Lightning wants to be told to average it
            self.log(f"{split}/{name}", value.float(), on_step=False, on_epoch=True, sync_dist=True, prog_bar=shown)
        scores.reset()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_scores)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.test_scores)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``index``, ``label`` (-1 where unknown) and ``probabilities`` ``[N, classes]`` of a batch."""
        return {"index": batch["index"], "label": batch["label"], "probabilities": self(batch["image"]).float().softmax(1)}

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.hparams["class_weights"] == "balanced" and self._class_weights is None and stage == "fit":
            self._class_weights = self._balanced_weights()
            self.classification.set_weights(self._class_weights)
        if stage != "fit":
            return
        self._check_data(getattr(self.trainer, "datamodule", None))
        tune_epochs, last = self.hparams["tune_epochs"], self.trainer.max_epochs
        if self.tuning and last is not None and 0 < last <= tune_epochs:
            raise InputError(f"tune_epochs is {tune_epochs} and training ends after {last} epochs: none is left for the heatmap loss")
        if self.hparams["compile"]:
            self.net.compile()

    def _check_data(self, data: Any) -> None:
        if self.variant != "standard" and hasattr(data, "subset"):
            subset = data.subset("train")
            if not bool(subset.store.has_mask[subset.indices].any()):
                raise InputError(f"none of the {len(subset)} training images has a mask, and variant {self.variant!r} learns from "
                                 f"masks: say where they are, or train the plain classifier with variant 'standard'")  # fmt: skip
        if self.hparams["schedule"] == "plateau" and "val" not in getattr(data, "splits", ["val"]):
            raise InputError("schedule 'plateau' goes by val/loss, and there is no validation split: choose another")

    def configure_callbacks(self) -> list[pl.Callback]:
        from .tuning import TuneC1C2

        there = self._trainer is not None and any(isinstance(callback, TuneC1C2) for callback in self._trainer.callbacks)
        return [TuneC1C2()] if self.hparams["tune_epochs"] > 0 and not there else []

    def on_train_epoch_start(self) -> None:
        self._start_means()

    def on_train_start(self) -> None:
        self._logged = -1

    def _start_means(self) -> None:
        for mean in self.train_means.values():
            mean.reset()

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Augmentation comes next, in on_after_batch_transfer, and on_train_batch_start only after it. Not the public hook of
        # this name, of which Lightning calls either the module's (with a warning) or the data module's.
        trainer = self._trainer
        if trainer is not None and trainer.training:
            self._seeded = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            self.reseed(AUGMENT, *self._seeded)
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._seeded != (self.current_epoch, batch_idx):
            raise RuntimeError(f"lightning {pl.__version__} did not announce batch {batch_idx} of epoch {self.current_epoch} before "
                               f"its augmentation, so no resume would be exact: please report this")  # fmt: skip
        self.reseed(STEP, self.current_epoch, batch_idx)
        # on_train_epoch_start is not called when resuming in mid-epoch, nor when resuming right behind an epoch's last batch: in the
        # first case the sums are those of this epoch and go on, in the second they are of the one before
        if self.loss.epoch != self.current_epoch:
            self._start_means()
        self.loss.set_epoch(self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        self.val_scores.reset()

    def on_test_epoch_start(self) -> None:
        self.test_scores.reset()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.reseed(EVALUATE, dataloader_idx, batch_idx)  # the same draws in every epoch

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.reseed(EVALUATE, dataloader_idx, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores(self.val_scores, "val")

    def on_test_epoch_end(self) -> None:
        self._log_scores(self.test_scores, "test")

    def reseed(self, purpose: int, epoch: int, batch: int) -> None:
        """Sets the random state of torch, Python and numpy to a function of seed, purpose, epoch, batch and rank."""
        number = self._number(purpose, epoch, batch)
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)

    def _number(self, purpose: int, epoch: int, batch: int) -> int:
        rank = self._trainer.global_rank if self._trainer is not None else 0
        packed = struct.pack("<5q", self.seed, purpose, epoch, batch, rank)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sums = torch.stack([mean.sums for mean in self.train_means.values()])
        if self._trainer is not None and self._trainer.world_size > 1:
            sums = self.all_gather(sums)
        checkpoint[STATE] = {
            "tuned": self._tuned,
            "class_weights": self._class_weights,
            "epoch": self.loss.epoch,
            "train_means": sums.view(-1, len(self.train_means), 2).cpu(),  # of each process
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(STATE)
        if state is None:
            raise InputError("the checkpoint was not written by ISNetModule: start from its weights instead, with weights=")
        if state["class_weights"] is not None:
            self._class_weights = list(state["class_weights"])
            self.classification.set_weights(self._class_weights)
        if state["tuned"] is not None:
            self.set_ranges(state["tuned"]["c1"], state["tuned"]["c2"])
        self.loss.set_epoch(state["epoch"])
        self._restore_means(state["train_means"])

    def _restore_means(self, sums: Tensor) -> None:
        """Every process takes up its own sums again; with another number of processes, the first has all of them."""
        rank, world = (self._trainer.global_rank, self._trainer.world_size) if self._trainer is not None else (0, 1)
        if len(sums) != world:
            sums = torch.cat([sums.sum(0, keepdim=True), torch.zeros_like(sums[:1]).expand(world - 1, -1, -1)])
        for mean, own in zip(self.train_means.values(), sums[rank]):
            mean.sums = own.to(mean.sums)
            mean._update_count += 1  # or torchmetrics warns that compute() came before update()

    # ---- optimisation ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = self._optimizer()
        warmup, schedule = h["warmup_steps"], h["schedule"]
        if schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10)
            schedulers: list[dict[str, Any]] = [{"scheduler": plateau, "interval": "epoch", "monitor": "val/loss"}]
            if warmup > 1:  # multiplies the rate step by step, so that both can share it
                rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
                schedulers.append({"scheduler": rising, "interval": "step"})
            return [optimizer], schedulers
        if schedule == "none" and warmup == 0:
            return optimizer
        steps = math.inf
        if schedule != "none":
            steps = self.trainer.estimated_stepping_batches
            if not 0 < steps < math.inf:
                raise InputError(f"schedule {schedule!r} needs to know when training ends: set max_epochs or max_steps")
            if warmup >= steps:
                raise InputError(f"warmup_steps is {warmup} and training has {int(steps)} steps: nothing is left for the schedule")

        def factor(step: int) -> float:  # a function: its numbers stay out of checkpoints, so that max_epochs may be raised
            if step < warmup:
                return (step + 1) / warmup
            if schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))
            if schedule == "step":
                return 0.01 if step >= 0.75 * steps else 0.1 if step >= 0.5 * steps else 1.0
            return 1.0

        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}]

    def _optimizer(self) -> torch.optim.Optimizer:
        h = self.hparams
        common = {"lr": h["lr"], "weight_decay": h["weight_decay"]}
        if h["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), momentum=h["momentum"], **common)
        kind = torch.optim.Adam if h["optimizer"] == "adam" else torch.optim.AdamW
        return kind(self.parameters(), betas=(h["momentum"], 0.999), **common)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is not None and self.tuning:
            return  # val/loss is of the classifier alone, and would be the best for ever
        super().lr_scheduler_step(scheduler, metric)

    def _balanced_weights(self) -> list[float]:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "listing") or not hasattr(data, "splits"):
            raise InputError("class_weights='balanced' counts the labels of a MaskedImageData: with other data give a list of numbers")
        labels = [s.label for s, split in zip(data.listing.samples, data.splits) if split == "train" and s.label is not None]
        counts = [labels.count(c) for c in range(len(self.spec.classes))]
        absent = [name for name, count in zip(self.spec.classes, counts) if count == 0]
        if absent:
            raise InputError(f"class_weights='balanced': no training image is of class {absent[0]!r}; give the weights as a list")
        return [len(labels) / (len(counts) * count) for count in counts]


class _Classification(nn.Module):
    """Cross entropy, mean over the samples of known label, weighted by class; 0 where there is none."""

    def __init__(self, label_smoothing: float, weights: list[float] | None) -> None:
        super().__init__()
        self.label_smoothing = float(label_smoothing)
        self.register_buffer("weights", None, persistent=False)
        if weights is not None:
            self.set_weights(weights)

    def set_weights(self, weights: list[float]) -> None:
        device = self.weights.device if self.weights is not None else None
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the samples, and what to divide it by."""
        weights = None if self.weights is None else self.weights.to(logits)
        total = F.cross_entropy(logits, labels, weights, reduction="sum", ignore_index=-1, label_smoothing=self.label_smoothing)
        known = labels >= 0
        share = known.to(logits.dtype) if weights is None else torch.where(known, weights[labels.clamp(min=0)], 0)
        return total, share.sum()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, share = self.terms(logits, labels)
        return total / torch.where(share > 0, share, 1)


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts, as a checkpoint that is loaded with ``weights_only=True`` may hold them."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, int) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _spec(spec: InputSpec | Mapping[str, Any]) -> InputSpec:
    try:
        return InputSpec.of(spec)
    except TypeError as error:
        raise InputError(f"spec must be an InputSpec or what its to_dict() gives: {one_line(error)}") from error


def _rules(given: str | Mapping[str, Any] | None) -> Any:
    """What a config file can say of rules, as `fisnet_cuda.rules.resolve` takes it."""
    if not isinstance(given, Mapping):
        return given
    return {layer: _rule(layer, rule) for layer, rule in given.items()}


def _rule(layer: str, given: Any) -> Rule:
    if isinstance(given, RULES):
        return given
    known = {kind.__name__.lower(): kind for kind in RULES}
    options = {"rule": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = str(options.pop("rule", "")).lower().replace("-", "").replace("_", "")
    if name not in known:
        hint = f"; the presets {', '.join(sorted(presets()))} are for the whole net" if isinstance(given, str) else ""
        raise InputError(f"rules: {layer!r} must be {{'rule': one of {', '.join(sorted(known))}, ...}}, got {given!r}{hint}")
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"rules: {layer!r}: {one_line(error)}") from error
