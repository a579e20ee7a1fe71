"""Tar shards -> batches: an endless, deterministic training stream and a finite one for validation and evaluation.

The stream is cut into lanes (order.py). Batch n of the whole run, counted over all ranks, is the next batch of lane
n mod lanes, whatever the number of ranks and loader workers: it is theirs in turn. So the place in the data is one
number, and a run goes on with the very same batches on any ranks x workers that divide the lanes.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vistallm.coinit.frames import choose_frames
from vistallm.coinit.shards import RawSample, is_remote, read_raw
from vistallm.config import Config, DataConfig
from vistallm.data.images import decode_sample
from vistallm.data.order import Epoch, Mixture, Shard, Visit, check_layout, lane_groups
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
    counts: Counter[str] = field(default_factory=Counter)
    unwritten: int = 0
    last: str = "none"

    def add(self, raw: RawSample, reject: SampleReject) -> None:
        """Record one reject; raises ValueError above `max_share` of the samples read."""
        self.counts[reject.reason] += 1
        self.last = str(reject)
        line = {"shard": raw.shard, "key": raw.key, "reason": reject.reason, "error": str(reject)}
        try:
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not end a run; the counts go on
            self.unwritten += 1
            if self.unwritten == 1:
                print(f"{self.path}: {error}; rejects are counted but not written until there is room", flush=True)
        rejected = self.counts.total()
        if self.read >= REJECTS_BEFORE_STOP and rejected > self.max_share * self.read:
            raise ValueError(
                f"{rejected} of {self.read} samples rejected {dict(self.counts)}, more than "
                f"data.max_reject_share={self.max_share}; see {self.path}, run "
                f"`python tools/build_coinit.py check DIR`, or raise the share. Last: {reject}"
            )


def reject_log(config: Config) -> RejectLog:
    """A new log of rejects that appends to rejects.jsonl of the run folder."""
    return RejectLog(Path(str(config.run_dir)) / "rejects.jsonl", config.data.max_reject_share)


class TrainStream(IterableDataset):
    """Endless batches of one rank.

    `data.lanes` must be a multiple of world_size x workers; None = exactly that many. The first `done` batches of the
    run, over all ranks, are skipped by the index. `collate` makes a batch of sequences and the vocabulary.
    """

    def __init__(
        self,
        mixture: Mixture,
        builder: SequenceBuilder,
        data: DataConfig,
        rejects: RejectLog,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        done: int = 0,
        collate: Callable[..., Any] = collate,
    ) -> None:
        super().__init__()
        self.collate = collate
        self.mixture, self.builder, self.data, self.rejects = mixture, builder, data, rejects
        self.seed, self.rank, self.world_size, self.done = seed, rank, world_size, done
        self.workers = max(data.workers, 1)
        self.lanes = data.lanes or world_size * self.workers
        if self.lanes % (world_size * self.workers):
            raise ValueError(
                f"data.lanes={self.lanes}: expected a multiple of {world_size} rank(s) x {self.workers} worker(s)"
            )
        check_layout(mixture, self.lanes)
        self.block = round(data.shuffle_buffer * mixture.samples_per_image)

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
        pools, skip = divmod(done, self.data.pool_batches)
        size = self.data.pool_batches * self.data.batch_size
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
        before, pool = self.rejects.counts.total(), self.data.pool_batches
        for raw in raws:
            self.rejects.read += 1
            try:
                chosen = choose_frames(raw, self.builder.frames, random.Random(f"{self.seed}-{raw.key}-{raw.copy}"))
                sample = decode_sample(chosen, self.builder.image_size, self.data.max_pixels)
                rows.append(self.builder.build(sample, random.Random(f"{self.seed}-{sample.id}-{raw.copy}")))
                sample.pixels = None  # the pool would keep them
            except SampleReject as reject:
                self.rejects.add(raw, reject)
        if len(rows) < pool:
            raise ValueError(
                f"{len(rows)} of {len(raws)} samples are usable {dict(self.rejects.counts)}; see {self.rejects.path}. "
                f"Last: {self.rejects.last}"
            )
        rows.sort(key=lambda sequence: len(sequence.input_ids))
        edges = [round(i * len(rows) / pool) for i in range(pool + 1)]
        order = random.Random(seed).sample(range(pool), pool)
        batches = [self.collate(rows[edges[i] : edges[i + 1]], self.builder.vocabulary) for i in order]
        batches[0].rejects = self.rejects.counts.total() - before
        return batches

    def _samples(self, lane: int, skip: int) -> Iterator[RawSample]:
        """Raw samples of a lane, all epochs, the first `skip` left out by arithmetic; shuffled in blocks.

        Blocks, and not a sliding buffer, because the place in a block says which samples have been given.
        """
        number = 0
        while True:
            total = self.mixture.total(number)
            size = (lane + 1) * total // self.lanes - lane * total // self.lanes
            if skip < size:
                epoch = Epoch(self.mixture, self.seed, number)
                block, given = divmod(skip, self.block)
                samples = self._read(epoch, lane, block * self.block)
                while raws := list(islice(samples, self.block)):
                    random.Random(f"{self.seed}-{number}-{lane}-{block}").shuffle(raws)
                    raws.reverse()
                    if self.block > self.data.shuffle_buffer:
                        raws = spread(raws)
                    waiting = deque(raws[given:])
                    del raws
                    while waiting:
                        yield waiting.popleft()  # what is used is freed at once
                    block, given = block + 1, 0
            skip = max(skip - size, 0)
            number += 1

    def _read(self, epoch: Epoch, lane: int, skip: int) -> Iterator[RawSample]:
        """Raw samples of a lane in one epoch before they are shuffled, the first `skip` left out."""
        for visits, turns in lane_groups(epoch, lane, self.lanes, skip, self.data.mix_shards):
            open_visits = [self._visit(visit) for visit in visits]
            for turn in turns:
                yield next(open_visits[turn])
            for visit in open_visits:
                next(visit, None)  # to its end: it closes its file and counts what was too much in it

    def _visit(self, visit: Visit) -> Iterator[RawSample]:
        """The samples of a visit, exactly as many as the index promises: those that aren't there come as faults."""
        shard, takes = self.mixture.shards[visit.shard], {take.task: take for take in visit.takes}
        seen, taken = Counter[str](), 0  # samples of the shard by task, and those that the visit's takes name

        def keep(task: str) -> bool:
            nonlocal taken
            if task not in takes:
                return task not in TASKS
            seen[task] += 1
            if not takes[task].low < seen[task] <= takes[task].high:
                return False
            taken += 1
            return visit.start < taken <= visit.stop

        self._check_size(shard)
        given, broken = visit.start, list[RawSample]()
        for raw in read_raw(shard.place, keep, self.data.cache, shard.size):
            if raw.task not in takes:
                broken.append(raw)
                continue
            raw.copy = takes[raw.task].copy
            yield raw
            given += 1
            if given == visit.stop:
                break
        promised = ", ".join(f"{take.high - take.low} of {take.task}" for take in visit.takes)
        text = f"{shard.place}: the index promises {promised} in this slice, {taken} are there"
        text += f"; {broken[-1].fault}" if broken and broken[-1].fault else ""
        for number in range(max(taken, visit.start), visit.stop):
            missing = RawSample(shard.place, "", fault=SampleReject("missing-sample", text))
            yield broken[number - taken] if number - taken < len(broken) else missing
        total = sum(take.high - take.low for take in visit.takes)
        if visit.stop == total:
            for raw in broken[total - taken :]:
                self.rejects.add(raw, raw.fault or SampleReject("unknown-task", f"{raw.key}: task {raw.task!r}"))

    def _check_size(self, shard: Shard) -> None:
        """Count a shard whose file is not the one of the index; what can be read of it is still used."""
        if shard.size is not None and not is_remote(shard.place) and os.path.isfile(shard.place):
            size = os.path.getsize(shard.place)
            if size != shard.size:
                text = f"{shard.place}: the index says {shard.size} bytes, it has {size}; build or copy it again"
                self.rejects.add(RawSample(shard.place, ""), SampleReject("changed-shard", text))


