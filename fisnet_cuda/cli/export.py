"""the plain classifier of a run, for use without this package: state_dict, torch.export, ONNX, each proven to give the same logits."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..files import check_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda export``."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write to")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint of the folder [%(default)s]")
    parser.add_argument("--no-onnx", action="store_true", help="leave out model.onnx")
    parser.add_argument("--no-torch-export", action="store_true", help="leave out model.pt2")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX [torch's own choice]")


def run(args: argparse.Namespace) -> int:
    """Exports, and says how far each format's logits are from the network's."""
    from ..export import export
    from ..train.checkpoint import load_run
    from .console import quiet

    check_folder(args.out)  # now, not after the work
    if args.opset is not None and args.no_onnx:
        raise InputError("--opset is of ONNX, which --no-onnx leaves out: drop one of them")
    with quiet():  # warnings in one line
        module = load_run(args.run, which=args.which)
        contract = export(module, args.out, torch_export=not args.no_torch_export, onnx=not args.no_onnx, opset=args.opset)
    shape = " x ".join(map(str, contract["input"]["shape"]))
    print(f"{contract['backbone']['path']}, input {shape} float32, classes {', '.join(contract['output']['classes'])}")
    print("logits against the trained network's, largest difference over largest logit:")
    for result in contract["formats"].values():
        largest = max(result["difference"].values())
        rounding = f"{largest:.1g}, rounding (at most {contract['largest_allowed']:.0e})"
        same = "0, equal bit by bit" if result["equal_bit_by_bit"] else rounding
        print(f"  {result['file']:<11} {same}" + (f"; run by {result['run_by']}" if "run_by" in result else ""))
    print(f"written: {args.out} (USAGE.md shows how to load each, model.json what the input must be)")
    return 0
