"""What is refused when a model is wrapped: module path, op, what to do, each message as users read it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from graph.zoo import Net, conv
from torch import nn

import fisnet_cuda as fc

REFUSED = {}


def refused(message, example=True):
    """Register a network whose wrapping raises exactly ``message``; ``example``: by torch.export too."""

    def register(cls):
        REFUSED[cls.__name__] = cls, message, example
        return cls

    return register


PRODUCT = "relevance through a product of two activations is not defined here"
LOGITS = "at the end of a network the losses apply it themselves; inside, it is a gate or attention"
UNGATED = "Return the logits, or use the network's variant without gates."
OTHER = (
    "(it has no LRP rule here). Replace it by a supported op (fisnet_cuda.supported() lists them), or wrap only the part of "
    "the model without it."
)
SAMPLES = "(it mixes the samples of the batch, axis 0). Leave axis 0 alone."


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x * F.hardtanh(self.fc(x.mean((2, 3))), 0, 1).view(-1, 4, 1, 1)


@refused(f"block.gate: mul is not supported ({PRODUCT}: gates, squeeze-and-excitation). Use the network's variant without gates.")
class SqueezeAndExcitation(Net):
    def make(self):
        self.block = nn.Sequential()
        self.block.add_module("gate", Gate())

    def body(self, x):
        return self.block(x)


@refused(f"the model: sigmoid is not supported ({LOGITS}). {UNGATED}")
class SigmoidGate(Net):
    def body(self, x):
        return x * torch.sigmoid(x)


@refused(f"the model: softmax is not supported ({LOGITS}). {UNGATED}")
class SoftmaxAtTheEnd(Net):
    def body(self, x):
        return x

    def forward(self, x):
        return super().forward(x).softmax(1)


@refused(f"last: LogSoftmax is not supported ({LOGITS}). {UNGATED}")
class LogSoftmaxLayer(Net):
    def make(self):
        self.last = nn.LogSoftmax(1)

    def body(self, x):
        return x

    def forward(self, x):
        return self.last(super().forward(x))


@refused("attention: MultiheadAttention is not supported (attention has no LRP rule here). Use a network without attention.")
class Attention(Net):
    def make(self):
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def body(self, x):
        y = x.flatten(2).transpose(1, 2)
        return self.attention(y, y, y)[0].transpose(1, 2).unflatten(2, (8, 8))


@refused(f"the model: matmul is not supported ({PRODUCT}: attention). Use a network without attention.")
class Products(Net):
    def body(self, x):
        y = x.flatten(2)
        return (y @ y.transpose(1, 2) @ y).unflatten(2, (8, 8))


@refused(
    "the model: scaled_dot_product_attention is not supported (attention has no LRP rule here). Use a network without attention."
)
class FunctionalAttention(Net):
    def body(self, x):
        y = x.flatten(2)
        return F.scaled_dot_product_attention(y, y, y).unflatten(2, (8, 8))


@refused("rnn: LSTM is not supported (recurrent layers have no LRP rule here). Use convolutions.")
class Recurrent(Net):
    def make(self):
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def body(self, x):
        return self.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, (8, 8))


@refused(f"act: PReLU is not supported {OTHER}")
class UnknownLayer(Net):
    def make(self):
        self.act = nn.PReLU()

    def body(self, x):
        return self.act(x)


@refused(f"act: square is not supported {OTHER}", example=False)  # export calls it pow
class UnknownOp(Net):
    def make(self):
        self.act = nn.Sequential()
        self.act.forward = lambda x: torch.square(x)

    def body(self, x):
        return self.act(x)


@refused("up: ConvTranspose2d is not supported (transposed convolutions have no LRP rule here). Use Upsample and a convolution.")
class Transposed(Net):
    def make(self):
        self.up = nn.ConvTranspose2d(4, 4, 2)

    def body(self, x):
        return self.up(x)


@refused("bn: SyncBatchNorm is not supported (statistics across processes are not supported yet). Use BatchNorm1d, 2d or 3d.",
         example=False)  # does not run on a CPU  # fmt: skip
class Synchronised(Net):
    def make(self):
        self.bn = nn.SyncBatchNorm(4)

    def body(self, x):
        return self.bn(x)


@refused("the model: gt is not supported (it chooses by value in a form that has no LRP rule here). Use relu, clamp(min=0) or a "
         "max pool.")  # fmt: skip
class Where(Net):
    def body(self, x):
        return torch.where(x > 0, x, x * 0.1)


@refused("the model: flatten from axis 0 is not supported " + SAMPLES)
class MixedSamples(Net):
    def body(self, x):
        return x.flatten(0, 1).unflatten(0, (-1, 4))


@refused("the model: mean over axis 0 is not supported " + SAMPLES)
class BatchMean(Net):
    def body(self, x):
        return x - x.mean((0, 2, 3), keepdim=True)


@refused("the model: sum over everything is not supported (it mixes the samples of the batch). Name the axes.")
class SumOfAll(Net):
    def body(self, x):
        return x - x.sum()


@refused("the model: mul is not supported (it uses a tensor made in forward). Register it as a buffer, so that it moves with the "
         "model.")  # fmt: skip
class TensorMadeInForward(Net):
    def body(self, x):
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)


@refused("the model: mean: it reads a tensor that was overwritten in place through a view or a part of it. Use the out-of-place "
         "form there (x = x + y instead of x += y, inplace=False).")  # fmt: skip
class OverwrittenThroughAPart(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        y = self.conv(x)
        y[:, :2].relu_()
        return y


@refused("the model: cat: it reads a tensor that was overwritten in place through a view or a part of it. Use the out-of-place "
         "form there (x = x + y instead of x += y, inplace=False).")  # fmt: skip
class PartOfTheOverwritten(Net):
    def make(self):
        self.conv = conv()

    def body(self, x):
        y = self.conv(x)
        part = y.chunk(2, 1)[0]
        y.relu_()
        return torch.cat([part, y], 1)


@refused("conv: padding_mode='circular' is not supported (it has no transpose here). Use zeros or reflect.")
class Circular(Net):
    def make(self):
        self.conv = conv(padding_mode="circular")

    def body(self, x):
        return self.conv(x)


@refused("pool: MaxPool2d with return_indices=True is not supported (indices carry no relevance). Leave it out.")
class Indices(Net):
    def make(self):
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def body(self, x):
        return self.pool(x)[0]


@refused("norm: InstanceNorm with track_running_stats=True is not supported (it has no LRP rule here). Use "
         "track_running_stats=False.")  # fmt: skip
class TrackedInstanceNorm(Net):
    def make(self):
        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)

    def body(self, x):
        return self.norm(x)


@refused("the model: conv is not supported (its weight is an activation: dynamic convolutions). Use a layer with its own "
         "weight.")  # fmt: skip
class DynamicConvolution(Net):
    def body(self, x):
        return F.conv2d(x, x[:, :, :3, :3])


@refused("the model: clamp is not supported (only clamp(min=0), a ReLU, has a rule). Use relu, relu6 or hardtanh.")
class Clamp(Net):
    def body(self, x):
        return x.clamp(-1, 1)


@refused("TwoInputs.forward takes 2 inputs, x, mask. Wrap the model in a module whose forward takes the batch alone (or give "
         "the others defaults).")  # fmt: skip
class TwoInputs(Net):
    def forward(self, x, mask):
        return super().forward(x * mask)


OUTPUT = "It must return the logits [N, C] alone, or a mapping or named tuple with 'logits': wrap the model in a module that does."


@refused(f"forward returns 2 values. {OUTPUT}")
class TwoOutputs(Net):
    def body(self, x):
        return x

    def forward(self, x):
        return super().forward(x), x


@refused(f"forward returns no tensor that depends on its input. {OUTPUT}")
class NoOutput(Net):
    def forward(self, x):
        return torch.zeros(2, 3)


@refused("the model: forward switches gradients or autocast on or off, which a program of the whole network cannot follow. "
         "Freeze layers with requires_grad_(False), and put autocast around the call.")  # fmt: skip
class NoGrad(Net):
    def body(self, x):
        with torch.no_grad():
            return x * 2


@refused("the model: .data is not supported " + OTHER, example=False)
class Data(Net):
    def body(self, x):
        return x.data


@refused("conv: WeightNorm computes the weight in a hook. Use torch.nn.utils.parametrizations instead (weight_norm, "
         "spectral_norm), or make it permanent (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove).")  # fmt: skip
class OldWeightNorm(Net):
    def make(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = torch.nn.utils.weight_norm(conv())

    def body(self, x):
        return self.conv(x)


@refused("lazy: LazyConv2d has no weights yet. Run the model on a batch first.")
class Lazy(Net):
    def make(self):
        self.lazy = nn.LazyConv2d(4, 3)

    def body(self, x):
        return self.lazy(x)


BY_EXAMPLE = "Pass example_input= (one batch of the right shape) and torch.export traces the model by example instead."


@refused("torch.fx cannot trace DataDependent (TraceError: symbolically traced variables cannot be used as inputs to control "
         f"flow). {BY_EXAMPLE}", example=False)  # fmt: skip
class DataDependent(Net):
    def body(self, x):
        return x if x.sum() > 0 else -x


@refused(f"torch.fx cannot trace Random (RuntimeError: forward draws random numbers, which this trace would fix for ever). "
         f"{BY_EXAMPLE}", example=False)  # fmt: skip
class Random(Net):
    def body(self, x):
        return x + torch.rand(4, 1, 1)


@refused("torch.fx cannot trace Assigned (TypeError: '_Proxy' object does not support item assignment). " + BY_EXAMPLE,
         example=False)  # fmt: skip
class Assigned(Net):
    def body(self, x):
        x[:, 0] = 0
        return x


def message_of(model, **options):
    with pytest.raises(fc.UnsupportedModelError) as raised:
        fc.ISNet(model, **options)
    return str(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_message(name):
    cls, message, _ = REFUSED[name]
    assert message_of(cls()) == message


@pytest.mark.parametrize("name", [n for n, (_, _, example) in REFUSED.items() if example])
def test_message_with_an_example(name):
    """The second front end refuses with the same words."""
    cls, message, _ = REFUSED[name]
    assert message_of(cls(), example_input=torch.rand(2, 3, 8, 8)) == message


def test_messages_of_export():
    """What neither front end can follow."""
    x = torch.rand(2, 3, 8, 8)
    message = message_of(DataDependent(), example_input=x)
    assert message.startswith("DataDependent can be traced neither by torch.fx (TraceError: symbolically traced variables cannot")
    assert "nor by torch.export (GuardOnDataDependentSymNode: " in message
    assert message.endswith("Let its forward not depend on the values or the size of the batch, or wrap only the part of the model "
                            "that classifies.")  # fmt: skip

    class NoGradByShape(NoGrad):
        def body(self, x):
            return super().body(x) if x.shape[-1] > 1 else x

    assert message_of(NoGradByShape(), example_input=x) == (
        "the model: wrap_with_set_grad_enabled is not supported (forward switches gradients or autocast on or off, which a program "
        "of the whole network cannot follow). Freeze layers with requires_grad_(False), and put autocast around the call."
    )
    assert message_of(Assigned(), example_input=x) == (
        "the model: fill is not supported (it rewrites part of a tensor). Build the tensor with torch.cat or pad."
    )


@pytest.mark.parametrize(("model", "message"), [
    (nn.Linear(3, 2), "the model is a single Linear: wrap it, torch.nn.Sequential(layer)"),
    (nn.Sequential(nn.Embedding(3, 2)), "0: Embedding is not supported (indices carry no relevance). Wrap only the part of the "
     "model behind it."),
    (nn.DataParallel(nn.Sequential(nn.Linear(3, 2))), "the model is wrapped in DataParallel. Pass the network itself (.module, "
     "._orig_mod), and put DataParallel around the ISNet."),
    (torch.compile(nn.Sequential(nn.Linear(3, 2))), "the model is wrapped in OptimizedModule. Pass the network itself (.module, "
     "._orig_mod), and put OptimizedModule around the ISNet."),
])  # fmt: skip
def test_what_is_no_network(model, message):
    assert message_of(model) == message


def test_hooks_are_mentioned():
    """A forward hook of the user's does not run where the program runs instead of the model."""
    model = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with pytest.warns(fc.FisnetWarning, match=r"^forward hooks of 1 do not run in net\(x, relevance=True\)$"):
        net = fc.ISNet(model)
    seen.clear()
    net(torch.rand(2, 3, 8, 8), relevance=True)
    assert not seen
    net(torch.rand(2, 3, 8, 8))
    assert len(seen) == 1


