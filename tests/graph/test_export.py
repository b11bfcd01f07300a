"""The second front end: torch.export for what torch.fx cannot trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graph import truth, zoo
from graph.zoo import Net, conv
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.graph import build_graph, build_graphs, capture


@pytest.fixture
def only_export(monkeypatch):
    """torch.fx fails, whatever the model."""

    def fail(model):
        raise RuntimeError("not today")

    monkeypatch.setattr(capture, "_capture_fx", fail)


# of every spelling; layers are put back together, so that these graphs are the same as those of torch.fx
SAME = (
    "SharedLayers", "SharedBatchNorm", "InputReadTwice", "PreactivationInPlace", "Residual", "DenseBlock", "conv_same_even",
    "conv_reflect", "net_1d", "net_3d", "mlp", "pool_max_ceil", "pool_adaptive_max", "bn_momentum_none", "FrozenParts",
    "norm_group", "norm_instance_affine", "map_bilinear", "act_gelu", "FusedLayers", "dropouts_1d_3d",
)  # fmt: skip
# functions keep aten's names
LIKE = (
    "ReluSpellings", "InPlaceArithmetic", "InPlaceAfterView", "Concatenations", "Slices", "Indexing", "NormalisesItsInput",
    "Constants", "Reductions", "Shapes", "LinearOnAnyRank", "FunctionalWeights", "subclasses", "FunctionalPools", "Dropouts",
    "FunctionalMaps", "FunctionalNorms", "FrozenDropout", "OptionalArguments", "DictOutput", "NamedTupleOutput", "StochasticDepth",
)  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_same_graph(name, request):
    make, x = zoo.build(name)
    by_fx = build_graphs(make())
    request.getfixturevalue("only_export")
    assert build_graphs(make(), x) == by_fx


@pytest.mark.parametrize("name", LIKE)
def test_same_numbers(name, only_export):
    make, x = zoo.build(name)
    options = zoo.CASES[name][2]
    truth.logits(make, x, layouts=False)
    if options.get("piecewise_linear", True):
        truth.heatmaps(make, x, train=False)


class ShapeDependent(nn.Module):
    """Python that asks for sizes: torch.fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.block = conv(3, 4), nn.BatchNorm2d(4), Block()
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        while x.shape[-1] > 4:
            x = F.max_pool2d(x, 2)
        x = F.dropout(self.block(x), 0.2, self.training)
        return self.head(self.drop(x.view(*x.shape[:2], -1).mean(-1)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        odd = x.shape[-1] % 2
        x = F.pad(x, (0, odd)) if odd else x
        return F.relu(x + self.bn(self.conv(x)))


def made():
    torch.manual_seed(0)
    return ShapeDependent()


X = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_shape_dependent_model():
    with pytest.raises(fc.UnsupportedModelError, match=r"torch.fx cannot trace ShapeDependent \(TraceError.*example_input="):
        fc.ISNet(made())
    truth.logits(made, X)
    truth.variants(made, X)
    truth.heatmaps(made, X, train=False)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_batch_size(n):
    """The example's size is not baked in; one sample will do as an example."""
    model = made().eval()
    net = fc.ISNet(model, variant="dual", example_input=X[:1])
    x = torch.rand(n, 3, 12, 12)
    out = net(x, relevance=True)
    assert torch.equal(out.logits, model(x))
    assert out.heatmaps.shape == (n, 2, 3, 12, 12)


def test_names_and_supervision():
    """Layers carry their module paths, as by torch.fx."""
    net = fc.ISNet(made(), example_input=X, supervise=("block", "bn"), rules={"block.*": fc.rules.Epsilon(0.5)})
    layers = [row.layer for row in net.plan().rows]
    assert {"stem", "bn", "block.conv", "block.bn", "head", "drop"} <= set(layers)
    rules = {row.layer: row.rule for row in net.plan().rows}
    assert rules["block.conv"] == "epsilon(0.5)"
    assert rules["head"] == "epsilon(0.01)"
    out = net(X, relevance=True)
    assert out.hidden["block"].shape == (3, 1, 4, 3, 4)
    assert out.hidden["bn"].shape == (3, 1, 4, 12, 12)


def test_modes_are_followed_at_run_time():
    """A BatchNorm and a dropout in eval mode inside a model in train mode."""
    plain = made().train()
    plain.block.bn.eval()
    plain.drop.eval()
    model = copy.deepcopy(plain)
    net = fc.ISNet(model, example_input=X)
    torch.manual_seed(3)
    want = plain(X)
    torch.manual_seed(3)
    assert torch.equal(net(X, relevance=True).logits, want)
    for (name, got), (_, value) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(got, value), name
    assert int(model.block.bn.num_batches_tracked) == 0
    assert int(model.bn.num_batches_tracked) == 1


def test_relevance_takes_its_example_from_x():
    model = made().double().eval()
    R = fc.relevance(model, X.double(), target=1, rules=truth.EPS0)
    assert R.shape == (3, 1, 3, 12, 12)
    assert fc.check_conservation(model, X.double()).violations == ()


def test_nothing_stays_on_the_model():
    model = made().train()
    model.bn.momentum = None
    before, state = truth.snapshot(model), torch.get_rng_state()
    fc.ISNet(model, example_input=X)
    assert truth.snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bn.num_batches_tracked == 0


class Named(Net):
    """A structured output, built in Python that torch.fx cannot follow."""

    def body(self, x):
        return x if len(x.shape) == 4 else x[None]

    def forward(self, x, flag=False, names=("a",), **kwargs):
        return {"features": x, "logits": super().forward(x), "loss": None if not flag else x.sum()}


def test_structured_output_and_optional_arguments():
    model, x = Named(), torch.rand(2, 3, 8, 8)
    out = fc.ISNet(model, example_input=x)(x, relevance=True)
    assert torch.equal(out.logits, model(x)["logits"])


def test_random_numbers_of_forward():
    """Drawn while the model runs, not once while it is traced."""

    class Noisy(Net):
        def body(self, x):
            return x + 0.1 * torch.randn(4, 1, 1)

    model, x = Noisy(), torch.rand(2, 3, 8, 8)
    net = fc.ISNet(model, example_input=x)
    torch.manual_seed(1)
    want = [model(x), model(x)]
    torch.manual_seed(1)
    got = [net(x, relevance=True).logits for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_graph_of_hugging_face_resnet(layer_type):
    """The same nodes in both modes, with BatchNorm following its module."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face ResNet comes with transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type=layer_type, num_labels=3
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    x = torch.rand(2, 3, 32, 32)
    graph = build_graph(model, True, x)
    assert graph == build_graph(model, False, x)
    assert graph.nodes[graph.output].name == "classifier.1"
    names = [node.name for node in graph.nodes]
    assert "resnet.embedder.embedder.convolution" in names
    assert {"resnet.encoder.stages.0", "resnet.encoder.stages.1"} <= graph.module_outputs.keys()
