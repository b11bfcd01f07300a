"""Linear maps without parameters and their transposes: padding, means, resizing, shuffles, slices."""

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, gradcheck, grads, randn
from hypothesis import given
from hypothesis import strategies as st

from fisnet_cuda import ops
from fisnet_cuda.ops.linear_ops import chunk_bounds

N = 2
F = torch.nn.functional
INTERPOLATE = (None, None, "nearest", None, None)

# op, settings, shape of a sample, PyTorch's own call
OPS = {
    "mean": ("mean", ((2, 3), False), (3, 2, 4), lambda x: x.mean((2, 3))),
    "mean-keepdim": ("mean", ((-1,), True), (3, 2, 4), lambda x: x.mean(-1, keepdim=True)),
    "mean-of-one": ("mean", ((2,), False), (3, 1), lambda x: x.mean(2)),
    "sum": ("sum", ((1, -1), False), (3, 2, 4), lambda x: x.sum((1, -1))),
    "pad": ("pad", ((1, 2, 0, 1), "constant", 0.0), (3, 2, 3), lambda x: F.pad(x, (1, 2, 0, 1))),
    "crop": ("pad", ((-1, 1, 0, -1), "constant", 0.0), (3, 3, 3), lambda x: F.pad(x, (-1, 1, 0, -1))),
    "pad-channels": ("pad", ((0, 0, 0, 0, 1, 1), "constant", 0.0), (3, 2, 2), lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))),
    "reflect": ("pad", ((1, 2, 2, 1), "reflect", None), (2, 3, 4), lambda x: F.pad(x, (1, 2, 2, 1), "reflect")),
    "reflect-1d": ("pad", ((1, 2), "reflect", None), (2, 4), lambda x: F.pad(x, (1, 2), "reflect")),
    "replicate": ("pad", ((1, 2, 0, 1), "replicate", None), (2, 3, 4), lambda x: F.pad(x, (1, 2, 0, 1), "replicate")),
    "replicate-3d": ("pad", ((1, 0, 1, 1, 0, 2), "replicate", None), (1, 2, 2, 3),
                     lambda x: F.pad(x, (1, 0, 1, 1, 0, 2), "replicate")),
    "nearest": ("interpolate", ((5, 7), None, "nearest", None, None), (2, 3, 4), lambda x: F.interpolate(x, (5, 7))),
    "nearest-factor": ("interpolate", (None, 1.7, "nearest", None, None), (2, 3, 4),
                       lambda x: F.interpolate(x, scale_factor=1.7)),
    "nearest-recomputed": ("interpolate", (None, 1.7, "nearest", None, True), (2, 3, 4),
                           lambda x: F.interpolate(x, scale_factor=1.7, recompute_scale_factor=True)),
    "nearest-1d": ("interpolate", (None, (2.5,), "nearest", None, None), (2, 3), lambda x: F.interpolate(x, scale_factor=2.5)),
    "linear": ("interpolate", (7, None, "linear", False, None), (2, 4), lambda x: F.interpolate(x, 7, mode="linear")),
    "bilinear": ("interpolate", (None, 2, "bilinear", False, None), (2, 3, 2),
                 lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bilinear-factors": ("interpolate", (None, (1.3, 0.6), "bilinear", False, None), (2, 3, 4),
                         lambda x: F.interpolate(x, scale_factor=(1.3, 0.6), mode="bilinear")),
    "bilinear-corners": ("interpolate", ((5, 4), None, "bilinear", True, None), (2, 3, 2),
                         lambda x: F.interpolate(x, (5, 4), mode="bilinear", align_corners=True)),
    "bicubic": ("interpolate", ((5, 4), None, "bicubic", False, None), (2, 3, 2),
                lambda x: F.interpolate(x, (5, 4), mode="bicubic")),
    "trilinear": ("interpolate", (3, None, "trilinear", False, None), (1, 2, 2, 2),
                  lambda x: F.interpolate(x, 3, mode="trilinear")),
    "pixel_shuffle": ("pixel_shuffle", (2,), (8, 2, 3), lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ("pixel_unshuffle", (2,), (2, 4, 6), lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": ("channel_shuffle", (3,), (6, 2, 2), lambda x: F.channel_shuffle(x, 3)),
}  # fmt: skip


def case(name):
    op, settings, shape, plain = OPS[name]
    y = plain(randn(N, *shape))

    def transposed(g):
        with torch.enable_grad():
            x = g.new_zeros(len(g), *shape).requires_grad_()
            return torch.autograd.grad(plain(x), x, g, create_graph=True)[0]

    return Case(name, lambda g: ops.linear_op_transposed(g, op, settings, shape), transposed,
                {"g": randn(3 * N, *y.shape[1:], seed=1)}, function=False)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_forward_is_pytorchs(name):
    op, settings, shape, plain = OPS[name]
    x = randn(N, *shape)
    assert torch.equal(ops.linear_op(x, op, settings), plain(x))


@pytest.mark.parametrize("name", OPS)
def test_transposed(name):
    equals_formula(case(name))
    gradcheck(case(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["mean", "pad", "bilinear", "channel_shuffle"])
def test_in_every_way(name, check):
    check(case(name))


@pytest.mark.parametrize("name", ["mean", "sum", "pad", "reflect", "channel_shuffle", "bilinear"])
def test_empty_batch(name):
    g = case(name).inputs["g"][:0].detach().requires_grad_()
    back = case(name).op(g)
    assert back.shape == (0, *OPS[name][2])
    assert grads(back, [g])[0].shape == g.shape


@given(st.integers(-3, -1) | st.integers(1, 3), st.integers(-7, 7), st.none() | st.integers(-7, 7), st.integers(1, 5))
def test_slices(dim, start, stop, size):
    shape = [size, size + 1, size]
    x = randn(N, *shape).requires_grad_()
    index = (slice(None),) * (dim % 4) + (slice(start, stop),)
    y = ops.slice_op(x, dim, start, stop)
    assert torch.equal(y, x[index])
    g = randn(*y.shape, seed=1)
    close(ops.slice_transposed(g, dim, start, stop, tuple(shape)), torch.autograd.grad(y, x, g)[0])


@given(st.integers(1, 12), st.integers(1, 6))
def test_chunks_are_torchs(size, chunks):
    parts = torch.arange(size).chunk(chunks)
    for i, part in enumerate(parts):
        start, stop = chunk_bounds(size, i, chunks)
        assert torch.equal(torch.arange(size)[start:stop], part)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.linear_op(torch.ones(1, 1), "twirl", ()), "unknown linear op 'twirl'"),
        (lambda: ops.linear_op_transposed(torch.ones(1, 1), "twirl", (), (1,)), "unknown linear op 'twirl'"),
        (
            lambda: ops.linear_op_transposed(torch.ones(1, 1, 2), "interpolate", (2, None, "area", None, None), (1, 4)),
            "interpolate with mode 'area' has no transpose here: use",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
