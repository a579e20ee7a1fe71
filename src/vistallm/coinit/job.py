"""One split of a source -> its shards, one by one: units in; a tar file, its index row and its rejects out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.images import ImageFile, read_image, scale_region, shrink
from vistallm.coinit.leaks import sample_images
from vistallm.coinit.shards import EncodedImage, shard_name, write_shard
from vistallm.coinit.sources.base import Draft, Reject, Source
from vistallm.schema import ImageInfo, Sample

ROWS = ".build"  # folder beside the shards: a recipe per split and a row per finished shard


@dataclass(frozen=True)
class BuildOptions:
    """How a source is built.

    Attributes:
        out: folder of the source's shards. samples_per_shard: about this many.
        max_side: shrink larger images to this many pixels; None = copy the files as they are.
        exclude: file of image ids, one per line, whose training samples are dropped.
        workers: processes, None = one per CPU. part: (i, n), take shards i, i + n, ...; neither changes the bytes.
    """

    out: Path
    samples_per_shard: int = 1000
    max_side: int | None = None
    exclude: Path | None = None
    workers: int | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or (self.max_side is not None and self.max_side < 1):
            raise ValueError(f"expected samples per shard and max side of at least 1, got {self}")
        if not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"part: expected i/n with i from 0 to n - 1, got {self.part[0]}/{self.part[1]}")


@dataclass
class Job:
    """One split's build, as every worker holds it."""

    source: Source
    split: str
    options: BuildOptions
    units: np.ndarray  # (N,) int, unit numbers in the order of the shards
    units_per_shard: int
    excluded: frozenset[str]

    @property
    def rows(self) -> Path:
        """Folder of the split's recipe and rows."""
        return self.options.out / ROWS / self.split

    @property
    def shards(self) -> int:
        """How many there are, empty ones included."""
        return -(-len(self.units) // self.units_per_shard)

    def row_file(self, number: int) -> Path:
        """Where a shard's row lies when the shard is done."""
        return self.rows / f"{number:06d}.json"

    def record(self, number: int) -> dict[str, Any]:
        """What `write` returned."""
        return json.loads(self.row_file(number).read_text(encoding="utf-8"))

    def is_done(self, number: int) -> bool:
        """Whether a shard's row is there, and the shard beside it (an empty one has no file)."""
        try:
            size = self.record(number)["row"]["bytes"]
            return not size or (self.options.out / shard_name(self.split, number)).stat().st_size == size
        except (OSError, ValueError):
            return False

    def write(self, number: int) -> dict[str, Any]:
        """Write one shard, then its row: {"row": index row, "rejects": [[reason, where], ...]}."""
        part = self.units[number * self.units_per_shard : (number + 1) * self.units_per_shard]
        rejects: list[Reject] = []
        out = self.options.out
        name, row = write_shard(out, self.split, number, self._samples(part.tolist(), rejects))
        if not row["samples"]:
            (out / name).unlink()
            row["bytes"] = 0
        record = {"row": row, "rejects": [[reject.reason, reject.where] for reject in rejects]}
        write_text(self.row_file(number), json.dumps(record, ensure_ascii=False))
        return record

    def _samples(self, units: list[int], rejects: list[Reject]) -> Iterator[tuple[Sample, list[EncodedImage]]]:
        for unit in units:
            files: dict[Path, ImageFile | Reject] = {}  # samples of a unit mostly share their images
            for draft in self.source.unit(unit):
                finished = draft if isinstance(draft, Reject) else self._finish(draft, files)
                if isinstance(finished, Reject):
                    rejects.append(finished)
                else:
                    yield finished

    def _finish(
        self, draft: Draft, files: dict[Path, ImageFile | Reject]
    ) -> tuple[Sample, list[EncodedImage]] | Reject:
        """Read a draft's images and fill in their names and sizes."""
        sample, encoded = draft.sample, []
        if self.excluded and (leaked := sorted(sample_images(sample) & self.excluded)):
            return Reject("excluded", f"{sample.id}: image {leaked[0]} is of an evaluation split")
        for i, (info, path) in enumerate(zip(sample.images, draft.images, strict=True)):
            file = files[path] if path in files else files.setdefault(path, _read(path))
            if isinstance(file, Reject):
                return Reject(file.reason, f"{sample.id}: {file.where}")
            if info.width and (info.width, info.height) != (file.width, file.height):
                got = f"{path.name} is {file.width} x {file.height}"
                return Reject("image-size", f"{sample.id}: expected {info.width} x {info.height}, {got}")
            old = file.width, file.height
            if self.options.max_side is not None:
                try:
                    file = shrink(file, self.options.max_side, path)
                    new = file.width, file.height
                    regions = [scale_region(r, old, new) if r.image == i else r for r in sample.regions]
                except ValueError as error:
                    return Reject("max-side", f"{sample.id}: {error}")
                sample.regions = regions
            sample.images[i] = ImageInfo(f"{i}.{file.suffix}", file.width, file.height)
            encoded.append((file.data, file.suffix))
        return sample, encoded


def _read(path: Path) -> ImageFile | Reject:
    try:
        return read_image(path)
    except OSError as error:
        return Reject("missing-image", f"{path} ({error.strerror or error})")
    except ValueError as error:
        return Reject("broken-image", str(error))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
