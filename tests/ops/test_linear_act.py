"""A linear map with its bias, constant BatchNorm, skip and ReLU in one op: `linear_act`."""

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, rand, randn
from ops.test_dual_linear import LAYERS, Layer
from torch import nn

from fisnet_cuda import ops


def forward(layer, x, W, shift=None, skip=None, relu=True, scale=None, pre=None):
    """By PyTorch's own layers; ReLU and bias as ever."""
    if pre is not None:
        x = torch.relu(x * layer.columns(pre[0]) + layer.columns(pre[1]))
    y = layer.fprop(x, W)
    y = y if scale is None else y * layer.columns(scale)
    y = y if shift is None else y + layer.columns(shift)
    y = y if skip is None else y + skip
    return torch.relu(y) if relu else y


def act_case(name, bias=True, skip=False, relu=True):
    layer = Layer(name)
    inputs = {"x": randn(*layer.x, seed=3), "W": layer.W}
    if bias:
        inputs["shift"] = randn(layer.c_out, seed=4)
    if skip:
        inputs["skip"] = randn(*layer.y, seed=5)
    names = list(inputs)[2:]

    def op(x, W, *rest):
        return ops.linear_act(x, W, layer.geometry, relu=relu, **dict(zip(names, rest)))

    def formula(x, W, *rest):
        return forward(layer, x, W, relu=relu, **dict(zip(names, rest)))

    return Case(f"{name}{'-bias' * bias}{'-skip' * skip}{'-relu' * relu}", op, formula, inputs)


CASES = [
    act_case("3x3", skip=True),
    act_case("strided", bias=False),
    act_case("grouped", relu=False),
    act_case("1d", skip=True, relu=False),
    act_case("dense", skip=True),
    act_case("dense-axes"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_act(case, check):
    check(case)


@pytest.mark.parametrize("name", LAYERS)
def test_linear_act_of_every_layer(name):
    for bias in (False, True):
        for skip in (False, True):
            for relu in (False, True):
                equals_formula(act_case(name, bias, skip, relu))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pre", [False, True])
def test_constant_batch_norms(name, pre):
    """Behind the map and, with a ReLU, in front of it; scales of both signs."""
    layer = Layer(name)
    x, skip = randn(*layer.x), randn(*layer.y, seed=1)
    scale, shift = randn(layer.c_out, seed=2), randn(layer.c_out, seed=3)
    c_in = layer.x[1 if layer.spatial else -1]
    before = (randn(c_in, seed=4), randn(c_in, seed=5)) if pre else None
    for given in (None, skip):
        for relu in (False, True):
            with torch.no_grad():
                got = ops.linear_act(x, layer.W, layer.geometry, scale, shift, given, relu, *(before or ()))
            close(got, forward(layer, x, layer.W, shift, given, relu, scale, before))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_as_scale_and_shift(affine, bias):
    conv, bn = nn.Conv2d(2, 3, 3, bias=bias).double(), nn.BatchNorm2d(3, affine=affine).double().eval()
    bn.running_mean.copy_(randn(3))
    bn.running_var.copy_(rand(3, low=0.5))
    if affine:
        bn.weight.data, bn.bias.data = randn(3, seed=1), randn(3, seed=2)
    x = randn(2, 2, 5, 5)
    with torch.no_grad():
        scale, shift, rstd = ops.constant_batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, conv.bias)
        got = ops.linear_act(x, conv.weight, ops.conv_geometry(2, 1, 0, 1, 1), scale, shift)
    close(got, bn(conv(x)).detach())
    close(rstd, (bn.running_var + bn.eps).rsqrt())


def test_no_gradient_through_a_constant_batch_norm():
    x, W, one = torch.ones(1, 2), torch.ones(3, 2, requires_grad=True), torch.ones(3)
    with pytest.raises(RuntimeError, match="no backward through scale or pre_scale: call it under torch"):
        ops.linear_act(x, W, ops.linear_geometry(), one, one)
    close(ops.linear_act(x, W.detach(), ops.linear_geometry(), one, one), 3 * torch.ones(1, 3))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad):
    layer = Layer("3x3")
    inputs = [rand(*layer.x), layer.W, rand(layer.c_out), rand(*layer.y)]
    x, W, shift, skip = inputs = [t.float().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = ops.linear_act(x, W, layer.geometry, None, shift, skip, True)
        if not grad:
            ops.linear_act(x, W, layer.geometry, shift, shift, skip, True)
    assert y.dtype == torch.bfloat16
    if grad:
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), inputs))


def test_empty_batch():
    for name in ("3x3", "dense"):
        layer = Layer(name)
        x = torch.zeros(0, *layer.x[1:], dtype=torch.float64, requires_grad=True)
        W = layer.W.clone().requires_grad_()
        y = ops.linear_act(x, W, layer.geometry, relu=True)
        assert y.shape == (0, *layer.y[1:])
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), [x, W]))


def test_a_skip_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"skip must have the shape of the result, \(2, 3\), got \(1, 3\)"):
        ops.linear_act(torch.ones(2, 4), torch.ones(3, 4), ops.linear_geometry(), skip=torch.ones(1, 3))
