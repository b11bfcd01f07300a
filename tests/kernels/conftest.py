"""Where kernel tests run: emulated on the CPU, and on a GPU when there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulator import emulated

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))  # the case lists that every implementation must pass
sys.path.append(str(Path(__file__).resolve().parent))  # common.py


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the test's tensors: "cpu", served by the emulated kernels with every check on, or "cuda"."""
    if request.param == "emulated":
        with emulated():
            yield "cpu"
    else:
        if not torch.cuda.is_available():
            pytest.skip("no GPU here: the kernels run emulated")
        yield "cuda"
