"""A classifier by its import path, made to fit the data: torchvision's, timm's, this package's or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.spec import InputSpec
from ..errors import FisnetWarning, InputError, one_line

__all__ = ["build_backbone", "load_weights"]

CLASSES = ("num_classes", "classes", "n_classes", "num_labels", "out_features")
CHANNELS = ("in_channels", "in_chans", "num_channels", "channels")
# What to install when a package is missing; both stay the user's choice, as they pin a torch of their own.
INSTALL = {"torchvision": "pip install torchvision (the one that matches your torch)", "timm": "pip install timm"}


def build_backbone(path: str, args: Mapping[str, Any] | None, spec: InputSpec) -> nn.Module:
    """Calls what ``path`` names and makes sure that it turns the data's images into one logit a class.

    The number of classes and of channels are passed where the callable has an argument for them (``num_classes``,
    ``in_channels``, ``in_chans``, ...) and ``args`` does not set it. A net that has another number of logits even so, because its
    weights are pretrained, gets a new last layer, and a `FisnetWarning` says so.

    Args:
        path: "package.module.callable", or "folder/file.py:callable"; the working folder counts as a place to import from.
        args: keyword arguments of the callable.
        spec: what the images are.

    Returns:
        The model, images ``[N, C, H, W]`` -> logits ``[N, classes]``.

    Raises:
        InputError: the path cannot be imported, the call fails, or the model does not fit the images.

    Example:
        >>> model = build_backbone("fisnet_cuda.nets.small", {}, InputSpec((32, 32), 1, ("normal", "TB")))
        >>> model(torch.rand(1, 1, 32, 32)).shape
        torch.Size([1, 2])
    """
    args = dict(args or {})
    build = _callable(path)
    model = _call(path, build, args, spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"backbone {path} returned {type(model).__name__}, not a torch.nn.Module: name what makes one")
    logits = _probe(path, model, spec)
    if logits.shape[1] != len(spec.classes):
        _replace_head(path, model, logits.shape[1], len(spec.classes))
        logits = _probe(path, model, spec)
        if logits.shape[1] != len(spec.classes):
            raise InputError(f"backbone {path} gives {logits.shape[1]} logits for {len(spec.classes)} classes: set its number "
                             f"in backbone_args")  # fmt: skip
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Starts a model from a file of weights: a ``state_dict``, or a checkpoint that holds one.

    Prefixes that wrappers leave ("net.", "model.", "module.") are taken off. A last layer of another number of classes keeps its own
    initialisation, and a `FisnetWarning` says so; anything else that does not fit is an error.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    state = _state_dict(Path(path))
    own = model.state_dict()
    for prefix in ("net.", "model.", "module."):
        if state and not set(state) & set(own) and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    unknown, missing = [k for k in state if k not in own], [k for k in own if k not in state]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if unknown or missing:
        what = f"has {_some(unknown)}, which the backbone lacks" if unknown else f"lacks {_some(missing)}"
        raise InputError(f"weights {path} are not of this backbone: the file {what}")
    other = [key for key in state if state[key].shape != own[key].shape]
    head = _last_layer(model)
    if other and (head is None or any(key.rpartition(".")[0] != head[0] for key in other)):
        key = other[0]
        raise InputError(f"weights {path} are not of this backbone: {key} is {list(state[key].shape)}, not {list(own[key].shape)}")
    if other:
        warnings.warn(f"weights {path} are for {len(state[other[0]])} classes: the last layer ({head[0]}) starts anew", FisnetWarning,
                      stacklevel=2)  # fmt: skip
    model.load_state_dict({key: value for key, value in state.items() if key not in other}, strict=False)


def _callable(path: str) -> Callable[..., Any]:
    if not isinstance(path, str) or not path.strip("."):
        raise InputError(f"backbone must be an import path such as fisnet_cuda.nets.resnet18, got {path!r}")
    if ".py:" in path:
        file, _, name = path.rpartition(":")
        return _attribute(path, _module_of_file(path, Path(file)), name)
    parts = path.split(".")
    if len(parts) < 2:
        raise InputError(f"backbone {path!r} must name a module and a callable in it, as in torchvision.models.resnet18")
    with _working_folder():
        for cut in range(len(parts) - 1, 0, -1):  # a class may be nested in another
            name = ".".join(parts[:cut])
            try:
                found = importlib.import_module(name)
            except ModuleNotFoundError as error:
                missing = error.name or ""
                if missing == name or name.startswith(f"{missing}."):
                    if cut > 1 and missing != parts[0]:
                        continue
                    hint = INSTALL.get(parts[0], "check the spelling, and that the module is installed or lies in the working folder")
                    raise InputError(f"backbone {path}: there is no module {missing!r} here: {hint}") from None
                hint = INSTALL.get(missing.partition(".")[0], f"install {missing}")
                raise InputError(f"backbone {path} needs the module {missing!r}, which is not here: {hint}") from None
            except Exception as error:
                raise InputError(f"backbone {path}: importing {name} failed with {type(error).__name__}: {one_line(error)}") from error
            for part in parts[cut:]:
                found = _attribute(path, found, part)
            if not callable(found):
                raise InputError(f"backbone {path} is a {type(found).__name__}, not a callable that makes a model")
            return found
    raise InputError(f"backbone {path} cannot be imported")


def _attribute(path: str, holder: Any, name: str) -> Any:
    if hasattr(holder, name):
        return getattr(holder, name)
    import difflib

    near = difflib.get_close_matches(name, [n for n in dir(holder) if not n.startswith("_")], 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
    raise InputError(f"backbone {path}: {getattr(holder, '__name__', holder)} has no {name!r}: {hint}")


def _module_of_file(path: str, file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"backbone {path}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"backbone {path}: running {file} failed with {type(error).__name__}: {one_line(error)}") from error
    return module


@contextmanager
def _working_folder():
    """The working folder is importable while a backbone is looked up: an installed command does not have it in ``sys.path``."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _call(path: str, build: Callable[..., Any], args: dict[str, Any], spec: InputSpec) -> Any:
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        parameters = {}
    given = dict(args)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    pretrained = any(given.get(name) for name in ("weights", "pretrained"))
    guessed = {}
    for names, value in ((CLASSES, len(spec.classes)), (CHANNELS, spec.channels)):
        if any(name in given for name in names):
            continue
        named = [name for name in names if name in parameters]
        if named:
            given[named[0]] = value
        elif takes_any and path.startswith("timm."):
            given["num_classes" if names is CLASSES else "in_chans"] = value
        elif takes_any and names is CLASSES and not pretrained:  # torchvision refuses another number beside its weights
            guessed["num_classes"] = value
    for attempt in ({**given, **guessed}, given) if guessed else (given,):
        try:
            return build(**attempt)
        except TypeError as error:
            if attempt is not given and any(name in str(error) for name in guessed):
                continue
            raise InputError(f"backbone {path}({_shown(attempt)}) failed: {one_line(error)}") from error
        except Exception as error:
            raise InputError(f"backbone {path}({_shown(attempt)}) failed with {type(error).__name__}: {one_line(error)}") from error
    raise AssertionError("unreachable")


