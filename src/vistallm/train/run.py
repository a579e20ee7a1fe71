"""One training run from a configuration: data, vocabulary, model, trainer, in that order."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from vistallm.config import Config, config_from_file
from vistallm.data.datamodule import CoinItDataModule, describe_data, describe_samples, training_root
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_empty, build_model, wrap_with_lora
from vistallm.model.checkpoint import (
    find_checkpoint,
    is_whole,
    load_weights,
    newest_checkpoint,
    refuse_code,
    save_beside,
)
from vistallm.model.language_model import check_sizes
from vistallm.model.vistallm import VistaLLM
from vistallm.tasks import TASKS
from vistallm.train.callbacks import AnswerScores, Checkpoints, MetricsFile, Preempted, StopAtSignal
from vistallm.train.module import VistaModule
from vistallm.train.optim import cast_frozen, set_trainable
from vistallm.train.reinforce import ReinforceModule, Sampler
from vistallm.train.strategy import build_strategy, check_layout, compile_layers, resolve_precision

OTHER_RUN = "of a run with other model.* or train.*; resume with its settings, or start a new run_dir= with ckpt="
Score = Callable[[VistaLLM], dict[str, float]]
Validator = Callable[[Config, Path], Score]
MakeSampler = Callable[[Config, Vocabulary], Sampler]
OWN_TRAINER_KEYS = ("strategy", "precision", "logger", "callbacks", "default_root_dir", "gradient_clip_val", "plugins")


def train(config: Config, validator: Validator | None = None, make_sampler: MakeSampler | None = None) -> Path:
    """Run one stage and return its run folder.

    `validator` scores answers while it trains (val.benchmarks); `make_sampler` gives what draws them (stage=rl).

    Raises:
        ValueError: anything is wrong in config, data or checkpoint, or another process trains in the run folder.
        Preempted: a signal has stopped the run after its checkpoint.
    """
    check_settings(config)
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    root, run_dir = training_root(config), Path(str(config.run_dir))
    score = validator(config, Path(root)) if validator and config.val.benchmarks else None
    with one_run(run_dir):
        resume = resume_path(config)
        module, data = build(config, root, make_sampler)
        if config.dry_run:  # before the trainer: the layout asked for need not be this machine's
            dry_run(config, data, module.steps)
            return run_dir
        trainer = build_trainer(config, run_dir, score)
        if trainer.is_global_zero:
            save_beside(module.model, config, run_dir)
        if resume is not None:
            print(f"resuming from {resume}")
        fit(trainer, module, data, resume)
    if module.stop_seen and trainer.global_step < module.steps:
        raise Preempted(f"stopped by a signal at step {trainer.global_step}; start it again to go on ({run_dir})")
    if trainer.is_global_zero:
        print(f"stage {config.stage} is done: {run_dir}")
    return run_dir


@contextlib.contextmanager
def one_run(run_dir: Path) -> Iterator[None]:
    """Make the run folder and hold its lock, on the first rank; ValueError where another process has it."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"run_dir={run_dir}: another process trains there; wait, or choose another one") from error
    except OSError as error:
        raise ValueError(f"run_dir={run_dir}: can't be written ({error}); choose another folder") from error
    with lock:
        yield


def fit(trainer: L.Trainer, module: VistaModule, data: CoinItDataModule, resume: Path | None) -> None:
    """Train; raises one line as ValueError for what users can mend."""
    try:
        if resume is not None and resume.is_dir():
            refuse_code(resume)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{resume}: not a checkpoint of this program: it holds more than tensors and numbers"
        ) from error
    except MisconfigurationException as error:
        raise ValueError(f"trainer.* or checkpoint.best: {error}") from error
    except (ValueError, RuntimeError) as error:
        text = str(error).strip()
        if resume is not None and ("loading state_dict" in text or "parameter group" in text):
            keys = [line.strip() for line in text.splitlines()[1:]]
            raise ValueError("\n  ".join([f"{resume}: {OTHER_RUN}", *keys])) from error
        if isinstance(error, RuntimeError):
            raise
        # torch wraps what a loader's worker raises into the text of its traceback; the message is at its end.
        raise ValueError(text.rpartition("\nValueError: ")[2]) from error
    except OSError as error:  # a checkpoint that found no room, above all
        folder = module.config.run_dir
        raise ValueError(f"{error}; make room in {folder}, then start it again: it goes on where it can") from error


def dry_run(config: Config, data: CoinItDataModule, steps: int) -> None:
    """Print what the run would read and do."""
    world = _world_size(config)
    print("\n".join(["data", *describe_data(data, world), *describe_samples(data)]))
    samples = steps * config.data.batch_size * world * int(config.trainer.get("accumulate_grad_batches", 1))
    print(f"dry run: {steps:,} steps, {samples:,} samples from {data.root}; nothing was trained")


