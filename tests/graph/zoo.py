"""Networks as people write them, every spelling of every layer: `make, x = zoo.build(name)` for a name in `zoo.CASES`.

Options of a case: piecewise_linear=False (no gradient x input to compare with), train_truth=False (a BatchNorm has several
statistics, or none), layouts=False (its forward needs contiguous tensors).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fisnet_cuda as fc

CASES = {}


def case(shape=(2, 3, 8, 8), **options):
    """Register a network class under its name."""

    def register(cls):
        CASES[cls.__name__] = cls, shape, options
        return cls

    return register


def seq(name, shape, *layers, **options):
    CASES[name] = (lambda: nn.Sequential(*(make() for make in layers))), shape, options


def conv(c_in=4, c_out=4, k=3, **kwargs):
    return nn.Conv2d(c_in, c_out, k, **{"padding": k // 2, **kwargs})


class Net(nn.Module):
    """A stem and a head around ``body``, which subclasses write."""

    c = 4

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.make()
        self.head = nn.Linear(self.c, 3)

    def make(self):
        pass

    def forward(self, x):
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


# ---- a module, a weight, a value, used more than once ------------------------------------------------------------------


@case()
class SharedLayers(Net):
    def make(self):
        self.conv, self.relu = conv(), nn.ReLU()

    def body(self, x):
        return self.relu(self.conv(self.relu(self.conv(x))))


@case(train_truth=False)  # one BatchNorm, two statistics
class SharedBatchNorm(Net):
    def make(self):
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def body(self, x):
        return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))


@case()
class SharedWeight(Net):
    def make(self):
        self.a, self.b = conv(), conv()
        self.b.weight = self.a.weight

    def body(self, x):
        return F.relu(self.b(F.relu(self.a(x))))


@case()
class InputReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 2), conv(3, 2, 5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1).mean((2, 3)))


# ---- ReLU ----------------------------------------------------------------------------------------------------------------


@case()
class ReluSpellings(Net):
    def make(self):
        self.convs = nn.ModuleList(conv() for _ in range(8))
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)

    def body(self, x):
        relus = (self.relu, self.relu_, F.relu, F.relu_, torch.relu, torch.relu_, lambda t: t.relu(), lambda t: t.relu_())
        for layer, relu in zip(self.convs, relus):
            x = relu(layer(x))
        x = F.relu(self.convs[0](x), inplace=True)
        x = torch.clamp(self.convs[1](x), min=0)
        return self.convs[2](x).clamp_min(0)


@case()
class PreactivationInPlace(Net):
    """The skip reads the tensor that the in-place ReLU overwrote."""

    def make(self):
        self.conv, self.relu = conv(), nn.ReLU(inplace=True)

    def body(self, x):
        x = self.conv(x)
        y = self.conv(self.relu(x))
        return F.relu(y + x)


@case()
class InPlaceAddIsSeenByOtherNames(Net):
    def make(self):
        self.a, self.b = conv(), conv()

    def body(self, x):
        y = self.a(x)
        seen = y
        y += x
        return F.relu(self.b(F.relu(seen)) + seen)


@case()
class OutOfPlaceAddIsNot(Net):
    def make(self):
        self.a, self.b = conv(), conv()

    def body(self, x):
        y = self.a(x)
        seen = y
        y = y + x
        return F.relu(self.b(F.relu(y)) + seen)


@case()
class CloneKeepsTheOldValue(Net):
    def make(self):
        self.a, self.b = conv(), conv()

    def body(self, x):
        y = self.a(x)
        old = y.clone()
        y.relu_()
        return F.relu(self.b(y) + old)


@case()
class InPlaceArithmetic(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        y = self.conv(x)
        y.add_(x).mul_(0.5)
        y *= 2
        y -= 0.25
        y /= 1.5
        y.sub_(0.1).div_(2)
        return F.relu_(y)


@case()
class InPlaceAfterView(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        y = self.conv(x)
        flat = y.flatten(2)
        return F.relu_(flat).unflatten(2, (8, 8))


# ---- sums, concatenations, shapes -----------------------------------------------------------------------------------------


@case()
class Residual(Net):
    def make(self):
        self.a, self.bn_a, self.b, self.bn_b = conv(bias=False), nn.BatchNorm2d(4), conv(bias=False), nn.BatchNorm2d(4)
        self.bn_c = nn.BatchNorm2d(4)
        self.down, self.relu = nn.Sequential(conv(k=1), nn.BatchNorm2d(4)), nn.ReLU(inplace=True)

    def body(self, x):
        out = self.bn_b(self.b(self.relu(self.bn_a(self.a(x)))))
        out += self.down(x)
        x = self.relu(out)
        out = self.bn_c(self.b(x))
        out.add_(x)
        return torch.add(self.relu(out), x)


@case()
class PreactivationResidual(Net):
    """BatchNorm behind a sum, as in preresnet."""

    def make(self):
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(bias=i == 0)) for i in range(2)
        )
        self.bn = nn.BatchNorm2d(4)

    def body(self, x):
        x = self.stem2(x) if hasattr(self, "stem2") else x - 0.1
        for block in self.blocks:
            x = x + block(x)
        return F.relu(self.bn(x))


@case()
class SameSummandTwice(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        y = self.conv(x)
        return F.relu(y + y + x - y * 0.5)


@case()
class Concatenations(Net):
    c = 16

    def make(self):
        self.a, self.b = conv(), conv(12, 4)

    def body(self, x):
        a = F.relu(self.a(x))
        one = torch.cat([a], 1)
        two = torch.cat((x, torch.concat([one, a], dim=-3)), dim=-3)
        return torch.cat([F.relu(self.b(two)), two], 1)


@case()
class DenseBlock(Net):
    c = 10

    def make(self):
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 2 * i), nn.ReLU(), conv(4 + 2 * i, 2, bias=i == 0)) for i in range(3)
        )
        self.bn = nn.BatchNorm2d(10)

    def body(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return F.relu(self.bn(torch.cat(features, 1)))


@case()
class TorchvisionTransition(Net):
    """conv -> average pool of signed values -> concat -> BatchNorm."""

    c = 6

    def make(self):
        self.bn, self.conv, self.pool = nn.BatchNorm2d(4), conv(k=1), nn.AvgPool2d(2)
        self.layer = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))
        self.last = nn.BatchNorm2d(6)

    def body(self, x):
        x = self.pool(self.conv(F.relu(self.bn(x))))
        return F.relu(self.last(torch.cat([x, self.layer(x)], 1)))


@case(layouts=False)  # view needs contiguous
class Shapes(Net):
    def make(self):
        self.conv, self.fc = conv(), nn.Linear(16, 16)

    def body(self, x):
        n, c, h, w = x.shape
        x = x.view(x.size(0), -1).reshape(n, c, h * w).view((n, c, h, w))
        x = x.reshape(x.shape[0], *[4, 8, 8]).permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous()
        x = x.transpose(1, 2).transpose(2, 1).unsqueeze(1).squeeze(1)
        x = F.relu(self.conv(x))
        small = F.avg_pool2d(x, (h // 4, w // 4))
        x = self.fc(small.view(n, c, -1)).view(-1, c, h // 2, w // 2)
        return F.relu(torch.flatten(x, 2).unflatten(-1, (4, 4)))


@case()
class Slices(Net):
    c = 8

    def make(self):
        self.a, self.b = conv(2, 2), conv(4, 4)

    def body(self, x):
        a, b = torch.chunk(x, 2, dim=1)
        c, d = x.split([1, 3], 1)
        e, f = torch.split(x, 2, dim=1)
        y = torch.cat([self.a(a), b + e, c, d[:, 1:], f], 1)
        y = torch.cat([y[:, :4], x.narrow(1, 1, 2), x[:, 2:3], x[..., 1:, :, :][:, :1]], 1)
        row = F.relu(self.b(y[:, :4]))
        return F.relu(torch.cat([row, y[:, -4:]], 1))[:, :, 1:-1, 2:]


@case()
class Indexing(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x[:, :, 0]))
        y = x[:, None, :, None, 1:][:, 0, :, 0]
        z = x[..., None, :-1, None][:, :, 0, ..., 0] + x[:, None, ..., 1:, None][:, 0, ..., 0]
        return self.head(x[:, :, -1] + y[..., 0] + z[:, :, 1])


CASES["Indexing"] = Indexing, (2, 2, 3, 7), {"first_layer": "zb"}


@case()
class GreyRepeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.stem(x.repeat(1, 3, 1, 1)) + self.stem(x.expand(-1, 3, -1, -1))).mean((2, 3)))


CASES["GreyRepeated"] = GreyRepeated, (2, 1, 8, 8), {}


# ---- constants, casts, reductions ---------------------------------------------------------------------------------------


@case()
class NormalisesItsInput(Net):
    def make(self):
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.3]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]))

    def forward(self, x):
        x = (x - self.mean) / self.std.view(1, -1, 1, 1)
        return super().forward(F.pad(x, (1, 1, 1, 1)))

    def body(self, x):
        return x


@case()
class Constants(Net):
    def make(self):
        self.conv, self.scale = conv(), nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 4, 1, 1))

    def body(self, x):
        y = 2 * self.conv(x) * self.scale + self.shift
        y = -(1 - y) / self.shift.add(1).sqrt()
        return F.relu(y * 0.5 - self.scale.mean() + 2)


@case()
class Reductions(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        x = F.relu(self.conv(x.mean(dim=[2, 3], keepdim=True).repeat(1, 1, 8, 8) + x))
        y = x.mean(-1).mean(-1) + x.sum((2, 3)) / x.size(2) ** 2 + x.sum(3).sum(2) / 64
        return y.unsqueeze(-1).unsqueeze(-1)


@case(piecewise_linear=False)  # float32 in the middle: not float64's gradient
class Casts(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        return F.relu(self.conv(x)).double().to(torch.float32).float()


# ---- linear and convolution ---------------------------------------------------------------------------------------------

relu, pool, flat = nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten
for name, options in {
    "grouped": {"groups": 2}, "depthwise": {"groups": 4}, "dilated": {"dilation": 2}, "strided": {"stride": 2},
    "uneven": {"k": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}, "same": {"padding": "same"},
    "same_even": {"k": 4, "padding": "same"}, "same_uneven": {"k": (4, 3), "padding": "same", "dilation": (1, 3)},
    "valid": {"padding": "valid"}, "reflect": {"padding_mode": "reflect"},
    "replicate": {"padding_mode": "replicate", "stride": 3}, "reflect_same": {"padding_mode": "reflect", "padding": "same"},
    "no_bias": {"bias": False}, "one": {"k": 1}, "large_stride": {"k": 2, "stride": 3, "padding": 0},
}.items():  # fmt: skip

    def layers(options=options):
        kwargs = {"padding": 1, **options}
        k = kwargs.pop("k", 3)
        return nn.Conv2d(4, 4, k, **kwargs)

    seq(f"conv_{name}", (2, 4, 7, 9), layers, relu, layers, nn.ReLU, pool, flat, lambda: nn.Linear(4, 3))

for d, kind, bn in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
    size = (5,) * d if d == 3 else (9,)
    pool_max, pool_avg = (getattr(nn, f"{p}Pool{d}d") for p in ("Max", "Avg"))
    seq(
        f"net_{d}d", (2, 2, *size), lambda k=kind: k(2, 4, 3, padding=1), lambda b=bn: b(4), relu,
        lambda p=pool_max: p(3, 2, 1), lambda k=kind: k(4, 4, 3, padding="same", groups=2), relu,
        lambda p=pool_avg: p(2, ceil_mode=True), flat, lambda d=d: nn.LazyLinear(3),
    )  # fmt: skip
    seq(
        f"reflect_{d}d", (2, 2, *size), lambda k=kind: k(2, 4, 3, padding=1, padding_mode="reflect"), relu,
        lambda k=kind: k(4, 4, 4, padding="same"), relu, flat, lambda: nn.LazyLinear(3),
    )  # fmt: skip

seq("mlp", (4, 6), lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), relu, lambda: nn.Linear(8, 8), relu, lambda: nn.Linear(8, 3))
seq("mlp_of_images", (4, 1, 3, 4), flat, lambda: nn.Linear(12, 8), relu, nn.Dropout, lambda: nn.Linear(8, 3))


@case()
class LinearOnAnyRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.w, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(F.linear(x, self.b.weight) + self.b.bias)
        return self.head(F.relu(x @ self.w)).mean(1).mean(1)


CASES["LinearOnAnyRank"] = LinearOnAnyRank, (2, 3, 4, 5), {"first_layer": "zb"}


@case()
class FunctionalWeights(Net):
    """Weights of its own, computed weights, a layer's weight read by function."""

    def make(self):
        self.w, self.b = nn.Parameter(torch.randn(4, 4, 3, 3) / 3), nn.Parameter(torch.zeros(4))
        self.conv = conv(bias=False)
        self.register_buffer("mask", (torch.rand(4, 4, 3, 3) > 0.3).float())

    def body(self, x):
        x = F.relu(F.conv2d(x, self.w, self.b, padding=1))
        w = self.conv.weight - self.conv.weight.mean(dim=(1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(x, w, padding="valid"))
        return F.relu(torch.conv2d(x, self.w * self.mask, bias=self.b, stride=2))


class StandardisedConv(nn.Conv2d):
    """A user's subclass with a forward of its own."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, w, self.bias)


class NamedConv(nn.Conv2d):
    """A user's subclass that only adds an attribute."""

    name = "mine"


class NamedPool(nn.MaxPool2d):
    pass


class NamedPad(nn.ReflectionPad2d):
    pass


seq("subclasses", (2, 3, 8, 8), lambda: StandardisedConv(3, 4, 3), relu, lambda: NamedPad(1), lambda: NamedConv(4, 4, 3),
    relu, lambda: NamedPool(2), flat, lambda: nn.Linear(36, 3))  # fmt: skip


class Parametrized(Net):
    def make(self):
        p = torch.nn.utils.parametrizations
        self.a, self.b = p.weight_norm(conv()), p.spectral_norm(conv())
        self.fc = p.weight_norm(nn.Linear(4, 4))
        self.bn = nn.BatchNorm2d(4)

    def body(self, x):
        x = F.relu(self.b(F.relu(self.bn(self.a(x)))))
        return F.relu(self.fc(x.transpose(1, 3))).transpose(1, 3)


# in train mode every read of a spectral norm is an iteration, so the model of the test must be read as often
CASES["Parametrized"] = Parametrized, (2, 3, 8, 8), {"train_truth": False}


# ---- pools --------------------------------------------------------------------------------------------------------------

POOLS = {
    "max": nn.MaxPool2d(2), "max_overlap": nn.MaxPool2d(3, 2, 1), "max_ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max_dilated": nn.MaxPool2d(2, 1, dilation=2), "max_uneven": nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "max_stride_1": nn.MaxPool2d(3, 1, 1), "avg": nn.AvgPool2d(2), "avg_overlap": nn.AvgPool2d(3, 2, 1),
    "avg_ceil": nn.AvgPool2d(2, 2, ceil_mode=True), "avg_no_pad_count": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg_ceil_pad": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_divisor": nn.AvgPool2d((2, 3), divisor_override=5), "adaptive_avg": nn.AdaptiveAvgPool2d(3),
    "adaptive_avg_none": nn.AdaptiveAvgPool2d((None, 2)), "adaptive_max": nn.AdaptiveMaxPool2d((3, 2)),
    "adaptive_max_none": nn.AdaptiveMaxPool2d((None, 1)), "adaptive_one": nn.AdaptiveAvgPool2d((1, 1)),
    "adaptive_max_one": nn.AdaptiveMaxPool2d(1),
}  # fmt: skip
for name, layer in POOLS.items():
    seq(f"pool_{name}", (2, 2, 7, 9), lambda: conv(2, 4), relu, lambda m=layer: m, lambda: conv(), relu, flat,
        lambda: nn.LazyLinear(3))  # fmt: skip
    if name in ("max_overlap", "avg_overlap", "adaptive_avg"):  # over values of either sign, then a BatchNorm
        seq(f"signed_{name}", (2, 2, 7, 9), lambda: conv(2, 4), lambda m=layer: m, lambda: nn.BatchNorm2d(4), relu,
            flat, lambda: nn.LazyLinear(3))  # fmt: skip
for d in (1, 3):
    layers = {
        "max_overlap": getattr(nn, f"MaxPool{d}d")(3, 2, 1, ceil_mode=True), "avg": getattr(nn, f"AvgPool{d}d")(3, 2, 1, True, False),
        "max_dilated": getattr(nn, f"MaxPool{d}d")(2, 1, 0, 2),
        "adaptive_avg": getattr(nn, f"AdaptiveAvgPool{d}d")(3), "adaptive_max": getattr(nn, f"AdaptiveMaxPool{d}d")(2),
        "adaptive_one": getattr(nn, f"AdaptiveAvgPool{d}d")(1),
    }  # fmt: skip
    convolution = getattr(nn, f"Conv{d}d")
    for name, layer in layers.items():
        seq(f"pool{d}d_{name}", (2, 2, *(5,) * d) if d == 3 else (2, 2, 11), lambda k=convolution: k(2, 3, 3, padding=1), relu,
            lambda m=layer: m, flat, lambda: nn.LazyLinear(3))  # fmt: skip


@case()
class FunctionalPools(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        x = F.relu(self.conv(F.avg_pool2d(x, kernel_size=2, stride=1)))
        x = F.adaptive_max_pool2d(x, (6, 5)) + F.adaptive_avg_pool2d(x, (6, 5))
        x = torch.max_pool2d(x, 2)
        return F.avg_pool2d(x, x.shape[2:])


@case()
class LogitsFromAPool(nn.Module):
    """As in squeezenet: a 1x1 convolution with a map a class, pooled."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = conv(3, 4), conv(4, 3, 1)

    def forward(self, x):
        return F.adaptive_avg_pool2d(F.relu(self.out(F.relu(self.stem(x)))), 1).view(x.size(0), -1)


@case()
class SignedLogitsFromAMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = conv(3, 4), conv(4, 3, 1)

    def forward(self, x):
        return self.out(F.relu(self.stem(x))).mean([2, 3])


@case()
class ReluBehindThePool(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        return F.relu(F.max_pool2d(self.conv(x), 2))


# ---- norms, dropout, frozen parts -----------------------------------------------------------------------------------------

for name, options in {
    "momentum_none": {"momentum": None}, "not_affine": {"affine": False}, "momentum": {"momentum": 0.3, "eps": 1e-3},
}.items():
    seq(f"bn_{name}", (4, 3, 6, 6), lambda: conv(3, 4), lambda o=options: nn.BatchNorm2d(4, **o), relu, lambda: conv(),
        lambda o=options: nn.BatchNorm2d(4, **o), relu, pool, flat, lambda: nn.Linear(4, 3))  # fmt: skip
seq("bn_no_statistics", (4, 3, 6, 6), lambda: conv(3, 4), lambda: nn.BatchNorm2d(4, track_running_stats=False), relu, pool, flat,
    lambda: nn.Linear(4, 3), piecewise_linear=False)  # fmt: skip


@case()
class FrozenParts(Net):
    """Frozen parameters, and BatchNorms that a user's ``train`` keeps in eval mode."""

    def make(self):
        self.a, self.bn_a, self.b, self.bn_b = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)
        for p in (*self.stem.parameters(), *self.a.parameters(), *self.bn_a.parameters(), self.b.bias):
            p.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.bn_a.eval()
        return self

    def body(self, x):
        return F.relu(self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))


