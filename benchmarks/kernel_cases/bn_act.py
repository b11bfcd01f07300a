"""BatchNorm + addition + ReLU (kernel 4) and its backward with the gradients of three consumers (kernel 3).

Train mode needs two passes over memory, as the statistics come before what they normalise; tensors of these sizes do not stay
in a cache between the passes. The floors count both.
"""

import torch

from fisnet_cuda.reference.batch_norm import pack_mask

from . import KernelCase, Sizes, nbytes, read_and_written

EPS = 1e-5


def _channels(sizes, device, seed):
    """A per-channel vector in [0.5, 1.5]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(sizes.C, generator=generator, device=device) + 0.5


def _forward(sizes, device, dtype):
    x = sizes.relevance(device=device, dtype=dtype, seed=1)
    weight, bias, mean, var = (_channels(sizes, device, seed) for seed in range(2, 6))
    return (x, weight, bias, mean, var, True, 0.1, EPS), {"relu": True}


def _forward_skip(sizes, device, dtype):
    args, kwargs = _forward(sizes, device, dtype)
    return args, {**kwargs, "skip": sizes.activation(device=device, dtype=dtype, seed=6)}


def _forward_eval(sizes, device, dtype):
    (x, weight, bias, mean, var, _, *rest), kwargs = _forward(sizes, device, dtype)
    return (x, weight, bias, mean, var, False, *rest), kwargs


def _forward_traffic(args, kwargs, outputs):
    return read_and_written(args, kwargs, outputs) + nbytes(args[0])  # x once more, for the statistics


def _backward(consumers):
    def make(sizes, device, dtype):
        x = sizes.relevance(device=device, dtype=dtype, seed=1)
        grads = [sizes.relevance(device=device, dtype=dtype, seed=seed) for seed in range(2, 2 + consumers)]
        weight = _channels(sizes, device, 9).to(torch.float64 if dtype == torch.float64 else torch.float32)
        mean, rstd = torch.zeros_like(weight), torch.ones_like(weight)  # those of x: y > 0 where x > 0
        return (grads, pack_mask(x), x, mean, rstd, weight), {}

    return make


def _backward_skip(sizes, device, dtype):
    return _backward(2)(sizes, device, dtype)[0], {"need_skip": True}


def _backward_traffic(args, kwargs, outputs):
    """The second pass reads x again, and either all gradients and the mask again or, where that is less, their sum, which the
    first pass then writes (for a skip it does in any case)."""
    grads, mask, x = args[:3]
    summed = nbytes(x) if kwargs.get("need_skip") else 2 * nbytes(x)
    return read_and_written(args, kwargs, outputs) + nbytes(x) + min(nbytes(grads, mask), summed)


def _eager_forward(x, weight, bias, mean, var, training, momentum, eps, skip=None, relu=True):
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return torch.relu_(y if skip is None else y.add_(skip))


def _eager_backward(grads, mask, x, mean, rstd, weight, need_skip=False):
    g = torch.ops.aten.threshold_backward(sum(grads[1:], grads[0]), x, 0)
    return torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, mean, rstd, True, EPS, [True, True, True])


CASES = [
    KernelCase("bn_act/train", "bn_act", _forward, _forward_traffic, eager=_eager_forward, rank=0),
    KernelCase("bn_act/train skip", "bn_act", _forward_skip, _forward_traffic, eager=_eager_forward, rank=0),
    KernelCase("bn_act/eval", "bn_act", _forward_eval, read_and_written, eager=_eager_forward),
    KernelCase("bn_act/train contiguous", "bn_act", _forward, _forward_traffic, Sizes(layout="contiguous"), _eager_forward, rank=2),
    KernelCase("bn_act backward/1", "bn_act_backward", _backward(1), _backward_traffic, eager=_eager_backward, rank=0),
    KernelCase("bn_act backward/3", "bn_act_backward", _backward(3), _backward_traffic, eager=_eager_backward, rank=0),
    KernelCase("bn_act backward/2 skip", "bn_act_backward", _backward_skip, _backward_traffic, eager=_eager_backward),
]
