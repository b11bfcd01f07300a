"""Whole training steps: the kernels against the reference path, in every precision, for every variant and kind of network."""

import pytest
import torch
from emulator import emulated
from gpu.steps import NETS, PRECISIONS, VARIANTS, Step, distance

from fisnet_cuda import _backend

ON_CUDA = [
    pytest.param("cuda", net, variant, precision, marks=pytest.mark.gpu)
    for net in NETS
    for variant in VARIANTS
    for precision in PRECISIONS
    if precision != "fp16" or net in ("resnet18s", "densenets")
]
EMULATED = [
    ("cpu", "seqbn", "selective", "float64"), ("cpu", "resnet18s", "dual", "float32"),
    ("cpu", "densenets", "stochastic", "float32"), ("cpu", "vgg", "original", "float32"),
]  # fmt: skip
MEASURED = ("logits", "heatmaps", "total", "gradients")


def results(device, net, variant, precision, backend, layout):
    step = Step(net, variant, device, precision, backend, layout)
    step()
    return step.results()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("device", "net", "variant", "precision"), [*EMULATED, *ON_CUDA])
def test_kernels_agree_with_the_reference(device, net, variant, precision, layout, request):
    """In float64 to rounding; else at most twice the reference's own error against float64, plus a rounding floor."""
    if device == "cuda":
        request.getfixturevalue("cuda")
        if layout == torch.contiguous_format and precision != "float32":
            pytest.skip("one precision is enough for the other layout")
    exact = results(device, net, variant, "float64", "reference", layout)
    if device == "cpu":
        with emulated(checks=False):
            got = results(device, net, variant, precision, "auto", layout)
    else:
        assert _backend._load()[0], _backend._load()[1]
        got = results(device, net, variant, precision, "auto", layout)
    usual = results(device, net, variant, precision, "reference", layout)
    assert torch.equal(got["explained"], exact["explained"])
    unit = torch.finfo(PRECISIONS[precision]).eps
    for name in MEASURED:
        if not torch.isfinite(usual[name]).all():
            assert precision == "fp16", f"{name} of the reference is not finite"
            continue  # beyond float16's range, with or without kernels
        mine, theirs = distance(got[name], exact[name]), distance(usual[name], exact[name])
        allowed = 1e-9 if precision == "float64" else 2 * theirs + 4 * unit
        assert mine <= allowed, f"{name}: error {mine:.2e}, allowed {allowed:.2e} (the reference: {theirs:.2e})"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("net", ["resnet18s", "seqbn"])
def test_compiled_without_a_graph_break(device, net, variant):
    """``torch.compile(fullgraph=True)`` of forward and relevance with the kernels in it; one case through inductor."""
    if device == "cpu" and (net, variant) != ("seqbn", "selective"):
        pytest.skip("one case emulated")
    torch._dynamo.reset()
    # on a CPU, fake tensors and oneDNN disagree about the strides of a channels_last weight's gradient
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    eager, compiled = (Step(net, variant, device, layout=layout) for _ in range(2))
    inductor = device == "cuda" and (net, variant) == ("resnet18s", "dual")
    compiled.net = torch.compile(compiled.net, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    for step in (eager, compiled):
        step()
    for name in MEASURED:
        assert distance(compiled.results()[name], eager.results()[name]) <= 1e-3, name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_gives_the_same_bits_every_time(device, variant, precision, deterministic):
    """Forward, heatmaps, loss and gradients, where PyTorch's own implementations are deterministic too."""
    if device == "cpu" and (variant, precision) != ("dual", "float32"):
        pytest.skip("one case emulated")
    first, second = ({}, {})
    for seen in (first, second):
        step = Step("resnet18s", variant, device, precision)
        step()
        seen.update(step.results())
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs from run to run"
