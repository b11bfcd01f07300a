"""fisnet_cuda: fast, differentiable Layer-wise Relevance Propagation for PyTorch, and classifiers trained with it so
that they ignore the background.

>>> import torch, fisnet_cuda as fc
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
>>> net, loss = fc.ISNet(model, variant="selective"), fc.ISNetLoss(P=0.7)
>>> x, y, masks = torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 1, 8, 8)
>>> masks[:, :, 2:6, 2:6] = 1
>>> total, parts = loss(net(x, relevance=True), y, masks)
>>> total.backward()
"""

from . import dispatch, nn, ops, reference, rules
from ._backend import info
from .errors import FisnetWarning, UnsupportedModelError
from .isnet.explain import ConservationReport, check_conservation, relevance, supported
from .isnet.loss import ISNetLoss, check_masks
from .isnet.module import ISNet, ISNetOutput
from .isnet.tuning import tune_c1_c2
from .presets import PRESETS, Preset, preset

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ConservationReport",
    "FisnetWarning",
    "ISNet",
    "ISNetLoss",
    "ISNetOutput",
    "Preset",
    "UnsupportedModelError",
    "__version__",
    "check_conservation",
    "check_masks",
    "dispatch",
    "info",
    "nn",
    "ops",
    "preset",
    "reference",
    "relevance",
    "rules",
    "supported",
    "tune_c1_c2",
]
