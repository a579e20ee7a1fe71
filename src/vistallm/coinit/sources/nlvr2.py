"""NLVR2: JSON lines of a sentence about two images in, `nlvr2` samples out (left image first).

In: `data/{train,dev,test1,test2}.json`; another file of a split, such as the balanced subset of test1, with
`--set file=data/balanced/balanced_test1.json`. The identifier "dev-850-0-1" says split, set, pair and sentence; its
images are dev-850-0-img0.png (left) and dev-850-0-img1.png (right). Consistency counts a sentence as right when all its
pairs are, so `meta["group"]` is the identifier without the pair: "dev-850-1". A unit is one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceOptions,
    read_json_lines,
    require,
)
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    find_file,
    image_file,
    read_settings,
)
from vistallm.schema import ImageInfo, Sample

_LABELS = {"true": "True", "false": "False"}


def load_nlvr2(options: SourceOptions) -> Source:
    """Statements about two images; splits train, dev, test1 (public), test2."""
    check_split(options, "train", "dev", "test1", "test2")
    named = read_settings(options, file="")["file"]
    name = f"{options.split}.json"
    path = (
        find_file(options.root, named) if named else find_file(options.root, name, f"data/{name}", f"nlvr2/data/{name}")
    )

    def make(record: Any, index: int) -> Iterator[Draft | Reject]:
        yield _statement(options, record, f"{path}, record {index}")

    return RecordSource(Packed(read_json_lines(path)), make)


def _statement(options: SourceOptions, record: Any, where: str) -> Draft:
    identifier = require(record, "identifier", str, where)
    parts = identifier.split("-")
    if len(parts) != 4 or parts[0] != options.split:
        raise SourceFormatError(
            f"{where}: expected identifier as {options.split}-SET-PAIR-SENTENCE, got {identifier!r}"
        )
    label = require(record, "label", str, where)
    if label.lower() not in _LABELS:
        raise SourceFormatError(f"{where}: expected label True or False, got {label!r}")
    names = [f"{'-'.join(parts[:3])}-img{side}" for side in (0, 1)]
    sample = Sample(
        id=f"nlvr2-{identifier}",
        task="nlvr2",
        source="nlvr2",
        images=[ImageInfo("", 0, 0), ImageInfo("", 0, 0)],
        fields={"statement": require(record, "sentence", str, where).strip(), "answer": _LABELS[label.lower()]},
        meta={"group": "-".join([*parts[:2], parts[3]]), "image_ids": [f"nlvr2:{name}" for name in names]},
    )
    folder = options.images or options.root / "images"
    directory = record.get("directory")  # only the training images are spread over folders, 0 to 99
    return Draft(sample, [_find(folder, f"{name}.png", options.split, directory) for name in names])


def _find(folder: Path, name: str, split: str, directory: int | None) -> Path:
    if directory is None:
        return image_file(folder, f"{split}/{name}", name)
    return image_file(
        folder, f"{split}/{directory}/{name}", f"images/{split}/{directory}/{name}", f"{directory}/{name}", name
    )
