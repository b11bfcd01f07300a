"""What the package raises and warns with, beyond the built-in `TypeError` and `ValueError`.

Wrong arguments raise `TypeError` or `ValueError` and name the argument, what it got and what to do.
"""

from __future__ import annotations

__all__ = ["FisnetWarning", "InputError", "UnsupportedModelError", "one_line"]


class FisnetWarning(UserWarning):
    """Something is probably not as the user meant it, but the computation goes on.

    Silence one kind with ``warnings.filterwarnings("ignore", category=FisnetWarning)``, or turn it into an
    error with ``"error"``.
    """


class UnsupportedModelError(TypeError):
    """A model holds an operation that relevance cannot be sent through; the message names the module path, the operation
    and what to do. Raised when the model is wrapped, never later.

    Example:
        >>> import torch, fisnet_cuda as fc
        >>> try:
        ...     fc.ISNet(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.PReLU()))
        ... except fc.UnsupportedModelError as error:
        ...     print(str(error).split(" (")[0])
        1: PReLU is not supported
    """


class InputError(ValueError):
    """A file, a folder or a setting that the user gave cannot be used. The message is one line and says what to do; the
    command line prints it without a traceback.

    Example:
        >>> raise InputError("x.csv has no column 'image': name one with image_column=")
        Traceback (most recent call last):
        ...
        fisnet_cuda.errors.InputError: x.csv has no column 'image': name one with image_column=
    """


def one_line(message: object) -> str:
    """A message without line breaks; of an error that says nothing, its type.

    Example:
        >>> one_line("a  b\\n   c"), one_line(KeyboardInterrupt())
        ('a b c', 'KeyboardInterrupt')
    """
    return " ".join(str(message).split()) or (type(message).__name__ if isinstance(message, BaseException) else "")
