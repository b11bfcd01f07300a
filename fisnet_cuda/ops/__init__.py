"""The ops of the relevance program: tensors and rules in, tensors out, differentiable to first order.

Each is an `torch.autograd.Function` or a composition of ops with an ordinary backward; `fisnet_cuda.reference` holds the
plain PyTorch behind them, a CUDA extension may serve the same names (`fisnet_cuda._backend`). They know no graphs.
"""

from .batch_norm import affine_scale_shift, bn_act, tracked_bn_act
from .dual_linear import dual_fprop, dual_phi_handed_over, dual_transposed_phi
from .first_layer import zb
from .head import eta_start, plus_start, pooled_dual_phi, pooled_phi
from .heatmap_loss import gwrp, heatmap_loss, resize_mask
from .linear_act import constant_batch_norm, linear_act
from .linear_maps import (
    Geometry,
    channel_scale,
    conv_geometry,
    fprop,
    linear_geometry,
    positive_part,
)
from .linear_ops import linear_op, linear_op_transposed, slice_op, slice_transposed
from .linear_phi import transposed, transposed_phi
from .phi import dual_phi, phi_scale, relative_epsilon, stabilised_ratio, times
from .pooling import avg_pool, avg_pool_transposed, max_pool, max_pool_transposed, max_pool_transposed_phi

__all__ = [
    "Geometry",
    "affine_scale_shift",
    "avg_pool",
    "avg_pool_transposed",
    "bn_act",
    "channel_scale",
    "constant_batch_norm",
    "conv_geometry",
    "dual_fprop",
    "dual_phi",
    "dual_phi_handed_over",
    "dual_transposed_phi",
    "eta_start",
    "fprop",
    "gwrp",
    "heatmap_loss",
    "linear_act",
    "linear_geometry",
    "linear_op",
    "linear_op_transposed",
    "max_pool",
    "max_pool_transposed",
    "max_pool_transposed_phi",
    "phi_scale",
    "plus_start",
    "pooled_dual_phi",
    "pooled_phi",
    "positive_part",
    "relative_epsilon",
    "resize_mask",
    "slice_op",
    "slice_transposed",
    "stabilised_ratio",
    "times",
    "tracked_bn_act",
    "transposed",
    "transposed_phi",
    "zb",
]
