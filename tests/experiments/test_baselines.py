"""The systems that the ISNets are compared with: their losses against hand numbers, and every one of them trains."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("matplotlib")

import benchmarks
from benchmarks.experiments.baselines import (
    RRR,
    ContrastMixed,
    GradCAM,
    HiResCAM,
    Masked,
    Mixed,
    Segmented,
    StochasticMixed,
    UNet,
    background_part,
    dice,
    grad_cam,
    input_gradient_penalty,
)
from benchmarks.experiments.fit import fit
from benchmarks.experiments.measure import heatmaps, measure, share, shown, visible
from benchmarks.experiments.nets import NETS, build_net, supervised
from benchmarks.experiments.systems import SYSTEMS, Setting, build
from benchmarks.experiments.tasks import Images, Task

BASELINES = {
    "masked": Masked, "segmented": Segmented, "rrr": RRR, "gradcam": GradCAM, "hirescam": HiResCAM, "mixed": Mixed,
    "stochastic_mixed": StochasticMixed, "contrast_mixed": ContrastMixed,
}  # fmt: skip
SMALL_NETS = ("convnet", "convnet_bn", "poolnet", "small")
SIZE = 24


def images(n: int, seed: int = 0, channels: int = 1) -> Images:
    """A bright bar on noise, upright or lying: the class; the foreground is the square around it."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 * torch.rand(n, channels, SIZE, SIZE, generator=generator)
    labels, masks = torch.arange(n) % 2, torch.zeros(n, 1, SIZE, SIZE)
    for i, label in enumerate(labels):
        y, z = torch.randint(2, SIZE - 10, (2,), generator=generator).tolist()
        masks[i, :, y : y + 8, z : z + 8] = 1
        x[i, :, y : y + 8, z : z + 8] *= 0.2
        bar = (slice(y + 3, y + 5), slice(z, z + 8)) if label else (slice(y, y + 8), slice(z + 3, z + 5))
        x[i, :, bar[0], bar[1]] = 1
    return Images(x, labels, masks)


