"""Source -> shards: plans fixed slices of units, forks workers, writes whole shards, and goes on after a kill.

Bytes depend on the recipe alone, not on workers or stops. A shard is done when its row is in `.build/<split>`.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vistallm.coinit.images import ImageFile, read_image
from vistallm.coinit.shards import EncodedImage, Row, shard_name, write_index, write_shard, write_text
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceOptions, is_training, sample_images
from vistallm.schema import ImageInfo, Sample

ROWS = ".build"  # folder beside the shards: a recipe per split and a row per finished shard
FINISHED = "finished"  # beside the rows of a whole split: "accepted", or "refused" for its many rejects
PROBES = 64  # units looked at before the build: for samples per unit, and to notice other annotation files
Load = Callable[[SourceOptions], Source]


@dataclass(frozen=True)
class BuildOptions:
    """How a source is built; `workers` does not change the bytes."""

    out: Path  # folder of the source's shards
    samples_per_shard: int = 1000  # about this many
    exclude: Path | None = None  # file of image ids, one per line, whose training samples are dropped
    workers: int | None = None  # processes; None = one per CPU
    max_rejects: float = 0.01  # a larger share, those that `exclude` drops not counted, fails the build

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"expected samples per shard of at least 1, got {self.samples_per_shard}")


@dataclass
class BuildReport:
    """What some shards hold: samples, bytes, rejects by reason with an example."""

    samples: int = 0
    size: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Count a shard by its row and rejects."""
        self.samples += record["row"]["samples"]
        self.size += record["row"]["bytes"]
        self.rejects.update(reason for reason, _ in record["rejects"])
        self.examples = dict(record["rejects"]) | self.examples


def build(name: str, load: Load, source_options: SourceOptions, options: BuildOptions) -> BuildReport:
    """Build one split of the source that `load` reads, or go on with it; returns what its shards hold.

    Raises:
        ValueError: the files are not as documented, nothing can be built, or `out` holds something else.
    """
    split = source_options.split
    if options.exclude is not None and not is_training(split):
        raise ValueError(f"--exclude drops training samples, but the split is {split!r}; leave it away")
    excluded = read_ids(options.exclude) if options.exclude else frozenset()
    source = load(source_options)
    if not len(source):
        raise ValueError(f"{name}, split {split!r}: no unit in {source_options.root}; check --split")
    numbers = sorted(set(np.linspace(0, len(source) - 1, PROBES).astype(int).tolist()))
    probes = [draft for number in numbers for draft in source.unit(number)]
    paths = [path for draft in probes if isinstance(draft, Draft) for path in draft.images]
    if paths and not any(path.is_file() for path in paths):
        missing = f"{len(paths)} images looked for, none is there, first {paths[0]}"
        raise ValueError(f"split {split!r}: {missing}; use --images")
    per_unit = sum(isinstance(probe, Draft) for probe in probes) / len(numbers)
    step = max(1, round(options.samples_per_shard / max(per_unit, 1e-3)))
    units, starts = _order(source, source_options.seed if is_training(split) else None, step, options.workers)
    slices = _Slices(source, split, options, units, starts, excluded)
    shown = [[probe.reason] if isinstance(probe, Reject) else probe.sample.to_json() for probe in probes]
    recipe = {"source": name, "seed": source_options.seed, "settings": source_options.settings}
    recipe["order"] = _digest(units.tobytes() + starts.tobytes())
    recipe["excluded"] = _digest("\n".join(sorted(excluded)).encode()) if excluded else None
    slices.claim(recipe | {"annotations": _digest(json.dumps(shown, sort_keys=True).encode())})
    records = [slices.record(number) for number in range(len(starts))]
    report, todo = BuildReport(), [number for number, record in enumerate(records) if record is None]
    for record in filter(None, records):
        report.add(record)
    with tqdm(total=len(starts), initial=len(starts) - len(todo), unit="shard", desc=split) as bar:
        for record in run_forked(slices.write, todo, options.workers):
            report.add(record)
            bar.set_postfix(samples=report.samples, MB=report.size >> 20, refresh=False)
            bar.update()
    slices.finish(report)
    return report


def read_ids(path: Path) -> frozenset[str]:
    """Image ids of a file, one or several joined by "|" per line; raises ValueError for an empty file."""
    lines = path.read_text(encoding="utf-8").split()
    if not lines:
        raise ValueError(f"{path}: expected image ids such as coco:581857, one per line, got an empty file")
    return frozenset(image_id for line in lines for image_id in line.split("|"))


