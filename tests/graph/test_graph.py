"""Graphs as data: names of layers, inner maps by name, which values share memory, what two traces have in common."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from graph import zoo
from graph.zoo import Net, conv
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.graph import build_graph, build_graphs
from fisnet_cuda.graph.ir import Mode

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def kinds(graph):
    return [node.kind for node in graph.nodes if node.kind != "host"]


def test_spellings_are_one_kind():
    for name in ("ReluSpellings", "PreactivationInPlace", "Residual"):
        graph = build_graph(zoo.build(name)[0](), False)
        assert set(kinds(graph)) <= {"input", "conv", "batch_norm", "relu", "add", "linear_map", "linear"}


def test_names():
    """A module's path; for a function its owner's and the op; numbered from the second use on."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = conv(), nn.ReLU()

        def forward(self, x):
            x = self.relu(self.conv(x))
            return F.relu(self.relu(self.conv(x)) + x)

    class Model(Net):
        def make(self):
            self.inner = Inner()

        def body(self, x):
            return self.inner(x)

    graph = build_graph(Model(), False)
    assert [n.name for n in graph.nodes] == [
        "input", "stem", "relu", "inner.conv", "inner.relu", "inner.conv:2", "inner.relu:2", "inner.add", "inner.relu:3", "mean",
        "head",
    ]  # fmt: skip
    assert graph.module_outputs == {"stem": 1, "inner.conv": 5, "inner.relu": 6, "inner": 8, "head": 10}


def test_in_place_relu_does_not_rename_what_it_overwrites():
    """supervise=("bn",) means BatchNorm's own output, though an in-place ReLU overwrites the tensor."""
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 2))
    graph = build_graph(model, False)
    assert [graph.nodes[graph.module_outputs[k]].kind for k in "012"] == ["conv", "batch_norm", "relu"]
    net = fc.ISNet(model.eval(), supervise=("1", "2"), first_layer="epsilon")
    out = net(X, relevance=True)
    assert not torch.equal(out.hidden["1"], out.hidden["2"])


def test_unknown_names_are_answered():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(ValueError, match=r"there is no layer '11'.*Did you mean '1'.*`print\(net.plan\(\)\)` lists the layers"):
        fc.ISNet(model, supervise=("11",))


def test_concatenations_share_their_beginnings():
    """Dense blocks: each concatenation reads the one before it, and logits stay the model's bit for bit."""
    make, x = zoo.build("DenseBlock")
    model = make().eval()
    graph = build_graph(model, False)
    joined = [n for n in graph.nodes if n.kind == "concat"]
    assert [len(n.inputs) for n in joined] == [2, 2, 2]
    for earlier, later in itertools.pairwise(joined):
        assert graph.nodes[later.inputs[0]].name == earlier.name
    assert torch.equal(fc.ISNet(model)(x, relevance=True).logits, model(x))


def test_only_true_prefixes_are_shared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 2), conv(3, 2), nn.Linear(2, 3)

        def forward(self, x):
            a, b = F.relu(self.a(x)), F.relu(self.b(x))
            parts = [
                torch.cat([a, b], 1), torch.cat([b, a, b], 1), torch.cat([a, b, a], 1), torch.cat([a, b], 2), a.repeat(1, 3, 1, 1),
                torch.cat([a, a], -3),
            ]  # fmt: skip
            return sum(self.head(p.flatten(2)[:, :2, 0]) + p.flatten(1)[:, -3:] for p in parts)

    graph = build_graph(Model(), False)
    assert [len(n.inputs) for n in graph.nodes if n.kind == "concat"] == [2, 3, 2, 2, 3, 2]
    model, x = Model().eval(), torch.rand(2, 3, 4, 4)
    assert torch.equal(fc.ISNet(model)(x, relevance=True).logits, model(x))
    double = model.double()
    leaf = x.double().requires_grad_()
    want = leaf * torch.autograd.grad(double(leaf)[:, 1].sum(), leaf)[0]
    torch.testing.assert_close(fc.relevance(double, x.double(), 1, fc.rules.Epsilon(0.0))[:, 0], want, rtol=1e-10, atol=1e-12)


def test_modes_of_functions():
    """A flag that is True in train and False in eval mode follows the module that passes it; a constant stays."""
    make, _ = zoo.build("FrozenDropout")
    graphs = build_graphs(make())
    assert graphs[True] is graphs[False]
    assert [n.attrs["training"] for n in graphs[True].nodes if n.kind == "mask"] == [Mode("part"), Mode("other")]

    class Always(Net):
        def body(self, x):
            return F.dropout(F.dropout(x, 0.5, True), 0.5, False)

    graphs = build_graphs(Always())
    assert [n.attrs["training"] for n in graphs[True].nodes if n.kind == "mask"] == [True, False]


def test_two_programs_where_the_modes_differ():
    class Auxiliary(Net):
        def body(self, x):
            return x + 1 if self.training else x

    net = fc.ISNet(Auxiliary().train())
    assert net._programs[True] is not net._programs[False]
    assert torch.equal(net(X, relevance=True).logits, net.model(X))
    net.eval()
    assert torch.equal(net(X, relevance=True).logits, net.model(X))
    assert "add" in str(net.train().plan())
    assert "add" not in str(net.eval().plan())


def test_shapes_that_are_asked_for_do_not_count_as_readers():
    """conv.shape between a convolution and its BatchNorm: the two stay one map."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.head = conv(3, 4), nn.BatchNorm2d(4), nn.Linear(256, 3)

        def forward(self, x):
            x = self.conv(x)
            n = x.size(0)
            return self.head(F.relu(self.bn(x)).view(n, -1))

    class Plain(Asks):
        def forward(self, x):
            return self.head(F.relu(self.bn(self.conv(x))).flatten(1))

    asks, plain = Asks().eval(), Plain().eval()
    plain.load_state_dict(asks.state_dict())
    for variant in ("selective", "dual"):
        maps = [fc.ISNet(m, variant=variant)(X, relevance=True).heatmaps for m in (asks, plain)]
        assert torch.equal(*maps)