def flipped(x: torch.Tensor, m: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return (x.flip(3), m.flip(3)) if torch.rand((), generator=generator) < 0.5 else (x, m)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("bars", 2, images(32), images(8, 1), {"biased": images(8, 2), "unbiased": images(8, 3)}, flipped)


def setting(system: str, net: str = "convnet", steps: int = 3, **more: object) -> Setting:
    return Setting(system, net=net, steps=steps, batch=8, lr=0.05, **more)


class TestRegistry:
    def test_they_are_there_by_name(self, task):
        for name, kind in BASELINES.items():
            assert type(build(setting(name), task)) is kind

    def test_a_process_that_imports_only_the_registry_has_them(self, monkeypatch):
        monkeypatch.setattr(benchmarks, "experiments", benchmarks.experiments)  # put back afterwards, like the modules
        for name in [name for name in sys.modules if name.startswith("benchmarks.experiments")]:
            monkeypatch.delitem(sys.modules, name)
        fresh = importlib.import_module("benchmarks.experiments.systems").SYSTEMS
        assert fresh is not SYSTEMS
        assert set(BASELINES) <= set(fresh)


class TestTraining:
    @pytest.mark.parametrize("net", SMALL_NETS)
    @pytest.mark.parametrize("name", BASELINES)
    def test_trains_and_is_measured(self, task, name, net):
        fitted = fit(setting(name, net), task)
        assert not fitted.diverged
        assert fitted.steps == (6 if name == "segmented" else 3)
        found = measure(fitted.system, task)
        assert 0 <= found["accuracy_unbiased"] <= 100
        assert ("dice" in found) == (name == "segmented")
        assert not any(module.training for module in fitted.system.modules())
        assert not any(layer._forward_hooks for layer in fitted.system.model.modules()), "nothing stays on the model"

    @pytest.mark.parametrize("name", BASELINES)
    def test_the_net_learns(self, task, name):
        steps = 60 if name == "segmented" else 3  # a U-Net of few steps finds no foreground: images are black
        start = [p.clone() for p in build(setting(name), task).model.parameters()]
        trained = fit(setting(name, steps=steps), task).system.model
        assert all((a != b).any() for a, b in zip(start, trained.parameters()))

    @pytest.mark.parametrize("name", ["rrr", "gradcam", "hirescam", "mixed", "stochastic_mixed", "contrast_mixed"])
    def test_strength_0_is_the_net_that_it_is_mixed_into(self, task, name):
        pair = (name.removesuffix("_mixed") if "_" in name else "standard", name)
        plain, other = (fit(setting(s, "convnet_bn", strength=0.0), task).system.model.state_dict() for s in pair)
        for key, value in plain.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("name", BASELINES)
    def test_on_a_gpu(self, task, name):
        assert not fit(setting(name, "convnet_bn"), task.to("cuda")).diverged


class TestMixed:
    def test_objects_stay_and_backgrounds_are_others(self, task, monkeypatch):
        system, seen = build(setting("mixed", strength=1.0), task), []
        monkeypatch.setattr(system, "model", lambda x: seen.append(x) or torch.zeros(len(x), 2))
        batch = task.train[slice(0, 16)].floats()
        system.loss(batch)
        M = batch.masks
        assert torch.equal(seen[0] * M, batch.images * M)
        changed = ((seen[0] - batch.images) * (1 - M)).flatten(1).any(1)
        assert changed.sum() >= 12, "but for those that the permutation leaves in their places"


@pytest.mark.parametrize(("variant", "title"), [("stochastic", "Stochastic ISNet"), ("contrast", "Contrast ISNet (ours)")])
class TestMixedISNet:
    def test_it_is_an_isnet_that_sees_the_composites_of_mixed(self, task, monkeypatch, variant, title):
        system, other = (build(setting(name, strength=0.5, seed=3), task) for name in (f"{variant}_mixed", "mixed"))
        assert system.net.variant == variant
        assert system.setting.title == f"{title} + backgrounds swapped"
        seen, masks = [], []
        forward, heatmap_loss = system.net.forward, system.heatmap_loss
        monkeypatch.setattr(system.net, "forward", lambda x, **kw: seen.append(x) or forward(x, **kw))
        monkeypatch.setattr(system, "heatmap_loss", lambda out, labels, M: masks.append(M) or heatmap_loss(out, labels, M))
        batch = task.train[slice(0, 16)].floats()
        _, parts = system.loss(batch)
        assert torch.equal(seen[0], other.swapped(batch).images)
        assert not torch.equal(seen[0], batch.images)
        assert torch.equal(masks[0], batch.masks)
        assert parts["heatmap"] > 0

    def test_the_classifier_alone_sees_them_too(self, task, variant, title):
        system = build(setting(f"{variant}_mixed", strength=1.0, tune=1), task)
        before, other = system.stages()[0], build(setting("mixed", strength=1.0), task)
        assert before.name == "classifier alone"
        batch = task.train[slice(0, 16)].floats()
        torch.testing.assert_close(before.loss(batch)[0], other.loss(batch)[0])  # the same weights and composites


class TestMasked:
    def test_the_classifier_never_sees_the_background(self, task):
        system = fit(setting("masked"), task).system
        first = task.tests["biased"]
        noisy = Images(first.images + (1 - first.masks) * torch.rand_like(first.images), first.labels, first.masks)
        assert torch.equal(system.logits(first.images, first.masks), system.logits(noisy.images, noisy.masks))
        assert not (shown(system, first) * (1 - first.masks)).any()

    def test_no_relevance_of_hidden_pixels_counts(self, task):
        system = fit(setting("masked"), task).system
        first = task.tests["biased"]
        assert share(system, first) == 0
        R = heatmaps(system, shown(system, first))
        assert (R * (1 - first.masks)).any(), "z^B gives relevance to black pixels: without `visible` they would count"

    def test_others_are_shown_everything(self, task):
        assert visible(build(setting("rrr"), task), task.val).all()


class TestSegmented:
    def test_the_first_stage_trains_the_unet_alone_and_the_second_leaves_it_alone(self, task):
        system = build(setting("segmented", "convnet_bn"), task)
        first, second = system.stages()
        assert {id(p) for p in first.parameters()} == {id(p) for p in system.unet.parameters()}
        assert {id(p) for p in second.parameters()} == {id(p) for p in system.model.parameters()}
        system.train()
        first.loss(task.train)[0].backward()
        assert system.unet.training
        assert all(p.grad is None for p in system.model.parameters())
        system.train()
        system.unet.zero_grad(set_to_none=True)
        before = {key: value.clone() for key, value in system.unet.state_dict().items()}
        second.loss(task.train)[0].backward()
        assert all(p.grad is None for p in system.unet.parameters())
        assert all(p.grad is not None for p in system.model.parameters())
        assert system.model.training
        assert not system.unet.training
        for key, value in system.unet.state_dict().items():
            assert torch.equal(value, before[key]), f"{key}: BatchNorm's statistics moved in the second stage"

    def test_the_classifier_is_shown_what_the_unet_found(self, task):
        system = fit(setting("segmented"), task).system
        x, other = task.val.images, torch.rand_like(task.val.masks)
        with torch.no_grad():
            found = (system.unet(x).sigmoid() > 0.5).float()
        assert torch.equal(system.prepare(x, other), x * found), "masks of the test images are not used"
        assert torch.equal(visible(system, task.val), found > 0)

    def test_the_unet_learns_where_the_bars_are(self, task):
        found = fit(setting("segmented", steps=60), task).system.extra(task)
        assert found["dice"] > 80

    def test_both_stages_get_all_steps(self, task):
        history = fit(setting("segmented", steps=4), task).history
        assert [row["stage"] for row in history] == ["segmentation", "classifier"]
        assert [row["step"] for row in history] == [4, 4]


class TestUNet:
    @pytest.mark.parametrize(("size", "poolings"), [((12, 12), 1), ((28, 28), 1), ((56, 56), 2), ((96, 96), 3), ((224, 224), 4)])
    def test_depth_follows_the_size(self, size, poolings):
        assert len(UNet(1, size).up) == poolings

    @pytest.mark.parametrize("size", [(31, 57), (56, 56), (13, 12)])
    def test_any_size_keeps_its_size(self, size):
        assert UNet(3, size, width=4)(torch.rand(2, 3, *size)).shape == (2, 1, *size)


def test_dice():
    found = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]]).view(3, 1, 1, 4)
    masks = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0], [1.0, 0, 0, 0]]).view(3, 1, 1, 4)
    torch.testing.assert_close(dice(found, masks), torch.tensor([0.5, 1.0, 0.5]))


