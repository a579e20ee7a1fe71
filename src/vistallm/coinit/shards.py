"""Shards: samples with encoded images <-> `<split>-%06d.tar` files and `index.json`; their only writer and reader.

A tar member's name is `<key>.json` or `<key>.<n>.<jpg|png>`; the key says the shard and the place in it. An image that
several samples use is stored with the first one, and the records of the others name that member. The same samples give
the same bytes: members carry no time, owner or machine. A record holds the CRC-32 of its sample's files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vistallm.schema import Sample, SampleReject

INDEX_VERSION = 1
REMOTE = ("http://", "https://", "s3://", "pipe:")
TRIES, WAIT, STALL = 5, 0.5, 60  # of a remote copy; seconds before the second try, doubled each time; without a byte
_OWN = b',"json":'  # what stands before the record's own CRC-32, the last of its `crc32`
_ROW = ("split", "samples", "bytes", "sha256", "tasks")
_NAME = re.compile(r"[^./\\][^/\\]*\.[A-Za-z0-9.]+")  # <key>.<extension>, no folder
_CHANGED = "is not as it was written: a byte has changed; copy or build the shard again"
_BROKEN = (tarfile.TarError, EOFError, OSError)  # what reading a damaged tar raises
Row = dict[str, Any]  # of a shard in index.json: the fields of _ROW, and the stored "images" where some are shared
EncodedImage = tuple[bytes, str]  # file bytes and their suffix, "jpg" or "png"


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def write_shard(
    out_dir: Path,
    split: str,
    number: int,
    samples: Iterable[tuple[Sample, Sequence[EncodedImage]]],
    share_images: bool = True,
) -> tuple[str, Row]:
    """Write one shard and return its name and index row; the file appears whole or not at all.

    `samples` come with their images in order; the written record names them, whatever `sample.images[i].file` says.
    With `share_images`, images of equal bytes are stored once; samples of one image should be neighbours.
    """
    path = out_dir / shard_name(split, number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tasks, listed = Counter[str](), 0
    stored: dict[bytes, str] = {}  # digest of an image -> its member
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (sample, images) in enumerate(samples):
            if len(images) != len(sample.images):
                raise ValueError(f"sample {sample.id}: {len(sample.images)} images are listed, {len(images)} came")
            key, record = f"{split}-{number:06d}-{place:05d}", sample.to_json()
            files, own = dict[str, bytes](), dict[str, bytes]()
            for i, (data, suffix) in enumerate(images):
                name = f"{i}.{suffix}"
                member = f"{key}.{name}"
                digest = hashlib.blake2b(data, digest_size=16).digest() if share_images else member.encode()
                if stored.setdefault(digest, member) == member:
                    own[name] = data
                else:
                    name = stored[digest]
                record["images"][i]["file"], files[name] = name, data
            for name, data in {"json": seal(record, files), **own}.items():
                entry = tarfile.TarInfo(f"{key}.{name}")  # time 0 and owner 0 by default
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            tasks[sample.task] += 1
            listed += len(images)
    with temporary.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    row = {"split": split, "samples": tasks.total(), "bytes": temporary.stat().st_size, "sha256": sha256}
    temporary.replace(path)
    row |= {"tasks": dict(sorted(tasks.items()))} | ({"images": len(stored)} if len(stored) < listed else {})
    return path.name, row


def seal(record: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """A record as JSON that ends in `crc32`: that of each of the sample's files, by name, then of the bytes before."""
    sums = {name: zlib.crc32(data) for name, data in files.items()}
    body = json.dumps(record | {"crc32": sums}, ensure_ascii=False, separators=(",", ":")).encode()[:-2]
    return body + _OWN + b"%d}}" % zlib.crc32(body)


