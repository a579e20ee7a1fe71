"""Source -> shards: plans fixed slices of units, forks workers, writes whole shards, and goes on after a kill.

The bytes depend on the recipe alone, never on workers, parts or interruptions: shard k of a split holds the samples of
a fixed slice of the units, those of one image next to one another (the images shuffled by the seed for training
splits). A shard is done when its row lies in `.build/<split>/`; index.json and rejects.jsonl are written from the rows
when a split has them all.
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
ACCEPTED = "accepted"  # marks the rows of a split that has few rejects, or as many as the user allows
PROBES = 64  # units looked at before the build: for samples per unit, and to notice other annotation files
Load = Callable[[SourceOptions], Source]
_File = tuple[tuple[int, int], ImageFile]  # (width, height) of a file, and what the shard holds of it


@dataclass(frozen=True)
class BuildOptions:
    """How a source is built.

    Attributes:
        out: folder of the source's shards. samples_per_shard: about this many.
        max_side: shrink larger images to this many pixels; None = copy the files as they are.
        exclude: file of image ids, one per line, whose training samples are dropped.
        workers: processes, None = one per CPU. part: (i, n), take shards i, i + n, ...; neither changes the bytes.
        max_rejects: a larger share of rejects, those that `exclude` asks for not counted, fails the build.
    """

    out: Path
    samples_per_shard: int = 1000
    max_side: int | None = None
    exclude: Path | None = None
    workers: int | None = None
    part: tuple[int, int] = (0, 1)
    max_rejects: float = 0.01

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

    def add(self, record: dict[str, Any]) -> None:
        """Count a shard by its row and rejects."""
        self.samples += record["row"]["samples"]
        self.size += record["row"]["bytes"]
        self.rejects.update(reason for reason, _ in record["rejects"])


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
    step = max(1, round(options.samples_per_shard / max(per_unit, 1e-3)))
    units, starts = _order(source, source_options.seed if is_training(split) else None, step, options.workers)
    slices = _Slices(source, split, options, units, starts, excluded)
    _claim(out, slices.rows / "recipe.json", _recipe(name, load, source_options, slices, probes))
    numbers = list(range(options.part[0], len(slices.starts), options.part[1]))
    todo = [number for number in numbers if not slices.is_done(number)]
    for number in todo:  # no other part writes these shards
        slices.remove_unfinished(f"{number:06d}")
    report = BuildReport(shards=len(starts))
    for number in sorted(set(numbers) - set(todo)):
        report.add(slices.record(number))
    total, done = len(units) // options.part[1], len(units) * (len(numbers) - len(todo)) // max(len(numbers), 1)
    with tqdm(total=total, initial=done, unit="unit", desc=split, dynamic_ncols=True) as bar:
        for record in run_forked(slices.write, todo, options.workers):
            report.add(record)
            bar.set_postfix(samples=report.samples, MB=report.size >> 20, refresh=False)
            bar.update(min(step, bar.total - bar.n))
    report.done = sum(map(slices.is_done, range(len(starts))))
    if report.done == report.shards:
        with (out / ROWS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two parts or splits may get here at once
            slices.remove_unfinished()
            fault, accepted = slices.too_many_rejects(), slices.rows / ACCEPTED
            accepted.unlink(missing_ok=True) if fault else accepted.touch()
            _write_index(out)
            if fault:
                raise ValueError(fault)
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


def _order(source: Source, seed: int | None, step: int, workers: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Units in the order of the shards, (N,) int64, and where in it each shard begins, about every `step` units.

    Units whose samples begin with the same image follow one another, in one shard, which stores the image once. Images
    come in the order of their first units, or shuffled by the seed.
    """

    def first_images(begin: int) -> list[int]:
        images = []
        for number in range(begin, min(begin + 1000, len(source))):
            draft = next((draft for draft in source.unit(number) if isinstance(draft, Draft)), None)
            name = str(draft.images[0] if draft else number)
            images.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
        return [begin, *images]

    begins = range(0, len(source), 1000)
    slices = sorted(tqdm(run_forked(first_images, begins, workers), "order", len(begins), leave=False, delay=2))
    images = np.array([image for _, *images in slices for image in images], np.uint64)
    _, first, group = np.unique(images, return_index=True, return_inverse=True)
    rank = np.arange(len(source))
    if seed is not None:
        rank = np.argsort(np.random.default_rng([seed, len(source)]).permutation(rank))
    rank = rank[first[group]]  # that of the first unit with the same image
    order = np.argsort(rank, kind="stable")
    starts = np.arange(0, len(source), step)
    ends = np.append(np.flatnonzero(np.diff(rank[order])) + 1, len(source))  # of the units of each image
    moved = ends[np.searchsorted(ends, starts)]
    moved[0] = 0
    starts = np.unique(
        np.where(moved - starts < step, moved, starts)
    )  # an image of very many units is cut all the same
    return order, starts[starts < len(source)]


