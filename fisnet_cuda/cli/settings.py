"""The settings of ``fit``: a parser whose errors are one line, the short names, and YAML with a comment at every setting."""

from __future__ import annotations

import re
import textwrap
import types
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import docstring_parser
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from .. import nets
from ..errors import InputError
from ..presets import preset
from .errors import nearest, one_line

__all__ = ["SHORT", "HelpFormatter", "SettingsParser", "commented_yaml", "expand", "share_help"]

# what users of other tools type -> the setting; `--amp` stands for a setting and its value
SHORT = {
    "--run-folder": "--run",  # torchrun takes --run, wherever it stands, for an abbreviation of its own --run-path
    "--path": "--data.path",
    "--masks": "--data.masks",
    "--size": "--data.size",
    "--channels": "--data.channels",
    "--augment": "--data.augment",
    "-b": "--data.batch_size",
    "--batch-size": "--data.batch_size",
    "--workers": "--data.workers",
    "--backbone": "--model.backbone",
    "--variant": "--model.variant",
    "--lr": "--model.lr",
    "--schedule": "--model.schedule",
    "--epochs": "--trainer.max_epochs",
    "--devices": "--trainer.devices",
}
AMP = ("--precision", "bf16-mixed")


def expand(argv: Sequence[str]) -> list[str]:
    """Arguments with the short names replaced by the settings they stand for; a preset by all of its settings but those that are
    given beside it, at the end: wherever it stands, it prevails over files of settings, and single settings over it.

    Raises:
        InputError: there is no such preset.

    Example:
        >>> expand(["--path", "imgs", "--lr=0.1", "-b8", "--amp"])
        ['--data.path', 'imgs', '--model.lr=0.1', '--data.batch_size=8', '--precision', 'bf16-mixed']
    """
    out: list[str] = []
    chosen: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--preset":
            chosen = _preset(value if equals else next(rest, ""))
        elif argument == "--amp":
            out += AMP
        elif name in SHORT:
            out.append(SHORT[name] + equals + value)
        elif out and out[-1] == "--model.backbone" and argument in nets.__all__:
            out.append(f"fisnet_cuda.nets.{argument}")
        elif re.fullmatch(r"-b\d+", argument):
            out.append(f"{SHORT['-b']}={argument[2:]}")
        else:
            out.append(argument)
    given = {argument.partition("=")[0] for argument in out}
    return out + [setting for setting in chosen if setting.partition("=")[0] not in given]