def _order(source: Source, seed: int | None, step: int, workers: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Units in the order of the shards, (N,) int64, and where in it each shard begins, about every `step` units.

    Units whose samples begin with the same image follow one another, in one shard, which stores the image once. Images
    come in the order of their first units, or shuffled by the seed.
    """

    def first_image(number: int) -> int:
        draft = next((draft for draft in source.unit(number) if isinstance(draft, Draft)), None)
        return text_number(str(draft.images[0] if draft else number))

    units = range(len(source))
    running = tqdm(run_forked(first_image, units, workers, 1000), "order", len(units), leave=False, delay=2)
    _, first, group = np.unique(np.fromiter(running, np.uint64), return_index=True, return_inverse=True)
    rank = np.arange(len(units))
    if seed is not None:
        rank = np.argsort(np.random.default_rng([seed, len(units)]).permutation(rank))
    rank = rank[first[group]]  # that of the first unit with the same image
    order = np.argsort(rank, kind="stable")
    starts = np.arange(0, len(units), step)
    ends = np.append(np.flatnonzero(np.diff(rank[order])) + 1, len(units))  # of the units of each image
    moved = ends[np.searchsorted(ends, starts)]
    moved[0] = 0
    starts = np.unique(np.where(moved - starts < step, moved, starts))  # an image of very many units is cut
    return order, starts[starts < len(units)]


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

    def claim(self, recipe: dict[str, Any]) -> None:
        """Write the recipe, or compare with what is there; raises ValueError when `out` is of something else."""
        out, path = self.options.out, self.rows / "recipe.json"
        if out.is_dir() and any(out.iterdir()) and not (out / ROWS).exists():
            raise ValueError(f"{out}: expected shards of {recipe['source']} or no files; choose another folder")
        self.rows.mkdir(parents=True, exist_ok=True)
        for other in (out / ROWS).glob("*/recipe.json"):
            old, keys = json.loads(other.read_text()), recipe if other == path else ("source",)
            if wrong := [f"{key} {old.get(key)!r} -> {recipe[key]!r}" for key in keys if old.get(key) != recipe[key]]:
                raise ValueError(
                    f"{out} was begun with another recipe ({', '.join(wrong)}); use the same one, choose another "
                    f"folder, or delete {self.rows} and the split's shards to build it anew"
                )
        if not path.is_file():
            write_text(path, json.dumps(recipe, indent=1))
        for left in (*out.glob(f".{self.split}-*.tar.*.tmp"), *self.rows.glob(".*.json.*.tmp")):  # of killed builds
            left.unlink()

    def record(self, number: int) -> dict[str, Any] | None:
        """What `write` returned; None when the shard is to be written (an empty one has a row and no file)."""
        try:
            record = json.loads((self.rows / f"{number:06d}.json").read_text(encoding="utf-8"))
            size = record["row"]["bytes"]
            if not size or (self.options.out / shard_name(self.split, number)).stat().st_size == size:
                return record
        except (OSError, ValueError):
            pass
        return None

    def write(self, number: int) -> dict[str, Any]:
        """Write one shard, then its row: {"row": index row, "rejects": [[reason, where], ...]}."""
        units = self.units[self.starts[number] : [*self.starts, len(self.units)][number + 1]].tolist()
        read = lru_cache(8)(read_image)  # neighbours mostly share their images
        rejects: list[list[str]] = []

        def samples() -> Iterator[tuple[Sample, list[EncodedImage]]]:
            for draft in (draft for unit in units for draft in self.source.unit(unit)):
                finished = draft if isinstance(draft, Reject) else self._finish(draft, read)
                if isinstance(finished, Reject):
                    rejects.append([finished.reason, finished.where])
                else:
                    yield finished

        name, row = write_shard(self.options.out, self.split, number, samples())
        if not row["samples"]:
            (self.options.out / name).unlink()
            row["bytes"] = 0
        record = {"row": row, "rejects": rejects}
        write_text(self.rows / f"{number:06d}.json", json.dumps(record, ensure_ascii=False))
        return record

    def _finish(self, draft: Draft, read: Callable[[Path], ImageFile]) -> tuple[Sample, list[EncodedImage]] | Reject:
        """Read a draft's images and fill in their names and sizes."""
        sample, encoded = draft.sample, []
        if leaked := sorted(sample_images(sample) & self.excluded):
            return Reject("excluded", f"{sample.id}: image {leaked[0]} is of an evaluation split")
        for i, (info, path) in enumerate(zip(sample.images, draft.images, strict=True)):
            try:
                image = read(path)
            except OSError as error:
                return Reject("missing-image", f"{sample.id}: {path} ({error.strerror or error})")
            except ValueError as error:
                return Reject("broken-image", f"{sample.id}: {error}")
            width, height = image.size
            if info.width and (info.width, info.height) != (width, height):
                got = f"{path.name} is {width} x {height} (as stored: an EXIF orientation is not applied)"
                return Reject("image-size", f"{sample.id}: expected {info.width} x {info.height}, {got}")
            if boxes := [r.box for r in sample.regions if r.image == i and r.box is not None and is_normalised(r.box)]:
                return Reject("normalised-box", f"{sample.id}: expected boxes in pixels, got {list(boxes[0])}")
            sample.images[i] = ImageInfo(f"{i}.{image.suffix}", *image.size)
            encoded.append((image.data, image.suffix))
        return sample, encoded

    def finish(self, whole: BuildReport) -> None:
        """Write the folder's index; raises ValueError, after that, when too many samples of the split are rejects."""
        unwanted = whole.rejects.total() - whole.rejects["excluded"]
        total = unwanted + whole.samples
        accepted = whole.samples > 0 and unwanted <= self.options.max_rejects * total
        out = self.options.out
        with (out / ROWS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two splits may get here at once
            (self.rows / FINISHED).write_text("accepted" if accepted else "refused")
            _write_index(out)
        if not accepted:
            reason, count = whole.rejects.most_common(1)[0]
            share = f"{unwanted} of {total} samples were rejected" if whole.samples else "every sample was rejected"
            raise ValueError(
                f"{out}, split {self.split!r}: {share}, expected at most {self.options.max_rejects:.1%}; most often "
                f"{reason} ({count}), as in {whole.examples[reason]!r}; all are in rejects.jsonl. Correct the cause "
                "and build into a new folder, or accept a larger share with --max-rejects"
            )


def is_normalised(box: Sequence[float]) -> bool:
    """Whether a box (x0, y0, x1, y1) must be in shares of the image's sides: in pixels it is in the first pixel."""
    return max(box) <= 1


def text_number(text: str) -> int:
    """A text as 64 bits: two of ten million texts share them with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _write_index(out: Path) -> None:
    """rejects.jsonl from the rows of all finished splits, and index.json from those of the accepted ones."""
    rows: dict[str, Row] = {}
    recipes: dict[str, str] = {}
    rejects, source = [], ""
    for mark in sorted((out / ROWS).glob(f"*/{FINISHED}")):
        split, recipe, accepted = mark.parent.name, mark.with_name("recipe.json"), mark.read_text() == "accepted"
        if accepted:
            source, recipes[split] = json.loads(recipe.read_text())["source"], _digest(recipe.read_bytes())
        for path in sorted(mark.parent.glob("[0-9]*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["row"]["samples"] and accepted:
                rows[shard_name(split, int(path.stem))] = record["row"]
            lines = [{"split": split, "reason": reason, "where": where} for reason, where in record["rejects"]]
            rejects += [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    write_text(out / "rejects.jsonl", "".join(rejects))
    if rows:
        write_index(out, rows, source=source, recipe=recipes)


_forked: Callable[[Any], Any]  # what the workers call: they inherit it, so that it need not be pickled


def _call(argument: Any) -> Any:
    return _forked(argument)


def run_forked(
    function: Callable[[Any], Any], arguments: Sequence[Any], workers: int | None, chunk: int = 1
) -> Iterator[Any]:
    """Yield `function` of each argument, in order, by forked processes (None = one per CPU), or here if one is enough.

    Workers share what the function refers to (a loaded source) with the parent; arguments are sent `chunk` at once.

    Raises:
        ValueError: a worker was killed. Whatever the function raises ends the whole, too.
    """
    global _forked
    workers = min(workers or len(os.sched_getaffinity(0)), -(-len(arguments) // chunk))
    if workers <= 1:
        yield from map(function, arguments)
        return
    _forked = function
    gc.collect()
    gc.freeze()  # the collector would write into pages that the workers share
    end_with_parent = ctypes.CDLL(None).prctl, (1, signal.SIGKILL)  # PR_SET_PDEATHSIG; else they wait for work for ever
    # An executor, unlike a multiprocessing pool, notices when a worker is killed.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), *end_with_parent) as executor:
        try:
            yield from executor.map(_call, arguments, chunksize=chunk)
        except BrokenProcessPool as error:
            raise ValueError("a worker was killed (out of memory?); lower --workers and run it again") from error
        finally:
            gc.unfreeze()