def check_settings(config: Config) -> None:
    """Raise ValueError, before anything is built, for what this machine, Lightning or the strategy does not have."""
    known = list(inspect.signature(L.Trainer).parameters)
    for key in config.trainer:
        if key in OWN_TRAINER_KEYS:
            raise ValueError(f"trainer.{key}: set by this project; use its own keys (strategy, precision, train.*)")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"trainer.{key}: Lightning's Trainer has no such argument; the nearest is trainer.{near}")
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "log.wandb=true: the package wandb is not installed; pip install -e .[wandb], or log.wandb=false"
        )
    best = config.checkpoint.best
    if (best or config.val.benchmarks) and "val_check_interval" not in config.trainer:
        raise ValueError("val.benchmarks, checkpoint.best: expected trainer.val_check_interval=N, too, got none")
    if best and best.startswith("val/") and not config.val.benchmarks:
        raise ValueError(f"checkpoint.best={best}: expected val.benchmarks=[...] that give this score, got none")
    if config.stage == "rl":
        check_reinforcement(config)
    check_layout(config)


def check_reinforcement(config: Config) -> None:
    """Raise ValueError for settings that stage=rl can't train with."""
    own = config.reinforce
    if not config.ckpt:
        raise ValueError("stage=rl: expected ckpt=RUN, a model that answers already (stage 1 or 2), got none")
    if unknown := [name for name in own.tasks if name not in TASKS]:
        raise ValueError(f"reinforce.tasks: expected names of {', '.join(TASKS)}; got {', '.join(unknown)}")
    if own.boundary > 1:
        raise ValueError(f"reinforce.boundary={own.boundary}: expected a share from 0 to 1")
    if own.temperature <= 0:
        raise ValueError(f"reinforce.temperature={own.temperature}: expected a number above 0")
    if own.copies == 1 and own.loss != "coordinate":
        raise ValueError(f"reinforce.copies=1: {own.loss} compares answers to one prompt; expected at least 2")
    if config.train.activation_checkpointing:
        raise ValueError("train.activation_checkpointing=true: answers share their prompt's cache; use false")


def build(
    config: Config, root: Path | str, make_sampler: MakeSampler | None = None
) -> tuple[VistaModule, CoinItDataModule]:
    """Build vocabulary, data and model, load the weights of `ckpt=`, set and print the trainable parts."""
    start, codec = find_checkpoint(config.ckpt) if config.ckpt else None, build_codec(config)
    if start:
        check_sizes(config.model.decoder, start[0])
    vocabulary = known = Vocabulary.load(start[0] / "vocabulary") if start else None
    video = config_from_file(start[0] / "config.yaml").model.video if start else config.model.video
    adds_links = vocabulary is not None and config.model.links != "none" and not vocabulary.link_tokens
    if vocabulary is None or adds_links or video == "none" != config.model.video:
        vocabulary = Vocabulary.build(config.model, codec, config.links)
    if vocabulary.region_tokens != codec.tokens:
        raise ValueError(
            f"ckpt={config.ckpt}: its vocabulary has {len(vocabulary.region_tokens)} region tokens, "
            f"coords={config.coords} num_bins={config.num_bins} writes {len(codec.tokens)}; "
            "use the coordinate settings it was trained with"
        )
    data = CoinItDataModule(config, vocabulary, root)
    steps = _steps(config, data)
    grows = vocabulary is not known or video != config.model.video
    model, rows = prepare_model(config, vocabulary, start, known if grows else None)
    print(f"stage {config.stage}, {config.model.name}: {steps} steps" + (f" from {start[1]}" if start else ""))
    for name, state, trainable, total in rows:
        print(f"  {name:<10} {state:<8} {trainable:>13,} of {total:>13,} parameters train")
    if config.stage == "rl":
        assert make_sampler is not None
        return ReinforceModule(model, config, steps, make_sampler(config, vocabulary)), data
    return VistaModule(model, config, steps), data