CASES["FrozenParts"] = FrozenParts, (2, 3, 8, 8), {"train_truth": False}


class FrozenDropout(Net):
    """Functional dropout of a part that stays in eval mode."""

    def make(self):
        class Part(nn.Module):
            def forward(self, x):
                return F.dropout(x, 0.5, self.training)

        self.part, self.other = Part(), Part()

    def train(self, mode=True):
        super().train(mode)
        self.part.eval()
        return self

    def body(self, x):
        return self.other(self.part(x))


CASES["FrozenDropout"] = FrozenDropout, (2, 3, 8, 8), {}


class UntrackedLater(Net):
    """``track_running_stats`` switched off on a layer that has statistics."""

    def make(self):
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_mean.fill_(0.1)
        self.bn.track_running_stats = False

    def body(self, x):
        return F.relu(self.bn(x))


CASES["UntrackedLater"] = UntrackedLater, (2, 3, 8, 8), {"train_truth": False}


@case(shape=(3, 3, 8, 8))
class Dropouts(Net):
    def make(self):
        self.conv, self.drop, self.drop2 = conv(), nn.Dropout(0.3), nn.Dropout2d(0.4, inplace=True)
        self.off, self.identity = nn.Dropout(0.0), nn.Identity()

    def body(self, x):
        x = self.drop2(F.relu(self.conv(self.drop(x))))
        x = self.off(F.dropout(x, 0.2, self.training))
        x = F.dropout2d(self.identity(x), 0.1, training=self.training)
        return torch.dropout(F.dropout(x, p=0.2, training=self.training, inplace=True), 0.1, self.training)


