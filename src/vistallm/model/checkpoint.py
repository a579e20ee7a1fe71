"""Run folders and exported models: the one writer and the one reader of weights with what they need beside them.

A run folder holds `config.yaml`, `vocabulary/`, `decoder/` and `checkpoints/step-<n>.ckpt`; an exported one the same
with manifest.json and safetensors in place of checkpoints. A reader takes every key of every part, or raises.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import io
import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint.metadata import MetadataIndex

from vistallm.config import Config, config_from_file, save_config
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_empty, tie
from vistallm.model.language_model import SIZES, copy_token_rows
from vistallm.model.vistallm import VistaLLM
from vistallm.model.weights import check_keys, read_safetensors

MANIFEST, FORMAT = "manifest.json", 1
PACKAGES = ("vistallm", "torch", "transformers", "peft", "open_clip_torch", "safetensors")
_METADATA = "torch.distributed.checkpoint.metadata."
METADATA_NAMES = {  # that the pickled `.metadata` of a sharded checkpoint may hold, beside dtypes
    *(_METADATA + name for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *(_METADATA + name for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    *(_METADATA + "_MEM_FORMAT_ENCODING", "torch.distributed.checkpoint.filesystem._StorageInfo"),
    *("torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath"),
}
GROWN = ("links.", "region_encoder.", "tokenizer.frames.")  # what model.links and model.video add to a run
DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STEP = re.compile(r"step-(\d+)\.ckpt$")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step in `run_dir`/checkpoints, or None; folders cut short do not count."""
    paths = (path for path in run_dir.glob("checkpoints/*") if path.is_file() or is_whole(path))
    steps = {int(match[1]): path for path in paths if (match := _STEP.search(path.name))}
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
    if not given.exists():
        raise ValueError(f"ckpt={path}: expected a run folder or a checkpoint file, found nothing there")
    if given.is_file() or given.suffix == ".ckpt":
        return given.parent.parent, given
    if newest := newest_checkpoint(given):
        return given, newest
    raise ValueError(
        f"ckpt={path}: expected a run folder with checkpoints/step-<n>.ckpt, or {MANIFEST}; found no checkpoint"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the model weights of a checkpoint by VistaLLM's own names; raises ValueError if unreadable.

    Args:
        path: a Lightning checkpoint (one file, or the folder that a sharded run writes), or an exported manifest.json.
    """
    if path.name == MANIFEST:
        return _read_exported(path)
    try:
        if path.is_dir():
            return _read_sharded(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from error
    return {key.removeprefix("model."): value for key, value in state.items()}


def _read_sharded(path: Path) -> dict[str, Tensor]:
    """Read the model weights, and only those, of a checkpoint that every rank has written a part of."""
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in refuse_code(path).state_dict_metadata.items()
        if key.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    load_sharded(state, storage_reader=FileSystemReader(path), no_dist=True)
    return {key.removeprefix("state_dict.model."): value for key, value in state.items()}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what torch.distributed.checkpoint writes into `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in METADATA_NAMES and not (module == "torch" and name in DTYPES):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


def refuse_code(path: Path) -> Metadata:
    """Return the metadata of a sharded checkpoint; raise UnpicklingError where to load it could run code.

    torch unpickles `.metadata` and what is no tensor (settings of the optimizer) without a check of its own.
    """
    with (path / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            stored = metadata.storage_data[MetadataIndex(key)]
            with (path / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
    return metadata


def _read_exported(manifest: Path) -> dict[str, Tensor]:
    """Return the weights of an exported folder, after a look at the size of each of its files."""
    folder = manifest.parent
    try:
        record = json.loads(manifest.read_text())
        version, files = record["format"], record.get("files", {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected an exported model with {MANIFEST} ({error!r})") from error
    if version != FORMAT:
        raise ValueError(f"{manifest}: expected format {FORMAT}, got {version!r}; export the run again")
    for path, size in ((folder / name, row["bytes"]) for name, row in files.items()):
        got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if got != f"{size} bytes":
            raise ValueError(f"{path}: expected {size} bytes by the manifest, got {got}; fetch the folder again")
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= read_safetensors(path)[0]
    return state


def load_weights(model: VistaLLM, path: Path, known: Vocabulary | None = None) -> None:
    """Load the weights of a checkpoint into a model; ValueError names every key that is missing or does not fit.

    `known` is the checkpoint's vocabulary where the model has links or videos and the checkpoint has none: word rows
    are matched by token, and what the model adds stays as it starts.
    """
    model.load_state_dict(_checked_state(model, path, known))


def _grown(state: dict[str, Tensor], model: VistaLLM, known: Vocabulary) -> dict[str, Tensor]:
    """Return the state with the rows of the model's vocabulary, and the model's own weights of links and frames."""
    own = model.state_dict()
    for key, rows in state.items():
        if key.endswith(("embed_tokens.weight", "lm_head.weight", "word_embeddings.weight")) and key in own:
            sides = [(v.qformer if key.startswith("tokenizer.") else v.lm) for v in (known, model.vocabulary)]
            former, wanted = (side.get_vocab() for side in sides)
            shared = [token for token in former if token in wanted]
            state[key] = own[key].clone()
            state[key][[wanted[token] for token in shared]] = rows[[former[token] for token in shared]].to(own[key])
    return {key: value for key, value in own.items() if key.startswith(GROWN)} | state


def load_run(
    path: str | Path, config: Config | None = None, dtype: torch.dtype | None = None
) -> tuple[VistaLLM, Config, Path]:
    """Build the model of a run or an exported folder with its own vocabulary and weights, in evaluation mode.

    Args:
        path: exported model, run folder or checkpoint.
        config: use this configuration instead of the folder's own.
        dtype: of the weights; None = bfloat16 with a GPU at hand, else float32.

    Returns:
        model, config, checkpoint path. Raises ValueError where a file or a key is missing or does not fit.
    """
    folder, checkpoint = find_checkpoint(str(path))
    config = config or config_from_file(folder / "config.yaml")
    dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model = build_empty(config, Vocabulary.load(folder / "vocabulary"), folder)
    state = _checked_state(model, checkpoint)
    # No second copy where the dtype is the file's.
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    tie(model)
    if config.train.decoder == "lora":
        copy_token_rows(model)
    return model.eval(), config, checkpoint


def _checked_state(model: VistaLLM, path: Path, known: Vocabulary | None = None) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, of which a file may leave out one of two tied; ValueError unless all fit."""
    state = read_state(path)
    advice = "use the model=, train.decoder= (full or lora) and coordinate settings it was trained with"
    if known is not None:
        state = _grown(state, model, known)
        advice = "links and videos can be added to a run with a whole language model; export one with LoRA first"
    for name, other in model.tied_weights().items():
        if other in state:
            state.setdefault(name, state[other])
    check_keys(model.state_dict(), state, str(path), advice)
    return state


def save_beside(model: VistaLLM, config: Config, folder: Path) -> None:
    """Write what `load_run` needs beside the weights: config.yaml, vocabulary/ and the language model's shape."""
    save_config(config, folder / "config.yaml")
    model.vocabulary.save(folder / "vocabulary")
    model.decoder_config.save_pretrained(folder / "decoder")


def save_exported(model: VistaLLM, config: Config, folder: Path, dtype: torch.dtype, **facts: Any) -> Path:
    """Write `model` to `folder` for `load_run`; return its manifest, which holds `facts` (step, differences ...), too.

    Paths of this machine (run folder, data, starting checkpoint, pretrained weights) are left out of config.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.run_dir = config.ckpt = config.data.root = None
    config.model.encoder.weights = config.model.tokenizer.weights = config.model.tokenizer.text_tokenizer = None
    sizes = {own: getattr(model.decoder_config, theirs) for own, theirs in SIZES.items()}
    config.model.decoder = replace(config.model.decoder, weights=None, **sizes)
    save_beside(model, config, folder)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_torch_state_dict({k: v for k, v in state.items() if k not in model.tied_weights()}, folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"format": FORMAT, "model": config.model.name, "stage": config.stage}
    manifest |= {"dtype": str(dtype).removeprefix("torch."), **facts}
    manifest |= {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder / MANIFEST
