"""Run every kernel once at small odd sizes, in every dtype and layout: what compute-sanitizer looks at.

``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py``; no pytest and no reference, which would only add to what the
tool has to watch. Operands are made on the CPU and copied: initcheck then knows every byte that was written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.gpu_worker import emulating
from benchmarks.kernel_cases import LAYOUTS, all_cases
from benchmarks.kernels import DTYPES, shrink, tensors
from fisnet_cuda import _backend


def moved(value, device):
    """Arguments on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(*(moved(part, device) for part in value)) if hasattr(value, "_fields") else type(value)(
            moved(part, device) for part in value
        )
    return value


def run(device: str) -> int:
    """All cases; returns how many ran."""
    seen = set()
    for case in all_cases():
        kernel = _backend.kernel(case.kernel, "auto", torch.empty(0, device=device))
        for layout in LAYOUTS:
            small = shrink(case)
            small = replace(small, sizes=replace(small.sizes, layout=layout))
            for dtype in DTYPES:
                key = (case.kernel, case.make, small.sizes, dtype)
                if key in seen:
                    continue
                seen.add(key)
                args, kwargs = case.make(small.sizes, "cpu", DTYPES[dtype])
                results = kernel(*moved(args, device), **moved(kwargs, device))
                for t in tensors(results):
                    t.cpu()
    return len(seen)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = p.parse_args()
    with emulating(options.device) as reason, torch.no_grad():
        if reason:
            print(f"left out: {reason}")
        else:
            print(f"{run(options.device)} cases ran")
