"""NLVR2: JSON lines of a sentence about two images in, `nlvr2` samples out (left image first).

In: `data/{train,dev,test1,test2}.json`; another file of a split, such as the balanced subset of test1, with
`--set file=data/balanced/balanced_test1.json`. The identifier "dev-850-0-1" says split, set, pair and sentence; its
images are dev-850-0-img0.png (left) and dev-850-0-img1.png (right). Consistency counts a sentence as right when all its
pairs are, so `meta["group"]` is the identifier without the pair: "dev-850-1". A unit is one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from vistallm.coinit.sources.base import Draft, Source, SourceOptions, first_file
from vistallm.coinit.sources.records import Record, file_source, read_json_lines
from vistallm.schema import ImageInfo, Sample

_LABELS = {"true": "True", "false": "False"}


def load_nlvr2(options: SourceOptions) -> Source:
    """Statements about two images; splits train, dev, test1 (public), test2."""
    split = options.check_split("train", "dev", "test1", "test2")
    file = options.read_settings(file="")["file"]
    usual = [f"{folder}{split}.json" for folder in ("", "data/", "nlvr2/data/")]
    path = options.find_file(*([file] if file else usual))
    root = options.images or options.root / "images"

    def make(record: Record, _: int) -> Iterator[Draft]:
        identifier = record.text("identifier")
        parts = identifier.split("-")
        if len(parts) != 4 or parts[0] != split:
            raise record.fault(f"expected identifier as {split}-SET-PAIR-SENTENCE, got {identifier!r}")
        label = record.text("label")
        if label.lower() not in _LABELS:
            raise record.fault(f"expected label True or False, got {label!r}")
        names = [f"{'-'.join(parts[:3])}-img{side}" for side in (0, 1)]
        sample = Sample(
            id=f"nlvr2-{identifier}",
            task="nlvr2",
            source="nlvr2",
            images=[ImageInfo("", 0, 0), ImageInfo("", 0, 0)],
            fields={"statement": record.text("sentence").strip(), "answer": _LABELS[label.lower()]},
            meta={"group": "-".join([*parts[:2], parts[3]]), "image_ids": [f"nlvr2:{name}" for name in names]},
        )
        folders = [f"{split}/", ""]
        if (directory := record.data.get("directory")) is not None:  # training images are spread over folders, 0 to 99
            folders = [f"{split}/{directory}/", f"images/{split}/{directory}/", f"{directory}/", ""]
        yield Draft(sample, [first_file(root, *(f"{folder}{name}.png" for folder in folders)) for name in names])

    return file_source(path, read_json_lines(path), make)
