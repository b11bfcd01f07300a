"""Whole ISNets with every fused kernel forced on: logits, heatmaps, loss, gradients and statistics are the reference's."""

import warnings

import golden_nets
import pytest
import torch
from helpers import error
from kernels.test_network import EXACT, SIZE, VARIANTS, Operators, same, step
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import fisnet_cuda as fc
from fisnet_cuda import dispatch
from fisnet_cuda.ops.layout import memory_format
from fisnet_cuda.rules import Epsilon

FUSED = {"linear_act", "transposed_phi", "fprop_adjoint", "dual_fprop", "dual_transposed_phi", "dual_fprop_adjoint"}
SETTINGS = {
    "train": {},
    "eval": {"train": False},
    "relative": {"eps": Epsilon(1e-2, relative=True)},
    "no z^B": {"first_layer": "epsilon"},
}


def step_with(rules, *args, **options):
    """A training step under ``rules`` of the dispatcher, and the operators that ran; a kernel that was asked for and cannot run
    a call is an error."""
    with dispatch.forced(rules), Operators() as operators, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is forced to.*", category=fc.errors.FisnetWarning)
        return step(*args, layout=torch.channels_last, **options), set(operators.seen) & FUSED


def expected(name, variant):
    """The fused kernels that such a network must reach in a training step."""
    dual, has_bn = variant == "dual", name in ("seqbn", "resnet18s", "densenets")
    wanted = {"transposed_phi"}
    if dual:
        wanted |= {"dual_fprop", "dual_transposed_phi"}
    if name in ("seqbn", "vgg"):
        wanted |= {"dual_fprop_adjoint"} if dual else {"fprop_adjoint"}
    if not has_bn and not dual:
        wanted |= {"linear_act"}
    return wanted


CASES = [
    (variant, settings) for variant in VARIANTS for settings in SETTINGS
    if (variant, settings) != ("dual", "no z^B")  # the z+ map needs a first layer with bounds
]  # fmt: skip


@pytest.mark.parametrize(("variant", "settings"), CASES)
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_float64(device, name, variant, settings):
    settings = SETTINGS[settings]

    def build():
        return golden_nets.build(name)

    options = {"size": SIZE[name], **settings}
    want = step(build, variant, device, "reference", layout=torch.channels_last, **options)
    got, seen = step_with("*=fused", build, variant, device, "auto", **options)
    same(got, want, EXACT)
    assert expected(name, variant) <= seen, seen


def whole(results, kind):
    """All gradients, or one of the other results, as one vector."""
    return torch.cat([v.double().flatten() for name, v in results.items() if name.startswith(kind)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("name", ["seqbn", "vgg", "resnet18s", "densenets"])
def test_autocast(device, name, variant, dtype):
    """No layer falls back for its dtypes, and the error is at most twice that of the library's products."""

    def build():
        return golden_nets.build(name)

    def run(rules):
        with torch.autocast("cuda" if device == "cuda" else "cpu", dtype):
            return step_with(rules, build, variant, device, "auto", torch.float32, **options)

    options = {"size": SIZE[name], "train": False}
    exact = step(build, variant, device, "reference", layout=torch.channels_last, **options)
    (usual, _), (got, seen) = run("*=library"), run("*=fused")
    assert expected(name, variant) <= seen, seen
    for kind in ("logits", "heatmaps", "gradient"):
        errors = [float((whole(r, kind) - whole(exact, kind)).norm() / whole(exact, kind).norm()) for r in (got, usual)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, (kind, errors)


@pytest.mark.parametrize("variant", ["selective", "dual"])
@pytest.mark.parametrize("name", ["seqbn", "vgg", "resnet18s"])
def test_tf32(device, name, variant):
    """float32 operands, products in TF32: its rounding is between that of float32 and that of bfloat16 products."""

    def build():
        return golden_nets.build(name)

    options = {"size": SIZE[name], "train": False}
    exact = step(build, variant, device, "reference", layout=torch.channels_last, **options)
    got, seen = step_with("*=fused", build, variant, device, "auto", torch.float32, **options)
    assert expected(name, variant) <= seen, seen
    with torch.autocast("cuda" if device == "cuda" else "cpu", torch.bfloat16):
        rough, _ = step_with("*=library", build, variant, device, "auto", torch.float32, **options)
    for kind in ("logits", "heatmaps", "gradient"):
        errors = [float((whole(r, kind) - whole(exact, kind)).norm() / whole(exact, kind).norm()) for r in (got, rough)]
        assert errors[0] <= errors[1] / 2, (kind, errors)


class MapCopies(TorchDispatchMode):
    """Copies of inner maps (more channels than an image has) of `step`'s samples into another layout, and in float32."""

    def __init__(self):
        super().__init__()
        self.relaid, self.wide = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy) and _inner_map(source):
            if memory_format(result) != memory_format(source):
                self.relaid.append((func.name(), tuple(source.shape), source.stride(), result.stride()))
            if torch.float32 in (result.dtype, source.dtype):
                self.wide.append((func.name(), tuple(source.shape), source.dtype, result.dtype))
        return result


def _inner_map(t):
    return isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[0] == 3 and t.shape[1] > 3


# Each flatten: once forward, once in relevance, and back from both; Dual has relevance twice.
@pytest.mark.parametrize(("name", "flattens"), [("resnet18s", 0), ("vgg", 1)])
@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_no_map_changes_its_layout(device, name, flattens, variant):
    """Under autocast a channels_last step copies no map into another layout but where it is flattened, and none to float32."""

    def build():
        return golden_nets.build(name)

    with MapCopies() as copies, torch.autocast("cuda" if device == "cuda" else "cpu", torch.bfloat16):
        step_with("*=fused", build, variant, device, "auto", torch.float32, size=SIZE[name])
    assert len(copies.relaid) <= flattens * (4 if variant == "selective" else 6), copies.relaid
    assert not copies.wide


@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_compiled(device, variant):
    """torch.compile takes the forced kernels too, in the forward and in the backward, without a break."""
    net = fc.ISNet(golden_nets.build("seqbn"), variant, check="never").to(device, torch.float64).to(memory_format=torch.channels_last)
    loss, size = fc.ISNetLoss(d=0.9, check="never"), SIZE["seqbn"]
    x = torch.rand(2, 3, size, size, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last)
    y, masks = torch.tensor([0, 1], device=device), (torch.rand(2, 1, size, size, device=device) > 0.5).double()
    net.eval()

    def run(x, y, masks):
        return loss(net(x, relevance=True), y, masks)[0]

    def gradients(fn):
        torch.manual_seed(7)
        net.zero_grad()
        fn(x, y, masks).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    seen = set()

    def look(graph, _):
        seen.update(node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fisnet")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with dispatch.forced("*=fused"):
        want = gradients(run)
        got = gradients(torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=look)))
    assert expected("seqbn", variant) <= seen, seen
    for g, w in zip(got, want, strict=True):
        assert error(g, w) <= EXACT