def _preset(name: str) -> list[str]:
    try:
        settings = preset(name).module
    except ValueError as error:
        raise InputError(f"--preset: {error}") from None
    return [f"--model.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, with the description's own line breaks and without its lists of every class that would fit."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _expand_help(self, action: Action) -> str:
        return re.sub(r", known subclasses:[^)]*", "", super()._expand_help(action))


class UsageError(Exception):
    """A setting is wrong. Not a ValueError, so that jsonargparse, which tries one type after another, lets it through."""


class SettingsParser(LightningArgumentParser):
    """Lightning's parser whose errors name the setting, what it got and what is allowed, in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing the usage and leaving the process."""
        if not self.exit_on_error:  # an inner parser that jsonargparse asks whether a value fits
            super().error(message, ex)
        raise UsageError(self._distil(str(message)))

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The settings of a command line.

        Raises:
            InputError: in one line.
        """
        self.argv = list(argv)
        self.files = [b for a, b in zip(argv, [*argv[1:], ""]) if a in ("-c", "--config")] + [
            a.partition("=")[2] for a in argv if a.startswith("--config=")
        ]
        try:
            return self.parse_args(list(argv))
        except UsageError as error:
            raise InputError(str(error)) from None

    def _distil(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            word = found.group(1).split("=")[0]
            if not word.startswith("-"):
                return f"{word!r} is not expected here: every argument follows an option, such as --data.path {word}"
            return f"there is no option {word}{nearest(word, [*self._options(), *SHORT, '--amp', '--preset'])}"
        if found := re.match(r"Group '(.+)' does not accept option '(.+)'", message) or re.match(
            r"()Option '(.+)' is not accepted", message
        ):
            key = ".".join(part for part in found.groups() if part)
            near = nearest(key, [option[2:] for option in self._options()])
            if not near and not found.group(1):  # a misspelt group: modle.lr
                near = nearest(key.split(".")[0], self.groups)
            return f"there is no setting {key}{near}{self._where()}"
        if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.S):
            return self._wrong_value(*found.groups())
        if found := re.match(r"the following arguments are required: (.*)", message):
            keys = found.group(1).split(", ")
            return f"{' and '.join(f'--{key}' for key in keys)} must be given{_HINTS.get(keys[0], '')}"
        if found := re.match(r"argument (\S+): expected one argument", message):
            return f"{found.group(1)} needs a value"
        if message.startswith("Problems parsing config: "):
            problem = one_line(message.split(": ", 1)[1]).replace(' in "<unicode string>",', " at")
            return f"not a YAML of settings{self._where() or ': --config'}: {problem}"
        if message.startswith("Unexpected config"):
            return f"not a YAML of settings{self._where()}: it holds a text, and lines such as 'model: {{lr: 0.01}}' are needed"
        return one_line(message)

    def _wrong_value(self, key: str, detail: str) -> str:
        got = re.search(r"Given value: (.*)", detail, re.S) or re.search(r"Got value: (.*)", detail, re.S)
        action = next((a for a in self._actions if a.dest == key), None)
        hint = getattr(action, "_typehint", None)
        if key == "config":
            return f"--config: {one_line(detail)}"
        if got is None or hint is None:
            return f"{key}: {one_line(detail)}"
        cause = re.search(r"(?:Problem with given class_path|No module named|has no attribute)[^\n]*(?:\n\s+[^\n-][^\n]*)?", detail)
        more = f" ({one_line(cause.group(0))})" if cause and "." in one_line(got.group(1)) else ""
        near = ""
        if get_origin(hint) is Literal:
            near = nearest(one_line(got.group(1)), map(str, get_args(hint)))
        where = "" if any(a.startswith(f"--{key}") for a in self.argv) else self._where()
        takes = describe(hint)
        if "mapping" in takes and ": None" in got.group(1):  # YAML reads {0:0.3} as {"0:0.3": null}
            more += "; a mapping is written {0: 0.3, 5: 0.7}, with a space behind each colon"
        return f"{key} takes {takes}; it got {one_line(got.group(1), 120)}{where}{near}{more}"

    def _where(self) -> str:
        files = getattr(self, "files", [])
        return f" in {' or '.join(files)}" if files else ""

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


_HINTS = {"data.path": ": the folder, CSV, HDF5 or npz file with the images (see --help)"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


def describe(hint: Any) -> str:
    """A type in words.

    Example:
        >>> describe(float | None), describe(Literal["a", "b"]), describe(list[int])
        ('a number or null', 'a or b', 'a list [a whole number, ...]')
    """
    if hint in _WORDS:
        return _WORDS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner)) if len(inner) < 3 else f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        words = [describe(part) for part in inner]
        return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin in (list, Sequence) and inner:
        return f"a list [{describe(inner[0])}, ...]"
    if origin is tuple and inner:
        return f"a list [{', '.join(describe(part) for part in inner if part is not ...)}{', ...' if ... in inner else ''}]"
    if origin is dict and inner:
        return f"a mapping {{{describe(inner[0])}: {describe(inner[1])}}}"
    return getattr(hint, "__name__", str(hint))


def share_help(parser: LightningArgumentParser, cls: type, group: str) -> None:
    """Gives arguments that are described together (``mean, std: ...``) these words each; jsonargparse leaves them without any."""
    for parameter in docstring_parser.parse(cls.__doc__ or "").params:
        names = [name.strip() for name in parameter.arg_name.split(",")]
        for action in parser._actions:
            if len(names) > 1 and action.dest in {f"{group}.{name}" if group else name for name in names} and not action.help:
                action.help = f"{parameter.arg_name}: {parameter.description}"


def commented_yaml(parser: LightningArgumentParser, settings: dict[str, Any], header: str = "") -> str:
    """Settings as YAML, each below the words that ``--help`` has for it; `--config` reads it back.

    Args:
        parser: where the words come from.
        settings: nested, of plain numbers, texts, lists and mappings.
        header: comment at the top.
    """
    actions = {action.dest: action for action in parser._actions if action.help is not SUPPRESS}
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for key, value in settings.items():
        if isinstance(value, dict) and key in parser.groups:
            lines += ["", f"{key}:"]
            for name, inner in value.items():
                lines += _setting(name, inner, actions.get(f"{key}.{name}"), "  ")
        else:
            lines += _setting(key, value, actions.get(key), "")
    return "\n".join(lines).strip() + "\n"


def _setting(name: str, value: Any, action: Action | None, indent: str) -> list[str]:
    text = one_line(action.help or "", 400).replace("None", "null") if action is not None else ""
    comment = textwrap.wrap(text.replace("%%", "%"), 116, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return [*comment, f"{indent}{name}: {shown.removesuffix(chr(10)).removesuffix('...').rstrip()}"]
