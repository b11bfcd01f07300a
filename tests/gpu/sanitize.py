"""Run every kernel once at small odd sizes, in every dtype and layout: what compute-sanitizer looks at.

Products of linear maps also at channels that fill vectors of 16 bytes, with every tile shape: odd ones never see cp.async.

``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py``; no pytest and no reference, which would only add to what the
tool has to watch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_worker import brief, emulating
from benchmarks.kernel_cases import LAYOUTS, all_cases
from benchmarks.kernels import DTYPES, Contest, grad_where_asked, results, shrink


def run(device: str) -> tuple[int, list[str]]:
    """All cases; returns how many ran, and those that did not."""
    seen, refused = set(), []
    for case in all_cases():
        for layout, odd in product(LAYOUTS, (True, False) if case.flops else (True,)):
            small = shrink(case, odd)
            small = replace(small, sizes=replace(small.sizes, layout=layout))
            for dtype in DTYPES:
                key = (case.kernel, case.make, small.sizes, dtype)
                if key in seen:
                    continue
                seen.add(key)
                try:
                    once(Contest(small, dtype, device, "none"))
                except Exception as error:
                    refused.append(f"{case.name}, {dtype}, {layout}: {brief(error)}")
    return len(seen) - len(refused), refused


def once(contest: Contest) -> None:
    """Run a case's kernel, with every tile shape where it has several, and read its results."""
    args, kwargs = contest.operands()
    for kernel in contest.shapes(args, kwargs).values() or [contest.kernel]:
        with grad_where_asked(args):
            made = results(kernel(*args, **kwargs))
        for t in made:
            if t is not None:
                t.cpu()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = p.parse_args()
    with emulating(options.device) as reason:
        if reason:
            print(f"left out: {reason}")
            sys.exit(0)
        count, refused = run(options.device)
    print("\n".join([*refused, f"{count} cases ran, {len(refused)} did not"]))
    sys.exit(int(bool(refused)))
