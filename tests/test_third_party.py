"""Other people's networks as they come: logits bit for bit, gradient x input, all variants, the plan.

pytorchcv's and Hugging Face's are small members with narrow layers. pytorchcv's ImageNet networks end in a 7x7 pool for
224 x 224 images; here they get a pool of their own for small ones, and one test runs a network untouched.
"""


import pytest
import torch
from graph import truth
from torch import nn

import fisnet_cuda as fc

NARROW, WIDE = [[8], [12], [16], [24]], [[16, 16], [24], [32], [48]]


def pytorchcv(module, name, size=64, pool=2, **settings):
    """A network of pytorchcv, from its submodule (``pytorchcv.model_provider`` needs torchvision)."""

    def make():
        models = pytest.importorskip(f"pytorchcv.models.{module}", reason="pytorchcv is not installed")
        torch.manual_seed(0)
        model = getattr(models, name)(in_size=(size, size), num_classes=5, **settings)
        for part in (model.features, model.output):
            if isinstance(getattr(part, "final_pool", None), nn.AvgPool2d):
                part.final_pool = nn.AvgPool2d(pool)
        return model

    return make, size


def hugging_face(**settings):
    def make():
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(0)
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=5, **settings))

    return make, 32


def torchvision(name, size=64, **settings):
    def make():
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed (it has no CPU build here)")
        torch.manual_seed(0)
        return getattr(models, name)(num_classes=5, **settings)

    return make, size


def timm(name, size=64, **settings):
    def make():
        timm = pytest.importorskip("timm", reason="timm is not installed (it needs torchvision)")
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, **settings)

    return make, size


resnet = {"init_block_channels": 8, "conv1_stride": True}
squeeze = {"channels": [[16, 16], [32, 32], [48]], "init_block_kernel_size": 3, "init_block_channels": 8, "pool": 3}
ZOO = {
    "resnet": pytorchcv("resnet", "ResNet", channels=[[8, 8], [12, 12], [16, 16], [24, 24]], bottleneck=False, **resnet),
    "resnet_bottleneck": pytorchcv("resnet", "ResNet", channels=WIDE, bottleneck=True, **resnet),
    "preresnet": pytorchcv("preresnet", "PreResNet", channels=NARROW, bottleneck=False, **resnet),
    "preresnet_bottleneck": pytorchcv("preresnet", "PreResNet", channels=WIDE, bottleneck=True, **resnet),
    "densenet": pytorchcv(
        "densenet", "DenseNet", channels=[[12, 16, 20], [14, 18], [13, 17], [12, 16]], init_block_channels=8, dropout_rate=0.1
    ),
    "mobilenet": pytorchcv(
        "mobilenet", "MobileNet", channels=[[8], [16], [16, 24], [24, 32], [48, 48]], first_stage_stride=False, pool=4
    ),
    "squeezenet": pytorchcv("squeezenet", "SqueezeNet", residuals=None, **squeeze),
    "squeezeresnet": pytorchcv("squeezenet", "SqueezeNet", residuals=[[0, 1], [0, 1], [0]], **squeeze),
    "resnext": pytorchcv(
        "resnext", "ResNeXt", channels=WIDE, init_block_channels=8, cardinality=2, bottleneck_width=32
    ),
    "wrn": pytorchcv("wrn", "WRN", channels=WIDE, init_block_channels=8, width_factor=2.0),
    "hugging_face_basic": hugging_face(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic"),
    "hugging_face_bottleneck": hugging_face(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck"),
    "torchvision_resnet": torchvision("resnet18"),
    "torchvision_densenet": torchvision("densenet121", memory_efficient=False),
    "torchvision_vgg": torchvision("vgg11_bn", 32),
    "torchvision_squeezenet": torchvision("squeezenet1_1"),
    "torchvision_mobilenet": torchvision("mobilenet_v2"),
    "timm_resnet": timm("resnet10t"),
    "timm_preresnet": timm("resnetv2_50", 64),
    "timm_densenet": timm("densenet121", drop_rate=0.1),
}  # fmt: skip


class VGGHead(nn.Module):
    """In place of pytorchcv's, which has 4096 units over 7x7 maps."""

    def __init__(self, channels):
        super().__init__()
        self.fc, self.relu, self.dropout = nn.Linear(channels, 16), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.dropout(self.relu(self.fc(x))))


def vgg(use_bn):
    make, _ = pytorchcv("vgg", "VGG", channels=[[4], [8], [8, 8], [12, 12], [16, 16]], use_bn=use_bn)

    def narrow():
        model = make()
        model.output = VGGHead(16)
        return model

    return narrow, 32


ZOO |= {"vgg": vgg(False), "vgg_bn": vgg(True)}


def load(name):
    """``(make, x)``: the network with weights that keep its signals alive, and images in [0, 1]."""
    make, size = ZOO[name]

    def made():
        model = make()
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.uniform_(-0.1, 0.3)
        return model

    return made, torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ZOO)
def test_logits(name):
    truth.logits(*load(name))


@pytest.mark.parametrize("name", ZOO)
def test_gradient_x_input(name):
    make, x = load(name)
    with torch.no_grad():
        top = int(truth.logits_of(make().double().eval()(x.double())).mean(0).argmax())
    truth.heatmaps(make, x, target=top)


@pytest.mark.parametrize("name", ZOO)
def test_variants(name):
    truth.variants(*load(name))


def test_plan_of_a_resnet():
    make, x = load("resnet_bottleneck")
    net = fc.ISNet(make(), variant="dual", supervise=("features.stage2", "features.stage4"))
    rows = {row.layer: row for row in net.plan().rows}
    assert rows["features.init_block.conv.conv"].rule == "zB[0, 1]"
    assert rows["features.stage1.unit1.body.conv3.conv"].rule == "z+(0.01), z+(0.01) | epsilon(0.01)"
    assert rows["output"].kernel == "plus_start:reference, dual_transposed_phi:reference"
    out = net(x, relevance=True)
    assert {name: R.shape for name, R in out.hidden.items()} == {
        "features.stage2": (2, 2, 24, 8, 8), "features.stage4": (2, 2, 48, 2, 2)
    }  # fmt: skip


def test_a_resnet_untouched():
    """224 x 224, its own pool, a thousand classes."""
    models = pytest.importorskip("pytorchcv.models.resnet", reason="pytorchcv is not installed")
    torch.manual_seed(0)
    model, x = models.resnet10().eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        out = fc.ISNet(model)(x, relevance=True)
        assert torch.equal(out.logits, model(x))
    assert torch.isfinite(out.heatmaps).all()
    assert out.explained.item() == out.logits.argmin().item()
