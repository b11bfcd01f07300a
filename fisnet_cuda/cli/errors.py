"""Errors as one line a person can act on, and the exit status that goes with them."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from typing import NoReturn

from .. import errors
from ..errors import InputError, UnsupportedModelError

__all__ = ["Parser", "nearest", "one_line", "rank", "report"]

# import name -> (distribution, extra that brings it)
EXTRAS = {
    "lightning": "train",
    "jsonargparse": "train",
    "yaml": "train",
    "docstring_parser": "train",
    "torchmetrics": "train",
    "kornia": "train",
    "h5py": "train",
    "PIL": "train",
    "matplotlib": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the option that was probably meant; abbreviations are not guessed at."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage and leaving the process."""
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            word = unknown.group(1).split()[0].split("=")[0]
            options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            message = f"there is no option {word}{nearest(word, options)}" if word.startswith("-") else f"{word!r} is not expected here"
        raise InputError(f"{message}; {self.prog} --help lists the options")


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean x?)"``, or nothing where no known word is close.

    Example:
        >>> nearest("varaint", ["variant", "eps"])
        ' (did you mean variant?)'
    """
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(text: object, limit: int = 600) -> str:
    """Text without line breaks, cut in the middle where it is longer than ``limit``.

    Example:
        >>> one_line("a  b\\n   c")
        'a b c'
    """
    line = errors.one_line(text)
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"


def rank() -> int:
    """Which of the processes that train together this one is, by torchrun's and Lightning's environment; 0 alone."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def report(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and the line that tells it.

    Exceptions may bring their own ``exit_code``. Those that a DataLoader's worker sent over are unwrapped.

    Example:
        >>> report(InputError("no.csv does not exist"))
        (2, 'error: no.csv does not exist')
    """
    text = _from_worker(str(error))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, one_line(text) or "interrupted"
    own = getattr(error, "exit_code", None)
    if own is not None or isinstance(error, (InputError, UnsupportedModelError)):
        return own if own is not None else BAD_INPUT, f"error: {one_line(text)}"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        if name in EXTRAS:
            return BAD_INPUT, f"error: {name} is not installed: pip install 'fisnet_cuda[{EXTRAS[name]}]'"
    if isinstance(error, BrokenPipeError):  # `| head`: the reader has gone, and nobody is left to tell
        return FAILED, ""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"error: {where}{error.strerror}"
    if type(error).__name__ in ("OutOfMemoryError",) or "out of memory" in text:
        return FAILED, "error: out of memory: lower --data.batch_size or --data.size, or use --precision bf16-mixed"
    return FAILED, f"error: unexpected {type(error).__name__}: {one_line(text, 300)} (--debug shows where)"


def _from_worker(text: str) -> str:
    """The worker's own message, without the traceback that torch's ``ExceptionWrapper`` puts into the text."""
    if not re.match(r"Caught \w+ in \w+ worker", text):
        return text
    last = text.strip().splitlines()[-1]
    return re.sub(r"^[\w.]+: ", "", last)
