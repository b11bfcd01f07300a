"""A trained module back from its run folder, without the data it was trained on."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import FisnetWarning, InputError, one_line
from .module import STATE, ISNetModule

__all__ = ["checkpoint_path", "load_run", "run_config"]

WHICH = ("best", "last")


def checkpoint_path(path: str | Path, which: str = "best") -> Path:
    """The checkpoint that a run folder or a path stands for.

    Args:
        path: a run folder (with best.ckpt, last.ckpt) or a checkpoint.
        which: "best" or "last", in a folder. Where there is no best one yet, the last is taken with a `FisnetWarning`.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if which not in WHICH:
        raise InputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"there is no run folder or checkpoint {path}")
    wanted = path / f"{which}.ckpt"
    if wanted.is_file():
        return wanted
    if which == "best" and (path / "last.ckpt").is_file():
        warnings.warn(f"{path} has no best.ckpt yet: last.ckpt is used", FisnetWarning, stacklevel=3)
        return path / "last.ckpt"
    found = sorted(p.name for p in path.glob("*.ckpt"))
    hint = f"; there are {', '.join(found[:5])}: name one of them" if found else ": did training get so far?"
    raise InputError(f"{path} has no {which}.ckpt{hint}")


def load_run(path: str | Path, device: torch.device | str = "cpu", which: str = "best") -> ISNetModule:
    """The module of a run, in eval mode: the same network, settings, `InputSpec` and tuned C1 and C2.

    Averaged weights (EMA) are loaded where training kept them. Only tensors, numbers and texts are read (``weights_only``): a
    checkpoint of doubtful origin cannot run code, but its backbone's import path is imported.

    Args:
        path: a run folder or a checkpoint.
        device: where the module goes.
        which: "best" or "last", in a folder.

    Returns:
        The module; ``module.spec`` says how to read images for it.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or its backbone cannot be built here.
    """
    file = checkpoint_path(path, which)
    checkpoint = _read(file)
    settings = {**checkpoint["hyper_parameters"], "weights": None}  # the start's weights are in the state_dict's place
    try:
        if settings["backbone"].startswith(("torchvision.", "timm.")):  # weights would be downloaded only to be replaced
            settings["backbone_args"] = without_pretrained(settings["backbone_args"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*its last layer .* was replaced", FisnetWarning)  # it has learned since
            module = ISNetModule(**settings)
        module.load_state_dict(checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{file} does not fit this version of the package or of the backbone: {one_line(error)[:300]}") from error
    module.hparams["weights"] = checkpoint["hyper_parameters"]["weights"]
    module.hparams["backbone_args"] = checkpoint["hyper_parameters"]["backbone_args"]
    return module.to(device).eval()


def run_config(path: str | Path) -> dict[str, Any]:
    """The resolved settings of a run, from its config.yaml.

    Args:
        path: the run folder, or a checkpoint in it.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    import yaml

    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.yaml"
    if not file.is_file():
        raise InputError(f"there is no {file}: is {file.parent} a run folder?")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no settings")
    return config


def without_pretrained(args: dict[str, Any]) -> dict[str, Any]:
    """A backbone's arguments without those that fetch weights.

    Example:
        >>> without_pretrained({"weights": "DEFAULT", "width": 64})
        {'weights': None, 'width': 64}
    """
    off = {"weights": None, "pretrained": False}
    return {key: off[key] if key in off and isinstance(value, (str, bool)) else value for key, value in args.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} holds more than weights and settings, or is damaged: {one_line(error)[:200]}") from error
    except Exception as error:
        raise InputError(f"{file} cannot be read as a checkpoint: {one_line(error)[:200]}") from error
    needed = ("state_dict", "hyper_parameters", STATE)
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in needed):
        raise InputError(f"{file} is not a checkpoint of fisnet-cuda fit: start a new training from it with --model.weights")
    return checkpoint
