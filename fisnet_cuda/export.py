"""The plain classifier in formats that need nothing of this package, each proven to give the trained network's logits."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .files import atomic, make_folder, write_json, write_text

if TYPE_CHECKING:
    from .data.spec import InputSpec
    from .train.module import ISNetModule

__all__ = ["BATCHES", "ExportError", "export"]

BATCHES = (1, 3)  # sizes that every format is compared on; formats are traced with 2
FLOOR, CAP = 1e-5, 1e-3  # of the largest logit
WEIGHTS, PROGRAM, ONNX, CONTRACT, USAGE = "model.pt", "model.pt2", "model.onnx", "model.json", "USAGE.md"


class ExportError(RuntimeError):
    """A format gives other logits than the trained network; nothing was written."""

    exit_code = 1


def export(
    module: ISNetModule, out: str | Path, *, torch_export: bool = True, onnx: bool = True, opset: int | None = None
) -> dict[str, Any]:
    """Writes the original model, free of Lightning and of this package, and how to feed it.

    ==============  =================================================================================================
    ``model.pt``    the model's own ``state_dict``; ``torch.load(..., weights_only=True)``
    ``model.pt2``   `torch.export`, any batch size; ``torch.export.load("model.pt2").module()``
    ``model.onnx``  ONNX, any batch size
    ``model.json``  what the input must be, the classes, the backbone, and the measured differences of logits
    ``USAGE.md``    a few lines for each format
    ==============  =================================================================================================

    Each file is read back and run on batches of 1 and 3 images of noise. The ``state_dict`` in a freshly built backbone must give
    bitwise the module's logits. The other formats may sum in another order: their largest difference, relative to the largest
    logit, must stay below 1e-5 or ten times what float32 itself costs this network against float64, whichever is more, and below
    1e-3.

    Args:
        module: a trained module, from `fisnet_cuda.train.checkpoint.load_run`.
        out: the folder to write to; files of these names are replaced once everything is proven.
        torch_export: write ``model.pt2``.
        onnx: write ``model.onnx``; needs the extra ``export``.
        opset: of ONNX; None: torch's own choice.

    Returns:
        What ``model.json`` holds.

    Raises:
        InputError: a package is missing, the folder cannot be written to, or torch cannot export this model.
        ExportError: logits differ; nothing is written.
    """
    needs = [name for name in ("onnx", "onnxscript") if onnx and importlib.util.find_spec(name) is None]
    if needs:
        raise InputError(f"{' and '.join(needs)} not installed: pip install 'fisnet_cuda[export]', or leave ONNX out with --no-onnx")
    # the module's own layout first, for equality bit by bit; then torch's default one, for tracing
    model = copy.deepcopy(module.net.model).cpu().eval()
    batches = _batches(module.spec)
    with torch.no_grad():
        own = [model(_as_trained(module, x)) for x in batches]
        model = model.to(memory_format=torch.contiguous_format)
        limit = _limit(model, batches)
        with tempfile.TemporaryDirectory(prefix="fisnet-export-") as name:
            folder = Path(name)
            state = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
            torch.save(state, folder / WEIGHTS)
            fresh = _rebuilt(module, folder / WEIGHTS)
            formats = {"state_dict": _compare(WEIGHTS, own, [fresh(_as_trained(module, x)) for x in batches], 0.0)}
            if torch_export:
                _write_program(model, module.spec, folder / PROGRAM)
                program = torch.export.load(folder / PROGRAM).module()
                formats["torch_export"] = _compare(PROGRAM, own, [program(x) for x in batches], limit)
            if onnx:
                opsets = _write_onnx(model, module.spec, folder / ONNX, opset)
                runner, run = _onnx_runner(folder / ONNX)
                formats["onnx"] = {**_compare(ONNX, own, [run(x) for x in batches], limit), "opset": opsets, "run_by": runner}
            contract = _contract(module, state, formats, limit)
            out = make_folder(out)
            for file in sorted(folder.iterdir()):
                with atomic(out / file.name) as temporary:
                    shutil.copyfile(file, temporary)
    write_json(out / CONTRACT, contract)
    write_text(out / USAGE, _usage(contract))
    return contract


# ---- logits ------------------------------------------------------------------------------------------------------------


def _batches(spec: InputSpec) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [spec.normalise(torch.rand(n, spec.channels, *spec.size, generator=generator)) for n in BATCHES]


def _as_trained(module: ISNetModule, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if module.hparams["channels_last"] else x


def _limit(model: nn.Module, batches: list[Tensor]) -> float:
    """Relative difference that rounding may make: ten times float32's own error, measured against float64."""
    exact = copy.deepcopy(model).double()
    error = max(_difference(exact(x.double()), model(x).double()) for x in batches)
    return min(max(FLOOR, 10 * error), CAP)