seq("dropouts_1d_3d", (2, 3, 4, 4, 4), lambda: nn.Conv3d(3, 4, 3), relu, lambda: nn.Dropout3d(0.3), lambda: nn.Flatten(2),
    lambda: nn.Dropout1d(0.3), lambda: nn.Flatten(1), lambda: nn.Linear(32, 3))  # fmt: skip
seq("dropout_first", (4, 3, 6, 6), lambda: nn.Dropout(0.2), nn.Identity, lambda: conv(3, 4), relu, flat, lambda: nn.Linear(144, 3))

class DropPath(nn.Module):
    """Stochastic depth, as timm writes it."""

    def forward(self, x, p=0.5):
        if not self.training:
            return x
        random = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
        random.div_(1 - p)
        return x * random


@case(shape=(6, 3, 8, 8))
class StochasticDepth(Net):
    def make(self):
        self.conv, self.path = conv(), DropPath()

    def body(self, x):
        return F.relu(x + self.path(self.conv(x)))


for name, norm in {
    "group": lambda: nn.GroupNorm(2, 4), "group_plain": lambda: nn.GroupNorm(4, 4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4), "instance_affine": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([4, 6, 6]), "layer_plain": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer_no_bias": lambda: nn.LayerNorm([6, 6], bias=False),
}.items():  # fmt: skip
    seq(f"norm_{name}", (3, 3, 6, 6), lambda: conv(3, 4), norm, relu, lambda: conv(), norm, relu, pool, flat,
        lambda: nn.Linear(4, 3), piecewise_linear=False)  # fmt: skip
