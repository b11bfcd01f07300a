"""MaskedImageData: subsets, batches and draws, by itself and in Lightning's hands."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("kornia")
pytest.importorskip("PIL")

from data import make
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

import fisnet_cuda.data
from fisnet_cuda.data.module import MaskedImageData, _draw
from fisnet_cuda.data.transforms import Augmentation, prepare
from fisnet_cuda.errors import InputError

SMALL = {"size": 16, "channels": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make.folder(root / "main", n=40)
    make.folder(root / "other", n=12, seed=1)
    make.table(root / "table", n=24, splits=True, groups=3)
    return root


@pytest.fixture(scope="module")
def data(root):
    data = MaskedImageData(str(root / "main"), tests={"away": str(root / "other")}, mean=0.5, std=0.5, **SMALL)
    data.setup()
    return data


class Watch(LightningModule):
    """A net that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(16 * 16, 2)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def step(self, name, batch):
        self.seen[name].append({key: value.clone() for key, value in batch.items()})
        return self.net(batch["image"].flatten(1))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.step("train", batch), batch["label"])

    def validation_step(self, batch):
        self.step("val", batch)

    def test_step(self, batch):
        self.step("test", batch)

    def predict_step(self, batch):
        return self.step("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(epochs=1, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **{**quiet, **options})


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in zip(a, b)
    )


class TestListing:
    def test_all_but_pixels_is_known_at_once(self, root, monkeypatch):
        monkeypatch.setattr("fisnet_cuda.data.store.read_sample", lambda *_, **__: pytest.fail("pixels were read"))
        data = MaskedImageData(str(root / "main"), size=[16, 24], channels=1, mean=0.5, std=[0.25], fit="pad", window=[0, 100])
        assert data.spec.size == (16, 24)
        assert data.spec.classes == ("disc", "square")
        assert (data.spec.mean, data.spec.std, data.spec.fit, data.spec.window) == ((0.5,), (0.25,), "pad", (0, 100))
        assert len(data.listing.samples) == len(data.splits) == 40
        assert [data.splits.count(name) for name in ("train", "val", "test")] == [28, 6, 6]

    def test_the_split_hangs_on_the_seed(self, root):
        splits = [MaskedImageData(str(root / "main"), seed=seed).splits for seed in (0, 0, 1)]
        assert splits[0] == splits[1] != splits[2]

    def test_other_data_serve_a_split(self, root):
        data = MaskedImageData(str(root / "main"), test=str(root / "other"), fractions=[0.6, 0.2, 0.2], **SMALL)
        assert [data.splits.count(name) for name in ("train", "val", "test")] == [30, 10, 12]
        assert set(data.splits[:40]) == {"train", "val"}
        assert all(sample.name.startswith("test:") for sample in data.listing.samples[40:])
        assert len({sample.name for sample in data.listing.samples}) == 52
        data = MaskedImageData(str(root / "main"), train=str(root / "other"), val={"path": str(root / "other")}, **SMALL)
        assert set(data.splits[:40]) == {"test"}

    def test_the_main_data_must_have_something_left(self, root):
        other = str(root / "other")
        with pytest.raises(InputError, match="nothing is left"):
            MaskedImageData(str(root / "main"), train=other, val=other, test=other)

    def test_further_test_sets(self, root):
        data = MaskedImageData(str(root / "main"), tests={"away": str(root / "other")}, **SMALL)
        subsets = data.subsets()
        assert list(subsets) == ["test", "away"]
        assert len(subsets["away"]) == 12
        assert len(subsets["test"]) == 6
        assert {data.splits[i] for i in subsets["away"].indices} == {"away"}

    def test_groups_of_the_test_split(self, root):
        data = MaskedImageData(str(root / "table"), **SMALL)
        subsets = data.subsets()
        assert list(subsets) == ["test", "test/g0", "test/g1", "test/g2"]
        assert sorted(torch.cat([subsets[f"test/g{i}"].indices for i in range(3)]).tolist()) == subsets["test"].indices.tolist()
        assert {data.listing.samples[i].group for i in subsets["test/g1"].indices} == {"g1"}

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"batch_size": 0}, "batch_size"),
            ({"workers": -1}, "workers"),
            ({"cache": "ram"}, "memory, disk"),
            ({"mask_threshold": 0}, "mask_threshold"),
            ({"seed": -1}, "seed"),
            ({"swap_background": 1.5}, "swap_background must be a probability from 0"),
            ({"swap_background": -0.1}, "swap_background must be a probability from 0"),
            ({"fractions": [0.5, 0.5]}, "three numbers"),
            ({"fractions": [0.5, 0.5, 0.5]}, "sum"),
            ({"augment": "heavy"}, "none, light, strong"),
            ({"augment": {"turn": 3}}, "turn"),
            ({"channels": 2}, "channels"),
            ({"mean": [0.1, 0.2]}, "mean"),
            ({"tests": {"train": "."}}, "cannot be called 'train'"),
            ({"tests": {"x": {"masks": "."}}}, "x: needs a path"),
            ({"test": {"path": ".", "size": 3}}, "'size'"),
            ({"test": "/no/such/folder"}, "/no/such/folder"),
        ],
    )
    def test_wrong_settings_are_one_line(self, root, options, text):
        with pytest.raises(InputError, match=text) as error:
            MaskedImageData(str(root / "main"), **options)
        assert "\n" not in str(error.value)

    def test_a_split_that_the_data_declare_is_not_replaced(self, root):
        with pytest.raises(InputError, match="declares a split 'test' itself"):
            MaskedImageData(str(root / "table"), test=str(root / "other"))

    def test_prediction_without_labels(self, root):
        data = MaskedImageData(str(root / "main"), classes=["sick", "healthy"], labels=False, **SMALL)
        data.setup("predict")
        assert data.spec.classes == ("sick", "healthy")
        batches = list(data.predict_dataloader())
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(40))
        assert all((batch["label"] == -1).all() for batch in batches)
        with pytest.raises(InputError, match="no images to train on"):
            data.setup("fit")

    def test_one_class_is_not_enough(self, tmp_path):
        make.folder(tmp_path, n=6, classes=1)
        data = MaskedImageData(str(tmp_path), **SMALL)
        data.setup()
        with pytest.raises(InputError, match="at least two classes"):
            data.setup("fit")


