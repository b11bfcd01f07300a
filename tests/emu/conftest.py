"""How a kernel that tests the emulator is run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from emulator import numpy_module


@pytest.fixture(scope="session")
def unit() -> Callable[..., np.ndarray]:
    """``unit(name, x, y, threads, ...)`` runs a kernel of `kernels/` and returns ``y``, which is filled with NaN before."""
    module = numpy_module("emulator_units")

    def run(name, x, y, threads=32, grid=1, n=0, shared=0, schedule=("in order", 1, False), keep=False, **config):
        if not keep:
            y.view(np.uint8)[...] = 0xFF
        sizes = {}
        for what, shape in (("grid", grid), ("block", threads)):
            shape = shape if isinstance(shape, tuple) else (shape,)
            sizes |= {f"{what}_{axis}": size for axis, size in zip("xyz", (*shape, 1, 1))}
        order, seed, async_random = schedule
        module.config(order=order, seed=seed, async_random=async_random, **config)
        module.launch(name, x=x, y=y, n=n, shared=shared, **sizes)
        return y

    return run
