"""``python -m fisnet_cuda.demo``: trains, measures, draws."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: command-line arguments; those of the process unless given.

    Returns:
        The exit status: 0, or 1 where the extra ``demo`` is not installed.
    """
    args = _parse(argv)
    missing = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"The demo needs {' and '.join(missing)}: pip install fisnet_cuda[demo]", file=sys.stderr)
        return 1
    with _one_thread():
        _run(args.out, args.quick, args.seed, args.papers_epsilon)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fisnet_cuda.demo",
        description="Trains a standard classifier and two ISNets on handwritten digits with a shortcut in "
        "the background, measures what the number of classes costs, and draws two figures. It takes a few "
        "minutes on two cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; says nothing of the method")
    parser.add_argument("--seed", type=int, default=0, help="draws weights, images and split [%(default)s]")
    parser.add_argument(
        "--papers-epsilon",
        action="store_true",
        help="train a fourth net, Selective with the papers' epsilon, to see where a shortcut can hide",
    )
    return parser.parse_args(argv)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Nets this small gain little from threads, and slow down many times where the cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, quick: bool, seed: int, papers_epsilon: bool) -> None:
    # Imported late, so that a missing extra gives one clear line instead of a traceback.
    from fisnet_cuda.demo import classes, digits, figures, report, train

    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train_originals, test_originals = digits.load_originals(seed)
    tests = digits.evaluation_sets(test_originals, variants=1 if quick else 3, seed=seed + 1)
    recipe = train.Recipe(steps=20) if quick else train.Recipe()
    print(report.introduction(recipe, len(train_originals), len(test_originals)), flush=True)

    plan: list[tuple[str, str | None, object]] = [
        ("Standard", None, train.EPSILON),
        ("Stochastic ISNet", "stochastic", train.EPSILON),
        ("Selective ISNet", "selective", train.EPSILON),
    ]
    if papers_epsilon:
        plan.append(("Selective, papers", "selective", train.PAPERS_EPSILON))
    nets = [train.train(name, variant, recipe, train_originals, tests, seed, epsilon) for name, variant, epsilon in plan]
    times = classes.measure((2, 10), original_up_to=10, repetitions=3) if quick else classes.measure()

    heatmaps = figures.heatmaps_figure(nets, tests, out / "heatmaps.png")
    scaling = figures.classes_figure(times, out / "classes.png")
    results = {
        "seed": seed,
        "quick": quick,
        "recipe": asdict(recipe),
        "epsilon": repr(train.EPSILON),
        "nets": [{k: v for k, v in vars(net).items() if k != "model"} for net in nets],
        "step_times_ms": [asdict(row) for row in times],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    print(report.nets_table(nets))
    print(report.classes_table(times))
    print(report.reading(nets, quick))
    print(f"Done in {time.perf_counter() - start:.0f} s. All numbers: {out / 'results.json'}\nFigures:")
    print(f"  {heatmaps}\n  {scaling}")


if __name__ == "__main__":
    sys.exit(main())
