"""Tar shards -> batches: an endless, deterministic training stream and a finite one for validation and evaluation.

The stream is cut into lanes (order.py). Batch n of the whole run, counted over all ranks, is the next batch of lane
n mod lanes, whatever the number of ranks and loader workers: it is theirs in turn. So the place in the data is one
number, and a run goes on with the very same batches on any ranks x workers that divide the lanes.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from vistallm.coinit.shards import RawSample, is_remote, read_raw
from vistallm.data.images import MAX_PIXELS, decode_sample
from vistallm.data.order import Epoch, Mixture, Visit, check_layout, lane_groups
from vistallm.data.sequence import Sequence, SequenceBuilder, collate
from vistallm.schema import Batch, SampleReject
from vistallm.tasks import TASKS

REJECTS_BEFORE_STOP = 100  # samples read before the share of rejects is judged


@dataclass
class RejectLog:
    """Counts rejects by reason and appends each to `path`; stops the run when too many samples are rejected."""

    path: Path | None
    max_share: float
    read: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    unwritten: int = 0
    last: str = "none"

    @property
    def total(self) -> int:
        """Rejects so far."""
        return sum(self.counts.values())

    def add(self, raw: RawSample, reject: SampleReject) -> None:
        """Record one reject; raises ValueError above `max_share` of the samples read."""
        self.counts[reject.reason] = self.counts.get(reject.reason, 0) + 1
        self.last = str(reject)
        self._write({"shard": raw.shard, "key": raw.key, "reason": reject.reason, "error": str(reject)})
        if self.read >= REJECTS_BEFORE_STOP and self.total > self.max_share * self.read:
            raise ValueError(
                f"{self.total} of {self.read} samples rejected {self.counts}, more than "
                f"data.max_reject_share={self.max_share}; see {self.path}, run "
                f"`python tools/build_coinit.py check DIR`, or raise the share. Last: {reject}"
            )

    def _write(self, line: dict[str, str]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not end a run; the counts go on
            self.unwritten += 1
            if self.unwritten == 1:
                print(f"{self.path}: {error}; rejects are counted but not written until there is room", flush=True)


class TrainStream(IterableDataset):
    """Endless batches of one rank.

    Args:
        mixture: the shards and their weights.
        batch_size: samples of one batch; buffer: undecoded samples that are shuffled together; mix: shards that a
            lane reads side by side; pool: batches that are filled together, so that sequences of like length share one.
        lanes: parts that the stream is cut into, a multiple of world_size x workers; None = exactly that many.
        done: batches that the run has trained on, over all ranks: they are skipped by the index.
    """

    def __init__(
        self,
        mixture: Mixture,
        builder: SequenceBuilder,
        *,
        batch_size: int,
        buffer: int,
        rejects: RejectLog,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        lanes: int | None = None,
        done: int = 0,
        pool: int = 1,
        mix: int = 16,
        cache: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__()
        readers = world_size * max(workers, 1)
        self.lanes = lanes or readers
        if self.lanes % readers:
            raise ValueError(
                f"data.lanes={self.lanes}: expected a multiple of {world_size} rank(s) x {max(workers, 1)} worker(s)"
            )
        check_layout(mixture, self.lanes)
        self.mixture, self.builder, self.rejects = mixture, builder, rejects
        self.batch_size, self.buffer, self.seed = batch_size, buffer, seed
        self.rank, self.world_size, self.workers = rank, world_size, max(workers, 1)
        self.done, self.pool, self.mix = done, pool, mix
        self.cache, self.max_pixels = cache, max_pixels

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        lanes: dict[int, Iterator[Batch]] = {}
        # The loader asks its workers in turn, from 0: the rank's batch number k is worker k mod workers's.
        number = self.done + self.rank + worker * self.world_size
        while True:
            turn, lane = divmod(number, self.lanes)
            if lane not in lanes:
                lanes[lane] = self._batches(lane, turn)
            yield next(lanes[lane])
            number += self.world_size * self.workers

    def _batches(self, lane: int, done: int) -> Iterator[Batch]:
        """Batches of one lane from its batch number `done` on."""
        pools, skip = divmod(done, self.pool)
        size = self.pool * self.batch_size
        samples = self._samples(lane, pools * size)
        while True:
            raws = list(islice(samples, size))
            yield from self._pool_batches(raws, f"{self.seed}-{lane}-{pools}")[skip:]
            pools, skip = pools + 1, 0

    def _pool_batches(self, raws: list[RawSample], seed: str) -> list[Batch]:
        """Build one pool: sequences of like length share a batch, and the batches are shuffled.

        A pool is a fixed number of samples READ and of batches made, whatever is rejected (batches then are a little
        smaller), so that the place in the stream is known from the number of batches alone.
        """
        rows: list[Sequence] = []
        before = self.rejects.total
        for raw in raws:
            self.rejects.read += 1
            try:
                sample = decode_sample(raw, self.builder.image_size, self.max_pixels)
                rows.append(self.builder.build(sample, random.Random(f"{self.seed}-{sample.id}-{raw.copy}")))
            except SampleReject as reject:
                self.rejects.add(raw, reject)
        if len(rows) < self.pool:
            raise ValueError(
                f"{len(rows)} of {len(raws)} samples are usable {self.rejects.counts}; see {self.rejects.path}. "
                f"Last: {self.rejects.last}"
            )
        rows.sort(key=lambda sequence: len(sequence.input_ids))
        edges = [round(i * len(rows) / self.pool) for i in range(self.pool + 1)]
        order = random.Random(seed).sample(range(self.pool), self.pool)
        batches = [collate(rows[edges[i] : edges[i + 1]], self.builder.vocabulary) for i in order]
        batches[0].rejects = self.rejects.total - before
        return batches

    def _samples(self, lane: int, skip: int) -> Iterator[RawSample]:
        """Raw samples of a lane, all epochs, the first `skip` left out by arithmetic; shuffled in blocks of `buffer`.

        Blocks, and not a sliding buffer, because the place in a block says which samples have been given.
        """
        number = 0
        while True:
            total = self.mixture.total(number)
            size = (lane + 1) * total // self.lanes - lane * total // self.lanes
            if skip < size:
                epoch = Epoch(self.mixture, self.seed, number)
                block, given = divmod(skip, self.buffer)
                samples = self._read(epoch, lane, block * self.buffer)
                while raws := list(islice(samples, self.buffer)):
                    random.Random(f"{self.seed}-{number}-{lane}-{block}").shuffle(raws)
                    del raws[len(raws) - given :]
                    while raws:
                        yield raws.pop()  # what is used is let go at once
                    block, given = block + 1, 0
            skip = max(skip - size, 0)
            number += 1

    def _read(self, epoch: Epoch, lane: int, skip: int) -> Iterator[RawSample]:
        """Raw samples of a lane in one epoch before they are shuffled, the first `skip` left out."""
        for visits, turns in lane_groups(epoch, lane, self.lanes, skip, self.mix):
            open_visits = [self._visit(visit) for visit in visits]
            for turn in turns:
                yield next(open_visits[turn])
            for visit in open_visits:
                next(visit, None)  # to its end: it closes its file and counts what was too much in it

    def _visit(self, visit: Visit) -> Iterator[RawSample]:
        """The samples of a visit, exactly as many as the index promises: those that aren't there come as faults."""
        shard = self.mixture.shards[visit.shard]
        takes, met, found = {take.task: take for take in visit.takes}, Counter[str](), 0
        promised = sum(take.high - take.low for take in visit.takes)

        def keep(task: str) -> bool:
            nonlocal found
            if task not in takes:
                return task not in TASKS
            met[task] += 1
            if not takes[task].low < met[task] <= takes[task].high:
                return False
            found += 1
            return visit.start < found <= visit.stop

        given, broken = visit.start, list[RawSample]()
        self._check_size(visit)
        for raw in read_raw(shard.place, keep, self.cache, shard.size):
            if raw.task not in takes:
                broken.append(raw)
                continue
            raw.copy = takes[raw.task].copy
            yield raw
            given += 1
            if given == visit.stop:
                break
        for number in range(max(found, visit.start), visit.stop):
            yield broken[number - found] if number - found < len(broken) else self._missing(visit, found, broken)
        if visit.stop == promised:
            for raw in broken[promised - found :]:
                self.rejects.add(raw, raw.fault or SampleReject("unknown-task", f"{raw.key}: task {raw.task!r}"))

    def _missing(self, visit: Visit, found: int, broken: list[RawSample]) -> RawSample:
        place = self.mixture.shards[visit.shard].place
        why = f"; {broken[-1].fault}" if broken and broken[-1].fault else ""
        promised = ", ".join(f"{take.high - take.low} of {take.task}" for take in visit.takes)
        text = f"{place}: the index promises {promised} in this part, {found} are there{why}"
        return RawSample(place, "", fault=SampleReject("missing-sample", text))

    def _check_size(self, visit: Visit) -> None:
        """Count a shard whose file is not the one of the index; what can be read of it is still used."""
        shard = self.mixture.shards[visit.shard]
        if shard.size is None or is_remote(shard.place) or not os.path.isfile(shard.place):
            return
        size = os.path.getsize(shard.place)
        if size != shard.size:
            text = f"{shard.place}: the index says {shard.size} bytes, the file has {size}; build or copy it again"
            self.rejects.add(RawSample(shard.place, ""), SampleReject("changed-shard", text))


def evaluation_sequences(
    shards: Iterable[Path | str], builder: SequenceBuilder, task: str, rejects: RejectLog, limit: int | None = None
) -> Iterator[Sequence]:
    """Yield the sequences of one task in file order with the fixed evaluation template, at most `limit`."""
    found = 0
    for shard in shards:
        for raw in read_raw(shard, lambda other: other == task):
            if limit is not None and found >= limit:
                return
            found += 1
            rejects.read += 1
            try:
                yield builder.build(decode_sample(raw))
            except SampleReject as reject:
                rejects.add(raw, reject)
