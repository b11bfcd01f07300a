"""BatchNorms over concatenations: which of them measure one part alone, and what the program says about it."""

import golden_nets
import pytest
import torch
from helpers import GraphNet, randomise
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.graph.fan_out import fan_out
from fisnet_cuda.graph.ir import Instr, Mode, Param, Slot, slots_in


def dense_block(eps=(1e-5, 1e-5, 1e-5), order=(0, 1), between=()):
    """Two dense layers and the BatchNorm behind them; ``order`` of (all so far, new part) in the concatenations."""
    cats = [("relu0", "conv1"), (between[-1][0] if between else "cat1", "conv2")]
    cats = [tuple(cat[i] for i in order) for cat in cats]
    return [
        ("conv0", nn.Conv2d(3, 4, 3, 1, 1), "x"), ("relu0", nn.ReLU(), "conv0"),
        ("bn1", nn.BatchNorm2d(4, eps[0]), "relu0"), ("relu1", nn.ReLU(), "bn1"), ("conv1", nn.Conv2d(4, 2, 3, 1, 1), "relu1"),
        ("cat1", "concat", cats[0]), *between,
        ("bn2", nn.BatchNorm2d(6, eps[1]), "cat1"), ("relu2", nn.ReLU(), "bn2"), ("conv2", nn.Conv2d(6, 3, 3, 1, 1), "relu2"),
        ("cat2", "concat", cats[1]),
        ("bn3", nn.BatchNorm2d(9, eps[2]), "cat2"), ("relu3", nn.ReLU(), "bn3"),
        ("mean", nn.AdaptiveAvgPool2d(1), "relu3"), ("flat", "flatten", "mean"), ("head", nn.Linear(9, 3), "flat"),
    ]  # fmt: skip


def known(model):
    """BatchNorm -> (layer of the part that it measures, whether it is the first part, the BatchNorm that measured the rest)."""
    forward = fc.ISNet(model, "selective")._programs[True][0].lowered.forward
    makers = {slot: instr for instr in forward for slot in instr.outs}
    found = {}
    for instr in forward:
        if instr.op in ("bn", "bn_relu") and instr.operands[9] is not None:
            part, ahead, mean, rstd, mode, running_mean = instr.operands[9]
            before = makers[mean.index]
            assert before.outs[1:3] == (mean.index, rstd.index)
            assert (mode, running_mean) == (Mode(before.layer), Param(f"{before.layer}.running_mean"))
            found[instr.layer] = makers[part.index].layer, ahead, before.layer
    return found


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["new part last", "new part first"])
def test_dense_block(order):
    ahead = order == (1, 0)
    assert known(GraphNet(dense_block(order=order))) == {"bn2": ("conv1", ahead, "bn1"), "bn3": ("conv2", ahead, "bn2")}


def test_densenets():
    """Every BatchNorm over a concatenation, the transitions' and the last one too; lists of one tensor are copies."""
    got = known(golden_nets.build("densenets"))
    assert len(got) == 6
    assert got["features.denseblock1.denselayer2.norm1"] == (
        "features.denseblock1.denselayer1.conv2", False, "features.denseblock1.denselayer1.norm1",
    )  # fmt: skip
    assert got["features.transition1.norm"][2] == "features.denseblock1.denselayer3.norm1"
    assert got["features.norm5"][2] == "features.denseblock2.denselayer3.norm1"


def test_another_eps():
    """rstd is another one then."""
    assert known(GraphNet(dense_block(eps=(1e-5, 1e-3, 1e-3)))) == {"bn3": ("conv2", False, "bn2")}


def test_other_values():
    """What lies between has statistics of its own."""
    pool = [("pool", nn.AvgPool2d(3, 1, 1), "cat1")]
    assert known(GraphNet(dense_block(between=pool))) == {"bn2": ("conv1", False, "bn1")}


def test_nobody_measured():
    """Two new parts, and a concatenation along another axis: one pass over the whole, as ever."""
    stem = [("conv0", nn.Conv2d(3, 4, 3, 1, 1), "x"), ("relu0", nn.ReLU(), "conv0"), ("conv1", nn.Conv2d(3, 2, 3, 1, 1), "x")]
    assert known(GraphNet([*stem, *dense_block()[5:]])) == {"bn3": ("conv2", False, "bn2")}

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn1, self.bn2, self.head = nn.Conv2d(3, 4, 3, 1, 1), *(nn.BatchNorm2d(4) for _ in range(2)), nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x).relu()
            x = self.bn2(torch.cat([x, self.bn1(x).relu()], 2)).relu()
            return self.head(x.mean((2, 3)))

    assert known(Rows()) == {}


def test_known_statistics_are_no_consumers():
    """No gradient comes back from a part that is measured: aliases are for those that give one."""
    part = Instr("bn_relu", None, (Slot(0),), (1, 2, 3), "part", kernel="bn_act")
    rest = (Slot(1), False, Slot(4), Slot(5), Mode("bn"), None)
    cat = Instr("concat", None, ((Slot(6), Slot(1)), 1), (7,), "cat")
    bn = Instr("bn", None, (Slot(7), *[None] * 8, rest, None, True), (8, 9, 10), "bn", kernel="bn_act")
    assert fan_out((part, cat, bn), (), frozenset(), 20) == ((part, cat, bn), (), 20)
    later = Instr("conv", None, (Slot(1),), (11,), "conv")
    instrs, _, _ = fan_out((part, cat, bn, later), (), frozenset(), 20)
    assert [slots_in(i.operands) for i in instrs] == [[0], [6, 20], [7, 1, 4, 5], [1]]


def test_plan():
    """It says nothing new: the same ops, on the same kernels."""
    rows = {row.layer: row for row in fc.ISNet(randomise(GraphNet(dense_block()))).plan().rows}
    assert [rows[name].forward for name in ("bn1", "bn2", "bn3")] == ["bn_relu"] * 3
