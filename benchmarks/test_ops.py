"""Times of the single ops, forward and backward, under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Shapes are those of ResNet-18 at four images of 3x112x112. Ids read op-direction-case-implementation-layout. Where
PyTorch has the same op, its result is compared before either is timed. ``FISNET_BENCH_DEVICE=cuda`` runs on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fisnet_cuda import ops

DEVICE = os.environ.get("FISNET_BENCH_DEVICE", "cpu")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
EPS = 1e-2

both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def rand() -> Callable[..., Tensor]:
    """Tensors in [0, 1], the same ones in every test."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, layout: str = "channels_last", grad: bool = False) -> Tensor:
        values = torch.rand(shape, generator=generator).to(DEVICE)
        if len(shape) == 4:
            values = values.contiguous(memory_format=LAYOUTS[layout])
        return values.requires_grad_(grad)

    return make


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time ``run(*inputs)``, or the backward from its outputs to those inputs that ask for a gradient."""

    def start(direction: str, run: Callable[..., Any], *inputs: Any) -> None:
        def wait() -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        def forward() -> None:
            with torch.no_grad():
                run(*inputs)
            wait()

        benchmark.group = request.node.originalname
        benchmark.extra_info.update(device=DEVICE, threads=torch.get_num_threads())
        if direction == "forward":
            benchmark(forward)
            return
        outputs = _differentiable(run(*inputs))
        adjoints = [torch.ones_like(t) for t in outputs]
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]

        def backward() -> None:
            torch.autograd.grad(outputs, wanted, adjoints, retain_graph=True)
            wait()

        benchmark(backward)

    return start


def _differentiable(outputs: Any) -> list[Tensor]:
    several: Sequence[Any] = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t for t in several if isinstance(t, Tensor) and t.requires_grad]


@both_layouts
@pytest.mark.parametrize("case", ["plain", "skip", "scale", "four-maps"])
@both_directions
def test_phi_scale(measure, rand, direction, case, layout):
    """phi(a) (g [+ skip]) [times scale] at the ReLU of ResNet-18's first stage."""
    maps = 4 if case == "four-maps" else 1
    a = rand(4, 64, 28, 28, layout=layout, grad=True)
    g = rand(4 * maps, 64, 28, 28, layout=layout, grad=True)
    skip = rand(4, 64, 28, 28, layout=layout, grad=True) if case == "skip" else None
    scale = rand(64, grad=True) if case == "scale" else None
    measure(direction, ops.phi_scale, g, a, EPS, skip, scale)


@both_layouts
@both_directions
def test_dual_phi(measure, rand, direction, layout):
    """Both rules of Dual at one ReLU."""
    inputs = [rand(4, 64, 28, 28, layout=layout, grad=True) for _ in range(4)]
    measure(direction, ops.dual_phi, *inputs, EPS, EPS)


# case -> output channels, input channels, kernel, stride, padding, input size
CONVOLUTIONS = {
    "3x3": (64, 64, 3, 1, 1, 28),
    "1x1": (128, 256, 1, 1, 0, 14),
    "3x3-stride2": (128, 64, 3, 2, 1, 28),
    "stem-7x7-stride2": (64, 3, 7, 2, 3, 112),
}


@both_layouts
@pytest.mark.parametrize("implementation", ["fisnet", "aten"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@both_directions
def test_transposed(measure, rand, direction, case, implementation, layout):
    """g = W^T s, against PyTorch's convolution_backward with the mask of the input gradient."""
    c_out, c_in, kernel, stride, padding, size = CONVOLUTIONS[case]
    out = (size + 2 * padding - kernel) // stride + 1
    s = rand(4, c_out, out, out, layout=layout, grad=True)
    W = rand(c_out, c_in, kernel, kernel, layout=layout, grad=True)
    x = rand(4, c_in, size, size, layout=layout)
    geometry = ops.conv_geometry(2, stride, padding, 1, 1)

    def fisnet(s: Tensor, W: Tensor) -> Tensor:
        return ops.transposed(s, W, geometry, (size, size))

    def aten(s: Tensor, W: Tensor) -> Tensor:
        strides, pads = [stride] * 2, [padding] * 2
        return torch.ops.aten.convolution_backward(
            s, x, W, None, strides, pads, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]

    torch.testing.assert_close(fisnet(s, W), aten(s, W), rtol=1e-4, atol=1e-3)
    measure(direction, fisnet if implementation == "fisnet" else aten, s, W)


@both_layouts
@both_directions
def test_zb(measure, rand, direction, layout):
    """The z^B rule of the 7x7 stride-2 stem."""
    R = rand(4, 64, 56, 56, layout=layout, grad=True)
    x, z = rand(4, 3, 112, 112, layout=layout), rand(4, 64, 56, 56, layout=layout)
    W = (rand(64, 3, 7, 7, layout=layout) - 0.5).requires_grad_()
    shift = rand(64, grad=True)
    low, high = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    measure(direction, ops.zb, R, x, z, W, shift, low, high, EPS, ops.conv_geometry(2, 2, 3, 1, 1))


@pytest.mark.parametrize("d", [0.9, 0.996, 1.0], ids="d={}".format)
@both_directions
def test_heatmap_loss(measure, rand, direction, d):
    """Background and foreground loss of four heatmaps of 3x112x112; d sets how many pixels are ranked."""
    R = (rand(4, 1, 3, 112, 112) - 0.5).requires_grad_()
    mask = torch.zeros(4, 1, 112, 112, device=DEVICE)
    mask[..., 28:-28, 28:-28] = 1
    options = {"d": d, "E": 1, "c1": 1, "c2": 25, "foreground": "hybrid", "normalization": "absRoIMean"}
    measure(direction, lambda R: ops.heatmap_loss(R, mask, backend="auto", **options), R)


@both_layouts
@both_directions
def test_max_pool_transposed(measure, rand, direction, layout):
    """Relevance through a 3x3 stride-2 max pool: a scatter that adds; backward, a gather."""
    x = rand(4, 64, 56, 56, layout=layout)
    pool = (2, False, (3, 2, 1, 1, False))
    winners = ops.max_pool(x, *pool)[1]
    g = rand(4, 64, 28, 28, layout=layout, grad=True)
    measure(direction, lambda g: ops.max_pool_transposed(g, winners, (56, 56), pool), g)


@both_layouts
@pytest.mark.parametrize("case", ["bn-relu", "bn-skip-relu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@both_directions
def test_bn_act(measure, rand, direction, mode, case, layout):
    """BatchNorm, addition and ReLU as one op."""
    x = rand(4, 64, 28, 28, layout=layout, grad=True)
    skip = rand(4, 64, 28, 28, layout=layout, grad=True) if case == "bn-skip-relu" else None
    weight, bias = rand(64, grad=True), rand(64, grad=True)
    mean, var = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)

    def run(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None) -> tuple[Tensor, ...]:
        return ops.bn_act(x, weight, bias, mean, var, mode == "train", skip=skip, relu=True)

    measure(direction, run, x, weight, bias, skip)
