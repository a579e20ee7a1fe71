"""Source -> shards: plans fixed slices of units, forks workers, writes whole shards, and goes on after a kill.

The bytes depend on the recipe alone, never on workers, parts or interruptions: shard k of a split holds the drafts of a
fixed slice of the units (shuffled by the seed for training splits). A shard is done when its row lies in
`.build/<split>/`; index.json and rejects.jsonl are written from the rows when a split has them all.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vistallm.coinit import images as image_files
from vistallm.coinit import shards
from vistallm.coinit.images import ImageFile, read_image, scale_region, shrink
from vistallm.coinit.leaks import is_training, read_ids, sample_images
from vistallm.coinit.shards import EncodedImage, Row, shard_name, write_index, write_shard
from vistallm.coinit.sources import base
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceOptions
from vistallm.schema import ImageInfo, Sample

PROBES = 64  # units looked at before the build: for samples per unit, and to tell another edition of the files
ROWS = ".build"
Load = Callable[[SourceOptions], Source]


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
class Result:
    """What a build wrote: this part's samples and rejects by reason, and whether the split is now whole."""

    samples: int = 0
    size: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    done: int = 0
    shards: int = 0


@dataclass
class _Job:
    """One split's build, as every worker holds it."""

    source: Source
    split: str
    options: BuildOptions
    units: np.ndarray  # (N,) int, unit numbers in the order of the shards
    units_per_shard: int
    excluded: frozenset[str]

    @property
    def rows(self) -> Path:
        return self.options.out / ROWS / self.split

    def row_file(self, number: int) -> Path:
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
        _write_text(self.row_file(number), json.dumps(record, ensure_ascii=False))
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


