"""phi_scale and its adjoint through the numpy binding, where torch cannot be imported; `test_numpy.py` runs this file.

    python numpy_only.py path/to/fisnet_emu.so
"""

import importlib.util
import sys

import numpy as np

N, K, C, INNER = 2, 3, 8, 5
SIZE = C * INNER


def bits(x, dtype):
    """``x`` as the kernel wants it; bfloat16, which numpy does not have, as its bits."""
    if dtype != "bf16":
        return x.astype({"f32": np.float32, "f16": np.float16, "f64": np.float64}[dtype])
    wide = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def values(x, dtype):
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if dtype == "bf16" else x.astype(np.float64)


def nan_like(x):
    return np.frombuffer(bytearray(b"\xff" * x.nbytes), x.dtype).reshape(x.shape)


def check(emu, dtype, bound):
    rng = np.random.default_rng(0)
    acc = np.float64 if dtype == "f64" else np.float32
    a = bits(np.maximum(rng.standard_normal((N, 1, SIZE)), 0), dtype)
    g, skip, rest, s_bar, join = (bits(rng.standard_normal((N, K, SIZE)), dtype) for _ in range(5))
    scale = rng.standard_normal(C).astype(acc)
    sizes = {"dtype": dtype, "outer": N, "channels": C, "inner": INNER, "samples": N, "maps": K, "size": SIZE, "eps": 0.01}
    sizes |= {"eps_n": None, "a": a, "scale": scale}

    s, out = nan_like(g), nan_like(g)
    emu.launch("phi_scale", g=g, skip=skip, rest=rest, s=s, out=out, **sizes)
    a64, scale64 = values(a, dtype), np.repeat(scale.astype(np.float64), INNER)
    want = a64 / (a64 + 0.01) * (values(g, dtype) + values(skip, dtype))
    close(values(s, dtype), want, bound, f"{dtype} s")
    close(values(out, dtype), scale64 * want + values(rest, dtype), bound, f"{dtype} out")

    slabs = 1  # as ChannelGrid::of has it for tensors as small as these
    g_bar, a_bar, partial, scale_bar = nan_like(g), nan_like(a), nan_like(np.zeros((slabs, C), acc)), nan_like(scale)
    results = {"g_bar": g_bar, "a_bar": a_bar, "partial": partial, "scale_bar": scale_bar}
    emu.launch("phi_scale_backward", s_bar=s_bar, join=join, s=s, slabs=slabs, **results, **sizes)
    s64, s_bar64 = values(s, dtype), values(s_bar, dtype) + values(join, dtype)
    u = np.where(a64 == 0, 0, scale64 * s_bar64 / (a64 + 0.01))
    close(values(g_bar, dtype), a64 * u, bound, f"{dtype} g_bar")
    ratio = np.divide(s64, a64, out=np.zeros_like(s64), where=np.broadcast_to(a64, s64.shape) != 0)
    close(values(a_bar, dtype), (0.01 * ratio * u).sum(1, keepdims=True), 2 * bound, f"{dtype} a_bar")
    close(scale_bar.astype(np.float64), (s_bar64 * s64).reshape(-1, C, INNER).sum((0, 2)), 1e-6, f"{dtype} scale_bar")


def close(got, want, bound, what):
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= bound, f"{what}: error {error:.2g}"  # NaN fails too


if __name__ == "__main__":
    sys.modules["torch"] = None  # importing it raises ImportError
    spec = importlib.util.spec_from_file_location("fisnet_emu", sys.argv[1])
    emu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emu)
    for order in ("in order", "reversed", "random"):
        emu.config(order=order)
        for dtype, bound in (("f64", 1e-12), ("f32", 1e-6), ("f16", 2**-11), ("bf16", 2**-8)):
            check(emu, dtype, bound)
    assert emu.stats()["blocks"] > 0
    assert "torch._C" not in sys.modules
    print("torch-free")