def _shown(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in args.items())


def _probe(path: str, model: nn.Module, spec: InputSpec) -> Tensor:
    """Logits of one grey image, in eval mode; the model's modes, statistics and the random state stay as they are."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    x = torch.full((1, spec.channels, *spec.size), 0.5)
    x = spec.normalise(x).to(parameter) if parameter is not None else spec.normalise(x)
    try:
        model.eval()
        with torch.no_grad():
            logits = model(x)
    except Exception as error:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None and first.in_channels != spec.channels:
            hint = f": it takes {first.in_channels} channels, so set the data's channels to {first.in_channels}"
        else:
            hint = f" with {type(error).__name__}: {one_line(error)}; do size and channels fit the net?"
        raise InputError(f"backbone {path} fails on an image of {spec.channels} x {spec.size[0]} x {spec.size[1]}{hint}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        got = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"backbone {path} must return logits [N, classes], got {got} for one image")
    return logits


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else None


def _replace_head(path: str, model: nn.Module, have: int, classes: int) -> None:
    """A last layer of ``classes`` outputs, freshly initialised, where there is one of ``have`` outputs."""
    found = _last_layer(model)
    name, old = found if found is not None else ("", None)
    outputs = old.out_features if isinstance(old, nn.Linear) else old.out_channels if old is not None else None
    if old is None or outputs != have or not name:
        raise InputError(f"backbone {path} gives {have} logits and there are {classes} classes: set its number of classes in "
                         f"backbone_args")  # fmt: skip
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, old.kernel_size, old.stride, old.padding, bias=bias)
    holder, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(holder), attribute, new.to(old.weight))
    warnings.warn(f"backbone {path} has {have} logits and there are {classes} classes: its last layer ({name}) was replaced by a "
                  f"new one, which has everything to learn", FisnetWarning, stacklevel=4)  # fmt: skip


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights: there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights {path} cannot be read as a state_dict ({one_line(error)[:200]})") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"weights {path} hold no state_dict: save one with torch.save(model.state_dict(), ...)")
    return dict(content)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
