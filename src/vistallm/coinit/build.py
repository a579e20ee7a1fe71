"""Source -> shards: plans fixed slices of units, forks workers, writes whole shards, and goes on after a kill.

The bytes depend on the recipe alone, never on workers, parts or interruptions: shard k of a split holds the drafts of a
fixed slice of the units (shuffled by the seed for training splits). A shard is done when its row lies in
`.build/<split>/`; index.json and rejects.jsonl are written from the rows when a split has them all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vistallm.coinit.images import read_image
from vistallm.coinit.job import ROWS, BuildOptions, Job, write_text
from vistallm.coinit.leaks import is_training, read_ids
from vistallm.coinit.shards import Row, shard_name, write_index
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceOptions
from vistallm.coinit.workers import run_forked

PROBES = 64  # units looked at before the build: for samples per unit, and to tell another edition of the files
Load = Callable[[SourceOptions], Source]


@dataclass
class Result:
    """What a build wrote: this part's samples and rejects by reason, and whether the split is now whole."""

    samples: int = 0
    size: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    done: int = 0
    shards: int = 0


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
    job = Job(
        source,
        source_options.split,
        options,
        _order(len(source), source_options),
        max(1, round(options.samples_per_shard / max(per_unit, 1e-3))),
        excluded,
    )
    recipe = _recipe(name, load, source_options, job, probes)
    _claim(options.out, job.rows / "recipe.json", recipe)
    numbers = list(range(options.part[0], job.shards, options.part[1]))
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


def _recipe(name: str, load: Load, source: SourceOptions, job: Job, probes: list[Draft | Reject]) -> dict[str, Any]:
    """Everything that the bytes depend on, beside the image files: another recipe is another set."""
    loader = sys.modules[(load.func if isinstance(load, partial) else load).__module__]
    used = {str(getattr(value, "__module__", "")) for value in vars(loader).values()}
    modules = {name for name in used if name.startswith("vistallm.")}
    modules |= {loader.__name__, __name__, read_image.__module__, Job.__module__, write_index.__module__}
    code, data = hashlib.sha256(), hashlib.sha256()
    for module in sorted(modules):
        code.update(Path(str(sys.modules[module].__file__)).read_bytes())
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
        write_text(path, json.dumps(recipe, indent=1))


def _run(job: Job, numbers: list[int]) -> None:
    """Write the shards that are not done yet, in workers, under a progress bar."""
    todo = [number for number in numbers if not job.is_done(number)]
    for number in todo:  # what a killed build left half written; no other part writes these shards
        for left in job.options.out.glob(f".{shard_name(job.split, number)}.*"):
            left.unlink(missing_ok=True)
    count, samples, size = len(job.units), 0, 0
    done = count * (len(numbers) - len(todo)) // max(len(numbers), 1)
    with tqdm(total=count // job.options.part[1], initial=done, unit="unit", desc=job.split, dynamic_ncols=True) as bar:
        for record in run_forked(job.write, todo, job.options.workers):
            samples, size = samples + record["row"]["samples"], size + record["row"]["bytes"]
            bar.set_postfix(samples=samples, MB=size >> 20, refresh=False)
            bar.update(min(job.units_per_shard, bar.total - bar.n))


def _collect(job: Job, numbers: list[int]) -> Result:
    """Count what the rows of this part say; write index.json and rejects.jsonl when the split has every row."""
    result = Result(shards=job.shards, done=sum(map(job.is_done, range(job.shards))))
    for record in map(job.record, numbers):
        result.samples += record["row"]["samples"]
        result.size += record["row"]["bytes"]
        result.rejects.update(reason for reason, _ in record["rejects"])
    if result.done == result.shards:
        with (job.options.out / ROWS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two parts or splits may get here at once
            if job.split not in _write_index(job.options.out):
                raise ValueError(
                    f"{job.options.out}: every sample of {job.split!r} was rejected; see rejects.jsonl for the reasons"
                )
    return result


def _write_index(out: Path) -> set[str]:
    """index.json and rejects.jsonl from the rows of all splits that are whole; returns those that have samples."""
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
    rejects.replace(out / "rejects.jsonl")
    if rows:
        write_index(out, rows, source=source, recipe=recipes)
    return {row["split"] for row in rows.values()}
