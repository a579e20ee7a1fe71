"""The order of training samples as a pure function: mixture, seed, epoch and lane in, visits of shards out.

A source's samples of a task form a cycle in shard order, and an epoch takes the next `weight` times their number from
it: every weight is exact over each epoch, and a weight of 1/20 reads 1/20 of the shards. What an epoch takes of one
shard is a *visit*. Visits are permuted with a seed that all ranks share, laid end to end, and cut into lanes of equal
length (to one sample); a lane mixes the samples of a few visits at a time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

Column = tuple[str, str]  # (source, task)
MOST_SHARED = 16.0  # a block of shuffled samples grows with the samples per image, up to this


@dataclass(frozen=True)
class Shard:
    """One training shard."""

    place: str
    source: str  # its folder
    tasks: Mapping[str, int]  # samples of each task
    size: int | None = None  # bytes, None = unknown
    images: int | None = None  # stored images, where samples share them


@dataclass(frozen=True)
class Take:
    """The samples of one task that a visit takes: those numbered [low, high) among the task's own in the shard."""

    task: str
    low: int
    high: int
    copy: int


@dataclass(frozen=True)
class Visit:
    """What is read from one shard in one go: samples numbered [start, stop) among all that `takes` names."""

    shard: int
    takes: tuple[Take, ...]
    start: int
    stop: int


class Mixture:
    """All training shards, whose order fixes the cycles, with the weight of each (source, task).

    A weight says how often a sample is seen per epoch on average (1 = once, 0.05, 1.6, ...). Only the first `fraction`
    of every column is in the cycles. Raises ValueError where no shard holds a sample of positive weight.
    """

    def __init__(self, shards: list[Shard], weights: Mapping[Column, float], fraction: float = 1.0) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"data.fraction={fraction}: expected a share above 0 and at most 1")
        self.shards, self.fraction = shards, fraction
        self.weights = {c: Fraction(w).limit_denominator(1_000_000) for c, w in weights.items() if w > 0}
        held = {(shard.source, task) for shard in shards for task, n in shard.tasks.items() if n}
        self.columns: list[Column] = sorted(held & set(self.weights))
        if not self.columns:
            wanted, names = ", ".join(sorted({task for _, task in weights})), sorted(map(":".join, held))
            raise ValueError(f"no training sample of the tasks {wanted}; the shards hold {', '.join(names)}")
        rows = [
            (number, i, n)
            for number, (source, task) in enumerate(self.columns)
            for i, shard in enumerate(shards)
            if shard.source == source and (n := shard.tasks.get(task, 0))
        ]
        # One row (column, shard, samples) each; `offset`: samples of the column in the shards before.
        self.rows = np.array(rows, np.int64)
        sizes = np.bincount(self.rows[:, 0], self.rows[:, 2], len(self.columns)).astype(np.int64)
        before = np.cumsum(self.rows[:, 2]) - self.rows[:, 2]
        self.offset = before - (np.cumsum(sizes) - sizes)[self.rows[:, 0]]
        sizes = np.ceil(fraction * sizes).astype(np.int64)
        self.rows[:, 2] = np.clip(sizes[self.rows[:, 0]] - self.offset, 0, self.rows[:, 2])
        self.sizes = sizes.tolist()

    @property
    def samples_per_image(self) -> float:
        """Samples of an image where samples share images, on average and at most MOST_SHARED; else 1."""
        used = stored = 0.0
        for shard in self.shards:
            held = sum(shard.tasks.values())
            wanted = sum(n for task, n in shard.tasks.items() if (shard.source, task) in self.weights)
            used += wanted
            stored += wanted * min(1.0, (shard.images or held) / max(held, 1))
        return min(used / stored, MOST_SHARED)

    def span(self, column: int, epoch: int) -> tuple[int, int]:
        """Places [from, to) on the endless cycle of a column's samples that an epoch takes."""
        step = self.weights[self.columns[column]] * self.sizes[column]
        return int(epoch * step), int((epoch + 1) * step)

    def samples(self, epoch: int) -> dict[Column, int]:
        """Samples of an epoch by (source, task)."""
        spans = [self.span(i, epoch) for i in range(len(self.columns))]
        return {column: high - low for column, (low, high) in zip(self.columns, spans, strict=True)}

    def fingerprint(self) -> str:
        """A short word that changes when the shards or the weights do: the order of the samples then does, too."""
        shards = [
            (s.source, Path(s.place).name, sorted(s.tasks.items()), *([s.images] if s.images else []))
            for s in self.shards
        ]
        weights = [(column, str(self.weights[column])) for column in self.columns]
        share = () if self.fraction == 1 else (self.fraction,)  # whole data keeps the word of earlier checkpoints
        return hashlib.sha256(repr((shards, weights, *share)).encode()).hexdigest()[:12]

    def total(self, epoch: int) -> int:
        """Samples of an epoch."""
        return sum(self.samples(epoch).values())