def _difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference over the largest logit; infinite where a value is not finite."""
    if not (expected.isfinite().all() and got.isfinite().all()):
        return float("inf")
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def _compare(name: str, expected: list[Tensor], got: list[Tensor], limit: float) -> dict[str, Any]:
    for x, y in zip(expected, got):
        if x.shape != y.shape:
            raise ExportError(f"{name} gives logits {list(y.shape)} and not {list(x.shape)}; nothing was written")
    differences = [_difference(x, y) for x, y in zip(expected, got)]
    if not max(differences) <= limit:
        raise ExportError(
            f"{name} gives other logits than the trained network: the largest difference is {max(differences):.2g} of the largest "
            f"logit (at most {limit:.2g} is rounding); nothing was written"
        )
    return {
        "file": name,
        "difference": {str(n): d for n, d in zip(BATCHES, differences)},  # by batch size
        "equal_bit_by_bit": all(torch.equal(x, y) for x, y in zip(expected, got)),
    }


# ---- formats -----------------------------------------------------------------------------------------------------------


def _rebuilt(module: ISNetModule, weights: Path) -> nn.Module:
    """A new backbone with the weights of the file, as a user would make it."""
    from .train.backbone import build_backbone
    from .train.checkpoint import without_pretrained

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = build_backbone(module.hparams["backbone"], without_pretrained(module.hparams["backbone_args"]), module.spec)
    if module.hparams["channels_last"]:
        model.to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def _example(spec: InputSpec) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    return (torch.zeros(2, spec.channels, *spec.size),), ({0: torch.export.Dim("batch")},)


def _write_program(model: nn.Module, spec: InputSpec, path: Path) -> None:
    example, dynamic = _example(spec)
    with _one_line("torch.export", "--no-torch-export"):
        torch.export.save(torch.export.export(model, example, dynamic_shapes=dynamic), path)


def _write_onnx(model: nn.Module, spec: InputSpec, path: Path, opset: int | None) -> int:
    import onnx

    example, dynamic = _example(spec)
    with _one_line("torch.onnx.export", "--no-onnx"):
        torch.onnx.export(
            model, example, path, dynamo=True, dynamic_shapes=dynamic, input_names=["images"], output_names=["logits"],
            opset_version=opset, external_data=False, verbose=False,
        )  # fmt: skip
        onnx.checker.check_model(str(path), full_check=True)
        opsets = {entry.domain: entry.version for entry in onnx.load(str(path)).opset_import}
    if opset is not None and opsets[""] != opset:  # torch converts where it can, and keeps its own where it cannot
        raise InputError(f"--opset {opset}: this model could only be written with opset {opsets['']}")
    return opsets[""]


def _onnx_runner(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What runs the file here: onnxruntime, or onnx's own reference where that is missing."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return f"onnxruntime {onnxruntime.__version__}", lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return f"onnx {onnx.__version__}, reference evaluator", lambda x: torch.from_numpy(evaluator.run(None, {"images": x.numpy()})[0])


@contextlib.contextmanager
def _one_line(what: str, option: str) -> Iterator[None]:
    """Exporters talk on standard output, warn and fail at length: here they end in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # of torch, onnxscript and onnx_ir, whose loggers are many
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"{what} cannot take this model ({type(error).__name__}: {line}); leave it out with {option}") from error
    finally:
        logging.disable(before)


# ---- how to use it -----------------------------------------------------------------------------------------------------


def _contract(module: ISNetModule, state: Mapping[str, Tensor], formats: dict[str, Any], limit: float) -> dict[str, Any]:
    spec = module.spec
    call = _plain_call(module, state)
    return {
        "input": {
            "name": "images", "dtype": "float32", "shape": ["batch", spec.channels, *spec.size],
            "channels": "grey" if spec.channels == 1 else "RGB",
            "mean": list(spec.mean), "std": list(spec.std), "fit": spec.fit, "window": spec.window,
            "meaning": "(image in [0, 1] - mean) / std, resized bilinearly with anti-aliasing; fit: squash changes the aspect ratio, "
            "pad adds black bars, crop takes the middle; window: intensities that become 0 and 1 (null: the full range of the type)",
        },
        "output": {"name": "logits", "shape": ["batch", len(spec.classes)], "classes": list(spec.classes),
                   "probabilities": "softmax(logits)"},
        "backbone": {"path": module.hparams["backbone"], "args": module.hparams["backbone_args"] if call is None else call,
                     "as_called": call is not None},
        "variant": module.variant,
        "formats": formats,
        "difference": "largest |difference of logits| / largest |logit| against the trained network, by batch size",
        "largest_allowed": limit,
        "torch": torch.__version__,
    }  # fmt: skip