class TestInputGradients:
    def test_penalty_of_a_linear_softmax_model_by_hand(self):
        # log p_c = z_c - logsumexp(z): d/dx sum_c log p_c = sum_c W_c - C sum_c p_c W_c, here with p = (1/2, 1/2, 0): z = (0, 0, -1e4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
        W = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [2.0, 1.0, -1e4]])
        model[1].weight.data = W
        x = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 1, 3)
        # sum_c W = (6, 3, -1e4); 3 * mean of the first two rows = (6, 3, 0): gradient (0, 0, -1e4)
        masks = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 1, 3)
        logits, penalty = input_gradient_penalty(model, x, masks)
        assert logits.tolist() == [[0.0, 0.0, -1e4]]
        assert penalty.item() == pytest.approx(0, abs=1e-6)
        _, penalty = input_gradient_penalty(model, x, 1 - masks / 2)  # the last pixel is half background: (0.5 * 1e4)^2
        assert penalty.item() == pytest.approx(25e6)

    def test_penalty_is_the_finite_differences_one(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()
        x, masks = torch.rand(2, 2, 5, 5).double(), torch.rand(2, 1, 5, 5).double()
        h, expected = 1e-5, 0.0
        for n in range(2):
            for c in range(2):
                for i in range(25):
                    step = torch.zeros_like(x)
                    step[n, c].view(-1)[i] = h
                    slope = sum(s * F.log_softmax(model(x + s * step), 1).sum() for s in (1, -1)) / (2 * h)
                    expected += float(((1 - masks[n, 0].view(-1)[i]) * slope.detach()) ** 2) / 2
        assert input_gradient_penalty(model, x, masks)[1].item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("net", SMALL_NETS)
    def test_gradient_reaches_the_weights(self, task, net):
        model = build_net(net, 2, 1, (SIZE, SIZE), 0)
        batch = task.train.floats()
        _, penalty = input_gradient_penalty(model, batch.images, batch.masks)
        gradients = torch.autograd.grad(penalty, [p for p in model.parameters() if p.dim() > 1])
        assert penalty > 0
        assert all(g.isfinite().all() and g.any() for g in gradients)

    def test_a_foreground_everywhere_costs_nothing(self, task):
        model = build_net("convnet", 2, 1, (SIZE, SIZE), 0)
        assert input_gradient_penalty(model, task.train.images, torch.ones_like(task.train.masks))[1] == 0


class TestHiResCAM:
    def test_before_a_linear_layer_the_map_is_the_logits_parts(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2, bias=False))
        x, labels = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1])
        parts = model[3].weight[labels].view(5, 3, 2, 2) * model[1](model[0](x))
        _, cam = grad_cam(model, model[1], x, labels, averaged=False)
        assert torch.allclose(cam, parts.sum(1, keepdim=True).relu(), atol=1e-6)
        assert not torch.allclose(cam, grad_cam(model, model[1], x, labels)[1], atol=1e-3)