def build(name: str, load: Load, source_options: SourceOptions, options: BuildOptions) -> Result:
    """Build one split of a source, or go on with it; prints progress to stderr.

    Args:
        name: the source's name, as samples carry it.
        load: reads its annotations.
        source_options: root, split and so on.
        options: where to and how.

    Raises:
        ValueError: the files are not as documented, nothing can be built, or `out` holds something else.
    """
    if options.exclude is not None and not is_training(source_options.split):
        raise ValueError(f"--exclude drops training samples, but the split is {source_options.split!r}; leave it away")
    excluded = read_ids(options.exclude) if options.exclude else frozenset()
    source = load(source_options)
    if not len(source):
        raise ValueError(f"{name}, split {source_options.split!r}: no unit in {source_options.root}; check --split")
    probes = _probe(source, source_options.split)
    per_unit = sum(isinstance(p, Draft) for p in probes) / min(len(source), PROBES)
    job = _Job(
        source,
        source_options.split,
        options,
        _order(len(source), source_options),
        max(1, round(options.samples_per_shard / max(per_unit, 1e-3))),
        excluded,
    )
    recipe = _recipe(name, load, source_options, job, probes)
    _claim(options.out, job.rows / "recipe.json", recipe)
    numbers = list(range(-(-len(source) // job.units_per_shard)))[options.part[0] :: options.part[1]]
    _run(job, numbers)
    return _collect(job, numbers)


def _order(count: int, options: SourceOptions) -> np.ndarray:
    order = np.arange(count)
    return np.random.default_rng([options.seed, count]).permutation(order) if is_training(options.split) else order


def _probe(source: Source, split: str) -> list[Draft | Reject]:
    """Drafts of some units from all over the source; raises ValueError when none of their images is there."""
    numbers = sorted(set(np.linspace(0, len(source) - 1, PROBES).astype(int).tolist()))
    found = [draft for number in numbers for draft in source.unit(number)]
    paths = [path for draft in found if isinstance(draft, Draft) for path in draft.images]
    if paths and not any(path.is_file() for path in paths):
        raise ValueError(
            f"split {split!r}: {len(paths)} images looked for, none is there, first {paths[0]}; use --images"
        )
    return found


def _recipe(name: str, load: Load, source: SourceOptions, job: _Job, probes: list[Draft | Reject]) -> dict[str, Any]:
    """Everything that the bytes depend on, beside the image files: another recipe is another set."""
    loader = sys.modules[(load.func if isinstance(load, partial) else load).__module__]
    code, data = hashlib.sha256(), hashlib.sha256()
    for module in (loader, base, shards, image_files, sys.modules[__name__]):
        code.update(Path(str(module.__file__)).read_bytes())
    for found in probes:
        record = [found.reason] if isinstance(found, Reject) else found.sample.to_json()
        data.update(json.dumps(record, sort_keys=True).encode())
    return {
        "source": name,
        "split": source.split,
        "seed": source.seed,
        "settings": source.settings,
        "units": len(job.units),
        "units_per_shard": job.units_per_shard,
        "max_side": job.options.max_side,
        "excluded": hashlib.sha256("\n".join(sorted(job.excluded)).encode()).hexdigest()[:16] if job.excluded else None,
        "annotations": data.hexdigest()[:16],
        "code": code.hexdigest()[:16],
    }


def _claim(out: Path, path: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe, or compare with the one that is there; raises ValueError when `out` is of something else."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ROWS).exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected shards of {recipe['source']} or no files, got others; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.parent.glob("*/recipe.json"):
        there = json.loads(other.read_text())
        keys = recipe if other == path else ("source",)
        wrong = [f"{key} {there.get(key)!r} -> {recipe[key]!r}" for key in keys if there.get(key) != recipe[key]]
        if wrong:
            raise ValueError(
                f"{out} was begun with another recipe ({', '.join(wrong)}); use the same one, choose another folder, "
                f"or delete {path.parent} and the split's shards to build it anew"
            )
    if not path.is_file():
        _write_text(path, json.dumps(recipe, indent=1))


def _run(job: _Job, numbers: list[int]) -> None:
    """Write the shards that are not done yet, in workers, under a progress bar."""
    todo = [number for number in numbers if not job.is_done(number)]
    for number in todo:  # what a killed build left half written; no other part writes these shards
        for left in job.options.out.glob(f".{shard_name(job.split, number)}.*"):
            left.unlink(missing_ok=True)
    workers = max(1, min(job.options.workers or len(os.sched_getaffinity(0)), len(todo)))
    written = map(job.write, todo) if workers == 1 else _in_workers(job, todo, workers)
    count, samples, size = len(job.units), 0, 0
    done = count * (len(numbers) - len(todo)) // max(len(numbers), 1)
    with tqdm(total=count // job.options.part[1], initial=done, unit="unit", desc=job.split, dynamic_ncols=True) as bar:
        for record in written:
            samples, size = samples + record["row"]["samples"], size + record["row"]["bytes"]
            bar.set_postfix(samples=samples, MB=size >> 20, refresh=False)
            bar.update(min(job.units_per_shard, bar.total - bar.n))


_forked: list[_Job] = []  # set in a worker alone, before its first shard


def _write_forked(number: int) -> dict[str, Any]:
    return _forked[0].write(number)


def _in_workers(job: _Job, numbers: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Rows of the shards as they are done; an executor, unlike a pool, notices a worker that was killed."""
    gc.collect()
    gc.freeze()  # the collector would write into the pages that forked workers share
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_forked.append, initargs=(job,)) as executor:
        futures = [executor.submit(_write_forked, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError("a worker was killed (out of memory?); lower --workers and run again to go on") from error
        finally:
            executor.shutdown(cancel_futures=True)
            gc.unfreeze()


def _collect(job: _Job, numbers: list[int]) -> Result:
    """Count what the rows of this part say; write index.json and rejects.jsonl when the split has every row."""
    count = -(-len(job.units) // job.units_per_shard)
    records = [job.record(number) for number in numbers]
    result = Result(shards=count, done=sum(job.row_file(number).is_file() for number in range(count)))
    for record in records:
        result.samples += record["row"]["samples"]
        result.size += record["row"]["bytes"]
        result.rejects.update(reason for reason, _ in record["rejects"])
    if result.done == count:
        with (job.options.out / ROWS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two parts or splits may get here at once
            _write_index(job.options.out)
    return result


def _write_index(out: Path) -> None:
    """index.json and rejects.jsonl from the rows of all splits that are whole."""
    rows: dict[str, Row] = {}
    recipes: dict[str, str] = {}
    rejects = out / f".rejects.{os.getpid()}.tmp"
    source = ""
    with rejects.open("w", encoding="utf-8") as file:
        for path in sorted((out / ROWS).glob("*/recipe.json")):
            recipe, split = json.loads(path.read_text()), path.parent.name
            names = [path.parent / f"{n:06d}.json" for n in range(-(-recipe["units"] // recipe["units_per_shard"]))]
            if not all(name.is_file() for name in names):
                continue
            source, recipes[split] = recipe["source"], hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for number, name in enumerate(names):
                record = json.loads(name.read_text(encoding="utf-8"))
                if record["row"]["samples"]:
                    rows[shard_name(split, number)] = record["row"]
                for reason, where in record["rejects"]:
                    line = {"split": split, "reason": reason, "where": where}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not rows:
        rejects.unlink()
        raise ValueError(f"{out}: every sample was rejected; see the rows in {out / ROWS}")
    rejects.replace(out / "rejects.jsonl")
    write_index(out, rows, source=source, recipe=recipes)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