seq("norm_layer_dense", (3, 5, 6), lambda: nn.Linear(6, 4), lambda: nn.LayerNorm(4), relu, flat, lambda: nn.Linear(20, 3),
    piecewise_linear=False)  # fmt: skip
seq("norm_instance_1d", (3, 3, 9), lambda: nn.Conv1d(3, 4, 3), lambda: nn.InstanceNorm1d(4), relu, flat, lambda: nn.Linear(28, 3),
    piecewise_linear=False)  # fmt: skip


class FunctionalNorms(Net):
    def make(self):
        self.w, self.b = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.conv = conv()

    def body(self, x):
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.w, self.b, self.training, 0.2, 1e-4)
        x = F.group_norm(self.conv(F.relu(x)), 2, self.w, self.b)
        x = F.instance_norm(self.conv(F.relu(x)), weight=self.w, bias=self.b)
        return F.relu(F.layer_norm(self.conv(F.relu(x)), x.shape[2:]))


CASES["FunctionalNorms"] = FunctionalNorms, (2, 3, 8, 8), {"piecewise_linear": False}

# ---- activations, resizing --------------------------------------------------------------------------------------------------

for name, act in {
    "relu6": nn.ReLU6, "hardtanh": lambda: nn.Hardtanh(-0.5, 2.0), "leaky_relu": lambda: nn.LeakyReLU(0.2), "elu": nn.ELU,
    "silu": nn.SiLU, "gelu": lambda: nn.GELU("tanh"), "hardswish": nn.Hardswish, "tanh": nn.Tanh, "mish": nn.Mish,
    "softplus": lambda: nn.Softplus(2.0),
}.items():  # fmt: skip
    seq(f"act_{name}", (2, 3, 6, 6), lambda: conv(3, 4), act, lambda: conv(), lambda: nn.BatchNorm2d(4), act, pool, flat,
        lambda: nn.Linear(4, 3), piecewise_linear=name == "leaky_relu")  # fmt: skip


