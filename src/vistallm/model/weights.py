"""Weight files of others: their keys against a module's own, files that are cut short, InstructBLIP's layout."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

INSTRUCTBLIP_NAMES = {  # prefix in an InstructBLIP checkpoint (Hugging Face layout) -> prefix here
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
    "vision_model.post_layernorm.": "feature_norm.",
    "language_projection.": "projection.",
}


def check_keys(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, advice: str, free_rows: str | None = None
) -> None:
    """Raise ValueError unless `state`, read from `source`, has the names and shapes of `own`.

    The message is a line that ends with `advice`, and one for every missing, unexpected or misshapen key, in which the
    numbers of layers are folded. `free_rows` names a matrix whose number of rows may differ.
    """
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {there} in the file, {here} here"
            for key, (there, here) in shapes.items()
            if there[key == free_rows :] != here[key == free_rows :]
        ],
    }
    raise_faults(faults, source, advice)


def raise_faults(faults: Mapping[str, list[str]], source: str, advice: str) -> None:
    """Raise ValueError with all keys of `faults` by what is wrong with them, unless there are none."""
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} keys {what}" for what, names in faults.items() if names)
        lines = [f"{what}: {name}" for what, names in faults.items() for name in fold(names)]
        raise ValueError("\n  ".join([f"{source}: weights of another model ({counts}); {advice}", *lines]))


def fold(names: Iterable[str]) -> list[str]:
    """Join names that differ in their first number alone: `layers.0.x`, `layers.1.x` -> `layers.{0..1}.x`."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(?:(.*?\.)(\d+)(?=\.))?(.*)", name, re.DOTALL).groups("")  # type: ignore[union-attr]
        numbers.setdefault((before, after), []).extend([int(number)] if number else [])
    return [before + _ranges(sorted(values)) + after for (before, after), values in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as `{0..2,5}`, and one number as it is."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


@contextlib.contextmanager
def reading(path: Path, holds: Iterable[str] = ()) -> Iterator[None]:
    """Turn whatever a reader of `path` raises into one ValueError that names the weights it holds."""
    try:
        yield
    except Exception as error:
        reason, keys = str(error).strip().partition("\n")[0], ", ".join(holds)
        text = f"{path}: not readable (half-downloaded?); fetch it again ({reason})"
        raise ValueError(text + (f"; it holds {keys}" if keys else "")) from error


def read_safetensors(path: Path, key: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata; `key` is the setting that names the file.

    Raises:
        ValueError: the file is missing or cut short.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file; give a .safetensors file, a name that is known, or null")
    with reading(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def read_instructblip(source: str) -> dict[str, Tensor]:
    """Read the QFormer, query tokens, vision post-layernorm and projection of an InstructBLIP checkpoint, in float32.

    Args:
        source: a folder or a hub name. Only the files with such weights are opened (or downloaded), safetensors or the
            `.bin` pickles of tensors of the first release.

    Raises:
        ValueError: there is no checkpoint, or a file of it is missing or cut short.
    """
    state: dict[str, Tensor] = {}
    for name, keys in _instructblip_files(source).items():
        path = _find(source, name)
        if path is None:
            raise ValueError(f"{source}/{name}: the index lists it, but it is not there; it holds {', '.join(keys)}")
        with reading(path, keys):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys() if _own_name(key)}  # noqa: SIM118
            else:  # files of before torch 1.6 are no zip files and can't be mapped
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            state |= {own: value.float() for key, value in tensors.items() if (own := _own_name(key))}
    return state


def _instructblip_files(source: str) -> dict[str, list[str]]:
    """Return the files with weights of ours and the keys that the index promises in each."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (index := _find(source, f"{whole}.index.json")) is not None:
            files: dict[str, list[str]] = {}
            try:
                for key, file in json.loads(index.read_text())["weight_map"].items():
                    files.setdefault(file, []).extend([key] if _own_name(key) else [])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                text = f"{index}: expected an index with a weight_map ({error!r}); fetch the folder again"
                raise ValueError(text) from error
            return {file: keys for file, keys in files.items() if keys}
        if _find(source, whole) is not None:
            return {whole: []}
    text = "expected an InstructBLIP checkpoint (model.safetensors or pytorch_model.bin, or an index of its files)"
    raise ValueError(f"{source}: {text}, found no weights of one")


def _find(source: str, name: str) -> Path | None:
    """Return a file of a folder or of a hub repository; None = the repository has no such file."""
    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model.tokenizer.weights={source}: no such folder, and not on the hub ({reason})") from error
    return None if path is None else Path(path)


def _own_name(key: str) -> str | None:
    """Return the name here of a weight in an InstructBLIP checkpoint; None = not one of ours."""
    bare = key.removeprefix("model.")
    for prefix, own in INSTRUCTBLIP_NAMES.items():
        if bare.startswith(prefix) and not bare.endswith(".position_ids"):  # a buffer of older transformers versions
            return own + bare.removeprefix(prefix)
    return None
