"""Tar shards -> batches: an endless, deterministic training stream and a finite one for validation and evaluation.

The order is a pure function of (seed, epoch, slot), where the slots are the loader workers of all ranks: shards are
permuted with a seed that every rank shares, then dealt to the slots; samples pass a shuffle buffer of undecoded bytes.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from vistallm.coinit.tasks import TASKS
from vistallm.data.collate import collate
from vistallm.data.sequence import SampleReject, SequenceBuilder
from vistallm.schema import Batch, Sample, Sequence

RawSample = dict[str, Any]  # "json": bytes, "0.jpg": bytes, ..., "__key__", "__url__"
REJECTS_BEFORE_STOP = 100  # samples read before the share of rejects is judged


def read_shard(path: Path) -> Iterator[RawSample]:
    """Yield the undecoded samples of one tar shard in file order (webdataset's own readers); ValueError if broken."""
    try:
        for group in group_by_keys(tar_file_expander(url_opener(iter([{"url": str(path)}])))):
            if group:
                yield group
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: not a readable tar file ({error.args[0]}); run `python tools/build_coinit.py check {path.parent}`"
        ) from error


def task_of(raw: RawSample) -> str | None:
    """Return the task of an undecoded sample, None when its JSON can't be read (decoding then rejects it)."""
    try:
        return str(json.loads(raw["json"])["task"])
    except (KeyError, TypeError, ValueError):
        return None