class TestLoaders:
    def test_training_draws_another_order_every_epoch(self, data):
        loader = data.train_dataloader()
        orders = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            orders.append(torch.cat([batch["index"] for batch in loader]).tolist())
        assert orders[0] == orders[2] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1]) == [i for i, name in enumerate(data.splits) if name == "train"]

    @pytest.mark.parametrize("name", ["train", "val", "test", "away", "all"])
    def test_a_subset_comes_in_order_and_whole(self, data, name):
        batches = list(data.loader(name, batch_size=5))
        expected = [i for i, split in enumerate(data.splits) if name in (split, "all")]
        assert torch.cat([batch["index"] for batch in batches]).tolist() == expected
        assert all(len(batch["image"]) == 5 for batch in batches[:-1])

    def test_a_subset_that_is_not_there(self, data):
        with pytest.raises(InputError, match="no images in 'tset'; there are some in all, train, val, test, away"):
            data.loader("tset")

    def test_prepared_batches_are_normalised_images_of_these_samples(self, data):
        for batch in data.loader("val"):
            ready = data.prepare(batch)
            assert ready["image"].dtype == ready["mask"].dtype == torch.float32
            torch.testing.assert_close(ready["image"], data.store.images[batch["index"]].float() / 127.5 - 1)
            assert set(ready["mask"].unique().tolist()) == {0, 1}
            assert ready["label"].tolist() == [data.listing.samples[i].label for i in batch["index"]]

    def test_an_empty_validation_split_is_no_error(self, root):
        data = MaskedImageData(str(root / "main"), fractions=[0.8, 0, 0.2], **SMALL)
        assert data.val_dataloader() == []
        assert len(data.test_dataloader()) == 2

    def test_balance(self, tmp_path):
        make.folder(tmp_path, n=30)
        for file in sorted((tmp_path / "images" / "square").iterdir())[3:]:
            file.unlink()
            (tmp_path / "masks" / "square" / file.name).unlink()
        data = MaskedImageData(str(tmp_path), fractions=[1, 0, 0], balance=True, **SMALL)
        labels = torch.cat([batch["label"] for batch in data.train_dataloader()])
        assert len(labels) == 16
        assert labels.bincount().min() >= 7, "15 discs and 3 squares give 9 of each, of which a batch leaves out two"

    def test_processes_share_what_one_sees(self, data):
        class Rank:
            training, world_size, current_epoch = True, 2, 0

        try:
            parts = []
            for rank in (0, 1):
                data.trainer = Rank()
                data.trainer.global_rank = rank
                parts.append([list(data.train_dataloader()), list(data.test_dataloader())])
        finally:
            data.trainer = None
        seen = [torch.cat([batch["index"] for part in parts for batch in part[kind]]).tolist() for kind in (0, 1)]
        assert len(set(seen[0])) == len(seen[0]) == 24
        assert sorted(seen[1]) == data.subset("test").indices.tolist()

    def test_report(self, data):
        assert data.report.images == 52
        assert "away" in str(data.report)

    def test_workers_give_the_same_batches(self, root, data):
        helped = MaskedImageData(str(root / "main"), workers=1, tests={"away": str(root / "other")}, **SMALL)
        assert same(list(data.loader("test")), list(helped.loader("test")))

    def test_disk_is_decoded_once_by_prepare_data(self, root, tmp_path, monkeypatch):
        options = {"cache": "disk", "cache_dir": str(tmp_path), **SMALL}
        MaskedImageData(str(root / "main"), **options).prepare_data()
        monkeypatch.setattr("fisnet_cuda.data.store.read_sample", lambda *_, **__: pytest.fail("decoded again"))
        data = MaskedImageData(str(root / "main"), **options)
        data.setup("fit")
        assert len(list(data.train_dataloader())) == 7


