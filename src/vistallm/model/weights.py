"""Pretrained weights of the instruction-guided tokenizer: an InstructBLIP checkpoint, or a file of ours for mini.

In: a path or hub name. Out: the tokenizer's weights set in place, all of them but the projection, or a ValueError.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vistallm.data.vocabulary import Vocabulary
from vistallm.model.decoder import initialise_new_rows
from vistallm.model.tokenizer import InstructionGuidedTokenizer

WORDS = "qformer.embeddings.word_embeddings.weight"
INSTRUCTBLIP_NAMES = {  # prefix in an InstructBLIP checkpoint (Hugging Face layout) -> prefix here
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
    "vision_model.post_layernorm.": "feature_norm.",
}


def load_tokenizer_weights(tokenizer: InstructionGuidedTokenizer, path: str, vocabulary: Vocabulary) -> None:
    """Set the weights of `tokenizer` in place, its projection left out.

    Args:
        tokenizer: built with one word row per token of `vocabulary.instruction`.
        path: a .safetensors file of ours, an InstructBLIP folder, or a hub name of one.
        vocabulary: word rows are matched by token where the file names its tokens, else by number (BERT's order); new
            tokens that the file does not have start as `initialise_new_rows` says.

    Raises:
        ValueError: the file is missing, or a weight is missing, unexpected or of another shape.
    """
    if Path(path).suffix == ".safetensors":
        state, tokens = read_own(Path(path))
    else:
        state, tokens = read_instructblip(path), None
    own = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("projection.")}
    fits = [k for k in own if k in state and (state[k].shape == own[k].shape or k == WORDS)]
    if len(fits) < len(own) or len(state) > len(own):
        wrong = sorted((own.keys() ^ state.keys()) | {k for k in own if k in state and k not in fits})
        raise ValueError(f"{path}: {len(wrong)} keys missing, unexpected or of another shape, first: {wrong[:3]}")
    rows, known = own[WORDS].clone(), vocabulary.instruction.get_vocab()
    names = tokens or vocabulary.instruction.convert_ids_to_tokens(list(range(len(state[WORDS]))))
    pairs = [(known[name], number) for number, name in enumerate(names) if name in known]
    places, numbers = (list(column) for column in zip(*pairs, strict=True))
    rows[places] = state[WORDS][numbers].to(rows.dtype)
    # New rows start from the mean of the loaded ones; those that the file has are then set once more.
    bins = torch.as_tensor(vocabulary.bin_values)
    initialise_new_rows(rows, vocabulary.instruction_first_new, vocabulary.instruction_bin_ids, bins)
    rows[places] = state[WORDS][numbers].to(rows.dtype)
    state[WORDS] = rows
    tokenizer.load_state_dict(state, strict=False)


def read_own(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file written by tools/pretrain_mini_tokenizer.py: weights in float32, and the names of its word rows."""
    if not path.is_file():
        raise ValueError(f"model.tokenizer.weights={path}: no such file; give an InstructBLIP folder, a file, or null")
    with safe_open(path, framework="pt") as file:
        tokens = json.loads((file.metadata() or {}).get("tokens", "null"))
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if tokens is None:
        raise ValueError(f"{path}: no token names in its metadata; write it with tools/pretrain_mini_tokenizer.py")
    return state, tokens


def read_instructblip(path: str) -> dict[str, Tensor]:
    """Read only the QFormer, query tokens and vision post-layernorm of an InstructBLIP checkpoint, sharded or not."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.index.json"]))
        except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(f"model.tokenizer.weights={path}: no such folder, and not on the hub ({error})") from error
    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: expected an InstructBLIP checkpoint in *.safetensors, found none")
    for file_path in files:
        with safe_open(file_path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                bare = key.removeprefix("model.")
                if bare.endswith(".position_ids"):  # a buffer that older transformers versions saved
                    continue
                for prefix, ours in INSTRUCTBLIP_NAMES.items():
                    if bare.startswith(prefix):
                        state[ours + bare.removeprefix(prefix)] = file.get_tensor(key).to(torch.float32)
    return state
