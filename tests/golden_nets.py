"""The small networks behind tests/goldens, as plain torch.nn modules.

    model, data = golden_nets.load("seq")   # float64, eval mode; data: tensors, keys of goldens/README.md
    golden_nets.NAMES                       # ("seq", "seqbn", "vgg", "resnet18s", "densenets")
    golden_nets.build("vgg")                # the network alone: default initialisation, float32, train mode
    golden_nets.ops("vgg", model)           # its graph, for oracles.Net
    golden_nets.arrays("loss")              # any golden file as a dict of tensors; "meta" is parsed JSON

Every call builds a fresh model and a fresh dict: a test may change what it gets.
"""

import json
import pathlib

import numpy as np
import torch
from torch import nn

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = ("seq", "seqbn", "vgg", "resnet18s", "densenets")


class VGG(nn.Module):
    """`features` and `classifier` as in torchvision, without dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class _Block(nn.Module):
    """ResNet's basic block with one ReLU module a use."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.downsample = None
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18's topology with widths 6, 12, 18, 24."""

    def __init__(self, widths=(6, 12, 18, 24), classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c_in = widths[0]
        for i, c_out in enumerate(widths):
            stage = nn.Sequential(_Block(c_in, c_out, 1 if i == 0 else 2), _Block(c_out, c_out, 1))
            setattr(self, f"layer{i + 1}", stage)
            c_in = c_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _DenseLayer(nn.Module):
    def __init__(self, c_in, growth, bn_size):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(c_in, bn_size * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(bn_size * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.relu1(self.norm1(torch.cat(features, 1)))
        return self.conv2(self.relu2(self.norm2(self.conv1(x))))


class _DenseBlock(nn.ModuleDict):
    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    """torchvision's, with a second ReLU after the conv so that LRP has one before the pool."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.relu2 = nn.ReLU()
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    def __init__(self, growth=6, blocks=(3, 3), initial=12, bn_size=2, classes=3):
        super().__init__()
        self.features = nn.Sequential()
        self.features.conv0 = nn.Conv2d(3, initial, 7, 2, 3, bias=False)
        self.features.norm0 = nn.BatchNorm2d(initial)
        self.features.relu0 = nn.ReLU()
        self.features.pool0 = nn.MaxPool2d(3, 2, 1)
        width = initial
        for i, depth in enumerate(blocks, 1):
            layers = [_DenseLayer(width + j * growth, growth, bn_size) for j in range(depth)]
            block = _DenseBlock({f"denselayer{j}": layer for j, layer in enumerate(layers, 1)})
            setattr(self.features, f"denseblock{i}", block)
            width += depth * growth
            if i < len(blocks):
                setattr(self.features, f"transition{i}", _Transition(width, width // 2))
                width //= 2
        self.features.norm5 = nn.BatchNorm2d(width)
        self.features.fReLU = nn.ReLU()
        self.features.AdaptPool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def _sequential(batchnorm):
    def conv(c_in, c_out):
        return [nn.Conv2d(c_in, c_out, 3, padding=1), *([nn.BatchNorm2d(c_out)] * batchnorm), nn.ReLU()]

    head = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 4)
    return nn.Sequential(*conv(3, 8), nn.MaxPool2d(2), *conv(8, 12), *head)


_BUILD = {
    "seq": lambda: _sequential(False),
    "seqbn": lambda: _sequential(True),
    "vgg": VGG,
    "resnet18s": ResNet18,
    "densenets": DenseNet,
}


def build(name):
    """The network with PyTorch's default initialisation, float32, in train mode."""
    return _BUILD[name]()


def arrays(file):
    """`goldens/<file>.npz`: numbers as tensors, strings as numpy arrays, `meta` as a dict."""
    with np.load(GOLDENS / f"{file}.npz") as npz:
        data = {key: npz[key] for key in npz.files}
    meta = json.loads(str(data.pop("meta"))) if "meta" in data else {}
    return {"meta": meta} | {k: v if v.dtype.kind in "US" else torch.from_numpy(v) for k, v in data.items()}


def load(name):
    """`(model, data)`: the network with its golden weights, float64 and eval mode, and its golden numbers."""
    data = arrays(f"{name}_eval")
    model = build(name).double().eval()
    prefix = "state/"
    model.load_state_dict({k[len(prefix):]: v for k, v in data.items() if k.startswith(prefix)})
    return model, data


def ops(name, model):
    """The graph of `model` as `(op name, module or "add" / "concat" / "flatten", inputs)`, for oracles.Net.

    Ops with a module have its name. A container's output is that of its last op: ResNet's `layer1` is
    `layer1.1.relu2`.
    """
    found, last = [], ["x"]

    def op(name, inputs=None, what=None):
        found.append((name, what or model.get_submodule(name), inputs or last[0]))
        last[0] = name
        return name

    def run(*names):
        return [op(each) for each in names][-1]

    if name in ("seq", "seqbn"):
        run(*(n for n, _ in model.named_children()))
    elif name == "vgg":
        run(*(f"features.{i}" for i in range(10)), "avgpool")
        op("flatten", what="flatten")
        run(*(f"classifier.{i}" for i in range(3)))
    elif name == "resnet18s":
        run("conv1", "bn1", "relu", "maxpool")
        for block in (f"layer{i}.{j}" for i in range(1, 5) for j in range(2)):
            x = last[0]
            y = run(*(f"{block}.{n}" for n in ("conv1", "bn1", "relu1", "conv2", "bn2")))
            if model.get_submodule(block).downsample is not None:
                op(f"{block}.downsample.0", x)
                x = op(f"{block}.downsample.1")
            op(f"{block}.add", (y, x), "add")
            run(f"{block}.relu2")
        run("avgpool")
        op("flatten", what="flatten")
        run("fc")
    elif name == "densenets":
        run("features.conv0", "features.norm0", "features.relu0", "features.pool0")
        for i in (1, 2):
            block, so_far = f"features.denseblock{i}", [last[0]]
            for layer in (f"{block}.{n}" for n, _ in model.get_submodule(block).named_children()):
                op(f"{layer}.concat", tuple(so_far), "concat")
                parts = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
                so_far.append(run(*(f"{layer}.{part}" for part in parts)))
            op(f"{block}.concat", tuple(so_far), "concat")
            if i == 1:
                run(*(f"features.transition1.{n}" for n in ("norm", "relu", "conv", "relu2", "pool")))
        run("features.norm5", "features.fReLU", "features.AdaptPool")
        op("flatten", what="flatten")
        run("classifier")
    return found