def decode_sample(raw: RawSample) -> Sample:
    """Decode JSON and images of a raw sample; raises SampleReject (bad-json, missing-image, bad-image)."""
    key = raw["__key__"]
    try:
        sample = Sample.from_json(json.loads(raw["json"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SampleReject("bad-json", f"{key}: {error}") from error
    sample.pixels = []
    for info in sample.images:
        data = raw.get(info.file.lower())
        if data is None:
            raise SampleReject("missing-image", f"{key}: no member {key}.{info.file} in the shard")
        # OpenCV raises for an empty buffer, but returns None for a broken one.
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
        if pixels is None or pixels.shape[:2] != (info.height, info.width):
            got = "nothing" if pixels is None else f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise SampleReject(
                "bad-image", f"{key}.{info.file}: expected {info.width}x{info.height} pixels, decoded {got}"
            )
        sample.pixels.append(pixels)
    return sample


@dataclass
class RejectLog:
    """Counts rejects by reason and appends each to `path`; stops the run when too many samples are rejected."""

    path: Path | None
    max_share: float
    read: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, raw: RawSample, reject: SampleReject) -> None:
        """Record one reject; raises ValueError above `max_share` of the samples read."""
        self.counts[reject.reason] = self.counts.get(reject.reason, 0) + 1
        if self.path is not None:
            line = {
                "shard": raw.get("__url__"),
                "key": raw.get("__key__"),
                "reason": reject.reason,
                "error": str(reject),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        total = sum(self.counts.values())
        if self.read >= REJECTS_BEFORE_STOP and total > self.max_share * self.read:
            raise ValueError(
                f"{total} of {self.read} samples rejected {self.counts}, more than "
                f"data.max_reject_share={self.max_share}; see {self.path}, run "
                f"`python tools/build_coinit.py check DIR`, or raise the share. Last: {reject}"
            )


class TrainStream(IterableDataset):
    """Endless batches of one rank; worker w of `workers` takes every `workers`-th slot of shards.

    Args:
        shards: all shard paths of the split, in index order.
        weights: task -> how often each of its samples is met per epoch (1 = once, 0.5 = every second one, 2 = twice).
        done: batches that this rank has already trained on: they are skipped without decoding an image.
        pool: batches that are filled together, so that sequences of like length share one.
    """

    def __init__(
        self,
        shards: list[Path],
        builder: SequenceBuilder,
        weights: dict[str, float],
        *,
        batch_size: int,
        buffer: int,
        rejects: RejectLog,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        done: int = 0,
        pool: int = 1,
    ) -> None:
        super().__init__()
        slots = world_size * max(workers, 1)
        if len(shards) < slots:
            raise ValueError(
                f"{len(shards)} training shards for {world_size} rank(s) x {max(workers, 1)} worker(s): "
                "each needs one; lower data.workers or write more, smaller shards"
            )
        self.shards, self.builder, self.weights, self.rejects = shards, builder, weights, rejects
        self.batch_size, self.buffer, self.seed = batch_size, buffer, seed
        self.rank, self.world_size, self.workers = rank, world_size, max(workers, 1)
        self.done, self.pool = done, pool

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        # The loader asks its workers in turn, from 0: after `done` batches the turn belongs to worker done % workers.
        lane = (worker + self.done) % self.workers
        pools, skip = divmod((self.done - lane + self.workers - 1) // self.workers, self.pool)
        slot = self.rank * self.workers + lane
        size = self.pool * self.batch_size
        samples = self._raw(slot, pools * size)
        while True:
            raws = list(islice(samples, size))
            yield from self._pool_batches(raws, f"{self.seed}-{slot}-{pools}")[skip:]
            pools, skip = pools + 1, 0

    def _pool_batches(self, raws: list[RawSample], seed: str) -> list[Batch]:
        """Build one pool: sequences of like length share a batch, and the batches are shuffled.

        A pool is a fixed number of samples READ and of batches made, whatever is rejected (batches then are a little
        smaller), so that the place in the stream is known from the number of batches alone.
        """
        rows: list[Sequence] = []
        for raw in raws:
            self.rejects.read += 1
            rng = random.Random(f"{self.seed}-{raw['__key__']}-{raw['__epoch__']}-{raw['__copy__']}")
            try:
                rows.append(self.builder.build(decode_sample(raw), rng))
            except SampleReject as reject:
                self.rejects.add(raw, reject)
        if len(rows) < self.pool:
            raise ValueError(
                f"{len(rows)} of {len(raws)} samples are usable {self.rejects.counts}; see {self.rejects.path}"
            )
        rows.sort(key=lambda sequence: len(sequence.input_ids))
        edges = [round(i * len(rows) / self.pool) for i in range(self.pool + 1)]
        order = random.Random(seed).sample(range(self.pool), self.pool)
        return [collate(rows[edges[i] : edges[i + 1]], self.builder.vocabulary) for i in order]

    def _raw(self, slot: int, skip: int) -> Iterator[RawSample]:
        """Shuffled raw samples of all epochs, the first `skip` left out."""
        epoch = 0
        while True:
            rng = random.Random(f"{self.seed}-{epoch}")
            order = rng.sample(range(len(self.shards)), len(self.shards))
            mine = order[slot :: self.world_size * self.workers]
            mixer = random.Random(f"{self.seed}-{epoch}-{slot}")
            for raw in _shuffled(self._weighted(mine, epoch), self.buffer, mixer):
                if skip > 0:
                    skip -= 1
                    continue
                yield raw
            epoch += 1

    def _weighted(self, shards: list[int], epoch: int) -> Iterator[RawSample]:
        for number in shards:
            for raw in read_shard(self.shards[number]):
                task = task_of(raw)
                weight = 1.0 if task is None else self.weights.get(task, 0.0)
                copies, rest = divmod(weight, 1)
                # A generator is drawn for broken weights alone: this runs for every sample, also those left out.
                if rest and random.Random(f"{self.seed}-{epoch}-{raw['__key__']}-weight").random() < rest:
                    copies += 1
                for copy in range(int(copies)):
                    yield {**raw, "__epoch__": epoch, "__copy__": copy}


def _shuffled(samples: Iterator[RawSample], size: int, rng: random.Random) -> Iterator[RawSample]:
    buffer: list[RawSample] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) >= size:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def evaluation_sequences(
    shards: list[Path], builder: SequenceBuilder, task: str, rejects: RejectLog, limit: int | None = None
) -> Iterator[Sequence]:
    """Yield the sequences of one task in file order with the fixed evaluation template, at most `limit`."""
    found = 0
    for shard in shards:
        for raw in read_shard(shard):
            if task_of(raw) not in (task, None):
                continue
            if limit is not None and found >= limit:
                return
            found += 1
            rejects.read += 1
            try:
                yield builder.build(decode_sample(raw))
            except SampleReject as reject:
                rejects.add(raw, reject)


def stage_weights(weights: dict[str, float], stage: int) -> dict[str, float]:
    """Return the mixture: `weights` as given, or every single-image (stage 1) or multi-image (stage 2) task once."""
    unknown = sorted(set(weights) - set(TASKS))
    if unknown:
        raise ValueError(f"data.weights: unknown task(s) {', '.join(unknown)}; known: {', '.join(TASKS)}")
    return dict(weights) or {name: 1.0 for name, task in TASKS.items() if task.multi_image == (stage == 2)}