class Epoch:
    """The visits of one epoch in their permuted order."""

    def __init__(self, mixture: Mixture, seed: int, epoch: int) -> None:
        self.mixture, self.seed, self.number = mixture, seed, epoch
        # Columns: round of the shard in this epoch, shard, column, low, high, copy. Tasks of a shard are read together.
        takes = np.concatenate([rows for i in range(len(mixture.columns)) for rows in self._column(i)])
        _, inverse = np.unique(takes[:, 0] * len(mixture.shards) + takes[:, 1], return_inverse=True)
        count = int(inverse.max(initial=-1)) + 1
        mixed = random.Random(f"{seed}-{epoch}").sample(range(count), count)
        rank = np.empty(count, np.int64)
        rank[mixed] = np.arange(count)
        place = rank[inverse]
        order = np.argsort(place, kind="stable")
        self._takes = takes[order]
        self._first = np.searchsorted(place[order], np.arange(count + 1))
        sizes = np.bincount(place, takes[:, 4] - takes[:, 3], count).astype(np.int64)
        self.ends = np.cumsum(sizes)
        self.total = int(self.ends[-1]) if count else 0

    def __len__(self) -> int:
        return len(self.ends)

    def _column(self, column: int) -> Iterator[np.ndarray]:
        """(n, 6) int64 rows of a column, a round over its shards at a time."""
        low, high = self.mixture.span(column, self.number)
        size = self.mixture.sizes[column]
        mine = self.mixture.rows[:, 0] == column
        shard, number, offset = self.mixture.rows[mine, 1], self.mixture.rows[mine, 2], self.mixture.offset[mine]
        yield np.empty((0, 6), np.int64)
        for copy in range(low // size, -(-high // size)):
            begin = np.clip(low - copy * size - offset, 0, number)
            end = np.clip(high - copy * size - offset, 0, number)
            some = end > begin
            same = np.full((int(some.sum()), 3), [copy - low // size, column, copy])
            yield np.column_stack([same[:, 0], shard[some], same[:, 1], begin[some], end[some], same[:, 2]])

    def bounds(self, lane: int, lanes: int) -> tuple[int, int]:
        """Places [from, to) of a lane in the epoch's samples laid end to end."""
        return lane * self.total // lanes, (lane + 1) * self.total // lanes

    def visits(self, lane: int, lanes: int) -> list[Visit]:
        """The visits of a lane in order; those at its ends may be parts of a visit."""
        low, high = self.bounds(lane, lanes)
        if low == high:
            return []
        first, last = np.searchsorted(self.ends, [low, high - 1], side="right")
        visits = []
        for i in range(int(first), int(last) + 1):
            begin = int(self.ends[i - 1]) if i else 0
            rows = self._takes[self._first[i] : self._first[i + 1]].tolist()
            takes = tuple(Take(self.mixture.columns[c][1], lo, hi, copy) for _, _, c, lo, hi, copy in rows)
            visits.append(Visit(rows[0][1], takes, max(low - begin, 0), min(high, int(self.ends[i])) - begin))
        return visits


def check_layout(mixture: Mixture, lanes: int) -> None:
    """Raise ValueError when an epoch has fewer shards to read than there are lanes: some would stay empty."""
    if (read := len(Epoch(mixture, 0, 0))) < lanes:
        advice = "lower data.workers, use fewer devices, or write more, smaller shards"
        raise ValueError(f"{read} training shards for {lanes} lanes (ranks x workers): each needs one; {advice}")


def lane_groups(epoch: Epoch, lane: int, lanes: int, skip: int, mix: int) -> Iterator[tuple[list[Visit], list[int]]]:
    """Yield groups of at most `mix` visits of a lane that are read side by side, the first `skip` samples left out.

    Each comes with the order in which its visits give their samples: a random one, drawn by (seed, epoch, lane, group).
    Visits that have given some of the skipped samples start after them.
    """
    visits = epoch.visits(lane, lanes)
    for number in range(0, len(visits), mix):
        group = visits[number : number + mix]
        counts = [visit.stop - visit.start for visit in group]
        if skip >= sum(counts):
            skip -= sum(counts)
            continue
        rng = np.random.default_rng([epoch.seed, epoch.number, lane, lanes, number])
        turns = rng.permutation(np.repeat(np.arange(len(group)), counts))
        given = np.bincount(turns[:skip], minlength=len(group)).tolist()
        moved = [replace(visit, start=visit.start + n) for visit, n in zip(group, given, strict=True)]
        yield moved, turns[skip:].tolist()
        skip = 0
