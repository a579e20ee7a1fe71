"""Shards: samples with encoded images in, `<split>-%06d.tar` files and `index.json` out; and the check of both.

A tar member's name is `<key>.json` or `<key>.<n>.<jpg|png>`; the key says the shard and the place in it. The same
samples give the same bytes: members carry no time, owner or machine. A record holds the CRC-32 of its sample's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vistallm.schema import Sample

INDEX_VERSION = 1
_OWN = b',"json":'  # what stands before the record's own CRC-32, the last of its `crc32`
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
    with _TarFile(temporary) as tar:
        for place, (sample, images) in enumerate(samples):
            key = f"{split}-{number:06d}-{place:05d}"
            names = [f"{i}.{suffix}" for i, (_, suffix) in enumerate(images)]
            if names != [info.file for info in sample.images]:
                raise ValueError(f"sample {sample.id}: images are listed as {sample.images}, but the files are {names}")
            files = {name: data for name, (data, _) in zip(names, images, strict=True)}
            tar.add(f"{key}.json", seal(sample.to_json(), files))
            for name, data in files.items():
                tar.add(f"{key}.{name}", data)
            tasks[sample.task] += 1
    temporary.replace(path)
    row = {"split": split, "samples": tasks.total(), "bytes": tar.size, "sha256": tar.digest.hexdigest()}
    return path.name, {**row, "tasks": dict(sorted(tasks.items()))}


def seal(record: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """A record as JSON that ends in `crc32`: that of each of the sample's files, by name, then of the bytes before."""
    sums = {name: zlib.crc32(data) for name, data in files.items()}
    body = json.dumps(record | {"crc32": sums}, ensure_ascii=False, separators=(",", ":")).encode()[:-2]
    return body + _OWN + b"%d}}" % zlib.crc32(body)


def broken_seal(record: dict[str, Any], content: bytes) -> bool:
    """Whether the bytes of a record are not those that were sealed; shards of before `crc32` are taken as they are."""
    sums = record.get("crc32", {})
    own = sums.get("json") if isinstance(sums, dict) else None
    return "crc32" in record and own != zlib.crc32(content.rpartition(_OWN)[0])


class _TarFile:
    """Writes a tar file in one pass, hashing as it goes; `tarfile` needs a second one and copies in small pieces."""

    def __init__(self, path: Path) -> None:
        self._file, self.digest, self.size = path.open("wb"), hashlib.sha256(), 0

    def __enter__(self) -> _TarFile:
        return self

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # time 0 and owner 0 by default
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def __exit__(self, *_: object) -> None:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
        self._file.close()


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
