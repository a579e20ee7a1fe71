"""Run folders: `config.yaml`, `vocabulary/`, `checkpoints/step-<n>.ckpt`. Save and load live here together."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint import load as load_sharded

from vistallm.config import Config, config_from_file
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.pretrained import MANIFEST, build_empty, check_state, default_dtype, fill, read_pretrained
from vistallm.model.vistallm import VistaLLM

_STEP = re.compile(r"step-(\d+)\.ckpt$")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step in `run_dir`/checkpoints, or None; folders cut short do not count."""
    named = (path for path in run_dir.glob("checkpoints/*") if path.is_file() or is_whole(path))
    steps = {int(found[1]): path for path in named if (found := _STEP.search(path.name))}
    return steps[max(steps)] if steps else None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and written to its end: the last file of a sharded run's folder is meta.pt."""
    return zipfile.is_zipfile(path / "meta.pt" if path.is_dir() else path)


def find_checkpoint(path: str) -> tuple[Path, Path]:
    """Resolve `ckpt=` (an exported model, a run folder or a checkpoint in one) to (folder, checkpoint).

    The checkpoint of an exported model is its manifest.json. Raises ValueError when nothing of the kind is there.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given, given / MANIFEST
    if given.is_dir() and not _STEP.search(given.name):
        found = newest_checkpoint(given)
        if found is None:
            raise ValueError(
                f"ckpt={path}: expected a run folder with checkpoints/step-<n>.ckpt, or {MANIFEST}; found no checkpoint"
            )
        return given, found
    if not given.exists():
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
    if found is not None and not is_whole(found):
        raise ValueError(f"{found}: not a readable checkpoint (cut short?); delete it to resume from the one before")
    if found is not None and found.is_dir() and config.strategy != "fsdp":
        raise ValueError(
            f"{found}: the processes of a sharded run have written a part each; resume it with strategy=fsdp on any "
            "number of them, or start a new run from its weights with ckpt="
        )
    return found


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the model weights of a checkpoint by VistaLLM's own names; raises ValueError if unreadable.

    Args:
        path: a Lightning checkpoint (one file, or the folder that a sharded run writes), or an exported manifest.json.
    """
    if path.name == MANIFEST:
        return read_pretrained(path)
    try:
        if path.is_dir():
            return _read_sharded(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return {key.removeprefix("model."): value for key, value in state.items()}


def _read_sharded(path: Path) -> dict[str, torch.Tensor]:
    """Read the model weights, and only those, of a checkpoint that every rank has written a part of."""
    reader = FileSystemReader(path)
    found = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(facts.size, dtype=facts.properties.dtype)
        for key, facts in found.items()
        if key.startswith("state_dict.") and isinstance(facts, TensorStorageMetadata)
    }
    load_sharded(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix("state_dict.model."): value for key, value in state.items()}


def load_weights(model: VistaLLM, path: Path) -> None:
    """Load the model weights of a checkpoint; raises ValueError for one of another model, one line."""
    state = read_state(path)
    check_state(model, state, path)
    model.load_state_dict(state)


def load_run(
    path: str, config: Config | None = None, dtype: torch.dtype | None = None
) -> tuple[VistaLLM, Config, Path]:
    """Build the model of a run or an exported folder with its own vocabulary and weights, in evaluation mode.

    Args:
        path: exported model, run folder or checkpoint.
        config: use this configuration instead of the folder's own.
        dtype: of the weights; None = bfloat16 with a GPU at hand, else float32.

    Returns:
        model, config, checkpoint path.
    """
    folder, checkpoint = find_checkpoint(path)
    config = config or config_from_file(folder / "config.yaml")
    model = build_empty(config, Vocabulary.load(folder / "vocabulary"), folder)
    fill(model, read_state(checkpoint), checkpoint, dtype or default_dtype())
    return model.eval(), config, checkpoint
