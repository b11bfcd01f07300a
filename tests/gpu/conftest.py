"""What the tests on a GPU share. Those that a CPU can run too run there emulated, so that they are known to be right."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: its products are then deterministic

import pytest
import torch
from emulator import emulated


@pytest.fixture
def cuda():
    """Skips where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return "cuda"


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """"cpu", where the kernels run emulated (tests/kernels checks every access), or "cuda"."""
    if request.param == "emulated":
        with emulated(checks=False):
            yield "cpu"
    else:
        yield request.getfixturevalue("cuda")


@pytest.fixture
def deterministic():
    """PyTorch's deterministic implementations, where it has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(False)
