"""What a run would read, without training: samples by source and task, the layout over ranks, token statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np

from vistallm.data.datamodule import CoinItDataModule, is_gone
from vistallm.data.mixture import find_folders
from vistallm.data.order import Epoch
from vistallm.data.stream import RejectLog
from vistallm.schema import IGNORE_INDEX, Batch

BATCHES = 64  # that the token statistics are taken from


@dataclass(frozen=True)
class Census:
    """Means per sample over the first batches: tokens, answer tokens, images, tokens of the QFormer's instruction.

    padding: share of padding among the batches' cells; longest: tokens of the longest sequence; samples: counted ones;
    rejects: by reason.
    """

    samples: int
    tokens: float
    supervised: float
    images: float
    instruction: float
    longest: int
    padding: float
    rejects: dict[str, int]


def take_census(data: CoinItDataModule, batches: int = BATCHES) -> Census:
    """Stream the first batches of the run and count."""
    rejects = RejectLog(None, 1.0)
    stream: list[Batch] = list(islice(data.stream(0, 1, 0, rejects), batches))
    lengths = np.concatenate([batch.attention_mask.sum(1).numpy() for batch in stream])
    cells = sum(batch.attention_mask.numel() for batch in stream)
    return Census(
        samples=len(lengths),
        tokens=float(lengths.mean()),
        supervised=sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in stream) / len(lengths),
        images=sum(len(batch.images) for batch in stream) / len(lengths),
        instruction=sum(int(batch.instruction_mask.sum()) for batch in stream) / len(lengths),
        longest=int(lengths.max()),
        padding=1 - float(lengths.sum()) / cells,
        rejects=rejects.counts,
    )


def describe_mixture(data: CoinItDataModule) -> list[str]:
    """Lines: each (source, task) with its weight and samples, what it leaves out, and what is missing on disk."""
    mixture, held = data.mixture, {column: 0 for column in data.mixture.columns}
    left: dict[str, int] = {}
    for shard in mixture.shards:
        for task, n in shard.tasks.items():
            if (shard.source, task) in held:
                held[shard.source, task] += n
            else:
                left[f"{shard.source}:{task}"] = left.get(f"{shard.source}:{task}", 0) + n
    lines = [f"  {'source':<20} {'task':<12} {'in shards':>11} {'weight':>8} {'per epoch':>11} {'share':>7}"]
    total = mixture.total(0)
    for column, n in mixture.samples(0).items():
        weight = float(mixture.weights[column])
        lines.append(f"  {column[0]:<20} {column[1]:<12} {held[column]:>11,} {weight:>8.3g} {n:>11,} {n / total:>7.1%}")
    lines.append(f"  {'all':<33} {sum(held.values()):>11,} {'':>8} {total:>11,}")
    if left:
        lines.append("  left out (weight 0): " + ", ".join(f"{name} {n:,}" for name, n in sorted(left.items())))
    missing = find_folders(data.config.data, data.root)[1]
    if missing:
        lines.append(f"  missing in {data.root}: {', '.join(missing)}")
    gone = [shard.place for shard in mixture.shards if is_gone(shard.place)]
    if gone:
        lines.append(f"  {len(gone)} of {len(mixture.shards)} shards are listed and not there, first {gone[0]}")
    return lines


def describe_layout(data: CoinItDataModule, world_size: int) -> list[str]:
    """Lines: how an epoch is cut into lanes, and how long that took to work out."""
    workers = max(data.config.data.workers, 1)
    lanes = data.lanes or world_size * workers
    started = time.perf_counter()
    epoch = Epoch(data.mixture, data.config.seed, 0)
    sizes = [high - low for low, high in (epoch.bounds(lane, lanes) for lane in range(lanes))]
    visits = [len(epoch.visits(lane, lanes)) for lane in range(lanes)]
    seconds = time.perf_counter() - started
    lines = [
        f"  {world_size} ranks x {workers} workers, {lanes} lanes: {min(sizes):,} to {max(sizes):,} samples and "
        f"{min(visits)} to {max(visits)} shards each; {len(epoch):,} shards to read (planned in {seconds:.2f} s)"
    ]
    if len(epoch) < lanes:
        lines.append(f"  too many lanes for {len(epoch):,} shards: lower data.workers, or write more, smaller shards")
    return lines


def describe_tokens(census: Census) -> list[str]:
    """Lines: what sequences look like."""
    rejected = ", ".join(f"{n} {reason}" for reason, n in census.rejects.items()) or "none"
    return [
        f"  of {census.samples} samples: {census.tokens:.1f} tokens each (longest {census.longest}), "
        f"{census.supervised:.1f} of them supervised, {census.images:.2f} images, "
        f"{census.instruction:.1f} tokens of instruction",
        f"  padding {census.padding:.1%} of the batches' cells; rejects: {rejected}",
    ]
