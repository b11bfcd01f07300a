"""Plain PyTorch for every op: the definition that the kernels are held to, and the path that runs on a CPU.

The files have the names, signatures and shapes of `fisnet_cuda.ops`; they know tensors only. Functions called
``..._backward`` are the first-order adjoints that the autograd Functions in `fisnet_cuda.ops` call.

Symbols
-------
========== =====================================================================================================
``N, K``   batch; heatmaps a sample. Relevance tensors are ``[N*K, ...]`` here (``[N, K, ...]`` for users)
``a``      input of a linear map, output of the ReLU before it, ``[N, ...]``; never repeated over K
``W, b``   weight ``[C_out, C_in/groups, *kernel]`` (linear: ``[C_out, C_in]``) and bias of a linear map
``scale``  BatchNorm's per-channel factor ``gamma / sqrt(var + eps_bn)``, statistics detached
``W~, b~`` weight and bias with the BatchNorm that follows folded in
``z``      pre-activation ``W~ a + b~``; ``z+`` its positive part by the z+ rule
``e``      epsilon, in units of ``z``: a number, or ``[N, 1, ...]`` when it is relative to the sample's own scale
``R``      relevance, in the unit of the explained quantity
``g``      relevance per unit of activation, ``R = a . g``
``s``      relevance per unit of pre-activation, ``s = phi(a) . g`` with ``phi(a) = a / (a + e)``
``x_bar``  adjoint of ``x``: the derivative of the training loss with respect to it
========== =====================================================================================================

Sources
-------
* Bach et al., On pixel-wise explanations ... by layer-wise relevance propagation, PLOS ONE 2015: epsilon, alpha-beta.
* Montavon et al., Explaining nonlinear classification decisions with deep Taylor decomposition, 2017: z+, z^B, w^2.
* Montavon et al., Layer-wise relevance propagation: an overview, 2019: gamma, canonical form with BatchNorm folded.
* Bassi, Dertkigil, Cavalli, Improving deep neural network generalization ... ISNet, Nature Communications 15:291, 2024.
* Bassi, Decherchi, Cavalli, Faster ISNet, arXiv 2401.08409: Dual, Selective and Stochastic; the gradient form of epsilon.
* Hutchinson, A stochastic estimator of the trace of the influence matrix ..., Communications in Statistics, 1989: the idea
  behind Contrast, which is this project's own.
"""

from .batch_norm import affine_scale_shift, bn_act, bn_act_backward
from .first_layer import zb, zb_backward
from .head import (
    eta_start,
    eta_start_backward,
    one_hot,
    plus_start,
    plus_start_backward,
    pooled_dual_phi,
    pooled_dual_phi_backward,
    pooled_phi,
    pooled_phi_backward,
)
from .heatmap_loss import gwrp, gwrp_terms, heatmap_loss, resize_mask
from .linear_maps import Geometry, conv_geometry, dgrad, fprop, linear_geometry, weight_dominates, wgrad
from .linear_phi import (
    dual_fprop,
    dual_fprop_adjoint,
    dual_transposed_phi,
    dual_transposed_sum,
    folded,
    folded_plus,
    fprop_adjoint,
    linear_act,
    transposed_phi,
)
from .phi import (
    dual_phi,
    dual_phi_backward,
    phi_scale,
    phi_scale_backward,
    ratio,
    ratio_backward,
    relative_epsilon,
    stabilise,
)
from .plus import plus_affine, plus_affine_backward
from .pooling import (
    max_pool,
    max_pool_gather,
    max_pool_scatter,
    max_pool_scatter_phi,
    max_pool_scatter_phi_backward,
)

__all__ = [
    "Geometry",
    "affine_scale_shift",
    "bn_act",
    "bn_act_backward",
    "conv_geometry",
    "dgrad",
    "dual_fprop",
    "dual_fprop_adjoint",
    "dual_phi",
    "dual_phi_backward",
    "dual_transposed_phi",
    "dual_transposed_sum",
    "eta_start",
    "eta_start_backward",
    "folded",
    "folded_plus",
    "fprop",
    "fprop_adjoint",
    "gwrp",
    "gwrp_terms",
    "heatmap_loss",
    "linear_act",
    "linear_geometry",
    "max_pool",
    "max_pool_gather",
    "max_pool_scatter",
    "max_pool_scatter_phi",
    "max_pool_scatter_phi_backward",
    "one_hot",
    "phi_scale",
    "phi_scale_backward",
    "plus_affine",
    "plus_affine_backward",
    "plus_start",
    "plus_start_backward",
    "pooled_dual_phi",
    "pooled_dual_phi_backward",
    "pooled_phi",
    "pooled_phi_backward",
    "ratio",
    "ratio_backward",
    "relative_epsilon",
    "resize_mask",
    "stabilise",
    "transposed_phi",
    "weight_dominates",
    "wgrad",
    "zb",
    "zb_backward",
]
