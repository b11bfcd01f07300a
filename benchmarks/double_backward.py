"""A baseline: Selective ISNet's heatmaps through autograd's double backward, the way most LRP code is written.

Every ReLU and BatchNorm is exchanged for one whose backward follows LRP-epsilon while the heatmap is made (``phi(a) g``,
BatchNorm as an affine map) and the ordinary derivative otherwise. The heatmap is a gradient taken with
``create_graph=True``, so the loss differentiates through PyTorch's double backward of every convolution. The maps are
those of ``fisnet_cuda.ISNet`` to rounding: `benchmarks.verify` holds both to that before anything is timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisnet_cuda as fc


class Switch:
    """Whether backward passes follow LRP-epsilon; one for each network."""

    relevance = False


class _ReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, eps, switch):
        a = z.relu()
        ctx.save_for_backward(a)
        ctx.eps, ctx.switch = eps, switch
        return a

    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        if ctx.switch.relevance:
            return g * (a / (a + ctx.eps)), None, None
        return torch.ops.aten.threshold_backward(g, a, 0), None, None


class RelevanceReLU(nn.Module):
    """ReLU whose backward is ``phi(a) g`` while relevance is asked for."""

    def __init__(self, eps: float, switch: Switch) -> None:
        super().__init__()
        self.eps, self.switch = eps, switch

    def forward(self, z: Tensor) -> Tensor:
        return _ReLUFunction.apply(z, self.eps, self.switch)


class _BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, switch):
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
        if not training:
            mean, rstd = running_mean, (running_var + eps).rsqrt()
        ctx.save_for_backward(x, weight, running_mean, running_var, mean, rstd)
        ctx.training, ctx.eps, ctx.switch = training, eps, switch
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, g, _mean, _rstd):
        x, weight, running_mean, running_var, mean, rstd = ctx.saved_tensors
        if ctx.switch.relevance:
            return g * (weight * rstd).view(1, -1, 1, 1), *[None] * 8
        grads = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, running_mean, running_var, mean, rstd, ctx.training, ctx.eps, [True, True, True]
        )
        return *grads, *[None] * 6


class RelevanceBatchNorm(nn.Module):
    """BatchNorm2d whose backward is an affine map, statistics detached, while relevance is asked for."""

    def __init__(self, bn: nn.BatchNorm2d, switch: Switch) -> None:
        super().__init__()
        self.bn, self.switch = bn, switch

    def forward(self, x: Tensor) -> Tensor:
        return self.with_statistics(x)[0]

    def with_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, mean, rstd)``."""
        bn = self.bn
        return _BatchNormFunction.apply(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps, self.switch
        )


class _Stem(nn.Module):
    """The first conv-BN-ReLU as one module, which remembers what the z^B rule needs of one forward."""

    def __init__(self, conv: nn.Conv2d, bn: RelevanceBatchNorm, relu: RelevanceReLU) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv, bn, relu
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, mean, rstd = self.bn.with_statistics(self.conv(x))
        output = self.relu(y)
        self.seen = output, mean, rstd
        return output


class DoubleBackward(nn.Module):
    """A classifier with LRP heatmaps by double backward; called like ``fisnet_cuda.ISNet``.

    Args:
        model: a network that begins with conv-BN-ReLU modules and has no functional ReLU; it is changed in place.
        eps: epsilon of the epsilon rule and of z^B.
        eta_eps: ``t`` of Selective's eta.
        first_layer: "zb" for inputs in [0, 1], or "epsilon".
    """

    def __init__(self, model: nn.Module, eps: float = 1e-2, eta_eps: float = 1e-2, first_layer: str = "zb") -> None:
        super().__init__()
        self.eps, self.eta_eps, self.first_layer = eps, eta_eps, first_layer
        self.switch = Switch()
        _exchange(model, eps, self.switch)
        self.stem = _join_stem(model)
        self.model = model

    def forward(self, x: Tensor, relevance: bool = False, target: Tensor | None = None) -> Tensor | fc.ISNetOutput:
        """Logits, or logits with one heatmap a sample.

        Args:
            x: images ``[N, 3, H, W]`` in [0, 1].
            relevance: also explain.
            target: explain these classes' logits ``[N]``, or with floating-point weights ``[N, C]`` the sum of all logits times
                them, instead of Selective's eta of the lowest logit.
        """
        if not relevance:
            return self.model(x)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            if self.first_layer == "epsilon":
                x = x.detach().requires_grad_()
            logits = self.model(x)
            assert self.stem.seen is not None
            y0, mean, rstd = self.stem.seen
            self.stem.seen = None
            index = logits.argmin(1) if target is None else target
            if index.is_floating_point():
                explained, index = (index * logits).sum(1), torch.full_like(logits[:, 0], -1, dtype=torch.long)
            else:
                explained = _eta(logits, index, self.eta_eps) if target is None else _at(logits, index)
            start = x if self.first_layer == "epsilon" else y0
            self.switch.relevance = True
            try:
                (g,) = torch.autograd.grad(explained.sum(), start, create_graph=differentiable)
            finally:
                self.switch.relevance = False
        with torch.set_grad_enabled(differentiable):
            heatmap = x * g if self.first_layer == "epsilon" else self._zb(x, y0 * g, mean, rstd)
        return fc.ISNetOutput(logits, heatmap.unsqueeze(1), {}, index.unsqueeze(1))

    def _zb(self, x: Tensor, R: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """The z^B rule for inputs in [0, 1], as semantics.md section 2 writes it; bias and beta detached."""
        conv, bn = self.stem.conv, self.stem.bn.bn
        scale = bn.weight * rstd
        W = conv.weight * scale.view(-1, 1, 1, 1)
        bias = 0 if conv.bias is None else conv.bias.detach()
        b = ((bias - mean) * scale + bn.bias.detach()).view(1, -1, 1, 1)
        W_plus, W_minus = W.clamp(min=0), W.clamp(max=0)
        geometry = {"stride": conv.stride, "padding": conv.padding}
        ones = torch.ones_like(x[:1])
        z = F.conv2d(x, W, **geometry) + b - F.conv2d(ones, W_minus, **geometry) - b.clamp(max=0)
        s = R / torch.where(z < 0, z - self.eps, z + self.eps)
        rest = [
            size - ((out - 1) * stride - 2 * padding + kernel)
            for size, out, stride, padding, kernel in zip(x.shape[2:], s.shape[2:], conv.stride, conv.padding, conv.kernel_size)
        ]
        up = F.conv_transpose2d(s, W_plus, **geometry, output_padding=rest)
        down = F.conv_transpose2d(s, W_minus, **geometry, output_padding=rest)
        return x * up + (x - 1) * down


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(1)).squeeze(1)


def _eta(logits: Tensor, index: Tensor, t: float) -> Tensor:
    P = _at(logits.softmax(1), index)
    return torch.log(P + t) - torch.log(1 - P + t)


def _exchange(module: nn.Module, eps: float, switch: Switch) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, RelevanceReLU(eps, switch))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, RelevanceBatchNorm(child, switch))
        else:
            _exchange(child, eps, switch)


def _join_stem(model: nn.Module) -> _Stem:
    """Put the first conv, BatchNorm and ReLU into one `_Stem`, at the place of the convolution."""
    first = {
        kind: next((name, m) for name, m in model.named_modules() if isinstance(m, kind))
        for kind in (nn.Conv2d, RelevanceBatchNorm, RelevanceReLU)
    }
    stem = _Stem(*[module for _, module in first.values()])
    for (name, _), new in zip(first.values(), (stem, nn.Identity(), nn.Identity())):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return stem
