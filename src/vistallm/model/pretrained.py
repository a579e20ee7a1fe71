"""A model as a folder that describes itself, and back: manifest.json, config.yaml, vocabulary/, decoder/, safetensors.

The loader reads the manifest, never the folder's name, and takes every key of every part or raises.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from vistallm.config import Config, DecoderConfig, config_from_file, save_config
from vistallm.data.vocabulary import Vocabulary, loading
from vistallm.model.keys import check_keys
from vistallm.model.vistallm import VistaLLM

MANIFEST, FORMAT = "manifest.json", 1
SIZES = {  # names of a language model's sizes here -> in transformers' configurations
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
PACKAGES = ("vistallm", "torch", "transformers", "peft", "open_clip_torch", "safetensors")


def build_empty(config: Config, vocabulary: Vocabulary, folder: Path | None) -> VistaLLM:
    """Build the model with weights that take no memory yet: `fill` or `shard` must follow.

    `folder`: a run's or an exported one, which knows the language model's shape; None = take it from the config.
    """
    config = copy.deepcopy(config)
    config.model.encoder.weights = config.model.tokenizer.weights = None
    shape: Path | str | None = config.model.decoder.weights
    if folder is not None and (folder / "decoder").is_dir():
        shape = folder / "decoder"
    decoder_config = None
    if shape is not None:
        with loading("model.decoder.weights", str(shape)):
            decoder_config = AutoConfig.from_pretrained(shape)
        if config.model.decoder.weights is None:
            _check_shape(decoder_config, config.model.decoder, Path(shape))
    with init_empty_weights(include_buffers=False):
        model = VistaLLM(config, vocabulary, decoder_config=decoder_config)
    tie(model)
    return model


def check_decoder(config: Config, folder: Path) -> None:
    """Raise ValueError when a run to go on from has a language model of other sizes than the config's, or its weights'.

    LoRA is merged into the language model that it was trained on: a 13B run would go on under the name of 7B.
    """
    if not (folder / "decoder").is_dir():
        return
    asked, found = config.model.decoder, AutoConfig.from_pretrained(folder / "decoder")
    if asked.weights is not None:
        with loading("model.decoder.weights", asked.weights):
            base = AutoConfig.from_pretrained(asked.weights)
        asked = replace(asked, **{own: getattr(base, theirs) for own, theirs in SIZES.items()})
    _check_shape(found, asked, folder)


def _check_shape(found: PreTrainedConfig, asked: DecoderConfig, source: Path) -> None:
    """Raise ValueError when a language model of other sizes than the folder's is asked for."""
    sizes = {own: (getattr(asked, own), getattr(found, theirs)) for own, theirs in SIZES.items()}
    wrong = [f"model.decoder.{key}={a}, it has {b}" for key, (a, b) in sizes.items() if a != b]
    if wrong:
        raise ValueError(
            f"{source}: of another model than the config asks for ({'; '.join(wrong)}); use the model= of its run"
        )


def tie(model: VistaLLM) -> None:
    """Make tied weights one parameter again."""
    for name, other in model.tied_weights().items():
        owner, _, weight = name.rpartition(".")
        setattr(model.get_submodule(owner), weight, model.get_parameter(other))


def fill(model: VistaLLM, state: dict[str, Tensor], source: Path, dtype: torch.dtype) -> None:
    """Set all weights of an empty model, without a second copy where the dtype is the file's.

    Args:
        model: from `build_empty`.
        state: its weights by name; of tied matrices one may be missing. Emptied on the way.
        source: for messages.
        dtype: of the floating-point weights from now on.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; all of them are named.
    """
    check_state(model, state, source)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    tie(model)
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):  # its buffer is a copy of rows, and no part of the state
            base: Any = layer.base_layer
            for adapter, rows in layer.token_indices.items():
                layer.trainable_tokens_original[adapter] = base.weight.data[rows].clone()


def check_state(model: VistaLLM, state: dict[str, Tensor], source: Path) -> None:
    """Add to `state` what a file leaves out of tied weights; ValueError unless it then is all of the model's."""
    for name, other in model.tied_weights().items():
        if other in state:
            state.setdefault(name, state[other])
    advice = "use the model=, train.decoder= (full or lora) and coordinate settings it was trained with"
    check_keys(model.state_dict(), state, str(source), advice)


def save_pretrained(model: VistaLLM, config: Config, folder: Path, dtype: torch.dtype, **facts: Any) -> Path:
    """Write `model` to `folder` and return its manifest; `facts` go into the manifest (step, differences ...).

    Paths of this machine (run folder, data, starting checkpoint, pretrained weights) are left out of config.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.run_dir = config.ckpt = config.data.root = None
    config.model.encoder.weights = config.model.tokenizer.weights = config.model.tokenizer.text_tokenizer = None
    sizes = {own: getattr(model.decoder_config, theirs) for own, theirs in SIZES.items()}
    config.model.decoder = replace(config.model.decoder, weights=None, **sizes)
    save_config(config, folder / "config.yaml")
    model.vocabulary.save(folder / "vocabulary")
    model.decoder_config.save_pretrained(folder / "decoder")
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for name in model.tied_weights():
        state.pop(name, None)
    save_torch_state_dict(state, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "model": config.model.name,
        "stage": config.stage,
        "dtype": str(dtype).removeprefix("torch."),
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": {str(path.relative_to(folder)): _row(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder / MANIFEST


def load_pretrained(folder: Path | str, config: Config | None = None, dtype: torch.dtype | None = None) -> VistaLLM:
    """Load what `save_pretrained` has written, in evaluation mode.

    Args:
        folder: with a manifest.json.
        config: use this configuration instead of the folder's own.
        dtype: of the weights; None = bfloat16 with a GPU at hand, else float32.

    Raises:
        ValueError: no manifest, a file is missing or cut short, or the keys are not the model's.
    """
    folder = Path(folder)
    state = read_pretrained(folder / MANIFEST)
    config = config or config_from_file(folder / "config.yaml")
    model = build_empty(config, Vocabulary.load(folder / "vocabulary"), folder)
    fill(model, state, folder, dtype or default_dtype())
    return model.eval()


def default_dtype() -> torch.dtype:
    """What weights are kept in for evaluation."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def read_pretrained(manifest: Path) -> dict[str, Tensor]:
    """Return the weights of an exported folder by name, read lazily from its safetensors files."""
    folder = manifest.parent
    for name, row in read_manifest(manifest)["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != row["bytes"]:
            got = "no such file" if size < 0 else f"{size} bytes"
            raise ValueError(
                f"{path}: expected {row['bytes']} bytes by the manifest, got {got}; fetch the folder again"
            )
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in _tensors(path)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json; raises ValueError when it is missing, unreadable or of another format."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent}: expected an exported model with {MANIFEST} ({error!r})") from error
    if version != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {version!r}; export the run again with this version")
    return manifest


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield key, file.get_tensor(key)


def _row(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