class TestGradCAM:
    def test_map_of_two_channels_by_hand(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.head = nn.Identity(), nn.Linear(8, 2, bias=False)

            def forward(self, x):
                return self.head(self.act(x).flatten(1))

        net = Net()
        net.head.weight.data = torch.tensor([[2.0, 0, 2, 0, -1, -1, -1, -1], [0, 0, 0, 4, 3, 3, 0, 6]])
        A = torch.tensor([[[3.0, 1.0], [0.0, 2.0]], [[1.0, 4.0], [2.0, 0.0]]]).unsqueeze(0).requires_grad_()
        # class 0: alpha = (1, -1): (2, -3, -2, 2) -> (2, 0, 0, 2); class 1: alpha = (1, 3): (6, 13, 6, 2)
        assert grad_cam(net, net.act, A, torch.tensor([0]))[1].flatten().tolist() == [2, 0, 0, 2]
        logits, cam = grad_cam(net, net.act, torch.cat([A, A]), torch.tensor([0, 1]))
        assert cam.flatten(1).tolist() == [[2, 0, 0, 2], [6, 13, 6, 2]], "samples do not mix"
        assert logits[0].tolist() == [-1, 23]

    @pytest.mark.parametrize("name", NETS)
    def test_the_layer_is_the_last_convolutional_activation(self, name):
        model = build_net(name, 2, 1, (64, 64), 0).eval()
        outputs = {}
        for path, module in model.named_modules():
            if path:
                module.register_forward_hook(lambda m, i, o, path=path: outputs.update({path: o}))
        model(torch.rand(1, 1, 64, 64))
        maps = [path for path, o in outputs.items() if torch.is_tensor(o) and o.dim() == 4]
        layer = supervised(name)[-1]
        later = maps[maps.index(layer) + 1 :]
        pools = (nn.MaxPool2d, nn.AdaptiveAvgPool2d)
        assert all(isinstance(model.get_submodule(path), pools) for path in later), "only pools come between it and the linear layer"
        assert (outputs[layer] >= 0).all()

    @pytest.mark.parametrize("name", [*SMALL_NETS, "resnet18", "densenet121"])
    def test_loss_lies_in_0_to_1_and_its_gradient_reaches_the_first_layer(self, name):
        size = (64, 64) if name in ("resnet18", "densenet121") else (SIZE, SIZE)
        x, labels, masks = torch.rand(4, 1, *size), torch.tensor([0, 1, 1, 0]), torch.rand(4, 1, *size)
        model = build_net(name, 2, 1, size, 0)
        layer = model.get_submodule(supervised(name)[-1])
        logits, cam = grad_cam(model, layer, x, labels)
        assert logits.shape == (4, 2)
        assert not layer._forward_hooks
        part = background_part(cam, masks)
        assert ((part >= 0) & (part <= 1)).all()
        assert part.any()
        weights = [p for p in model.parameters() if p.dim() == 4]
        gradients = torch.autograd.grad(part.sum(), weights)
        assert all(g.isfinite().all() for g in gradients)
        assert gradients[0].any()

    def test_hook_is_removed_when_the_forward_fails(self):
        model = build_net("convnet", 2, 1, (SIZE, SIZE), 0)
        with pytest.raises(RuntimeError):
            grad_cam(model, model.relu3, torch.rand(1, 2, SIZE, SIZE), torch.tensor([0]))
        assert not model.relu3._forward_hooks

    def test_a_layer_that_is_not_called_is_refused(self):
        model = build_net("convnet", 2, 1, (SIZE, SIZE), 0)
        with pytest.raises(ValueError, match="called 0 times"):
            grad_cam(model, nn.ReLU(), torch.rand(1, 1, SIZE, SIZE), torch.tensor([0]))


class TestBackgroundPart:
    def test_by_hand(self):
        cam = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
        masks = torch.zeros(3, 1, 2, 2)
        masks[0, 0, 0, 0] = 0.75
        masks[2, 0, 0] = 1
        torch.testing.assert_close(background_part(cam, masks), torch.tensor([0.25, 0.0, 0.5]))

    def test_a_coarse_map_is_upsampled(self):
        # bilinear weights of 2 -> 4 in one dimension: 1, 3/4, 1/4, 0
        cam, masks = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
        assert float(background_part(cam, masks)) == pytest.approx(0.25 / 2)

    def test_the_whole_image_as_foreground_or_background(self):
        cam = torch.rand(2, 1, 3, 3)
        assert not background_part(cam, torch.ones(2, 1, 9, 9)).any()
        torch.testing.assert_close(background_part(cam, torch.zeros(2, 1, 9, 9)), torch.ones(2))
