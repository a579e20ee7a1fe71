"""The Lightning data module: finds the shards (builds the mini set on first use), streams, resumes mid-epoch."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from vistallm.coinit.shards import is_remote
from vistallm.config import Config
from vistallm.data.mixture import build_mixture, find_folders, require_folders
from vistallm.data.order import Epoch
from vistallm.data.sequence import Sequence, build_sequencer, collate, collate_rollouts
from vistallm.data.stream import RejectLog, TrainStream, evaluation_sequences, reject_log
from vistallm.data.vocabulary import Vocabulary
from vistallm.mini.build import ensure_mini
from vistallm.regions.masks import load_compiled
from vistallm.schema import IGNORE_INDEX, Batch

MINI_ROOT = Path("data/mini")


def data_root(config: Config) -> Path:
    """The local folder of the shards or source folders; builds the mini set when none is named; raises ValueError."""
    if config.data.root is None:
        if config.data.name != "mini":
            raise ValueError(f"data={config.data.name}: give the shard folder as data.root=DIR (tools/build_coinit.py)")
        return ensure_mini(MINI_ROOT)
    if is_remote(config.data.root):
        raise ValueError(f"data.root={config.data.root}: this reads local shards; copy them to a folder first")
    root = Path(config.data.root)
    if not (root / "index.json").is_file() and not (config.data.sources and root.is_dir()):
        raise ValueError(f"data.root={root}: expected a folder with index.json, found none; run tools/build_coinit.py")
    return root


def training_root(config: Config) -> str:
    """The place of the training shards, which may be remote; raises ValueError as `data_root` does."""
    return str(config.data.root) if is_remote(str(config.data.root)) else str(data_root(config))


class CoinItDataModule(L.LightningDataModule):
    """Training stream and validation batches of one stage; its state is the place in the stream, the same on all ranks.

    `root` is the place of the shards, or of the source folders.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, root: Path | str) -> None:
        super().__init__()
        load_compiled()  # once, before the loader's workers fork: each would compile the samplers for itself
        self.config, self.root, self.lanes = config, str(root), config.data.lanes
        self.builder = build_sequencer(config, vocabulary)
        self.folders = require_folders(config.data, self.root, config.dry_run)
        self.mixture = build_mixture(config, self.folders)
        self.batches_done = 0  # over all ranks
        self._ready = 0  # Lightning's count of this rank's batches that `batches_done` stands for

    def steps_per_epoch(self, world_size: int, accumulate: int) -> int:
        """Optimizer steps of one pass over the weighted training split."""
        return max(1, self.mixture.total(0) // (self.config.data.batch_size * world_size * accumulate))

    def stream(
        self, rank: int, world_size: int, workers: int, rejects: RejectLog, collate: Callable[..., Any] = collate
    ) -> TrainStream:
        """One rank's endless stream, from `batches_done` on."""
        data = dataclasses.replace(self.config.data, workers=workers, lanes=self.lanes)
        place = (self.config.seed, rank, world_size, self.batches_done)
        return TrainStream(self.mixture, self.builder, data, rejects, *place, collate)

    def missing_shards(self) -> list[str]:
        """Local training shards that the index lists and that are not there."""
        places = [shard.place for shard in self.mixture.shards]
        return [place for place in places if not is_remote(place) and not Path(place).is_file()]

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's loader."""
        workers, trainer = self.config.data.workers, self.trainer
        assert trainer is not None
        if missing := self.missing_shards():
            raise ValueError(f"{self.root}: {len(missing)} shard(s) of the index are not there, first {missing[0]}")
        own, make = self.config.reinforce, cast(Callable[..., Any], collate)
        if self.config.stage == "rl":
            make = functools.partial(collate_rollouts, tasks=own.tasks, replay=own.replay > 0)
        stream = self.stream(trainer.global_rank, trainer.world_size, workers, reject_log(self.config), make)
        return DataLoader(
            stream, None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_outlive_first_sigterm
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The first `data.val_batches` validation batches, dealt to the ranks in turn, equally many each."""
        trainer = self.trainer
        assert trainer is not None
        size, tasks = self.config.data.batch_size, sorted({task for _, task in self.mixture.columns})
        per_task = -(-self.config.data.val_batches * size // len(tasks))
        rejects = reject_log(self.config)
        rows: list[Sequence] = []
        for task in tasks:
            shards = [s.place for folder in self.folders for s in folder.shards("val") if s.tasks.get(task)]
            rows += evaluation_sequences(shards, self.builder, task, rejects, per_task, generation=False)
        mine = rows[trainer.global_rank :: trainer.world_size][: len(rows) // trainer.world_size]
        batches = [collate(mine[i : i + size], self.builder.vocabulary) for i in range(0, len(mine), size)]
        return DataLoader(cast(Any, batches), batch_size=None, num_workers=0)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and what the order depends on; the same on every rank."""
        trainer, data = self.trainer, self.config.data
        assert trainer is not None
        # `ready` counts the batch that is being trained on, which is done by the time a checkpoint is written.
        ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return {
            "seed": self.config.seed,
            "batches_done": self.batches_done + (ready - self._ready) * trainer.world_size,
            "ready": ready,
            "lanes": self.lanes or trainer.world_size * max(data.workers, 1),
            "mixture": self.mixture.fingerprint(),
            **{key: getattr(data, key) for key in ("batch_size", "pool_batches", "shuffle_buffer", "mix_shards")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place in the stream; ValueError when what the order of the data depends on has changed.

        The stream keeps the checkpoint's lanes and goes on with the very next batch where ranks x workers divide them.
        Else every new lane leaves out the same share of the epoch: the number of samples done is kept, but until the
        epoch ends some are seen again and as many are not.
        """
        trainer, now = self.trainer, self.state_dict()
        assert trainer is not None
        changed = [k for k in now if k not in ("batches_done", "lanes", "ready") and now[k] != state.get(k, now[k])]
        if changed:
            changes = ", ".join(f"{k} {state[k]} -> {now[k]}" for k in changed)
            raise ValueError(
                f"resume: the data order depends on {changes}; restore them, or start a new run with ckpt="
            )
        readers = trainer.world_size * max(self.config.data.workers, 1)
        lanes = self.config.data.lanes or int(state["lanes"])
        if lanes % readers:
            done = state["batches_done"] * state["batch_size"]
            print(f"resume: {readers} ranks x workers do not divide the run's {lanes} lanes: the order changes from")
            print(f"  here on, after the same {done} samples")
            lanes = readers
        self.lanes, self.batches_done, self._ready = lanes, int(state["batches_done"]), int(state["ready"])


def _outlive_first_sigterm(worker: int) -> None:
    """Keep a worker alive when a queue signals every process of a run; a second signal ends it (DataLoader's own)."""
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


# -- what a run would read, without training --------------------------------------------------------------------------


def describe_samples(data: CoinItDataModule, batches: int = 64) -> list[str]:
    """Lines: means of a sample over the first batches of the run, also as words of tools/plan.py."""
    rejects = RejectLog(None, 1.0)
    read = list(islice(data.stream(0, 1, 0, rejects), batches))
    lengths = np.concatenate([batch.attention_mask.sum(1).numpy() for batch in read])
    count = len(lengths)
    supervised = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in read) / count
    images = sum(len(batch.images) for batch in read) / count
    instruction = sum(int(batch.instruction_mask.sum()) for batch in read) / count
    cells = sum(batch.attention_mask.numel() for batch in read)
    rejected = ", ".join(f"{n} {reason}" for reason, n in rejects.counts.items()) or "none"
    return [
        f"  of {count} samples: {lengths.mean():.1f} tokens each (longest {lengths.max()}), {supervised:.1f} of them "
        f"supervised, {images:.2f} images, {instruction:.1f} tokens of instruction",
        f"  padding {1 - lengths.sum() / cells:.1%} of the batches' cells; rejects: {rejected}",
        f"  memory and time: python tools/plan.py with the words of this run and tokens={cells / count:.0f} "
        f"supervised={supervised:.0f} images={images:.2f} instruction={instruction:.0f}",
    ]


def describe_data(data: CoinItDataModule, world_size: int) -> list[str]:
    """Lines: each (source, task) with its weight and samples, what is left out or missing, and an epoch's lanes."""
    mixture, held = data.mixture, Counter[tuple[str, str]]()
    for shard in mixture.shards:
        held.update({(shard.source, task): n for task, n in shard.tasks.items()})
    lines = [f"  {'source':<20} {'task':<12} {'in shards':>11} {'weight':>8} {'per epoch':>11} {'share':>7}"]
    total = mixture.total(0)
    for column, n in mixture.samples(0).items():
        weight = float(mixture.weights[column])
        lines.append(f"  {column[0]:<20} {column[1]:<12} {held[column]:>11,} {weight:>8.3g} {n:>11,} {n / total:>7.1%}")
    lines.append(f"  {'all':<33} {sum(held[column] for column in mixture.columns):>11,} {'':>8} {total:>11,}")
    if left := [f"{source}:{task} {held[source, task]:,}" for source, task in sorted({*held} - {*mixture.columns})]:
        lines.append("  left out (weight 0): " + ", ".join(left))
    if missing := find_folders(data.config.data, data.root)[1]:
        lines.append(f"  missing in {data.root}: {', '.join(missing)}")
    if shards := data.missing_shards():
        lines.append(f"  {len(shards)} of {len(mixture.shards)} shards are listed and not there, first {shards[0]}")
    workers = max(data.config.data.workers, 1)
    lanes, epoch = data.lanes or world_size * workers, Epoch(mixture, data.config.seed, 0)
    sizes = [high - low for low, high in (epoch.bounds(lane, lanes) for lane in range(lanes))]
    visits = [len(epoch.visits(lane, lanes)) for lane in range(lanes)]
    lines.append(
        f"  {world_size} ranks x {workers} workers, {lanes} lanes: {min(sizes):,} to {max(sizes):,} samples and "
        f"{min(visits)} to {max(visits)} shards each; {len(epoch):,} shards to read"
    )
    if len(epoch) < lanes:
        lines.append(f"  too many lanes for {len(epoch):,} shards: lower data.workers, or write more, smaller shards")
    return lines
