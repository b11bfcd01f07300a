"""The z^B rule at the first layer and its adjoint (kernel 5): stems of ResNet and VGG.

The adjoint starts from the operands alone, as the kernel does: PyTorch's side makes the ratios again too (where it trains it
keeps them, which saves time and costs memory).
"""

from fisnet_cuda.ops import conv_geometry
from fisnet_cuda.reference import fprop

from . import KernelCase, Sizes, nbytes, read_and_written

EPS = 1e-2


def _stem(kernel, stride, padding):
    """``(forward, backward)`` arguments of a stem with a ReLU behind it: relevance comes per unit of the ReLU's output."""
    geometry = conv_geometry(2, stride, padding, 1, 1)

    def operands(sizes, device, dtype):
        def tensor(*shape, seed):
            return sizes.tensor(*shape, device=device, dtype=dtype, seed=seed)

        low, high = tensor(3, seed=1).abs().neg() - 1, tensor(3, seed=2).abs() + 1
        x = tensor(sizes.N, 3, sizes.H, sizes.W, seed=3).clamp(-1, 1)
        W, shift = tensor(sizes.C, 3, kernel, kernel, seed=4) * 0.1, tensor(sizes.C, seed=5) * 0.1
        a = fprop(x, W, shift, geometry).relu()
        g = sizes.tensor(sizes.N * sizes.K, *a.shape[1:], device=device, dtype=dtype, seed=6)
        return g, x, a, W, shift, low, high

    def forward(sizes, device, dtype):
        g, x, a, W, shift, low, high = operands(sizes, device, dtype)
        return (g, x, a, W, shift, low, high, EPS, geometry, a), {}

    def backward(sizes, device, dtype):
        g, x, a, W, shift, low, high = operands(sizes, device, dtype)
        R_bar = sizes.tensor(g.shape[0], *x.shape[1:], device=device, dtype=dtype, seed=7)
        return (R_bar, g, None, None, x, a, W, shift, low, high, EPS, geometry, True, False, a), {}

    return forward, backward


def _forward_traffic(args, kwargs, outputs):
    """The ratios that the reference keeps need not be written."""
    return nbytes(args, outputs[0])


_RESNET, _VGG = _stem(7, 2, 3), _stem(3, 1, 1)
_AT_224 = Sizes(N=64, C=64, H=224, W=224)
CASES = [
    KernelCase("zb/resnet stem", "zb", _RESNET[0], _forward_traffic, _AT_224, rank=0),
    KernelCase("zb/vgg", "zb", _VGG[0], _forward_traffic, _AT_224),
    KernelCase("zb backward/resnet stem", "zb_backward", _RESNET[1], read_and_written, _AT_224, rank=0),
    KernelCase("zb backward/vgg", "zb_backward", _VGG[1], read_and_written, _AT_224),
]