def prepare_model(
    config: Config, vocabulary: Vocabulary, start: tuple[Path, Path] | None, known: Vocabulary | None = None
) -> tuple[VistaLLM, list[tuple[str, str, int, int]]]:
    """Build the model, freeze what does not train, cast and compile it; the rows are `set_trainable`'s.

    Under fsdp only the first process of a node (of the run, where the launcher tells ranks) reads weights: the others
    get empty models, which `shard` fills. So a node holds one copy of them in host memory.
    """
    frozen_half = config.train.frozen_bf16 and resolve_precision(config) == "bf16-mixed"
    if config.strategy == "fsdp" and rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        model = build_empty(config, vocabulary, start[0] if start else None)
    else:
        half = frozen_half and config.train.decoder != "full"
        dtype = torch.bfloat16 if half else torch.float32
        model = load_start(config, vocabulary, start, dtype, known) if start else build_model(config, vocabulary, dtype)
    rows = set_trainable(model, config.train)
    if frozen_half:
        cast_frozen(model)
    compile_layers(model, config.train.compile)
    return model, rows


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint to resume from under `resume=auto|never|PATH`.

    Raises:
        ValueError: PATH holds no checkpoint, the file is broken, or `never` meets the checkpoints of an earlier run,
            which a later `resume=auto` or `ckpt=` would take for its own.
    """
    chosen = newest_checkpoint(Path(str(config.run_dir)))
    if config.resume == "never" and chosen is not None:
        raise ValueError(f"{chosen} is of an earlier run: resume=never needs another run_dir=, or delete it")
    if config.resume not in ("auto", "never"):
        chosen = find_checkpoint(config.resume)[1]
    if chosen is None:
        return None
    if not is_whole(chosen):
        raise ValueError(f"{chosen}: not a readable checkpoint (cut short?); delete it to resume from the one before")
    if chosen.is_dir() and config.strategy != "fsdp":
        raise ValueError(
            f"{chosen}: the processes of a sharded run have written a part each; resume it with strategy=fsdp on any "
            "number of them, or start a new run from its weights with ckpt="
        )
    return chosen


def load_start(
    config: Config,
    vocabulary: Vocabulary,
    start: tuple[Path, Path],
    dtype: torch.dtype,
    known: Vocabulary | None = None,
) -> VistaLLM:
    """Build the model as the checkpoint was trained, with LoRA or without, load it, then merge LoRA or add it.

    A stage 1 of LoRA so goes on with a frozen (merged) language model, and one without goes on with LoRA. `known` is
    the checkpoint's vocabulary where it has no links or videos and the model does.
    """
    former, wanted = config_from_file(start[0] / "config.yaml"), config.train.decoder == "lora"
    had = former.train.decoder == "lora"
    shape = replace(config.model, decoder=former.model.decoder) if had and not wanted else config.model
    trained = replace(config.train, decoder="lora" if had else "full")
    model = build_model(replace(config, model=shape, train=trained), vocabulary, dtype)
    load_weights(model, start[1], known)
    if had and not wanted:
        model.decoder = model.decoder.merge_and_unload()
    elif wanted and not had:
        model.decoder = wrap_with_lora(model.decoder, config, vocabulary)
    return model


def build_trainer(config: Config, run_dir: Path, score: Score | None = None) -> L.Trainer:
    """Build the Lightning Trainer: endless stream, steps from the config, checkpoints in the run folder."""
    arguments: dict[str, Any] = {"num_sanity_val_steps": 0, "log_every_n_steps": 1, "check_val_every_n_epoch": None}
    arguments |= {"enable_model_summary": False, "enable_progress_bar": False}
    arguments |= {"devices": 1} if config.strategy == "single" else {}
    arguments |= config.trainer  # `build` has put max_steps there
    callbacks: list[Callback] = [
        *([AnswerScores(score)] if score else []),
        MetricsFile(run_dir / "metrics.csv", config.log.every_n_seconds),
        StopAtSignal(),
        Checkpoints(run_dir / "checkpoints", config.checkpoint.every_n_steps, config.checkpoint.keep),
    ]
    if best := config.checkpoint.best:
        mode = {"val_loss": "min"}.get(best, "max")
        callbacks.append(
            ModelCheckpoint(run_dir / "checkpoints", "best", best, mode=mode, enable_version_counter=False)
        )
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version=""))
    if config.log.wandb:
        loggers.append(WandbLogger(name=config.name, project=config.log.project, save_dir=run_dir))
    try:
        return L.Trainer(
            **arguments,
            precision=resolve_precision(config),  # type: ignore[arg-type]
            strategy=build_strategy(config),
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=callbacks,
            # The sbatch script requeues; Lightning would write a checkpoint of its own kind and place.
            plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        )
    except MisconfigurationException as error:
        raise ValueError(f"trainer.*: {error}") from error


def quiet() -> None:
    """Silence the lines that Lightning prints about itself; warnings about the user's data stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*|.*transfer_batch_to_device.*|The dirpath has changed.*|.*not empty."
    )


def _steps(config: Config, data: CoinItDataModule) -> int:
    """Optimizer steps of the run: trainer.max_steps, else trainer.max_epochs (1) over the mixture."""
    if "max_steps" not in config.trainer:
        per_epoch = data.steps_per_epoch(_world_size(config), int(config.trainer.get("accumulate_grad_batches", 1)))
        config.trainer["max_steps"] = per_epoch * int(config.trainer.pop("max_epochs", 1))
    return int(config.trainer["max_steps"])


def _world_size(config: Config) -> int:
    """Ranks that trainer.devices and trainer.num_nodes ask for; 1 device where the number is left to Lightning."""
    devices, nodes = config.trainer.get("devices", 1), int(config.trainer.get("num_nodes", 1))
    return (devices if isinstance(devices, int) and devices > 0 else 1) * nodes
