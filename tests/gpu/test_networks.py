"""Whole training steps: the kernels against the reference path, in every precision, for every variant and kind of network."""

from contextlib import nullcontext
from statistics import median

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
    ("cpu", "seq", "contrast", "float32"),
]  # fmt: skip
MEASURED = ("logits", "heatmaps", "total", "gradients")


SEEDS = (3, 4, 5, 6, 7)  # of batches


def results(device, net, variant, precision, backend, layout, seed):
    step = Step(net, variant, device, precision, backend, layout, seed=seed)
    step()
    return step.results()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("device", "net", "variant", "precision"), [*EMULATED, *ON_CUDA])
def test_kernels_agree_with_the_reference(device, net, variant, precision, layout, request):
    """In float64 to rounding; else at most twice the reference's own error against float64, plus a rounding floor.

    The gradients of a whole network are chaotic: a unit that one rounding switches off, or a pixel that it moves to another
    rank, changes many of them, and the errors of one batch are luck, with a long tail. Where those of the first batch are not
    within bounds, the medians of five batches have to be.
    """
    if device == "cuda":
        request.getfixturevalue("cuda")
        if layout == torch.contiguous_format and precision != "float32":
            pytest.skip("one precision is enough for the other layout")
        assert _backend._load()[0], _backend._load()[1]
    setting = device, net, variant
    unit = torch.finfo(PRECISIONS[precision]).eps
    mine, theirs = ({name: [] for name in MEASURED} for _ in range(2))
    for seed in SEEDS:
        exact = results(*setting, "float64", "reference", layout, seed)
        with emulated(checks=False) if device == "cpu" else nullcontext():
            got = results(*setting, precision, "auto", layout, seed)
        usual = results(*setting, precision, "reference", layout, seed)
        if seed == SEEDS[0]:
            assert torch.equal(got["explained"], exact["explained"])
        for name in MEASURED:
            if torch.isfinite(usual[name]).all():
                assert torch.isfinite(got[name]).all(), f"{name} is not finite, the reference's is"
                mine[name].append(distance(got[name], exact[name]))
                theirs[name].append(distance(usual[name], exact[name]))
            else:  # beyond float16's range, with or without kernels
                assert precision == "fp16", f"{name} of the reference is not finite"
        beyond = {}
        for name in filter(mine.get, MEASURED):
            error, allowed = median(mine[name]), 1e-9 if precision == "float64" else 2 * median(theirs[name]) + 4 * unit
            if error > allowed:
                beyond[name] = f"error {error:.2e}, allowed {allowed:.2e}"
        if (seed == SEEDS[0] and not beyond) or precision == "float64":
            break
    assert not beyond, f"{beyond}, medians of {len(mine['total'])} batches"


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