def write_index(out_dir: Path, shards: dict[str, Row], **extra: Any) -> dict[str, Any]:
    """Write index.json for these shards (by name) and return it; `extra` is kept beside (source, recipe, seed)."""
    totals: dict[str, Counter[str]] = {}
    for row in shards.values():
        totals.setdefault(row["split"], Counter()).update(row["tasks"])
    tasks = {split: dict(sorted(counts.items())) for split, counts in totals.items()}
    index = {"version": INDEX_VERSION, **extra, "tasks": tasks, "shards": dict(sorted(shards.items()))}
    write_text(out_dir / "index.json", json.dumps(index, indent=1) + "\n")
    return index


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_index(root: Path | str) -> dict[str, Any]:
    """Read index.json of a local or remote folder; raises ValueError with what to do when it is missing or broken."""
    place = join(str(root), "index.json")
    if not is_remote(place) and not Path(place).is_file():
        raise ValueError(f"shards: expected {place}, which is not there; build it with `python tools/build_coinit.py`")
    with open_place(place) as file:
        text = file.read()
    try:
        index = json.loads(text)
        complete = all(name in row for row in index["shards"].values() for name in _ROW)
        version, usable = index.get("version"), complete and index["shards"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: not an index of shards ({error!r}); build the shards again") from error
    if version != INDEX_VERSION or not usable:
        raise ValueError(
            f"{place}: expected version {INDEX_VERSION} and at least one shard with {', '.join(_ROW)}, got version "
            f"{version!r} and {len(index['shards'])} shard(s); build the shards again"
        )
    return index


def split_shards(root: Path, split: str, task: str | None = None) -> list[Path]:
    """The shard files of a split that hold samples of a task (None = any); ValueError where one or all are missing."""
    rows = {name: row for name, row in read_index(root)["shards"].items() if row["split"] == split}
    if not rows:
        raise ValueError(f"{root}: index.json lists no shard of split {split!r}; build it with tools/build_coinit.py")
    missing = [name for name in rows if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root}: index.json lists {len(missing)} shard(s) that are not there, first {missing[0]}")
    return [root / name for name, row in rows.items() if task is None or row["tasks"].get(task)]


@dataclass
class RawSample:
    """One sample of a shard, undecoded."""

    shard: str  # place of the shard
    key: str  # the sample's name in it
    record: dict[str, Any] | None = None  # its JSON, None when broken or not there
    files: dict[str, bytes] = field(default_factory=dict)  # its images by the name in the record
    copy: int = 0  # times that the run has seen this sample before
    fault: SampleReject | None = None  # why it can't be used, None = nothing known
    squares: dict[str, np.ndarray] | None = None  # decoded images by member, one dict for neighbours that share any

    @property
    def task(self) -> str | None:
        """The task of the sample, None when its JSON can't be read (`sample` then raises)."""
        return None if self.record is None else str(self.record.get("task"))

    def member(self, name: str) -> str:
        """Shard and member of an image in `files`: samples that share an image name the same one."""
        return f"{self.shard}/{name if name.count('.') > 1 else f'{self.key}.{name}'}"

    def sample(self) -> Sample:
        """The sample without pixels; raises SampleReject (bad-json, checksum, missing-image, or its fault)."""
        if self.fault is not None:
            raise self.fault
        if self.record is None:
            raise SampleReject("bad-json", f"{self.key}: no member {self.key}.json in the shard")
        try:
            sample = Sample.from_json(self.record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SampleReject("bad-json", f"{self.key}: {error}") from error
        for info in sample.images:
            if info.file not in self.files:
                raise SampleReject("missing-image", f"{self.key}: no member for image {info.file} in the shard")
            if "crc32" in self.record and self.record["crc32"].get(info.file) != zlib.crc32(self.files[info.file]):
                raise SampleReject("checksum", f"{self.key}, image {info.file} {_CHANGED}")
        return sample


def read_raw(
    place: str | Path,
    keep: Callable[[str], bool] = lambda task: True,
    cache: str | Path | None = None,
    size: int | None = None,
    images: bool = True,
) -> Iterator[RawSample]:
    """Yield the samples of a tar shard in file order; images of tasks that `keep` refuses are not read.

    Broken and strange members become samples with a `fault`; a tar that ends or breaks early does so as the last one.

    `keep` is called once with the task of each sample that has one, in file order. Without `images`, `files` stays
    empty. `place`, `cache` and `size` are those of `open_place`, which raises ValueError for a remote shard.
    """
    place = str(place)
    try:
        with open_place(place, cache, size) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _samples(_OpenShard(place, file, tar), keep, images)
    except _BROKEN as error:
        text = f"{place}: not a readable tar file to its end ({error}); run `python tools/build_coinit.py check` on it"
        yield RawSample(place, "", fault=SampleReject("broken-shard", text))


class _OpenShard:
    """The members of an open tar: their names in order, their contents, what is strange or ends it early."""

    def __init__(self, place: str, file: BinaryIO, tar: tarfile.TarFile) -> None:
        self.place, self.file, self.tar = place, file, tar
        self.located: dict[str, tuple[int, int]] = {}  # member -> place of its content and its size, in bytes
        self.strange: list[RawSample] = []
        self.error: Exception | None = None

    def names(self) -> Iterator[str]:
        """Names of the regular files; those before a break come first."""
        try:
            for member in self.tar:
                self.tar.members = []  # type: ignore[attr-defined]  # or the tar would keep them all
                if member.isreg() and _NAME.fullmatch(member.name):
                    self.located[member.name] = member.offset_data, member.size
                    yield member.name
                elif member.isreg():
                    text = f"member {member.name!r}: expected a file <key>.<extension> without folders; left out"
                    self.strange.append(RawSample(self.place, member.name, fault=SampleReject("bad-member", text)))
        except _BROKEN as error:
            self.error = error

    def content(self, member: str) -> bytes:
        """The bytes of a member that `names` has given."""
        offset, size = self.located[member]
        self.file.seek(offset)
        content = self.file.read(size)
        if len(content) < size:
            raise EOFError(f"{member} ends after {len(content)} of {size} bytes")
        return content


def _samples(shard: _OpenShard, keep: Callable[[str], bool], images: bool) -> Iterator[RawSample]:
    """The samples that `keep` wants, those before a break first."""
    last, recent = RawSample(shard.place, ""), dict[str, bytes]()  # the last sample, and its images by member
    for key, group in groupby(shard.names(), lambda name: name.partition(".")[0]):
        raw, members = RawSample(shard.place, key), {name.partition(".")[2]: name for name in group}
        record = members.pop("json", None)
        wanted = record is None or _read_record(raw, shard.content(record), keep)
        if wanted and images:
            listed = (raw.record or {}).get("images")
            for image in listed if isinstance(listed, list) else []:
                name = image.get("file") if isinstance(image, dict) else None
                if isinstance(name, str) and name in shard.located:
                    members.setdefault(name, name)
            raw.files = {name: recent.get(member) or shard.content(member) for name, member in members.items()}
            if not recent.keys().isdisjoint(members.values()):
                raw.squares = last.squares = {} if last.squares is None else last.squares
            last, recent = raw, {member: raw.files[name] for name, member in members.items()}
        yield from shard.strange
        shard.strange.clear()
        if wanted:
            yield raw
    yield from shard.strange
    if shard.error is not None:
        raise shard.error


def _read_record(raw: RawSample, content: bytes, keep: Callable[[str], bool]) -> bool:
    """Parse the JSON of a sample; returns whether the sample is wanted (one that can't be read is, as a fault)."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raw.fault = SampleReject("bad-json", f"{raw.key}: {error}")
        return True
    if not isinstance(record, dict) or "task" not in record:
        raw.fault = SampleReject("bad-json", f"{raw.key}: expected a sample's record, got {content[:60]!r}")
        return True
    sums = record.get("crc32", {})  # shards of before `crc32` are taken as they are
    own = sums.get("json") if isinstance(sums, dict) else None
    if "crc32" in record and own != zlib.crc32(content.rpartition(_OWN)[0]):
        raw.fault = SampleReject("checksum", f"{raw.key}.json {_CHANGED}")
        return True
    raw.record = record
    return keep(str(record["task"]))


def read_shard(path: Path | str) -> Iterator[tuple[Sample, list[bytes]]]:
    """Samples of a shard in order, with their images as encoded bytes; raises ValueError for a broken member."""
    for raw in read_raw(path):
        try:
            sample = raw.sample()
        except SampleReject as error:
            raise ValueError(f"{Path(path).name}, {error}") from error
        names = [info.file for info in sample.images]
        if unlisted := sorted(set(raw.files) - set(names)):
            raise ValueError(f"{Path(path).name}, {raw.key}: the record lists images {names}, not {unlisted}")
        yield sample, [raw.files[name] for name in names]


class UnreachableError(ValueError):
    """A remote place that can't be copied."""


def is_remote(place: str) -> bool:
    """Whether a place is not a local path."""
    return place.startswith(REMOTE)


def join(root: str, name: str) -> str:
    """The place of a file in a root; `{}` in a `pipe:` command stands for the file's name."""
    return root.replace("{}", shlex.quote(name)) if root.startswith("pipe:") else f"{root.rstrip('/')}/{name}"


def open_place(place: str, cache: str | Path | None = None, size: int | None = None) -> BinaryIO:
    """Open a path, or an `http(s)://`, `s3://` or `pipe:COMMAND` address, which is copied to a file in `cache` first.

    Without a `cache` the copy is temporary. Raises UnreachableError when copying failed `TRIES` times, ValueError when
    the copy has not `size` bytes.
    """
    if not is_remote(place):
        return open(place, "rb")
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    folder = Path(cache or tempfile.gettempdir())
    path = folder / f"vistallm-{digest}-{size}-{place.rpartition('/')[2][-60:]}"
    if cache and path.is_file():
        return path.open("rb")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _copy(place, temporary)
        got = temporary.stat().st_size
        if size not in (None, got):
            raise ValueError(f"{place}: the index says {size} bytes, got {got}; build or copy the shard again")
        return (temporary.replace(path) if cache else temporary).open("rb")
    finally:
        temporary.unlink(missing_ok=True)  # a file that is open stays until it is closed


def _copy(place: str, out: Path) -> None:
    """Copy a remote file by curl, `aws s3 cp` or the given command; from its start again when that fails."""
    from webdataset.gopen import gopen  # here, because it imports torch, which builders do without

    command = place.removeprefix("pipe:")
    if place.startswith("http"):
        command = f"curl -fsSL --connect-timeout 30 --speed-limit 1 --speed-time {STALL} {shlex.quote(place)}"
    elif place.startswith("s3:"):
        command = f"aws s3 cp {shlex.quote(place)} -"
    for attempt in range(TRIES):
        try:
            with out.open("wb") as file, gopen(f"pipe:{command}") as source:
                return shutil.copyfileobj(source, file, 1 << 20)
        except OSError as error:
            failure = error
            if attempt + 1 < TRIES:
                time.sleep(WAIT * 2**attempt)
    raise UnreachableError(
        f"{place}: gave up after {TRIES} tries ({failure}); check the address and the network, then start again: the "
        "run resumes (data.cache keeps what is read)"
    ) from failure
