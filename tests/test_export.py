"""Exported files: read back without the package's help, equal logits, refusals that leave nothing behind."""

import json
import re
import runpy

import numpy as np
import pytest
import saved_run
import torch
from PIL import Image
from torch import nn

from fisnet_cuda import export as export_module
from fisnet_cuda import nets
from fisnet_cuda.data.images import read_image
from fisnet_cuda.errors import InputError
from fisnet_cuda.export import ExportError, export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    _, module = saved_run.save(folder / "run", backbone="fisnet_cuda.nets.small")
    return module, folder / "out", export(module, folder / "out")


def images(module, n, seed=5):
    return module.spec.normalise(torch.rand(n, module.spec.channels, *module.spec.size, generator=torch.Generator().manual_seed(seed)))


def logits(module, x):
    with torch.no_grad():
        return module(x)


def test_all_files_are_there_and_nothing_else(exported):
    _, out, contract = exported
    assert {p.name for p in out.iterdir()} == {"model.pt", "model.pt2", "model.onnx", "model.json", "USAGE.md"}
    assert json.loads((out / "model.json").read_text()) == contract


def test_state_dict_is_plain_and_gives_the_same_bits(exported):
    module, out, contract = exported
    state = torch.load(out / "model.pt", weights_only=True)
    fresh = nets.small(**contract["backbone"]["args"]).eval()
    fresh.load_state_dict(state)
    assert list(state) == list(nets.small().state_dict())
    fresh.to(memory_format=torch.channels_last)
    for n in (1, 2, 5):
        x = images(module, n).contiguous(memory_format=torch.channels_last)
        assert torch.equal(fresh(x), logits(module, x))
    assert contract["formats"]["state_dict"]["equal_bit_by_bit"]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_torch_export_takes_any_batch(exported, n):
    module, out, _ = exported
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(images(module, n)), logits(module, images(module, n)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_onnx_takes_any_batch(exported, n):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, out, _ = exported
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"images": images(module, n).numpy()})[0])
    torch.testing.assert_close(got, logits(module, images(module, n)), rtol=1e-5, atol=1e-5)


def test_usage_runs_as_it_stands(exported, tmp_path, monkeypatch):
    """Every block of USAGE.md, after the one that reads an image, gives the trained module's logits of that image file."""
    module, out, _ = exported
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out / "image.png")
    expected = logits(module, module.spec.normalise(read_image(out / "image.png", module.spec)[None]))
    monkeypatch.chdir(out)
    blocks = re.findall(r"```python\n(.*?)```", (out / "USAGE.md").read_text(), re.S)
    assert len(blocks) == 4
    for block in blocks[1:]:
        script = tmp_path / "usage.py"
        script.write_text(blocks[0] + block)
        got = torch.as_tensor(runpy.run_path(str(script))["logits"]).detach()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (out / "image.png").unlink()


def test_contract_tells_input_classes_and_differences(exported):
    module, _, contract = exported
    assert contract["input"]["shape"] == ["batch", 3, 24, 32]
    assert (contract["input"]["mean"], contract["input"]["std"], contract["input"]["fit"]) == ([0.5], [0.25], "squash")
    assert contract["output"]["classes"] == list(module.spec.classes)
    for result in contract["formats"].values():
        assert set(result["difference"]) == {"1", "3"}
        assert max(result["difference"].values()) <= contract["largest_allowed"] < 1e-3


def test_module_is_left_as_it_was(tmp_path):
    _, module = saved_run.save(tmp_path / "run")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    strides = [p.stride() for p in module.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    export(module, tmp_path / "out", onnx=False, torch_export=False)
    assert torch.equal(state, torch.get_rng_state())
    assert strides == [p.stride() for p in module.parameters()]
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["USAGE.md", "model.json", "model.pt"]


def test_other_logits_leave_nothing_behind(tmp_path, monkeypatch):
    """An exporter that loses a thousandth of a bias is found out."""
    _, module = saved_run.save(tmp_path / "run")
    write = export_module._write_program

    def lossy(model, *args):
        with torch.no_grad():
            model[-1].bias += 1e-3
        write(model, *args)

    monkeypatch.setattr(export_module, "_write_program", lossy)
    with pytest.raises(ExportError, match=r"model\.pt2 gives other logits .* nothing was written"):
        export(module, tmp_path / "out", onnx=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_a_new_backbone_does_not_take_up_are_found_out(tmp_path, monkeypatch):
    _, module = saved_run.save(tmp_path / "run")
    load = nn.Module.load_state_dict

    def rounded(self, state, *args, **kwargs):
        state = {key: value.bfloat16().to(value.dtype) for key, value in state.items()}
        return load(self, state, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "load_state_dict", rounded)
    with pytest.raises(ExportError, match=r"model\.pt gives other logits"):
        export(module, tmp_path / "out", onnx=False, torch_export=False)
    assert not (tmp_path / "out").exists()


def test_difference_is_infinite_for_nan():
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert export_module._difference(good, bad) == float("inf")
    with pytest.raises(ExportError):
        export_module._compare("x", [good], [bad], 1e-3)
    with pytest.raises(ExportError, match="logits"):
        export_module._compare("x", [good], [good[:, :1]], 1e-3)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_extra_is_one_line(tmp_path, monkeypatch, missing):
    _, module = saved_run.save(tmp_path / "run")
    find = export_module.importlib.util.find_spec
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    with pytest.raises(InputError, match=rf"^{missing} not installed: pip install 'fisnet_cuda\[export\]', or .*--no-onnx$"):
        export(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reference_evaluator_stands_in_for_onnxruntime(exported, monkeypatch):
    module, out, _ = exported
    find = export_module.importlib.util.find_spec
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    runner, run = export_module._onnx_runner(out / "model.onnx")
    assert "reference" in runner
    torch.testing.assert_close(run(images(module, 1)), logits(module, images(module, 1)), rtol=1e-4, atol=1e-4)


def test_backbone_of_a_users_file_with_its_last_layer_exchanged(tmp_path):
    file = tmp_path / "mynet.py"
    file.write_text(
        "from torch import nn\ndef make(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7))\n"
    )
    with pytest.warns(match="was replaced"):
        _, module = saved_run.save(tmp_path / "run", channels=1, backbone=f"{file}:make", backbone_args={"width": 6})
    contract = export(module, tmp_path / "out", onnx=False, torch_export=False)
    assert contract["backbone"] == {"path": f"{file}:make", "args": {"width": 6}, "as_called": False}
    text = (tmp_path / "out" / "USAGE.md").read_text()
    assert "last layer was exchanged" in text
    assert "from mynet import make" in text
