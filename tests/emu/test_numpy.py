"""The launchers of the project's kernels for numpy arrays, without torch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import ROOT, cannot_build, numpy_module, toolkit_headers

ONE = np.ones(1, np.float32)
PHI = {
    "dtype": "f32", "outer": 1, "channels": 1, "inner": 1, "samples": 1, "maps": 1, "size": 1, "eps": 0.5, "eps_n": None,
    "g": ONE, "a": ONE, "skip": None, "scale": None, "rest": None, "out": None,
}  # fmt: skip


@pytest.fixture
def emu():
    module = numpy_module("fisnet_emu")
    module.config()
    return module


def test_phi_scale_where_torch_cannot_be_imported(emu):
    script = Path(__file__).with_name("numpy_only.py")
    done = subprocess.run([sys.executable, script, emu.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "torch-free\n"


def test_launchers_and_fields_have_names(emu):
    """Unique ones, which Python can write as keywords."""
    names = emu.launchers()
    assert len(set(names)) == len(names) > 0
    for name in names:
        fields = emu.fields(name)
        assert len(set(fields)) == len(fields) > 0, name
        assert all(word.isidentifier() for word in (name, *fields)), name
        with pytest.raises(TypeError, match=f"{name}: missing field '{fields[0]}'"):
            emu.launch(name)


def test_launch_says_what_is_wrong_with_a_field(emu):
    s = np.full(1, np.nan, np.float32)
    emu.launch("phi_scale", s=s, **PHI)
    assert s == np.float32(1 / 1.5)
    fixed = np.ones(1, np.float32)
    fixed.flags.writeable = False
    emu.launch("phi_scale", s=s, **(PHI | {"g": fixed}))
    with pytest.raises(KeyError, match="no launcher 'phi'"):
        emu.launch("phi")
    for field, value, says in [
        ("wrong", 1, "no field 'wrong'; the fields are dtype outer"),
        ("dtype", "f8", "field 'dtype' must be one of 'bf16', 'f16', 'f32', 'f64'"),
        ("dtype", 0, "field 'dtype' must be one of"),
        ("eps", "small", "field 'eps' must be a number"),
        ("size", 1.5, "field 'size' must be an integer"),
        ("size", True, "field 'size' must be an integer"),
        ("maps", 1 << 31, "field 'maps' does not fit into 32 bits"),
        ("g", [1.0], "field 'g' must be a numpy array or None"),
        ("g", np.ones(4, np.float32)[::2], "field 'g' must be contiguous"),
        ("s", fixed, "field 's' must be writeable"),
    ]:
        with pytest.raises(TypeError, match=f"phi_scale: {says}"):
            emu.launch("phi_scale", **({"s": s} | PHI | {field: value}))


def test_errors_name_the_field(emu):
    with pytest.raises(emu.Error, match=r"out-of-bounds read of 4 bytes .*, 4 bytes past the end of 'a'"):
        emu.launch("phi_scale", s=np.zeros(2, np.float32), **(PHI | {"size": 2, "g": np.ones(2, np.float32)}))
    assert issubclass(emu.Error, RuntimeError)


def test_config_refuses_what_it_does_not_know(emu):
    with pytest.raises(ValueError, match="order must be one of 'in order', 'random', 'reversed'"):
        emu.config(order="sorted")
    with pytest.raises(TypeError):
        emu.config(speed=3)


def test_builds_without_torch(emu, tmp_path):
    """FISNET_WITH_TORCH=OFF configures where Python has no torch, and has the numpy modules and nothing of torch's."""
    if cannot_build():
        pytest.skip(cannot_build())
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    build = tmp_path / "build"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DFISNET_WITH_TORCH=OFF", "-DFISNET_WITH_CUDA=OFF"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DFISNET_CUDA_INCLUDE={toolkit_headers()}"]
    done = subprocess.run(configure, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    targets = subprocess.run(["ninja", "-C", build, "-t", "targets", "all"], capture_output=True, text=True).stdout
    assert "fisnet_emu: phony" in targets
    assert "emulator_units: phony" in targets
    assert "torch_cpu" not in (build / "build.ninja").read_text()