class FunctionalActivations(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        acts = (F.relu6, lambda t: F.hardtanh(t, -0.5, 2.0), lambda t: F.leaky_relu(t, 0.3, inplace=True), F.elu, F.silu,
                lambda t: F.gelu(t, approximate="tanh"), F.hardswish, torch.tanh, F.mish, lambda t: F.softplus(t, beta=2))  # fmt: skip
        for act in acts:
            x = act(self.conv(x))
        return x


CASES["FunctionalActivations"] = FunctionalActivations, (2, 3, 6, 6), {"piecewise_linear": False}

for name, layer in {
    "zero_pad": lambda: nn.ZeroPad2d((1, 2, 0, -1)), "reflect_pad": lambda: nn.ReflectionPad2d((1, 2, 3, 0)),
    "replicate_pad": lambda: nn.ReplicationPad2d(2), "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest_size": lambda: nn.Upsample((5, 9)), "bilinear": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
    "shuffle": lambda: nn.PixelShuffle(2), "unshuffle": lambda: nn.PixelUnshuffle(2), "channels": lambda: nn.ChannelShuffle(2),
}.items():  # fmt: skip
    seq(f"map_{name}", (2, 3, 6, 6), lambda: conv(3, 4), relu, layer, flat, lambda: nn.LazyLinear(3))
    if name not in ("bilinear", "bicubic"):
        seq(f"first_{name}", (2, 4, 6, 6), layer, lambda: nn.LazyConv2d(4, 3), relu, flat, lambda: nn.LazyLinear(3))


@case()
class FunctionalMaps(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        x = F.relu(self.conv(F.pad(x, (1, 1))))
        x = F.interpolate(F.pad(x, [0, 1, 2, 0], mode="reflect"), size=(8, 8))
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return F.pixel_shuffle(F.relu(self.conv(x)).repeat(1, 4, 1, 1), 2)


# ---- forwards -----------------------------------------------------------------------------------------------------------


@case()
class OptionalArguments(Net):
    def body(self, x):
        return x

    def forward(self, x, labels=None, scale: float = 1.0, *, return_loss=True, **kwargs):
        logits = super().forward(x)
        if labels is None:
            return logits * scale
        return F.cross_entropy(logits, labels) if return_loss else None


@case()
class DictOutput(Net):
    def body(self, x):
        return x

    def forward(self, x):
        return {"logits": super().forward(x), "features": x}


class Output(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


@case()
class NamedTupleOutput(Net):
    def make(self):
        self.relu = nn.ReLU(inplace=True)

    def body(self, x):
        return self.relu(input=x - 0.1)

    def forward(self, x):
        return Output(features=x, logits=super().forward(x))


@case()
class ContainersAndState(Net):
    """Writes on itself while it runs, which must not outlive the trace."""

    def make(self):
        self.layers = nn.ModuleDict({"a": conv(), "b": conv()})
        self.calls, self.seen, self.last = 0, [], None

    def body(self, x):
        if not torch.jit.is_scripting():
            self.kept = None
        for layer in self.layers.values():
            x = F.relu(layer(x))
        assert x.dim() == 4, "images"
        return x


@case()
class FusedLayers(nn.Module):
    """fisnet_cuda.nn by hand."""

    def __init__(self):
        super().__init__()
        n = fc.nn
        self.a = n.ConvBNReLU(conv(3, 4, bias=False), nn.BatchNorm2d(4))
        self.pool, self.b = n.MaxPool(nn.MaxPool2d(3, 2, 1)), n.ConvReLU(conv())
        self.bn, self.c = n.BNReLU(nn.BatchNorm2d(4)), n.ConvBNReLU(conv(), nn.BatchNorm2d(4))
        self.add, self.fc, self.head = n.AddReLU(), n.LinearReLU(nn.Linear(4, 5)), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(self.a(x))
        y = self.c(self.bn(self.b(x)), x)
        y = self.c(y, skip=x)
        return self.head(self.fc(self.add(y, x).mean((2, 3))))


CASES["FusedLayers"] = FusedLayers, (2, 3, 8, 8), {"train_truth": False}  # self.c runs twice


# ---- building ------------------------------------------------------------------------------------------------------------------


def build(name):
    """``(make, x)``: a seeded network without lazy layers, and an input in [0, 1]."""
    make, shape, _ = CASES[name]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def made():
        torch.manual_seed(0)
        model = make()
        model.eval()(x)  # initialises lazy layers
        for m in model.modules():
            if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) and not hasattr(m, "parametrizations"):
                nn.init.kaiming_normal_(m.weight)  # signals that deep chains keep
                if m.bias is not None:
                    m.bias.data.uniform_(-0.1, 0.2)
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.affine:
                m.weight.data.uniform_(0.5, 1.5).mul_(torch.tensor([1.0, -1.0]).repeat(m.num_features)[: m.num_features])
                m.bias.data.uniform_(-0.3, 0.3)
        return model.train()

    return made, x
