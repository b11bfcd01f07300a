"""Layer -> rule -> kernel: what relevance will do in a network, before anything is trained."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from .nets import add_backbone_arguments, build

VARIANTS = ("selective", "stochastic", "contrast", "dual", "original")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda plan``."""
    parser.add_argument(
        "net", metavar="BACKBONE|RUN", help="an import path (torchvision.models.resnet50), a net of this package (resnet18), or a run"
    )
    add_backbone_arguments(parser, 224)
    parser.add_argument("--variant", choices=VARIANTS, default="selective", help="of a backbone; a run has its own [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose kernels to name; where the model is by default")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    import fisnet_cuda

    path = Path(args.net)
    if path.exists() and (path.is_dir() or path.suffix == ".ckpt"):
        from ..train.checkpoint import load_run

        net = load_run(path).net
    else:
        model, spec = build(args.net, args)
        net = fisnet_cuda.ISNet(model, variant=args.variant, input_low=spec.low, input_high=spec.high)
    plan = net.plan(args.device)
    if args.json:
        print(json.dumps([asdict(row) for row in plan.rows], indent=1))
    else:
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{args.net}: {parameters:,} parameters, variant {net.variant}\n\n{plan}")
    return 0
