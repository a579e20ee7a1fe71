"""Shards: samples with encoded images in, `<split>-%06d.tar` files and `index.json` out; and the check of both.

A tar member's name is `<key>.json` or `<key>.<n>.<jpg|png>`; the key says the shard and the place in it. The same
samples give the same bytes: members carry no time, owner or machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vistallm.schema import ImageInfo, Sample

INDEX_VERSION = 1
_ROW = ("split", "samples", "bytes", "sha256", "tasks")
Row = dict[str, Any]  # what index.json says of one shard: the fields of _ROW
EncodedImage = tuple[bytes, str]  # file bytes and their suffix, "jpg" or "png"


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def write_shard(
    out_dir: Path, split: str, number: int, samples: Iterable[tuple[Sample, Sequence[EncodedImage]]]
) -> tuple[str, Row]:
    """Write one shard and return its name and index row; the file appears whole or not at all.

    Args:
        out_dir: existing folder.
        split: "train", "val", "test" or a benchmark's own split.
        number: number of the shard in its split.
        samples: each with its images in order; `sample.images[i].file` must be "<i>.<suffix>".
    """
    path = out_dir / shard_name(split, number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tasks: Counter[str] = Counter()
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (sample, images) in enumerate(samples):
            key = f"{split}-{number:06d}-{place:05d}"
            names = [f"{i}.{suffix}" for i, (_, suffix) in enumerate(images)]
            if names != [info.file for info in sample.images]:
                raise ValueError(f"sample {sample.id}: images are listed as {sample.images}, but the files are {names}")
            record = json.dumps(sample.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
            for name, data in [("json", record), *zip(names, (data for data, _ in images), strict=True)]:
                member = tarfile.TarInfo(f"{key}.{name}")  # time 0 and owner 0 by default
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            tasks[sample.task] += 1
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    size = temporary.stat().st_size
    temporary.replace(path)
    row = {"split": split, "samples": tasks.total(), "bytes": size, "sha256": digest}
    return path.name, {**row, "tasks": dict(sorted(tasks.items()))}


def write_index(out_dir: Path, shards: dict[str, Row], **extra: Any) -> dict[str, Any]:
    """Write index.json for these shards (by name) and return it; `extra` is kept beside (source, recipe, seed)."""
    totals: dict[str, Counter[str]] = {}
    for row in shards.values():
        totals.setdefault(row["split"], Counter()).update(row["tasks"])
    tasks = {split: dict(sorted(counts.items())) for split, counts in totals.items()}
    index = {"version": INDEX_VERSION, **extra, "tasks": tasks, "shards": dict(sorted(shards.items()))}
    temporary = out_dir / f".index.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out_dir / "index.json")
    return index


def read_index(root: Path | str) -> dict[str, Any]:
    """Read index.json; raises ValueError with what to do when the folder, the file or its shards are missing."""
    path = Path(root) / "index.json"
    if not path.is_file():
        raise ValueError(f"shards: expected {path}, which is not there; build it with `python tools/build_coinit.py`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        rows = [[row[name] for name in _ROW] for row in index["shards"].values()]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of shards ({error!r}); build the shards again") from error
    if index.get("version") != INDEX_VERSION:
        raise ValueError(
            f"{path}: expected version {INDEX_VERSION}, got {index.get('version')!r}; build the shards again"
        )
    if not rows:
        raise ValueError(f"{path}: expected at least one shard, it lists none; build the shards again")
    return index


def read_shard(path: Path | str) -> Iterator[tuple[Sample, list[bytes]]]:
    """Samples of a shard in order, with their images as encoded bytes; raises ValueError for a broken member."""
    with tarfile.open(path) as tar:
        members: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, name = member.name.partition(".")
            file = tar.extractfile(member)
            if key not in members and members:
                yield _sample_of(path, *members.popitem())
            members.setdefault(key, {})[name] = file.read() if file is not None else b""
        if members:
            yield _sample_of(path, *members.popitem())


def _sample_of(path: Path | str, key: str, files: dict[str, bytes]) -> tuple[Sample, list[bytes]]:
    where = f"{Path(path).name}, {key}"
    if "json" not in files:
        raise ValueError(f"{where}: expected a member {key}.json, got {', '.join(files)}")
    try:
        sample = Sample.from_json(json.loads(files["json"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    names = [info.file for info in sample.images]
    if sorted(names) != sorted(set(files) - {"json"}):
        raise ValueError(f"{where}: the record lists images {names}, the shard holds {sorted(set(files) - {'json'})}")
    return sample, [files[name] for name in names]


class ShardWriter:
    """Write a split's samples one by one; a full shard is closed and the next begun, index.json is written on exit.

    Rows of other splits that an index in the folder already has are kept, so splits can be built one after another.
    """

    def __init__(self, out_dir: Path | str, split: str, max_samples: int = 1000) -> None:
        self.out_dir, self.split, self.max_samples = Path(out_dir), split, max_samples
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, Row] = {}
        self._waiting: list[tuple[Sample, Sequence[EncodedImage]]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, sample: Sample, images: Sequence[EncodedImage]) -> None:
        """Add one sample; its `images` list is named after the given files."""
        for i, (info, (_, suffix)) in enumerate(zip(sample.images, images, strict=True)):
            sample.images[i] = ImageInfo(f"{i}.{suffix}", info.width, info.height)
        self._waiting.append((sample, images))
        if len(self._waiting) == self.max_samples:
            self._flush()

    def _flush(self) -> None:
        name, row = write_shard(self.out_dir, self.split, len(self._rows), self._waiting)
        self._rows[name] = row
        self._waiting = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self._waiting:
            self._flush()
        extra: dict[str, Any] = {}
        rows = self._rows
        if (self.out_dir / "index.json").is_file():
            extra = read_index(self.out_dir)
            rows = {name: row for name, row in extra["shards"].items() if row["split"] != self.split} | rows
        write_index(self.out_dir, rows, **{k: v for k, v in extra.items() if k not in ("version", "tasks", "shards")})
