"""What a training step of each variant costs on this machine, beside the plain step of the same network."""

from __future__ import annotations

import argparse
import contextlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fisnet_cuda

from ..errors import InputError
from ..files import write_json
from ..progress import Progress
from ..timing import interleaved
from .nets import _positive, add_backbone_arguments, build

__all__ = ["add_arguments", "measure", "run", "text"]

PLAIN, FORWARD, HEATMAP = "plain step", "forward", "heatmap"
VARIANTS = ("selective", "stochastic", "contrast", "dual", "original")
PRECISIONS = {"32": None, "tf32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SLOW = 3  # original, with a map a class, takes part in every third round only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda bench``."""
    parser.add_argument("backbone", nargs="?", default="resnet18", help="an import path, or a net of this package [%(default)s]")
    add_backbone_arguments(parser, 224)
    parser.add_argument("-b", "--batch-size", type=_positive, default=8, help="images a step [%(default)s]")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:-1]), help="which ISNets [%(default)s]")
    parser.add_argument("--rounds", type=_positive, default=20, help="how often each is timed [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="32", help="as in fit [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, and writes the JSON if it is asked for."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; fisnet-cuda info tells why")
    if args.precision == "16-mixed" and device.type == "cpu":
        raise InputError("--precision 16-mixed needs a GPU: use bf16-mixed or 32")
    if args.json is not None and args.json.is_dir():  # known before minutes are spent
        raise InputError(f"--json {args.json} is a folder: name a file")
    with _tf32(args.precision == "tf32"):
        result = measure(args, device)
    print(text(result))
    if args.json is not None:
        write_json(args.json, result)
        print(f"all numbers: {args.json}")
    return 0


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of every kind of step, their ratio to the plain one, and their peak memory."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, spec = build(args.backbone, args)
    model = model.to(device, memory_format=torch.channels_last)
    steps = _steps(model, spec, args, device)
    progress = Progress("bench", args.rounds + 1)
    times = interleaved(
        steps, args.rounds, every={"original step": SLOW}, device=device, tick=lambda done: progress.update(done, f"round {done}")
    )
    memory = {name: _peak(step, device) for name, step in steps.items()}
    rows = []
    for name, spread in times.items():
        base = times[PLAIN if name.endswith("step") else FORWARD]
        rows.append({"kind": name, **spread._asdict(), "ratio": spread.p50 / base.p50, "peak_bytes": memory[name]})
    return {
        "backbone": args.backbone,
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": list(spec.size),
        "channels": spec.channels,
        "classes": len(spec.classes),
        "batch_size": args.batch_size,
        "precision": args.precision,
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "fisnet_cuda": fisnet_cuda.__version__,
        "kernels": bool(fisnet_cuda.info()["kernels"]) and device.type == "cuda",
        "machine": platform.machine(),
        "unit": "ms",
        "rows": rows,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table.

    Example:
        >>> row = {"kind": "plain step", "p20": 1.0, "p50": 2.0, "p80": 3.0, "ratio": 1.0, "peak_bytes": None}
        >>> result = dict(backbone="small", parameters=5, size=[8, 8], channels=1, classes=2, batch_size=4, precision="32", rounds=3,
        ...               device="CPU, 1 threads", torch="2.11", kernels=False, rows=[row])
        >>> print(text(result).splitlines()[3])
        plain step          1.00      2.00      3.00     1.00x
    """
    height, width = result["size"]
    gpu = any(row["peak_bytes"] for row in result["rows"])
    lines = [
        f"{result['backbone']} ({result['parameters'] / 1e6:.2f} M parameters), {result['channels']} x {height} x {width}, "
        f"{result['classes']} classes, batch {result['batch_size']}, precision {result['precision']}; {result['device']}, "
        f"torch {result['torch']}, CUDA kernels: {'yes' if result['kernels'] else 'no'}",
        "",
        f"{'ms':<16}{'p20':>8}{'median':>10}{'p80':>10}{'ratio':>10}" + (f"{'peak MiB':>12}" if gpu else ""),
    ]
    for row in result["rows"]:
        line = f"{row['kind']:<16}{row['p20']:>8.2f}{row['p50']:>10.2f}{row['p80']:>10.2f}{row['ratio']:>9.2f}x"
        lines.append(line + (f"{row['peak_bytes'] / 2**20:>12.0f}" if gpu else ""))
    lines += ["", "ratio: steps to the plain step, the heatmap to the forward; less is better (step: forward, loss, backward, update)"]
    lines += [f"medians of {result['rounds']} interleaved rounds; p20 to p80 is how far they scatter"]
    return "\n".join(lines)


def _steps(model: torch.nn.Module, spec: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """One model for all kinds, so that they have the same weights and the same memory beneath them."""
    height, width = spec.size
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.batch_size, spec.channels, height, width, generator=generator)
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.randint(len(spec.classes), (args.batch_size,), generator=generator).to(device)
    masks = torch.zeros(args.batch_size, 1, height, width, device=device)
    masks[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    dtype = PRECISIONS[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    heatmap_loss = fisnet_cuda.ISNetLoss()
    bounds = {"input_low": spec.low, "input_high": spec.high}

    def cast() -> Any:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def step(loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run_step() -> None:
            model.train()
            optimizer.zero_grad()
            with cast():
                loss = loss_of()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return run_step

    def isnet_loss(net: fisnet_cuda.ISNet) -> Callable[[], torch.Tensor]:
        return lambda: heatmap_loss(net(x, relevance=True), y, masks)[0]

    steps = {PLAIN: step(lambda: F.cross_entropy(model(x), y))}
    for variant in args.variants:
        draws = torch.Generator(device).manual_seed(0)
        steps[f"{variant} step"] = step(isnet_loss(fisnet_cuda.ISNet(model, variant=variant, generator=draws, **bounds)))
    explainer = fisnet_cuda.ISNet(model, variant="selective", **bounds)

    def forward() -> None:
        model.eval()
        with torch.no_grad(), cast():
            model(x)

    def heatmap() -> None:
        model.eval()
        with torch.no_grad(), cast():
            explainer(x, relevance=True, target=y)

    return {**steps, FORWARD: forward, HEATMAP: heatmap}


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that torch had allocated at the most during a step; None on the CPU, where it does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@contextlib.contextmanager
def _tf32(on: bool) -> Any:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
