"""A few training steps of one case (forward, loss, backward) in this process; prints its peak memory in MiB.

``python -m benchmarks.peak '{"case": "dual", "steps": 4, "threads": 2, "setup": {"model": "resnet18"}}'``

Run in a fresh process for every case, importing no more than such a step needs: the peak is that of the whole
process, PyTorch included.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import torch

from benchmarks.cases import Setup, TrainingStep


def peak_mib(device: str) -> float:
    """The process's largest resident size, or the most GPU memory that tensors took, in MiB.

    On Linux this is VmHWM: ``ru_maxrss`` survives exec, so that a child would inherit its parent's peak.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def main(request: str) -> None:
    """Run what the JSON text asks for and print ``{"peak_mib": ...}``."""
    wanted = json.loads(request)
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    setup = Setup(**wanted["setup"])
    step = TrainingStep(wanted["case"], setup, update=False)
    for _ in range(wanted["steps"]):
        step()
    print(json.dumps({"peak_mib": peak_mib(setup.device)}))


if __name__ == "__main__":
    main(sys.argv[1])
