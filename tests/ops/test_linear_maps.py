"""Transposed convolutions and dense layers as forward ops, and the positive part of weights."""

import itertools

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, grads, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from fisnet_cuda import ops, reference

N, K = 2, 3
F = torch.nn.functional
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def input_gradient(s, W, geometry, in_size):
    """``W^T s`` by PyTorch's own convolution backward (its derivative is PyTorch's convolution double backward)."""
    if not geometry.spatial:
        return s @ W
    channels = W.shape[1] * geometry.groups
    like = s.new_zeros(s.shape[0], channels, *in_size)
    flags = [True, False, False]
    return torch.ops.aten.convolution_backward(
        s, like, W, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * geometry.spatial,
        geometry.groups, flags,
    )[0]  # fmt: skip


def scaled(s, scale, geometry):
    return s * (scale.view(-1, *[1] * geometry.spatial) if geometry.spatial else scale)


def conv_case(name, spatial, c_in, c_out, size, kernel, stride=1, padding=0, dilation=1, groups=1, batch=N, scale=True):
    geometry = ops.conv_geometry(spatial, stride, padding, dilation, groups)
    W = randn(c_out, c_in // groups, *kernel, seed=1)
    out = CONV[spatial](W.new_zeros(1, c_in, *size), W, None, stride, padding, dilation, groups).shape[2:]
    inputs = {"s": randn(batch, c_out, *out, seed=2), "W": W}
    if scale:
        inputs["scale"] = randn(c_out, seed=3)
    return Case(
        name,
        lambda s, W, *k: ops.transposed(s, W, geometry, size, *k),
        lambda s, W, *k: input_gradient(scaled(s, *k, geometry) if k else s, W, geometry, size),
        inputs,
    )


def dense_case(name, *rows):
    geometry = ops.linear_geometry()
    return Case(
        name,
        lambda s, W, k: ops.transposed(s, W, geometry, (), k),
        lambda s, W, k: (s * k) @ W,
        {"s": randn(*rows, 3, seed=2), "W": randn(3, 4, seed=1), "scale": randn(3, seed=3)},
    )


CASES = [
    conv_case("2d", 2, 4, 3, (5, 4), (3, 2)),
    conv_case("2d-no-scale", 2, 4, 3, (5, 4), (3, 2), scale=False),
    conv_case("2d-strided", 2, 9, 2, (6, 5), (3, 3), stride=2, padding=1),
    conv_case("2d-few-channels", 2, 3, 4, (7, 6), (3, 3), stride=2, padding=1),
    conv_case("2d-stem", 2, 1, 2, (9, 9), (7, 7), stride=2, padding=3),
    conv_case("2d-uneven", 2, 2, 2, (6, 7), (2, 3), stride=(1, 3), padding=(1, 0), dilation=(2, 1)),
    conv_case("2d-grouped", 2, 4, 6, (5, 5), (3, 3), padding=1, groups=2),
    conv_case("2d-depthwise", 2, 3, 3, (5, 5), (3, 3), stride=2, padding=1, groups=3),
    # weights much larger than the map: their gradient takes a path of its own
    conv_case("2d-late", 2, 3, 16, (2, 1), (3, 3), stride=(1, 2), padding=1),
    conv_case("2d-late-1x1", 2, 3, 5, (1, 1), (1, 1)),
    conv_case("2d-one", 2, 1, 1, (1, 1), (1, 1)),
    conv_case("1d", 1, 2, 3, (7,), (3,), stride=2, padding=1, dilation=2),
    conv_case("3d", 3, 2, 2, (3, 4, 3), (2, 2, 3), stride=(1, 2, 1), padding=(0, 0, 1)),
    dense_case("dense", N),
    dense_case("dense-rank-3", N, 2),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed(case, check):
    check(case)


@st.composite
def convolutions(draw, few=False):
    spatial = 2 if few else draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    kernel = each(1, 7 if spatial == 2 else 3)
    stride = (draw(st.integers(1, 4)),) * 2 if few else each(1, 3)
    dilation = (1, 1) if few else each(1, 2)
    padding = each(0, 4 if few else 2)
    size = tuple(max(draw(st.integers(1, 10)), d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation))
    groups = 1 if few else draw(st.integers(1, 2))
    c_in, c_out = groups * draw(st.integers(1, 9 if few else 2)), groups * draw(st.integers(1, 3))
    return conv_case("drawn", spatial, c_in, c_out, size, kernel, stride, padding, dilation, groups, draw(st.integers(1, 2)))


@settings(max_examples=120)
@given(convolutions(few=True))
def test_every_strided_stem(case):
    """Few input channels and a stride take a path of their own on a CPU; kernels smaller than the stride, padding larger
    than the kernel and inputs that no window reaches included."""
    equals_formula(case)


@settings(max_examples=80)
@given(convolutions())
def test_every_convolution(case):
    equals_formula(case)


def test_few_channels_in_channels_last():
    s, W = randn(2, 4, 5, 5), randn(4, 3, 7, 7, seed=1)
    geometry = ops.conv_geometry(2, 2, 3, 1, 1)
    want = ops.transposed(s, W, geometry, (10, 9))
    for layout in (torch.channels_last, torch.contiguous_format):
        close(ops.transposed(s.contiguous(memory_format=layout), W.contiguous(memory_format=layout), geometry, (10, 9)), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_is_the_adjoint_of_fprop(case):
    """``<s, W a> = <W^T s, a>``."""
    s, W = (t.detach() for t in list(case.inputs.values())[:2])
    scale = torch.ones(W.shape[0], dtype=W.dtype)
    g = case.op(s, W, *([scale] if len(case.inputs) == 3 else []))
    a = randn(*g.shape, seed=7).requires_grad_()
    value = (case.op(s, W, *([scale] if len(case.inputs) == 3 else [])) * a).sum()
    (back,) = torch.autograd.grad(value, a)
    close(back, g)


@pytest.mark.parametrize("case", [c for c in CASES if "scale" in c.inputs and c.name != "dense-rank-3"], ids=str)
def test_empty_batch(case):
    s, W, scale = (t.detach().clone().requires_grad_() for t in case.inputs.values())
    empty = s[:0].detach().requires_grad_()
    g = case.op(empty, W, scale)
    assert g.shape == (0, *case.op(s, W, scale).shape[1:])
    assert not any(t.any() for t in grads(g, [empty, W, scale]))


def test_fprop_is_pytorchs():
    x, W, b = randn(2, 4, 5, 5), randn(6, 2, 3, 3, seed=1), randn(6, seed=2)
    geometry = ops.conv_geometry(2, 2, 1, 1, 2)
    assert torch.equal(ops.fprop(x, W, b, geometry), F.conv2d(x, W, b, 2, 1, 1, 2))
    x, W, b = randn(2, 3, 4), randn(5, 4, seed=1), randn(5, seed=2)
    assert torch.equal(ops.fprop(x, W, b, ops.linear_geometry()), F.linear(x, W, b))


def fprop_case(name, c_in, c_out, size, kernel, bias=True, **settings):
    """`fprop` beside PyTorch's convolution, where the weight gradient may take its own path."""
    geometry = ops.conv_geometry(2, settings.get("stride", 1), settings.get("padding", 0), 1, 1)
    inputs = {"x": randn(N, c_in, *size), "W": randn(c_out, c_in, *kernel, seed=1)}
    if bias:
        inputs["b"] = randn(c_out, seed=2)
    return Case(
        name, lambda x, W, b=None: ops.fprop(x, W, b, geometry), lambda x, W, b=None: F.conv2d(x, W, b, **settings), inputs,
        function=False,
    )  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "case",
    [
        fprop_case("early", 2, 2, (4, 4), (3, 3), padding=1),
        fprop_case("late", 2, 24, (2, 2), (3, 3), padding=1),
        fprop_case("late-strided", 2, 32, (3, 2), (3, 3), bias=False, padding=1, stride=2),
        fprop_case("late-1x1", 3, 5, (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_fprop(case, check):
    geometry = ops.conv_geometry(2, 1, 0, 1, 1)
    assert reference.weight_dominates(case.inputs["x"], case.inputs["W"], geometry) == case.name.startswith("late")
    check(case)


@pytest.mark.parametrize("groups", [1, 2])
def test_wgrad_is_pytorchs(groups):
    x, W = randn(2, 4, 6, 5), randn(6, 4 // groups, 3, 2, seed=1).requires_grad_()
    geometry = ops.conv_geometry(2, (2, 1), (1, 0), (1, 2), groups)
    y = ops.fprop(x, W, None, geometry)
    s = randn(*y.shape, seed=2)
    close(reference.wgrad(x, s, W, geometry), torch.autograd.grad(y, W, s)[0])
    x, W = randn(2, 3, 4), randn(5, 4, seed=1).requires_grad_()
    s = randn(2, 3, 5, seed=2)
    want = torch.autograd.grad(F.linear(x, W), W, s)[0]
    close(reference.wgrad(x, s, W, ops.linear_geometry()), want)


def test_geometry():
    assert ops.conv_geometry(2, 1, (1, 2), [3], 4) == (2, (1, 1), (1, 2), (3, 3), 4)
    assert ops.linear_geometry().spatial == 0


def test_autocast_runs_in_its_dtype():
    s, W = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(3, 5, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        g = ops.transposed(s, W, ops.conv_geometry(2, 1, 1, 1, 1), (4, 4))
    assert g.dtype == torch.bfloat16
    g.float().sum().backward()
    assert s.grad.dtype == W.grad.dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="s has 3 channels and W has 4 outputs"):
        ops.transposed(torch.ones(1, 3, 2, 2), torch.ones(4, 1, 1, 1), ops.conv_geometry(2, 1, 0, 1, 1), (2, 2))
    with pytest.raises(ValueError, match="s has 3 channels and W has 4 outputs"):
        ops.transposed(torch.ones(1, 3), torch.ones(4, 1), ops.linear_geometry(), ())


# ---- positive part -------------------------------------------------------------------------------------------------------


def positive_case(shape, sign):
    def formula(W):
        factor = sign.to(W.dtype).view(-1, *[1] * (W.dim() - 1))
        return torch.where(W * factor > 0, W * factor, W.new_zeros(()))

    def op(W):
        return ops.positive_part(W, sign.to(W.dtype))

    return Case(f"{len(shape)}d", op, formula, {"W": randn(*shape, seed=4)})


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "case", [positive_case((4, 2), randn(4).sign()), positive_case((3, 2, 3, 2), torch.tensor([1.0, -1.0, 0.0]))], ids=str
)
def test_positive_part(case, check):
    check(case)


def test_positive_part_without_signs_and_at_zero():
    W = torch.tensor([[1.0, -2.0, 0.0, -0.0]], requires_grad=True)
    y = ops.positive_part(W)
    assert y.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert y.data_ptr() != W.data_ptr()
    y.sum().backward()
    assert W.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    sign = torch.ones(1, requires_grad=True)
    ops.positive_part(W, sign).sum().backward()
    assert sign.grad is None


def test_cuda_backend_is_refused_without_one():
    for name, call in itertools.product(["cuda"], [ops.transposed]):
        with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on a GPU"):
            call(torch.ones(1, 3), torch.ones(3, 2), ops.linear_geometry(), (), backend=name)