def test_the_warning_points_at_the_line_that_wraps():
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 2))
    model[0].register_forward_pre_hook(lambda module, inputs: None)
    with pytest.warns(fc.FisnetWarning) as caught:
        fc.ISNet(model)
    assert {w.filename for w in caught} == {__file__}


def test_an_error_of_the_models_own_is_not_lost():
    class Broken(Net):
        def body(self, x):
            return x.no_such_method()

    assert message_of(Broken()) == f"the model: no_such_method is not supported {OTHER}"

    class Raises(Net):
        def body(self, x):
            raise ValueError("bad settings. More follows.")

    assert "torch.fx cannot trace Raises (ValueError: bad settings)" in message_of(Raises())


@pytest.mark.parametrize(("body", "message"), [
    (lambda x: x.view(-1, 4).mean(0, True).expand(4, -1).reshape(2, 4, 2, 1), "over axis 0"),
    (lambda x: x.reshape(4, 2, 8, 8), r"a reshape from \(2, 4, 8, 8\) to \(4, 2, 8, 8\) mixes the samples"),
    (lambda x: torch.cat([x, x], -4), r"cat along axis -4 of \(2, 4, 8, 8\) mixes the samples"),
    (lambda x: x.mean(-4, keepdim=True), r"mean over axis 0 of \(2, 4, 8, 8\) mixes the samples"),
    (lambda x: x.narrow(-4, 0, 1), r"a slice of axis -4 of \(2, 4, 8, 8\) picks samples"),
    (lambda x: x + x.mean((2, 3), keepdim=True), r"a sum of activations \(2, 4, 8, 8\) and \(2, 4, 1, 1\) has no LRP rule"),
    (lambda x: F.relu(x + x.mean((2, 3), keepdim=True)), r"a sum of activations \(2, 4, 8, 8\) and \(2, 4, 1, 1\) has no"),
])  # fmt: skip
def test_what_only_the_run_can_see(body, message):
    class Model(Net):
        pass

    model = Model()
    model.body = body
    with pytest.raises((ValueError, fc.UnsupportedModelError), match=message):
        fc.ISNet(model)(torch.rand(2, 3, 8, 8), relevance=True)