class TestInLightning:
    def run(self, root, epochs=2, torch_seed=0, **options):
        data, module = MaskedImageData(str(root / "main"), **{**SMALL, **options}), Watch()
        torch.manual_seed(torch_seed)
        trainer(epochs).fit(module, datamodule=data)
        return data, module

    def test_training_is_augmented_and_the_rest_is_not(self, root):
        data, module = self.run(root)
        assert len(module.seen["train"]) == 14
        plain = data.store.images.float() / 255
        for batch in module.seen["train"]:
            assert "seed" not in batch
            assert batch["image"].dtype == torch.float32
            assert not torch.equal(batch["image"], plain[batch["index"]])
            assert set(batch["mask"].unique().tolist()) == {0, 1}
        for batch in module.seen["val"]:
            assert torch.equal(batch["image"], plain[batch["index"]])

    def test_draws_hang_on_seed_epoch_and_samples_only(self, root):
        _, one = self.run(root)
        _, again = self.run(root, torch_seed=9)
        _, other = self.run(root, seed=1)
        assert same(one.seen["train"], again.seen["train"])
        assert not same(one.seen["train"], other.seen["train"])
        first, second = (
            {int(i): image for batch in epoch for i, image in zip(batch["index"], batch["image"])}
            for epoch in (one.seen["train"][:7], one.seen["train"][7:])
        )
        assert all(not torch.equal(first[i], second[i]) for i in first.keys() & second.keys())

    def test_workers_make_no_difference(self, root):
        _, one = self.run(root, epochs=1)
        _, helped = self.run(root, epochs=1, workers=1)
        assert same(one.seen["train"], helped.seen["train"])

    def test_without_augmentation(self, root):
        data, module = self.run(root, epochs=1, augment="none")
        for batch in module.seen["train"]:
            assert torch.equal(batch["image"], data.store.images[batch["index"]].float() / 255)

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_every_sample_once(self, root, stage):
        data, module = MaskedImageData(str(root / "main"), **SMALL), Watch()
        getattr(trainer(), stage)(module, datamodule=data)
        key, name = {"validate": ("val", "val"), "test": ("test", "test"), "predict": ("predict", "all")}[stage]
        assert torch.cat([batch["index"] for batch in module.seen[key]]).tolist() == data.subset(name).indices.tolist()

    def test_autocast_leaves_batches_as_they_are(self, root):
        _, one = self.run(root, epochs=1)
        data, module = MaskedImageData(str(root / "main"), **SMALL), Watch()
        trainer(precision="bf16-mixed").fit(module, datamodule=data)
        assert same(one.seen["train"], module.seen["train"])

    @pytest.mark.parametrize("options", [{}, {"swap_background": 0.5}, {"swap_background": 1.0, "augment": "none"}])
    def test_going_on_in_the_middle_of_an_epoch_sees_the_rest(self, root, tmp_path, options):
        class Stop(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if trainer.global_step == 10:
                    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                    trainer.should_stop = True
                    raise KeyboardInterrupt

        _, whole = self.run(root, **options)
        module = Watch()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer(2, callbacks=[Stop()]).fit(module, datamodule=MaskedImageData(str(root / "main"), **SMALL, **options))
        rest, data = Watch(), MaskedImageData(str(root / "main"), **SMALL, **options)
        torch.manual_seed(77)
        trainer(2).fit(rest, datamodule=data, ckpt_path=tmp_path / "stopped.ckpt")
        assert same(rest.seen["train"], whole.seen["train"][10:])


class TestSwappedBackgrounds:
    run = TestInLightning.run

    @pytest.mark.parametrize("augment", ["none", "strong"])
    def test_training_alone_is_swapped_and_nothing_else_changes(self, root, augment):
        _, plain = self.run(root, augment=augment)
        data, module = self.run(root, augment=augment, swap_background=0.5, mean=0.5, std=0.25)
        count = 0
        for a, b in zip(plain.seen["train"], module.seen["train"], strict=True):
            assert torch.equal(a["index"], b["index"])
            assert torch.equal(a["mask"], b["mask"])  # those of the objects, moved by the same draws
            assert b["swapped"].dtype == torch.bool
            as_it_was = data.spec.normalise(a["image"])
            assert torch.equal(b["image"][~b["swapped"]], as_it_was[~b["swapped"]])
            assert (b["image"] != as_it_was).flatten(1).any(1)[b["swapped"]].all()
            if augment == "none":
                inside = b["mask"].bool()
                assert torch.equal(b["image"][inside], as_it_was[inside])
            count += int(b["swapped"].sum())
        assert 14 < count < 42, "half of 56"
        for batch in module.seen["val"]:
            assert "swapped" not in batch
            assert torch.equal(batch["image"], data.spec.normalise(data.store.images[batch["index"]]))

    def test_the_look_is_of_the_whole_picture(self, root):
        """Moved, then swapped, then brightened: object and background get the same brightness, and the seam is where the mask ends."""
        data = MaskedImageData(str(root / "main"), augment={"flip": 1.0, "brightness": 0.2}, swap_background=1.0, **SMALL)
        batch = data.loader("train", 8).dataset.__getitems__(list(range(8)))
        batch["image"] = (batch["image"] // 4 + 90).clamp(max=150)  # so that nothing is cut at 0 or 1
        seen = data.prepare(batch, augment=True, seed=5)
        plain = prepare(batch, data.spec, Augmentation({"flip": 1.0}), 5, 1.0)
        assert torch.equal(seen["mask"], batch["mask"].flip(-1).float() / 255)
        assert torch.equal(seen["swapped"], plain["swapped"])
        change = (seen["image"] - plain["image"]).flatten(1)
        torch.testing.assert_close(change, change[:, :1].expand_as(change))
        assert change.abs().amax(1).min() > 0
        flipped = {**batch, "image": batch["image"].flip(-1), "mask": batch["mask"].flip(-1)}
        assert torch.equal(prepare(flipped, data.spec, None, 5, 1.0)["image"], plain["image"])

    def test_images_without_a_mask_are_left_alone(self, root, tmp_path):
        make.folder(tmp_path / "main", n=40)
        for path in (tmp_path / "main" / "masks" / "disc").iterdir():
            path.unlink()
        data, module = self.run(tmp_path, augment="none", swap_background=1.0)
        batches = module.seen["train"]
        assert sum(int(batch["swapped"].sum()) for batch in batches) > 10
        for batch in batches:
            alone = batch["has_mask"].sum() < 2
            assert torch.equal(batch["swapped"], batch["has_mask"] & ~alone)
            plain = data.store.images[batch["index"]].float() / 255
            assert torch.equal(batch["image"][~batch["swapped"]], plain[~batch["swapped"]])

    def test_own_loops_and_soft_masks(self, root):
        data = MaskedImageData(str(root / "main"), swap_background=1.0, soft_masks=True, **SMALL)
        batch = next(iter(data.loader("train")))
        assert data.prepare(batch, augment=True, seed=1)["swapped"].all()
        assert "swapped" not in data.prepare(batch)
        torch.manual_seed(0)
        one = data.prepare(batch, augment=True)
        torch.manual_seed(0)
        assert torch.equal(data.prepare(batch, augment=True)["image"], one["image"])

    def test_what_cannot_be_swapped_is_refused(self, root, tmp_path):
        def says(path, **options):
            data = MaskedImageData(str(path), **{**SMALL, "swap_background": 0.5, **options})
            data.setup("test")  # whoever evaluates need not be able to swap
            with pytest.raises(InputError) as error:
                data.setup("fit")
            assert "\n" not in str(error.value)
            return str(error.value)

        assert "a batch of one image has no other background to give: set batch_size" in says(root / "main", batch_size=1)
        make.folder(tmp_path / "bare", n=40, parallel=False)
        assert "none of the 28 training images has a mask" in says(tmp_path / "bare")
        make.folder(tmp_path / "full", n=40)
        for path in (tmp_path / "full" / "masks").rglob("*.png"):
            make.save(path, np.full((32, 32), 255, np.uint8))
        assert "of the 28 masks of training images 0 have both foreground and background, 0 any background" in says(tmp_path / "full")


def test_seeds_of_batches_differ():
    index = torch.arange(8)
    cases = itertools.product((0, 1), (0, 1, 10), (index[:4], index[4:], index[:4].flip(0)))
    seeds = [_draw(seed, epoch, samples) for seed, epoch, samples in cases]
    assert len(set(seeds)) == len(seeds)
    assert _draw(1, 2, index) == _draw(1, 2, index.clone())
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_arrays_and_mnist_without_masks(tmp_path):
    data = MaskedImageData(str(make.npz(tmp_path / "digits.npz", n=24, mnist=True)), mask_from="nonzero", **SMALL)
    data.setup("fit")
    batch = data.prepare(next(iter(data.train_dataloader())))
    assert batch["has_mask"].all()
    assert batch["mask"].any()
    assert {fact.mask_kind for fact in data.store.facts} == {"nonzero"}
    assert data.splits.count("test") == 6


def test_lists_of_dicts(root):
    files = sorted((root / "main" / "images").rglob("*.png"))
    items = [
        {"image": str(file), "mask": str(file).replace("images", "masks"), "label": file.parent.name, "split": split}
        for file, split in zip(files, itertools.cycle(("train", "train", "val", "test")))
    ]
    data = MaskedImageData(items, **SMALL)
    assert data.splits.count("train") == 20
    assert data.store.has_mask.all()


def test_public_names_are_there_and_cost_nothing_before_they_are_used():
    for name in fisnet_cuda.data.__all__:
        assert getattr(fisnet_cuda.data, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        fisnet_cuda.data.nothing  # noqa: B018
    heavy = "lightning kornia PIL matplotlib h5py torchmetrics"
    code = f"import sys, fisnet_cuda, fisnet_cuda.data; print([n for n in {heavy.split()} if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(fisnet_cuda.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_loop_of_the_docstring_runs(root):
    import fisnet_cuda as fc
    from fisnet_cuda.nets import small

    data = MaskedImageData(str(root / "main"), size=32, channels=3, batch_size=8)
    data.setup()
    net, loss = fc.ISNet(small(2), input_low=data.spec.low, input_high=data.spec.high), fc.ISNetLoss()
    train = data.train_dataloader()
    train.set_epoch(3)
    for batch in itertools.islice(train, 2):
        batch = data.prepare(batch, augment=True)
        out = net(batch["image"], relevance=True)
        total, _ = loss(out, batch["label"], batch["mask"], has_mask=batch["has_mask"])
        assert np.isfinite(total.item())
    assert sum(len(batch["image"]) for batch in map(data.prepare, data.loader("test"))) == 6
