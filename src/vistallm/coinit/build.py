"""Source -> shards: plans fixed slices of units, forks workers, writes whole shards, and goes on after a kill.

The bytes depend on the recipe alone, never on workers, parts or interruptions: shard k of a split holds the samples of
a fixed slice of the units (shuffled by the seed for training splits). A shard is done when its row lies in
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
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vistallm.coinit.images import ImageFile, read_image, scale_region, shrink
from vistallm.coinit.shards import EncodedImage, Row, shard_name, write_index, write_shard
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceOptions, is_training, sample_images
from vistallm.schema import ImageInfo, Sample

ROWS = ".build"  # folder beside the shards: a recipe per split and a row per finished shard
PROBES = 64  # units looked at before the build: for samples per unit, and to notice other annotation files
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
class BuildReport:
    """What this part of a build wrote, its rejects by reason, and how many of the split's shards are done."""

    samples: int = 0
    size: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    done: int = 0
    shards: int = 0


def build(name: str, load: Load, source_options: SourceOptions, options: BuildOptions) -> BuildReport:
    """Build one split of a source, or go on with it; prints progress to stderr.

    Args:
        name: the source's name, as samples carry it.
        load: reads its annotations.
        source_options: root, split and so on.
        options: where to and how.

    Raises:
        ValueError: the files are not as documented, nothing can be built, or `out` holds something else.
    """
    split, out = source_options.split, options.out
    if options.exclude is not None and not is_training(split):
        raise ValueError(f"--exclude drops training samples, but the split is {split!r}; leave it away")
    excluded = read_ids(options.exclude) if options.exclude else frozenset()
    source = load(source_options)
    if not len(source):
        raise ValueError(f"{name}, split {split!r}: no unit in {source_options.root}; check --split")
    probes = _probe(source, split)
    per_unit = sum(isinstance(probe, Draft) for probe in probes) / min(len(source), PROBES)
    units = np.arange(len(source))
    if is_training(split):
        units = np.random.default_rng([source_options.seed, len(source)]).permutation(units)
    slices = _Slices(
        source, split, options, units, max(1, round(options.samples_per_shard / max(per_unit, 1e-3))), excluded
    )
    _claim(out, slices.rows / "recipe.json", _recipe(name, load, source_options, slices, probes))
    numbers = list(range(options.part[0], slices.shards, options.part[1]))
    todo = [number for number in numbers if not slices.is_done(number)]
    for number in todo:  # no other part writes these shards
        slices.remove_unfinished(f"{number:06d}")
    total, samples, size = len(units) // options.part[1], 0, 0
    done = len(units) * (len(numbers) - len(todo)) // max(len(numbers), 1)
    with tqdm(total=total, initial=done, unit="unit", desc=split, dynamic_ncols=True) as bar:
        for record in run_forked(slices.write, todo, options.workers):
            samples, size = samples + record["row"]["samples"], size + record["row"]["bytes"]
            bar.set_postfix(samples=samples, MB=size >> 20, refresh=False)
            bar.update(min(slices.units_per_shard, bar.total - bar.n))
    report = BuildReport(shards=slices.shards, done=sum(map(slices.is_done, range(slices.shards))))
    for record in map(slices.record, numbers):
        report.samples += record["row"]["samples"]
        report.size += record["row"]["bytes"]
        report.rejects.update(reason for reason, _ in record["rejects"])
    if report.done == report.shards:
        with (out / ROWS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two parts or splits may get here at once
            slices.remove_unfinished()
            if split not in _write_index(out):
                raise ValueError(f"{out}: every sample of {split!r} was rejected; see rejects.jsonl for the reasons")
    return report


def read_ids(path: Path) -> frozenset[str]:
    """Image ids of a file, one or several joined by "|" per line; raises ValueError for an empty file."""
    lines = path.read_text(encoding="utf-8").split()
    if not lines:
        raise ValueError(f"{path}: expected image ids such as coco:581857, one per line, got an empty file")
    return frozenset(image_id for line in lines for image_id in line.split("|"))


def _probe(source: Source, split: str) -> list[Draft | Reject]:
    """Drafts of some units from all over the source; raises ValueError when none of their images is there."""
    numbers = sorted(set(np.linspace(0, len(source) - 1, PROBES).astype(int).tolist()))
    probes = [draft for number in numbers for draft in source.unit(number)]
    paths = [path for draft in probes if isinstance(draft, Draft) for path in draft.images]
    if paths and not any(path.is_file() for path in paths):
        missing = f"{len(paths)} images looked for, none is there, first {paths[0]}"
        raise ValueError(f"split {split!r}: {missing}; use --images")
    return probes


@dataclass
class _Slices:
    """One split's shards as slices of its units, as every worker holds them."""

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

    def record(self, number: int) -> dict[str, Any]:
        """What `write` returned."""
        return json.loads((self.rows / f"{number:06d}.json").read_text(encoding="utf-8"))

    def is_done(self, number: int) -> bool:
        """Whether a shard's row is there, and the shard beside it (an empty one has no file)."""
        try:
            size = self.record(number)["row"]["bytes"]
            return not size or (self.options.out / shard_name(self.split, number)).stat().st_size == size
        except (OSError, ValueError):
            return False

    def remove_unfinished(self, pattern: str = "*") -> None:
        """Remove what killed builds left half written of the shards whose number fits the pattern."""
        for folder, name in (
            (self.options.out, f".{self.split}-{pattern}.tar.*.tmp"),
            (self.rows, f".{pattern}.json.*.tmp"),
        ):
            for path in folder.glob(name):
                path.unlink(missing_ok=True)

    def write(self, number: int) -> dict[str, Any]:
        """Write one shard, then its row: {"row": index row, "rejects": [[reason, where], ...]}."""
        units = self.units[number * self.units_per_shard : (number + 1) * self.units_per_shard]
        rejects: list[Reject] = []
        name, row = write_shard(self.options.out, self.split, number, self._samples(units.tolist(), rejects))
        if not row["samples"]:
            (self.options.out / name).unlink()
            row["bytes"] = 0
        record = {"row": row, "rejects": [[reject.reason, reject.where] for reject in rejects]}
        _write_text(self.rows / f"{number:06d}.json", json.dumps(record, ensure_ascii=False))
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
            size = file.width, file.height
            if info.width and (info.width, info.height) != size:
                got = f"{path.name} is {file.width} x {file.height}"
                return Reject("image-size", f"{sample.id}: expected {info.width} x {info.height}, {got}")
            if self.options.max_side is not None:
                try:
                    file = shrink(file, self.options.max_side, path)
                    new = file.width, file.height
                    sample.regions = [scale_region(r, size, new) if r.image == i else r for r in sample.regions]
                except ValueError as error:
                    return Reject("max-side", f"{sample.id}: {error}")
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


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _recipe(
    name: str, load: Load, source: SourceOptions, slices: _Slices, probes: list[Draft | Reject]
) -> dict[str, Any]:
    """Everything that the bytes depend on, beside the image files: another recipe is another set."""
    loader = sys.modules[(load.func if isinstance(load, partial) else load).__module__]
    used = {str(getattr(value, "__module__", "")) for value in vars(loader).values()}
    used |= {loader.__name__, __name__, read_image.__module__, write_index.__module__}
    files = [Path(str(sys.modules[module].__file__)) for module in sorted(used) if module.startswith("vistallm.")]
    records = [[probe.reason] if isinstance(probe, Reject) else probe.sample.to_json() for probe in probes]
    return {
        "source": name,
        "split": source.split,
        "seed": source.seed,
        "settings": source.settings,
        "units": len(slices.units),
        "units_per_shard": slices.units_per_shard,
        "max_side": slices.options.max_side,
        "excluded": _digest("\n".join(sorted(slices.excluded)).encode()) if slices.excluded else None,
        "annotations": _digest(json.dumps(records, sort_keys=True).encode()),
        "code": _digest(b"".join(path.read_bytes() for path in files)),
    }


def _claim(out: Path, path: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe, or compare with the one that is there; raises ValueError when `out` is of something else."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ROWS).exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected shards of {recipe['source']} or no files, got others; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.parent.glob("*/recipe.json"):
        old, keys = json.loads(other.read_text()), recipe if other == path else ("source",)
        wrong = [f"{key} {old.get(key)!r} -> {recipe[key]!r}" for key in keys if old.get(key) != recipe[key]]
        if wrong:
            raise ValueError(
                f"{out} was begun with another recipe ({', '.join(wrong)}); use the same one, choose another folder, "
                f"or delete {path.parent} and the split's shards to build it anew"
            )
    if not path.is_file():
        _write_text(path, json.dumps(recipe, indent=1))


def _write_index(out: Path) -> set[str]:
    """index.json and rejects.jsonl from the rows of all splits that are whole; returns those that have samples."""
    rows: dict[str, Row] = {}
    recipes: dict[str, str] = {}
    rejects, source = out / ".rejects.tmp", ""
    with rejects.open("w", encoding="utf-8") as file:
        for path in sorted((out / ROWS).glob("*/recipe.json")):
            recipe, split = json.loads(path.read_text()), path.parent.name
            names = [path.parent / f"{n:06d}.json" for n in range(-(-recipe["units"] // recipe["units_per_shard"]))]
            if not all(name.is_file() for name in names):
                continue
            source, recipes[split] = recipe["source"], _digest(path.read_bytes())
            for number, name in enumerate(names):
                record = json.loads(name.read_text(encoding="utf-8"))
                if record["row"]["samples"]:
                    rows[shard_name(split, number)] = record["row"]
                for reason, where in record["rejects"]:
                    line = {"split": split, "reason": reason, "where": where}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    rejects.replace(out / "rejects.jsonl")
    if rows:
        write_index(out, rows, source=source, recipe=recipes)
    return {row["split"] for row in rows.values()}


_function: list[Callable[[Any], Any]] = []  # set in a worker alone, before its first call


def _begin(function: Callable[[Any], Any]) -> None:
    """Keep the function, and end this process when the parent is killed: it would wait for work for ever."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    _function.append(function)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(argument: Any) -> Any:
    return _function[0](argument)


def run_forked(function: Callable[[Any], Any], arguments: Sequence[Any], workers: int | None) -> Iterator[Any]:
    """Yield `function` of each argument, in any order.

    Workers share what the function refers to (a loaded source) with the parent, so nothing but results is pickled.

    Args:
        function: runs in a forked process; with one worker, here.
        arguments: picklable, one per call.
        workers: processes; None = one per CPU.

    Raises:
        ValueError: a worker was killed. Whatever the function raises ends the whole.
    """
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), len(arguments)))
    if workers == 1:
        yield from map(function, arguments)
        return
    gc.collect()
    gc.freeze()  # the collector would write into pages that the workers share
    context = multiprocessing.get_context("fork")
    # An executor, unlike a multiprocessing pool, notices when a worker is killed.
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,)) as executor:
        futures = [executor.submit(_call, argument) for argument in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker was killed (out of memory?); lower --workers and run the command again"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)
            gc.unfreeze()
