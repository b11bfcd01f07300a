"""Which kernels does a training step spend its time in? torch.profiler's table of one case, to know what to tune next."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import choices, common, gpu_worker
from benchmarks.cases import CASES, TrainingStep
from benchmarks.common import Report, cell
from benchmarks.gpu_worker import Turn

# a fused product is one kernel with an epilogue for each op
EPILOGUES = {
    "Act": "linear_act", "Phi": "transposed_phi", "Adjoint": "fprop_adjoint", "Shifts": "dual_fprop", "DualPhi": "dual_transposed_phi",
    "DualAdjoint": "dual_fprop_adjoint", "DualSum": "dual_transposed_sum",
}  # fmt: skip
DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
# the first pattern that is found in a kernel's name says whose it is
OTHERS = (
    (r"wgrad|bprop_filter|backward_filter", "library: weight gradient"),
    (r"dgrad|bprop|backward_data", "library: transposed convolution"),
    (r"fprop|convolve|conv2d|implicit_gemm|cudnn.*conv", "library: convolution"),
    (r"gemm|cublas|splitKreduce|nvjet|gemv", "library: matrix product"),
    (r"nchwToNhwc|nhwcToNchw|transpose", "library: layout"),
    (r"[Mm]emcpy|[Mm]emset", "copy or fill"),
    (r"batch_norm|bn_fw|bn_bw", "library: BatchNorm"),
    (r"multi_tensor|foreach", "PyTorch: optimizer and clipping"),
    (r"at::native|at_cuda|aten::", "PyTorch: pointwise and reductions"),
    (r"triton", "torch.compile"),
)


def short(name: str) -> str:
    """A kernel's name without types of arguments, namespaces and what does not tell it from others.

    Example:
        >>> short("void fisnet::(anonymous namespace)::phi_scale_kernel<__nv_bfloat16, 8>(fisnet::PhiScaleParams)")
        'phi_scale_kernel<bf16, 8>'
        >>> short("void fisnet::linear_kernel<float, fisnet::Tile<128, 64, 4, 4>, 1, fisnet::Product<true, 1, 1, false>, "
        ...       "fisnet::(anonymous namespace)::PhiEpilogue<float> >(fisnet::ProductPlan, void*)")
        'transposed_phi fp32 128x64'
    """
    plain = name.replace("(anonymous namespace)::", "").replace("(int)", "").replace("(bool)", "")
    if "fisnet::" not in plain:
        return name
    plain = re.sub(r"\b(fisnet::)+", "", plain.removeprefix("void ")).split("(")[0].replace(" >", ">")
    for long, word in DTYPES.items():
        plain = re.sub(rf"\b{long}\b", word, plain)
    found = re.match(r"linear_kernel<(\w+), Tile<(\d+), (\d+).*?>, (\w+), Product<.*?>, (\w+)Epilogue", plain)
    if not found:
        return plain
    dtype, m, n, wide, epilogue = found.groups()
    narrow = "" if wide in ("1", "true") else ", by element"
    return f"{EPILOGUES.get(epilogue, epilogue)} {dtype} {m}x{n}{narrow}"


def serves(name: str) -> str:
    """What a kernel does in a step: the op of ours that it belongs to, or whose it is.

    Example:
        >>> serves("void fisnet::(anonymous namespace)::phi_scale_backward_kernel<float, 4>(fisnet::PhiScaleBackwardParams)")
        'phi_scale_backward'
        >>> serves("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64"), serves("unheard_of")
        ('library: transposed convolution', 'other')
    """
    if "fisnet::" in name:
        return re.split(r"_kernel\b|[ <]", short(name))[0]
    return next((whose for pattern, whose in OTHERS if re.search(pattern, name)), "other")


COLUMNS = {
    "kernel": lambda row: short(row["kernel"])[:90],
    "serves": lambda row: serves(row["kernel"]),
    "launches a step": cell("launches", 0),
    "ms a step": cell("ms", 3),
    "share": lambda row: f"{row['share']:.1%}",
}


def run(options: argparse.Namespace) -> Report:
    """Warm up, and profile a few steps when it is our turn."""
    title = f"Kernels of a training step: {options.model}, {options.case}, {options.precision}"
    report = Report("profile", title, common.settings_of(options), common.environment(options.device), COLUMNS)
    turn = Turn(options, report)
    setup = common.setup_of(options, model=options.model, classes=10)
    with gpu_worker.emulating(options.device):
        with gpu_worker.alone(options.device), choices.postponed() if options.wait else contextlib.nullcontext():
            step = TrainingStep(options.case, setup)
            for _ in range(2):
                step()
        turn.wait()
        choices.decide([step], turn.left)
        activities = [ProfilerActivity.CUDA if options.device == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            for _ in range(options.steps):
                step()
            if options.device == "cuda":
                torch.cuda.synchronize()
    own = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events) or 1.0
    for event in events[: options.top]:
        microseconds = getattr(event, own)
        report.add(
            kernel=event.key, launches=event.count / options.steps, ms=microseconds / 1e3 / options.steps,
            share=microseconds / total,
        )  # fmt: skip
    turn.say(f"{total / 1e3 / options.steps:.1f} ms a step in {len(events)} kernels")
    turn.save()
    return report


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    gpu_worker.options_of(p)
    p.add_argument("--model", default="resnet50")
    p.add_argument("--case", choices=CASES, default="selective")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=224, help="height and width of the images")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--top", type=int, default=40, help="how many kernels to show")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.model, options.batch, options.size, options.steps = "small", 2, 32, 1
    common.prepare(options)
    return gpu_worker.finish(run(options), options)


if __name__ == "__main__":
    gpu_worker.leave(main())