def _plain_call(module: ISNetModule, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments with which the backbone's callable, alone, makes a model of these weights; None: its last layer was replaced."""
    from .train.backbone import CHANNELS, CLASSES, _callable
    from .train.checkpoint import without_pretrained

    build, args, spec = _callable(module.hparams["backbone"]), without_pretrained(module.hparams["backbone_args"]), module.spec
    parameters = inspect.signature(build).parameters
    full = dict(args)
    for names, value in ((CLASSES, len(spec.classes)), (CHANNELS, spec.channels)):
        named = [name for name in names if name in parameters]
        if named and not any(name in args for name in names):
            full[named[0]] = value
    timm = {"num_classes": len(spec.classes), "in_chans": spec.channels}
    for kwargs in (full, {"num_classes": len(spec.classes), **args}, {**timm, **args}):
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(**kwargs).load_state_dict(state)
            return kwargs
        except Exception:  # other arguments, then
            continue
    return None


def _usage(contract: dict[str, Any]) -> str:
    """USAGE.md: the input, then a section a format."""
    given, classes, formats = contract["input"], contract["output"]["classes"], contract["formats"]
    _, channels, height, width = given["shape"]
    mean, std = ([float(f"{v:.9g}") for v in given[name]] for name in ("mean", "std"))
    sections = [_INTRODUCTION.format(names=", ".join(classes))]
    if given["fit"] != "squash" or given["window"] is not None:
        sections.append(_OTHER_FIT.format(fit=given["fit"], window=given["window"]))
    mode = "L" if channels == 1 else "RGB"
    sections.append(_INPUT.format(mode=mode, channels=channels, height=height, width=width, mean=mean, std=std, classes=classes))
    sections += [text for name, text in (("onnx", _ONNX_USAGE), ("torch_export", _PROGRAM_USAGE)) if name in formats]
    backbone = contract["backbone"]
    where, name = _import_lines(backbone["path"])
    call = ", ".join(f"{key}={value!r}" for key, value in backbone["args"].items())
    note = ""
    if not backbone["as_called"]:
        note = "Its last layer was exchanged for one with this number of classes: do the same before loading.\n\n"
    elif backbone["path"].startswith("fisnet_cuda.nets.") and name != "small":
        first = ", and may stand in for it" if channels == 3 else "; its first layer takes 3 channels, and this one's takes 1"
        note = f"`torchvision.models.{name}` has the same keys{first}.\n\n"
    sections.append(_WEIGHTS_USAGE.format(note=note, where=where, name=name, call=call))
    return "\n".join(sections)


def _import_lines(path: str) -> tuple[str, str]:
    """How to import a backbone, and its name."""
    source, _, name = path.rpartition(":" if ".py:" in path else ".")
    if ".py:" not in path:
        return f"from {source} import {name}", name
    file = Path(source)
    return f"import sys\nsys.path.insert(0, {str(file.parent)!r})  # where {file.name} lies\nfrom {file.stem} import {name}", name


_INTRODUCTION = """# A classifier of {names}

Images in, logits out. Nothing here needs fisnet_cuda unless it is named. `model.json` has the input's contract and the measured
differences of logits.
"""

_OTHER_FIT = """This network was trained with fit={fit!r} and window={window}. The line that opens the image squashes an 8-bit image:
replace it by what `model.json` says under "input".
"""

_INPUT = """## The input

```python
import numpy as np
from PIL import Image
image = Image.open("image.png").convert("{mode}").resize(({width}, {height}), Image.Resampling.BILINEAR)
x = np.asarray(image, np.float32).reshape({height}, {width}, {channels}) / 255
x = ((x - np.float32({mean})) / np.float32({std})).transpose(2, 0, 1)[None]  # [batch, {channels}, {height}, {width}]
classes = {classes!r}
```
"""

_ONNX_USAGE = """## model.onnx

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {"images": x})[0]
print(classes[logits[0].argmax()])
```
"""

_PROGRAM_USAGE = """## model.pt2

```python
import torch
model = torch.export.load("model.pt2").module()
logits = model(torch.from_numpy(x))
print(classes[logits[0].argmax()])
```
"""

_WEIGHTS_USAGE = """## model.pt

The `state_dict` alone, for the backbone's own code.

{note}```python
import torch
{where}
model = {name}({call}).eval()
model.load_state_dict(torch.load("model.pt", weights_only=True))
logits = model(torch.from_numpy(x))
print(classes[logits[0].argmax()])
```
"""
