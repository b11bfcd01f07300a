"""The command line: ``fisnet-cuda fit | evaluate | heatmap | export | ...``, the same as ``python -m fisnet_cuda``.

A subcommand is one module of this package. It is imported when it is asked for, so that ``fisnet-cuda info`` needs nothing but
torch, and offers ``add_arguments(parser)`` and ``run(args) -> int`` for an `argparse.ArgumentParser`, or ``main(argv) -> int`` where
it parses by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ..errors import InputError
from .errors import Parser, one_line, rank, report

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """A subcommand: its module in this package, and what it is for."""

    module: str
    summary: str


COMMANDS = {
    "fit": Command("fit", "train a classifier on images, masks and labels; resumes by itself"),
    "validate": Command("validate", "metrics of a run on its validation images"),
    "test": Command("test", "metrics of a run on its test images, subset by subset"),
    "predict": Command("predict", "class probabilities of images, as CSV"),
    "evaluate": Command("evaluate", "does the shortcut still work? metrics with intervals, attention, faithfulness; a figure"),
    "heatmap": Command("heatmap", "what the classifier looks at: PNG grids of heatmaps, and .npy"),
    "export": Command("export", "the plain classifier: state_dict, torch.export, ONNX; equal logits are proven"),
    "plan": Command("plan", "layer -> rule -> kernel, of a backbone or of a run"),
    "info": Command("info", "versions and devices, and whether the CUDA kernels are there"),
    "bench": Command("bench", "what a training step of each variant costs on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Errors are one line on standard error.

    Args:
        argv: command-line arguments; those of the process unless given.

    Returns:
        The exit status: 0; 2 where what the user gave cannot be used; 1 for other failures (training diverged, out of memory);
        130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        fisnet-cuda ...
        0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    name = ""
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0 if argv else 2
        if argv[0] == "--version":
            from fisnet_cuda import __version__

            print(f"fisnet-cuda {__version__}")
            return 0
        name, rest = _command(argv[0]), argv[1:]
        module = import_module(f"{__name__}.{COMMANDS[name].module}")
        if hasattr(module, "main"):
            return module.main(rest)
        parser = Parser(prog=f"fisnet-cuda {name}", description=_capital(module.__doc__ or COMMANDS[name].summary))
        module.add_arguments(parser)
        return module.run(parser.parse_args(rest)) or 0
    except SystemExit as end:  # argparse's --help, and whatever a library ends with
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        status, line = report(error)
        if line and not (rank() and isinstance(error, InputError)):  # rank 0 says the same
            print(f"fisnet-cuda {name}: {line}" if name else f"fisnet-cuda: {line}", file=sys.stderr)
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            raise
        return status


def _command(word: str) -> str:
    from .errors import nearest

    if word in COMMANDS:
        return word
    raise InputError(f"there is no command {one_line(word)!r}{nearest(word, COMMANDS)}; commands: {', '.join(COMMANDS)}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fisnet-cuda COMMAND [options]",
            "",
            "Image classifiers that ignore the background: train on images with masks, evaluate, look, export.",
            "",
            *lines,
            "",
            "fisnet-cuda COMMAND --help tells the options; --debug, with any of them, shows the traceback of an error.",
            "First steps:",
            "  fisnet-cuda fit --data.path images --data.masks masks --run runs/first",
            "  fisnet-cuda evaluate runs/first",
            "  fisnet-cuda heatmap images/*/0*.png --checkpoint runs/first",
        ]
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
