"""Test-wide settings: one thread (tensors are small, and tests may run side by side), hypothesis without a deadline; how many
tests were skipped, and why, in the summary."""

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import torch

torch.set_num_threads(1)
# on a GPU: float32 means float32. With TF32, which cuDNN uses unless told otherwise, convolutions are wrong by 1e-3
torch.backends.cudnn.allow_tf32 = False

# cmake, ninja and the like may come from this environment, which need not be activated
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

# what tests measure on a GPU is not for the user's own runs
os.environ.setdefault("FISNET_CACHE", os.path.join(tempfile.gettempdir(), f"fisnet_tests_{os.getpid()}", "dispatch.json"))

hypothesis.settings.register_profile("fisnet", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fisnet")


def pytest_terminal_summary(terminalreporter):
    """Say what this machine could not test: "12 tests skipped: nvcc is missing: ..."."""
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} test{'s' if count > 1 else ''} skipped: {reason}", yellow=True)
