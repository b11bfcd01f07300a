"""One library for every torch from 2.11 on: what it asks of torch, and that the check would notice."""

import shutil
import subprocess

import pytest
import torch
from package import check_symbols, tools

import fisnet_cuda as fc
from fisnet_cuda import _backend

pytestmark = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="g++ and nm are needed to look at a library")


@pytest.mark.skipif(not _backend.LIBRARY.exists(), reason="the extension is not built")
def test_the_installed_library():
    assert check_symbols.complaints(_backend.LIBRARY) == {}
    assert fc.info()["kernels"], fc.info()["reason"]


@pytest.mark.slow
@pytest.mark.skipif(bool(tools.lacks("nvcc", "cmake", "ninja")), reason=tools.lacks("nvcc", "cmake", "ninja"))
def test_the_library_that_cmake_builds():
    assert check_symbols.complaints(tools.build()) == {}


def newer_than_target():
    later = [name for name, release in check_symbols.torch_functions().items() if release > check_symbols.NEWEST]
    if not later:
        pytest.skip(f"torch {torch.__version__} declares nothing newer than 2.11")
    return next((name for name in later if name.startswith("torch_")), later[0])


@pytest.mark.parametrize(
    ("symbol", "complaint"),
    [
        ("torch_call_dispatcher", None),
        ("aoti_torch_get_numel", None),
        ("PyModule_Create2", None),
        ("malloc", None),
        (newer_than_target, "needs torch"),
        ("torch_invented_function", "torch declares no such C function"),
        ("_ZN3c1011SymIntArrayEv", "not of the stable ABI"),
        ("_ZN2at4_ops5empty4callEv", "not of the stable ABI"),
        ("_PyObject_New", "not of the stable ABI"),
        ("cudaMalloc", "not of the stable ABI"),
        ("cuLaunchKernel", "not of the stable ABI"),
    ],
    ids=lambda v: v.__name__ if callable(v) else str(v)[:24],
)
def test_a_planted_symbol(tmp_path, symbol, complaint):
    symbol = symbol() if callable(symbol) else symbol
    found = check_symbols.complaints(planted(tmp_path, f'extern "C" int {symbol}(); int call() {{ return {symbol}(); }}'))
    assert set(found) == ({symbol} if complaint else set())
    assert not complaint or found[symbol].startswith(complaint)


def test_a_planted_library_and_search_path(tmp_path):
    """Linking another library, or leaving a path of this machine, is refused."""
    planted(tmp_path, "int cuda_side() { return 1; }", name="libtorch_cuda.so")
    code = "int cuda_side(); int call() { return cuda_side(); }"
    library = planted(tmp_path, code, f"-L{tmp_path}", "-ltorch_cuda", "-Wl,-rpath,/opt/here")
    found = check_symbols.complaints(library)
    assert found["libtorch_cuda.so"] == "must not be linked"
    assert found["/opt/here"].startswith("a search path")


def test_a_planted_visible_run_time(tmp_path):
    found = check_symbols.complaints(planted(tmp_path, 'extern "C" int cudaMalloc() { return 0; }'))
    assert found["cudaMalloc"].startswith("the CUDA run time must stay hidden")


def test_command_line(tmp_path, capsys):
    good = planted(tmp_path, "int call() { return 0; }", name="good.so")
    bad = planted(tmp_path, 'extern "C" int torch_invented_function(); int call() { return torch_invented_function(); }')
    assert check_symbols.main(str(good)) == 0
    assert check_symbols.main(str(bad)) == 1
    assert "torch_invented_function: torch declares no such C function" in capsys.readouterr().out


def planted(folder, code, *options, name="planted.so"):
    source = (folder / name).with_suffix(".cpp")
    source.write_text(code + "\n")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(folder / name), *options], check=True, capture_output=True)
    return folder / name
