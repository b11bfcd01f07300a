"""Training on Lightning: the module, its callbacks, and how a run is read back; needs the extra ``train``.

The callbacks of a run are made by `fisnet_cuda.train.callbacks.callbacks`.
"""

from __future__ import annotations

from .._lazy import lazy

_HOMES = {"DivergedError": "divergence", "ISNetModule": "module", "load_run": "checkpoint", "run_config": "checkpoint"}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy(__name__, _HOMES)