@dataclass
class _Slices:
    """One split's shards as slices of its units, as every worker holds them."""

    source: Source
    split: str
    options: BuildOptions
    units: np.ndarray  # (N,) int, unit numbers in the order of the shards
    starts: np.ndarray  # (shards,) int, where in `units` each shard begins; some may end up empty
    excluded: frozenset[str]

    @property
    def rows(self) -> Path:
        """Folder of the split's recipe and rows."""
        return self.options.out / ROWS / self.split

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
        units = self.units[self.starts[number] : [*self.starts, len(self.units)][number + 1]]
        rejects: list[Reject] = []
        name, row = write_shard(self.options.out, self.split, number, self._samples(units.tolist(), rejects))
        if not row["samples"]:
            (self.options.out / name).unlink()
            row["bytes"] = 0
        record = {"row": row, "rejects": [[reject.reason, reject.where] for reject in rejects]}
        _write_text(self.rows / f"{number:06d}.json", json.dumps(record, ensure_ascii=False))
        return record

    def _samples(self, units: list[int], rejects: list[Reject]) -> Iterator[tuple[Sample, list[EncodedImage]]]:
        files: dict[Path, _File | Reject] = {}  # neighbours mostly share their images
        for unit in units:
            for draft in self.source.unit(unit):
                finished = draft if isinstance(draft, Reject) else self._finish(draft, files)
                if isinstance(finished, Reject):
                    rejects.append(finished)
                else:
                    yield finished
            if len(files) > 8:
                files.clear()

    def _finish(self, draft: Draft, files: dict[Path, _File | Reject]) -> tuple[Sample, list[EncodedImage]] | Reject:
        """Read a draft's images and fill in their names and sizes."""
        sample, encoded = draft.sample, []
        if self.excluded and (leaked := sorted(sample_images(sample) & self.excluded)):
            return Reject("excluded", f"{sample.id}: image {leaked[0]} is of an evaluation split")
        for i, (info, path) in enumerate(zip(sample.images, draft.images, strict=True)):
            if path not in files:
                files[path] = self._read(path)
            file = files[path]
            if isinstance(file, Reject):
                return Reject(file.reason, f"{sample.id}: {file.where}")
            (width, height), image = file
            if info.width and (info.width, info.height) != (width, height):
                got = f"{path.name} is {width} x {height} (as stored: an EXIF orientation is not applied)"
                return Reject("image-size", f"{sample.id}: expected {info.width} x {info.height}, {got}")
            regions = [region for region in sample.regions if region.image == i]
            if boxes := [r.box for r in regions if r.box is not None and is_normalised(r.box)]:
                return Reject("normalised-box", f"{sample.id}: expected boxes in pixels, got {list(boxes[0])}")
            try:
                new = image.width, image.height
                scaled = iter([scale_region(region, (width, height), new) for region in regions])
            except ValueError as error:
                return Reject("max-side", f"{sample.id}: {error}")
            sample.regions = [next(scaled) if region.image == i else region for region in sample.regions]
            sample.images[i] = ImageInfo(f"{i}.{image.suffix}", *new)
            encoded.append((image.data, image.suffix))
        return sample, encoded

    def _read(self, path: Path) -> _File | Reject:
        try:
            image = read_image(path)
            size, max_side = (image.width, image.height), self.options.max_side
            return size, image if max_side is None else shrink(image, max_side, path)
        except OSError as error:
            return Reject("missing-image", f"{path} ({error.strerror or error})")
        except ValueError as error:
            return Reject("broken-image", str(error))

    def too_many_rejects(self) -> str | None:
        """Why the split must not be used as it is, None when its rejects are few enough."""
        samples, counts, examples = 0, Counter[str](), dict[str, str]()
        for record in map(self.record, range(len(self.starts))):
            samples += record["row"]["samples"]
            counts.update(reason for reason, _ in record["rejects"])
            examples = dict(record["rejects"]) | examples
        unwanted = counts.total() - counts["excluded"]
        if samples and unwanted <= self.options.max_rejects * (unwanted + samples):
            return None
        reason, count = counts.most_common(1)[0]
        share = f"{unwanted} of {unwanted + samples} samples were rejected" if samples else "every sample was rejected"
        share += f", expected at most {self.options.max_rejects:.1%}"
        example = f"most often {reason} ({count}), as in {examples[reason]!r}; all are in rejects.jsonl"
        do = "Correct the cause and build into a new folder, or accept a larger share with --max-rejects"
        return f"{self.options.out}, split {self.split!r}: {share}; {example}. {do}"


def is_normalised(box: Sequence[float]) -> bool:
    """Whether a box (x0, y0, x1, y1) must be in shares of the image's sides: in pixels it is in the first pixel."""
    return max(box) <= 1


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
        "shards": len(slices.starts),
        "order": _digest(slices.units.tobytes() + slices.starts.tobytes()),
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


def _write_index(out: Path) -> None:
    """rejects.jsonl from the rows of all splits that are whole, and index.json from those of the accepted ones."""
    rows: dict[str, Row] = {}
    recipes: dict[str, str] = {}
    rejects, source = out / ".rejects.tmp", ""
    with rejects.open("w", encoding="utf-8") as file:
        for path in sorted((out / ROWS).glob("*/recipe.json")):
            recipe, split = json.loads(path.read_text()), path.parent.name
            names = [path.parent / f"{number:06d}.json" for number in range(recipe["shards"])]
            if not all(name.is_file() for name in names):
                continue
            accepted = (path.parent / ACCEPTED).is_file()
            if accepted:
                source, recipes[split] = recipe["source"], _digest(path.read_bytes())
            for number, name in enumerate(names):
                record = json.loads(name.read_text(encoding="utf-8"))
                if record["row"]["samples"] and accepted:
                    rows[shard_name(split, number)] = record["row"]
                for reason, where in record["rejects"]:
                    line = {"split": split, "reason": reason, "where": where}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    rejects.replace(out / "rejects.jsonl")
    if rows:
        write_index(out, rows, source=source, recipe=recipes)


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
