"""``fisnet-cuda fit``: trains a classifier on images, masks and labels, and goes on by itself where a run was cut off."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ..data.module import MaskedImageData
from ..data.split import drift, read_manifest
from ..errors import InputError
from ..files import make_folder, write_text
from ..presets import PRESETS
from ..train.callbacks import callbacks
from ..train.module import ISNetModule
from .console import Console, quiet, say, settings_kept
from .errors import one_line, rank
from .settings import SHORT, HelpFormatter, SettingsParser, commented_yaml, expand, share_help

__all__ = ["main"]

LAUNCHED = "FISNET_CUDA_RUN"  # how a process that launches others for DDP tells them the run folder
PRECISIONS = {"32": "32-true", "tf32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}
# the tool's own business, or without a meaning here
NOT_OFFERED = {
    "precision", "logger", "fast_dev_run", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler", "barebones",
    "default_root_dir", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs", "enable_autolog_hparams", "model_registry",
    "overfit_batches",
}  # fmt: skip
TRAINER_DEFAULTS = {"max_epochs": 20, "gradient_clip_val": 1.0, "deterministic": "warn", "devices": 1, "log_every_n_steps": 10}
# settings that a run may be continued with although they are others: they do not change what is learned, or are meant to change.
# Where the images lie is one of them: that they are the same ones is seen by split.csv.
FREE = {
    "data.path", "data.masks",
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.min_epochs", "trainer.min_steps", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.profiler", "trainer.enable_progress_bar",
    "trainer.log_every_n_steps", "data.workers", "data.cache", "data.cache_dir", "patience", "figures_every", "figures_images",
    "swap_every", "swap_images",
    "checkpoint_every_steps", "checkpoint_every_minutes",
}  # fmt: skip
OPTIMIZER = ("model.lr", "model.momentum", "model.weight_decay")  # a checkpoint brings its own
OWN = ("run", "resume", "config")  # not part of what a run is
HEADER = "Settings of fisnet-cuda fit. Edit, and train with: fisnet-cuda fit --config THIS_FILE --run runs/another"


def main(argv: Sequence[str]) -> int:
    """Trains.

    Args:
        argv: arguments behind ``fit``.

    Returns:
        The exit status.
    """
    argv = expand(argv)
    with quiet(), settings_kept():
        if any(a.split("=")[0] == "--print_config" for a in argv):
            print(_printed_config(argv), end="")
            return 0
        if not {"-h", "--help"} & set(argv):
            argv = _with_settings_of_run(argv)
        cli = FitCLI(argv)
        return Run(cli, argv).go()


class FitCLI(LightningCLI):
    """The settings of a run, and the data module and the module that they describe; the trainer is made by `Run`.

    Args:
        argv: the arguments, short names expanded.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        super().__init__(
            ISNetModule,
            MaskedImageData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=SettingsParser,
            parser_kwargs=_PARSER,
            args=self.argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the module keeps what it needs itself
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The tool's own settings."""
        _own_arguments(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Data, model and what of Lightning's Trainer is the user's to set."""
        _core_arguments(parser)

    def parse_arguments(self, parser: SettingsParser, args: Any) -> None:
        """Settings, or InputError in one line."""
        self.config = parser.parse(args)

    def _set_seed(self) -> None:
        _seed(self.config.seed)

    def before_instantiate_classes(self) -> None:
        """What can be refused before anything is read."""
        _check_precision(self.config.precision, self.config.trainer.accelerator)

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """None yet: its callbacks need the run folder."""

    def settings(self) -> dict[str, Any]:
        """All settings with their values, as config.yaml keeps them."""
        return _plain(yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True, format="yaml")))


class Run:
    """One call of ``fit``: where it writes, what it goes on from, and how it ends."""

    def __init__(self, cli: FitCLI, argv: Sequence[str]) -> None:
        self.cli, self.argv = cli, list(argv)
        self.config, self.settings = cli.config, cli.settings()
        self.data, self.module = cli.datamodule, cli.model
        self.folder = _run_folder(self.config.run)
        self.checkpoint = self._checkpoint()
        self.made: Path | None = None  # the topmost folder that this call made
        self.stopped: BaseException | None = None
        self.begun, self.begun_at = time.perf_counter(), -1  # when training started, and at which step; -1: it did not

    def go(self) -> int:
        """Trains; a folder in which nothing was trained is taken away again."""
        trainer = self._trainer()
        try:
            with _launching(self.folder), _interruptible():
                trainer.fit(self.module, datamodule=self.data, ckpt_path=self.checkpoint)
        except BaseException as error:
            kept = self._clean_up(trainer, error)
            if isinstance(self.stopped, KeyboardInterrupt) or isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._interrupted(trainer, kept)) from None
            if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
                raise InputError(
                    f"{self.checkpoint} holds another network than these settings describe (backbone, classes or channels differ)"
                ) from error
            raise
        self._close(trainer)
        return 0

    # ---- before ------------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> Path | None:
        """What to go on from; refuses folders that hold something else."""
        resume, last = self.config.resume, self.folder / "last.ckpt"
        if resume not in ("auto", "never"):
            source = Path(resume)
            if source.is_dir():
                source = source / "last.ckpt"
            _check_checkpoint(source)
            if self._holds_something():
                raise InputError(f"{self.folder} holds a run already: name another --run for the one that goes on from {resume}")
            self._tell_differences(source.parent, strict=False)
            return source
        if not self._holds_something():
            _check_writable(self.folder)
            return None
        if resume == "never":
            raise InputError(f"{self.folder} holds a run already, and --resume never does not go on with it: name another --run")
        if not (self.folder / "config.yaml").is_file():
            raise InputError(f"{self.folder} is not empty and not a run folder (it has no config.yaml): name another --run")
        _check_writable(self.folder)
        self._tell_differences(self.folder, strict=True)
        if not last.is_file():
            return None
        _check_checkpoint(last)
        say(f"going on with {last}")
        return last

    def _holds_something(self) -> bool:
        try:
            return self.folder.is_dir() and any(self.folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot read the run folder {self.folder}: {error.strerror}") from None

    def _tell_differences(self, folder: Path, strict: bool) -> None:
        if not (folder / "config.yaml").is_file():
            return
        before, now = _flat(_read_yaml(folder / "config.yaml")), _flat(self.settings)
        differ = [key for key in now if key in before and before[key] != now[key]]
        words = {key: f"{key} {_short(before[key])} -> {_short(now[key])}" for key in differ}
        if "model.optimizer" in words and not strict:  # what it has gathered is of no use to another one
            raise InputError(
                f"{folder} was trained with another optimizer ({words['model.optimizer']}): start from its weights instead, with "
                "--model.weights and the model.pt that fisnet-cuda export writes"
            )
        binding = [words[key] for key in differ if key not in FREE]
        if strict and binding:
            raise InputError(
                f"{folder} was trained with other settings ({'; '.join(binding)}): name another --run, or give the settings it has"
            )
        if words:
            kept = " (the optimizer goes on with those of the checkpoint)" if set(OPTIMIZER) & set(words) else ""
            say(f"settings that differ from {folder}: {'; '.join(words.values())}{kept}")

    def _compare_images(self) -> None:
        """A file more or less moves others to other splits: the network would be tested on what it has learned."""
        folder = self.checkpoint.parent if self.checkpoint is not None else self.folder
        if self.checkpoint is None or not (folder / "split.csv").is_file() or not hasattr(self.data, "store"):
            return
        found = drift(read_manifest(folder / "split.csv"), self.data.listing, self.data.splits, self.data.store.hashes)
        if any(found) and folder == self.folder:
            raise InputError(
                f"the images have changed since {folder} was trained: {found}. Its test could hold what it has learned from: put the "
                "files back, or start a new run"
            )
        if any(found):
            say(f"images that differ from {folder}: {found}; what it has learned from may be in validation and test now")

    def _trainer(self) -> Trainer:
        values = dict(self.cli.config_init.trainer)
        given = values.pop("callbacks", None) or []
        processes = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if processes > 1:  # torchrun has started them
            local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
            values |= {"devices": local, "num_nodes": processes // local}
            values["strategy"] = "ddp" if values["strategy"] == "auto" else values["strategy"]
        _set_precision(self.config.precision)
        known = inspect.signature(callbacks).parameters
        options = {name: value for name, value in vars(self.config).items() if name in known and name != "run"}
        own = [_Begin(self), Console(), *callbacks(self.folder, **options)]
        values |= {
            "precision": PRECISIONS[self.config.precision],
            "callbacks": [*own, *(given if isinstance(given, list) else [given])],
            "logger": False,  # metrics.csv is the run folder's own; TensorBoard joins once the folder is there
            "enable_checkpointing": True,
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # the data module's sampler knows of the processes
            "num_sanity_val_steps": 0,
            "default_root_dir": str(self.folder),
        }
        try:
            return Trainer(**values)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:  # Lightning's MisconfigurationException is none of them
            raise InputError(f"trainer: {one_line(error)}") from error
        except Exception as error:
            if type(error).__name__ == "MisconfigurationException":
                raise InputError(f"trainer: {one_line(error)}") from error
            raise

    # ---- during ------------------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> None:
        """Data and model are known to be good: the folder, its config.yaml, and what is going to happen, in words."""
        self._compare_images()
        if trainer.is_global_zero:
            self.made = _first_missing(self.folder)
            make_folder(self.folder)
            write_text(self.folder / "config.yaml", commented_yaml(self.cli.parser, self.settings, HEADER))
        report = getattr(self.data, "report", None)
        if report is not None:
            say(str(report).rstrip())
            say()
        say(describe_model(self.module, self.config))
        if self.data.swap_background:
            say(describe_swaps(self.data))
        say(f"run folder: {self.folder}")
        if importlib.util.find_spec("tensorboard") is not None:
            from lightning.pytorch.loggers import TensorBoardLogger

            trainer.loggers = [TensorBoardLogger(str(self.folder), name="", version="tensorboard")]

    # ---- after -------------------------------------------------------------------------------------------------------

    def _clean_up(self, trainer: Trainer, error: BaseException) -> bool:
        """Takes away the folder that this call made if nothing of use is in it; whether there is one now."""
        useless = trainer.global_step == 0 or (type(error) is InputError)  # one of the first epoch's end: a monitor's name, say
        if self.made is not None and useless and not list(self.folder.glob("*.ckpt")):
            for logger in trainer.loggers:
                logger.finalize("failed")
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self.folder.parents:
                if not parent.is_relative_to(self.made):
                    break
                with contextlib.suppress(OSError):
                    parent.rmdir()
        return self.folder.is_dir()

    def _interrupted(self, trainer: Trainer, kept: bool) -> str:
        where = f"interrupted in epoch {trainer.current_epoch + 1}, after {trainer.global_step} steps"
        if not kept:
            return f"interrupted before the first step: nothing was written to {self.folder}"
        return f"{where}; to go on: fisnet-cuda fit --run {shlex.quote(str(self.folder))}"

    def _close(self, trainer: Trainer) -> None:
        run = shlex.quote(str(self.folder))
        best = self.folder / "best.ckpt"
        epochs = f"{trainer.current_epoch} epoch{'s' * (trainer.current_epoch != 1)}, {trainer.global_step} steps"
        say()
        if self.begun_at in (-1, trainer.global_step):
            say(f"nothing was left to train: {self.folder} has {epochs}; --trainer.max_epochs says how many there shall be")
        else:
            early = trainer.should_stop and trainer.current_epoch < (trainer.max_epochs or 0)
            took = timedelta(seconds=round(time.perf_counter() - self.begun))
            say(f"trained {epochs}{', stopped early' if early else ''}; this time {took}")
        say(f"run folder: {self.folder} ({'best.ckpt, ' if best.exists() else ''}last.ckpt, metrics.csv, config.yaml)")
        say("next:")
        say(f"  fisnet-cuda evaluate {run}")
        say(f"  fisnet-cuda heatmap IMAGE... --checkpoint {run}")
        say(f"  fisnet-cuda export {run} --out {shlex.quote(str(self.folder / 'export'))}")


class _Begin(Callback):
    """Calls `Run.begin` once Lightning has set up the data, and keeps what stopped the training."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.run.begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.begun, self.run.begun_at = time.perf_counter(), trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.run.stopped = exception


def describe_model(module: Any, config: Any) -> str:
    """The model in one line: network, parameters, variant, rules' epsilon, where C1 and C2 come from."""
    model = config.model
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    name = str(model.backbone).rsplit(".", 1)[-1]
    line = f"model: {name}, {parameters / 1e6:.2f} M parameters, precision {config.precision}; "
    if model.variant == "standard":
        masks = "masks are used to swap backgrounds only" if config.data.swap_background else "masks are not used for training"
        return line + f"the plain classifier (variant standard): {masks}"
    epsilon = f"epsilon {model.eps}{' relative' if model.relative_eps else ''}"
    ranges = f"C1 {_short(model.c1)}, C2 {_short(model.c2)}"
    if model.tune_epochs:
        ranges = f"C1 and C2 tuned after {model.tune_epochs} epoch{'s' * (model.tune_epochs > 1)} without the heatmap loss"
    return line + f"ISNet {model.variant}, {epsilon}, P {_short(model.P)}, d {model.d}; {ranges}"


def describe_swaps(data: MaskedImageData) -> str:
    """Which training images may get another background, in one line."""
    subset = data.subset("train")
    masked = int(subset.store.has_mask[subset.indices].sum())
    rest = "" if masked == len(subset) else f"; those without a mask, {len(subset) - masked} of {len(subset)}, are left alone"
    return f"backgrounds: each training image gets another one's with probability {data.swap_background:g}, in each step anew{rest}"


# ---- the parser ------------------------------------------------------------------------------------------------------

_DESCRIPTION = """Trains a classifier on images with masks, so that it does not look at the background.

  fisnet-cuda fit --data.path images --data.masks masks --run runs/first
  fisnet-cuda fit --config settings.yaml --model.variant dual --trainer.max_epochs 40
  fisnet-cuda fit --run runs/first                 goes on where this run was cut off
  fisnet-cuda fit --print_config > settings.yaml   all settings, to edit

short names:
""" + "\n".join(f"  {short:<14} {long}" for short, long in SHORT.items()) + """
  --amp          --precision bf16-mixed
  --preset NAME  model settings that belong together; single ones given beside it prevail:
""" + "\n".join(f"    {p.name:<8} {p.why}" for p in PRESETS.values()) + """

every setting, with its default, stands below; --debug shows the traceback of an error
"""
_PARSER = {
    "prog": "fisnet-cuda fit",
    "usage": "fisnet-cuda fit --data.path IMAGES [--data.masks MASKS] [--run FOLDER] [--config FILE ...] [settings]",
    "description": _DESCRIPTION,
    "allow_abbrev": False,
    "formatter_class": HelpFormatter,
}


def _own_arguments(parser: LightningArgumentParser) -> None:
    add: Callable[..., Any] = parser.add_argument
    add("--run", type=str | None, default=None, help="Run folder: checkpoints, metrics, figures, settings. Default: runs/<date-time>")
    add(
        "--resume", type=str, default="auto",
        help="auto: go on with the run folder's last.ckpt where there is one. never: refuse a folder that holds a run. Or a path: go "
        "on from that checkpoint, or that run, in a new folder",
    )  # fmt: skip
    add(
        "--precision", type=Literal["32", "tf32", "bf16-mixed", "16-mixed"], default="32",
        help="32: true float32, TF32 off. tf32: float32 with TF32 products (GPU). bf16-mixed: autocast to bfloat16. 16-mixed: autocast "
        "to float16 with loss scaling (GPU)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="Of weights, split, order, augmentation and draws")
    parser.add_function_arguments(callbacks, as_group=False, skip={"run"})
    share_help(parser, callbacks, "")


def _core_arguments(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(MaskedImageData, "data", fail_untyped=False)
    parser.add_class_arguments(ISNetModule, "model", fail_untyped=False)
    parser.add_class_arguments(Trainer, "trainer", skip=set(NOT_OFFERED), instantiate=False, fail_untyped=False, sub_configs=True)
    share_help(parser, MaskedImageData, "data")
    share_help(parser, ISNetModule, "model")
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    parser.link_arguments("seed", "data.seed")
    parser.link_arguments("seed", "model.seed")
    parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")


def _printed_config(argv: Sequence[str]) -> str:
    """What ``--print_config`` prints: jsonargparse's own, with the help's words as comments."""
    parser = FitCLI.__new__(FitCLI)
    parser.parser_class, parser.trainer_defaults = SettingsParser, TRAINER_DEFAULTS
    made = LightningCLI.init_parser(parser, **_PARSER)
    _own_arguments(made)
    _core_arguments(made)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        made.parse(argv)
    return commented_yaml(made, _plain(yaml.safe_load(text.getvalue())), HEADER)


# ---- small parts -----------------------------------------------------------------------------------------------------


def _with_settings_of_run(argv: list[str]) -> list[str]:
    """``--run X`` of a folder that holds a run: its settings come first, so that the rest of the command may be left out."""
    given = [b for a, b in pairwise(argv) if a == "--run"] + [a.partition("=")[2] for a in argv if a.startswith("--run=")]
    config = Path(given[-1]) / "config.yaml" if given else None
    resume_elsewhere = any(a.split("=")[0] == "--resume" for a in argv)
    if config is None or resume_elsewhere or not config.is_file():
        return argv
    _read_yaml(config)
    return ["--config", str(config), *argv]


def _run_folder(named: str | None) -> Path:
    if named:
        return Path(named)
    if LAUNCHED in os.environ:
        return Path(os.environ[LAUNCHED])
    folder = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    count = 2
    while folder.exists():
        folder, count = folder.with_name(f"{folder.name.split('_')[0]}_{count}"), count + 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        folder = _agree(folder)
    return folder


def _agree(folder: Path) -> Path:
    """The first process's name of the folder, in all processes that torchrun has started."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise InputError("several processes train together: name the run folder with --run, so that they agree on it")
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"fisnet_cuda/run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank() == 0:
        store.set(key, str(folder))
    return Path(store.get(key).decode())


def _first_missing(folder: Path) -> Path | None:
    """The topmost part of the path that is not there yet; None where all of it is."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    return missing[-1] if missing else None


def _check_writable(folder: Path) -> None:
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"the run folder {folder} cannot be made: {there} is a file; name another --run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"the run folder {folder} cannot be written: no permission to write into {there}; name another --run")


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give --resume a checkpoint (.ckpt) or a run folder that has last.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, zip and torch, in as many ways as files can be something else
        raise InputError(f"{path} is not a checkpoint, or is damaged: give --resume the last.ckpt of a run") from None
    hparams = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(hparams, dict) or "variant" not in hparams or "loops" not in content:
        raise InputError(f"{path} is not a checkpoint of fisnet-cuda fit: give the last.ckpt of a run")


def _check_precision(precision: str, accelerator: Any) -> None:
    gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    if precision == "16-mixed" and not gpu:
        raise InputError("--precision 16-mixed needs a GPU, and this run is on the CPU: use bf16-mixed or 32")
    if precision == "tf32" and not gpu:
        say("precision tf32 has no effect on a CPU: products are those of float32")


def _set_precision(precision: str) -> None:
    """TF32 in products and convolutions of this process, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    from lightning.pytorch import seed_everything

    seed_everything(seed, workers=True, verbose=False)


@contextlib.contextmanager
def _launching(folder: Path) -> Iterator[None]:
    """Processes that Lightning launches for DDP run this command again: they find the name of the folder."""
    before = os.environ.get(LAUNCHED)
    os.environ[LAUNCHED] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[LAUNCHED]
        else:
            os.environ[LAUNCHED] = before


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C works afterwards as before: Lightning switches it off while it shuts down."""
    try:
        before = signal.getsignal(signal.SIGINT)
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):  # not in the main thread
            signal.signal(signal.SIGINT, before)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold settings: is it the config.yaml of a run?")
    return content


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say where, which are no part of what a run is; the trainer's last."""
    return {key: value for key, value in settings.items() if key not in OWN}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """One level: "model.lr" -> value."""
    flat = {}
    for key, value in settings.items():
        if key in ("data", "model", "trainer") and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _short(value: Any) -> str:
    return one_line(yaml.safe_dump(value, default_flow_style=True).replace("...", ""), 80)
