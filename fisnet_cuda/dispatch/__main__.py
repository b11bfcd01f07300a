"""``python -m fisnet_cuda.dispatch``: what has been measured on this machine, or ``--clear`` to measure anew."""

from __future__ import annotations

import argparse

from . import clear, report


def main(arguments: list[str] | None = None) -> None:
    """Print the decisions in the cache, or remove them."""
    parser = argparse.ArgumentParser("python -m fisnet_cuda.dispatch", description="The measured choice of every fused op.")
    parser.add_argument("--all", action="store_true", help="also those of other GPUs and versions")
    parser.add_argument("--clear", action="store_true", help="forget all of them, so that they are measured anew")
    options = parser.parse_args(arguments)
    if options.clear:
        print(f"removed {clear()}")
    else:
        report(everything=options.all)


if __name__ == "__main__":
    main()
