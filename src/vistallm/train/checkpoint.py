"""Run folders: `config.yaml`, `vocabulary/`, `checkpoints/step-<n>.ckpt`. Save and load live here together."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from vistallm.config import Config, config_from_file
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.vistallm import VistaLLM

_STEP = re.compile(r"step-(\d+)\.ckpt$")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step in `run_dir`/checkpoints, or None."""
    steps = {int(found[1]): path for path in run_dir.glob("checkpoints/*") if (found := _STEP.search(path.name))}
    return steps[max(steps)] if steps else None


def find_checkpoint(path: str) -> tuple[Path, Path]:
    """Resolve `ckpt=` (a run folder or a checkpoint file in one) to (run folder, checkpoint); raises ValueError."""
    given = Path(path)
    if given.is_dir():
        found = newest_checkpoint(given)
        if found is None:
            raise ValueError(f"ckpt={path}: expected a run folder with checkpoints/step-<n>.ckpt, found no checkpoint")
        return given, found
    if not given.is_file():
        raise ValueError(f"ckpt={path}: expected a run folder or a checkpoint file, found nothing there")
    return given.parent.parent, given


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint to resume from under `resume=auto|never|PATH`.

    Raises:
        ValueError: PATH holds no checkpoint, the file is broken, or `never` meets the checkpoints of an earlier run,
            which a later `resume=auto` or `ckpt=` would take for its own.
    """
    newest = newest_checkpoint(Path(str(config.run_dir)))
    match config.resume:
        case "never":
            if newest is not None:
                raise ValueError(f"{newest} is of an earlier run: resume=never needs another run_dir=, or delete it")
            return None
        case "auto":
            found = newest
        case path:
            found = find_checkpoint(path)[1]
    if found is not None and found.is_file() and not zipfile.is_zipfile(found):
        raise ValueError(f"{found}: not a readable checkpoint (cut short?); delete it to resume from the one before")
    return found


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the model weights of a Lightning checkpoint by VistaLLM's own names; raises ValueError if unreadable."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return {key.removeprefix("model."): value for key, value in state.items()}


def load_weights(model: VistaLLM, path: Path) -> None:
    """Load the model weights of a checkpoint.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ (a checkpoint of another model); one line.
    """
    state = read_state(path)
    own = model.state_dict()
    shapes = [
        f"{k} {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if shapes or missing or unexpected:
        first = (shapes or [f"missing {k}" for k in missing] or [f"unexpected {k}" for k in unexpected])[0]
        raise ValueError(
            f"{path}: a checkpoint of another model ({len(shapes)} shapes differ, {len(missing)} keys missing, "
            f"{len(unexpected)} unexpected; first: {first}); use the model= and coordinate settings it was trained with"
        )
    model.load_state_dict(state)


def load_run(path: str, config: Config | None = None) -> tuple[VistaLLM, Config, Path]:
    """Build the model of a run from its own config and vocabulary and load its weights, in evaluation mode.

    Args:
        path: run folder or checkpoint file.
        config: use this configuration instead of the run's own.

    Returns:
        model, config, checkpoint path.
    """
    run_dir, checkpoint = find_checkpoint(path)
    config = config or config_from_file(run_dir / "config.yaml")
    config.model.encoder.weights = config.model.tokenizer.weights = None  # the checkpoint holds them
    model = VistaLLM(config, Vocabulary.load(run_dir / "vocabulary"))
    load_weights(model, checkpoint)
    return model.eval(), config, checkpoint