def spread(raws: list[RawSample]) -> list[RawSample]:
    """Put the samples of one image at equal distances; the order of the others stays."""
    uses = Counter(image for raw in raws for image in map(raw.member, raw.files))
    groups: dict[str, list[int]] = {}  # a sample with several images goes with the one that is used most
    for place, raw in enumerate(raws):
        groups.setdefault(max(map(raw.member, raw.files), key=uses.__getitem__, default=str(place)), []).append(place)
    slots = [0.0] * len(raws)
    for places in groups.values():
        step = len(raws) / len(places)
        for i, place in enumerate(places):
            slots[place] = places[0] % step + i * step
    return [raws[place] for place in sorted(range(len(raws)), key=slots.__getitem__)]


def evaluation_sequences(
    shards: Iterable[Path | str],
    builder: SequenceBuilder,
    task: str,
    rejects: RejectLog,
    limit: int | None = None,
    generation: bool = True,
) -> Iterator[Sequence]:
    """The first `limit` sequences of one task in file order, with the fixed template; `generation` as in `build`."""
    raws = (raw for shard in shards for raw in read_raw(shard, lambda other: other == task))
    for raw in islice(raws, limit):
        rejects.read += 1
        try:
            yield builder.build(decode_sample(choose_frames(raw, builder.frames)), generation=generation)
        except SampleReject as reject:
            rejects.add(raw, reject)
