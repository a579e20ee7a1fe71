"""Pretrained weights of the instruction-guided tokenizer: an InstructBLIP checkpoint, or a file of ours for mini.

In: a path or hub name. Out: the tokenizer's weights set in place, or a ValueError that lists every key at fault.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vistallm.data.vocabulary import Vocabulary
from vistallm.model.keys import check_keys, reading
from vistallm.model.language_model import initialise_new_rows
from vistallm.model.qformer import InstructionGuidedTokenizer

WORDS = "qformer.embeddings.word_embeddings.weight"
INSTRUCTBLIP_NAMES = {  # prefix in an InstructBLIP checkpoint (Hugging Face layout) -> prefix here
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
    "vision_model.post_layernorm.": "feature_norm.",
    "language_projection.": "projection.",
}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def load_tokenizer_weights(tokenizer: InstructionGuidedTokenizer, path: str, vocabulary: Vocabulary) -> None:
    """Set the weights of `tokenizer` in place; a file of ours has no projection, which stays as it is.

    Args:
        tokenizer: built with one word row per token of `vocabulary.qformer`.
        path: a .safetensors file of ours, an InstructBLIP folder, or a hub name of one.
        vocabulary: word rows are matched by token where the file names its tokens, else by number (BERT's order); new
            tokens that the file does not have start as `initialise_new_rows` says.

    Raises:
        ValueError: a file is missing or cut short, or a weight is missing, unexpected or of another shape.
    """
    own = tokenizer.state_dict()
    if Path(path).suffix == ".safetensors":
        state, tokens = read_own(Path(path))
        own = {key: value for key, value in own.items() if not key.startswith("projection.")}
    else:
        state, tokens = read_instructblip(path), None
    if "query_tokens" in state:  # fewer queries than the file's: its first ones
        state["query_tokens"] = state["query_tokens"][:, : own["query_tokens"].shape[1]]
    advice = "model.tokenizer.* and the width of the decoder must be the checkpoint's"
    check_keys(own, state, f"model.tokenizer.weights={path}", advice, free_rows=WORDS)  # rows are matched by token
    rows, known = own[WORDS].clone(), vocabulary.qformer.get_vocab()
    names = tokens or vocabulary.qformer.convert_ids_to_tokens(list(range(len(state[WORDS]))))
    pairs = [(known[name], number) for number, name in enumerate(names) if name in known]
    places, numbers = (list(column) for column in zip(*pairs, strict=True))
    rows[places] = state[WORDS][numbers].to(rows.dtype)
    # New rows start from the mean of the loaded ones; those that the file has are then set once more.
    bins = torch.as_tensor(vocabulary.bin_values)
    initialise_new_rows(rows, vocabulary.qformer_first_new, vocabulary.qformer_bin_ids, bins)
    rows[places] = state[WORDS][numbers].to(rows.dtype)
    state[WORDS] = rows
    tokenizer.load_state_dict(state, strict=False)


def read_own(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file written by tools/pretrain_mini.py: weights in float32, and the names of its word rows."""
    if not path.is_file():
        raise ValueError(f"model.tokenizer.weights={path}: no such file; give an InstructBLIP folder, a file, or null")
    with reading(path), safe_open(path, framework="pt") as file:
        tokens = json.loads((file.metadata() or {}).get("tokens", "null"))
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if tokens is None:
        raise ValueError(f"{path}: no token names in its metadata; write it with tools/pretrain_mini.py")
    return state, tokens


def read_instructblip(path: str) -> dict[str, Tensor]:
    """Read the QFormer, query tokens, vision post-layernorm and projection of an InstructBLIP checkpoint, in float32.

    Of the checkpoint's files, safetensors or bin, only those that hold such weights are opened (or downloaded).
    """
    folder = Path(path) if Path(path).is_dir() else _download(path)
    return {
        ours: value.to(torch.float32)
        for file, keys in _files(folder).items()
        for key, value in _read(folder / file, keys).items()
        if (ours := _our_name(key))
    }


def _our_name(key: str) -> str | None:
    """Return the name here of a weight in an InstructBLIP checkpoint; None = not one of ours."""
    bare = key.removeprefix("model.")
    if bare.endswith(".position_ids"):  # a buffer that older transformers versions saved
        return None
    found = (ours + bare.removeprefix(prefix) for prefix, ours in INSTRUCTBLIP_NAMES.items() if bare.startswith(prefix))
    return next(found, None)


def _index(folder: Path) -> dict[str, list[str]] | None:
    """Return the files with weights of ours and their keys, by the folder's index; None = it has none."""
    path = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if path is None:
        return None
    needed: dict[str, list[str]] = {}
    try:
        for key, file in json.loads(path.read_text())["weight_map"].items():
            if _our_name(key):
                needed.setdefault(file, []).append(key)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected an index with a weight_map ({error!r}); fetch the folder again") from error
    return needed


def _files(folder: Path) -> dict[str, list[str]]:
    """Return the files to read, each with the keys that the index promises; raises ValueError when one is missing."""
    needed = _index(folder)
    if needed is None:
        found = next((files for pattern in WHOLE if (files := sorted(folder.glob(pattern)))), [])
        needed = {file.name: [] for file in found}
    if not needed:
        raise ValueError(
            f"{folder}: expected an InstructBLIP checkpoint in {' or '.join(WHOLE)}, found no weights of one"
        )
    for file, keys in needed.items():
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: the index lists it, but it is not there; it holds {', '.join(keys)}")
    return needed


def _read(path: Path, keys: list[str]) -> dict[str, Tensor]:
    """Return the tensors of ours in one file; of the others nothing is read."""
    with reading(path, keys):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if _our_name(key)}  # noqa: SIM118
        # Files of before torch 1.6 are no zip files and can't be mapped.
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {key: value for key, value in whole.items() if _our_name(key)}


def _download(name: str) -> Path:
    """Fetch the files that are needed from the hub; raises ValueError when there is no such repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(INDEXES)))
        needed = _index(folder)
        return Path(snapshot_download(name, allow_patterns=list(WHOLE) if needed is None else list(needed)))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"model.tokenizer.weights={name}: no such folder, and not on the hub ({said})") from error
