"""The Lightning data module: finds the shards (builds the mini set on first use), streams, resumes mid-epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader, Dataset

from vistallm.coinit.mini import ensure_mini
from vistallm.coinit.shards import read_index
from vistallm.coinit.tasks import TemplateRange
from vistallm.config import Config
from vistallm.data.collate import collate
from vistallm.data.sequence import PAD_COLOUR, SequenceBuilder
from vistallm.data.stream import RejectLog, TrainStream, evaluation_sequences, stage_weights
from vistallm.data.vocabulary import Vocabulary
from vistallm.regions.codec import RegionCodec
from vistallm.regions.masks import load_compiled
from vistallm.schema import Batch, Sequence

MINI_ROOT = Path("data/mini")


def build_codec(config: Config) -> RegionCodec:
    """Return the codec of a configuration."""
    return RegionCodec(
        coords=config.coords,
        num_bins=config.num_bins,
        points=config.points,
        mask_sampler=config.mask_sampler,
        target_iou=config.target_iou,
    )


def build_sequencer(config: Config, vocabulary: Vocabulary) -> SequenceBuilder:
    """Return the sample-to-sequence builder of a configuration."""
    templates = config.data.templates
    if isinstance(templates, str) and templates != "mini":
        raise ValueError(f"data.templates={templates}: expected a number, mini or null")
    return SequenceBuilder(
        codec=build_codec(config),
        vocabulary=vocabulary,
        queries=config.model.tokenizer.queries,
        image_size=config.model.encoder.image_size,
        pad_colour=PAD_COLOUR,
        system_prompt=config.model.decoder.system_prompt,
        max_length=config.data.max_length,
        max_instruction=config.model.tokenizer.max_instruction_tokens,
        templates=cast(TemplateRange, templates),
        template=config.decode.template,
    )


def reject_log(config: Config) -> RejectLog:
    """Return a new log of rejects that appends to rejects.jsonl of the run folder."""
    return RejectLog(Path(str(config.run_dir)) / "rejects.jsonl", config.data.max_reject_share)


def data_root(config: Config) -> Path:
    """Return the shard folder; builds the mini set when none is named.

    Raises:
        ValueError: `data.root` is missing, empty or not a shard folder.
    """
    if config.data.root is None:
        if config.data.name != "mini":
            raise ValueError(f"data={config.data.name}: give the shard folder as data.root=DIR (tools/build_coinit.py)")
        return ensure_mini(MINI_ROOT)
    root = Path(config.data.root)
    if not (root / "index.json").is_file():
        raise ValueError(
            f"data.root={root}: expected a shard folder with index.json, found none; run tools/build_coinit.py"
        )
    return root


def split_shards(root: Path, split: str) -> list[Path]:
    """Return the shard files of a split in index order; raises ValueError when there is none or one is missing."""
    names = [name for name, row in read_index(root)["shards"].items() if row["split"] == split]
    if not names:
        raise ValueError(f"{root}: index.json lists no shard of split {split!r}; build it with tools/build_coinit.py")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root}: index.json lists {len(missing)} shard(s) that are not there, first {missing[0]}")
    return [root / name for name in names]


class CoinItDataModule(L.LightningDataModule):
    """Training stream and validation batches of one stage; its state is the number of batches done, on every rank."""

    def __init__(self, config: Config, vocabulary: Vocabulary, root: Path) -> None:
        super().__init__()
        load_compiled()  # once, before the loader's workers fork: each would compile the samplers for itself
        self.config, self.root = config, root
        self.builder = build_sequencer(config, vocabulary)
        self.weights = stage_weights(config.data.weights, config.stage)
        self.batches_done = 0

    def steps_per_epoch(self, world_size: int, accumulate: int) -> int:
        """Return optimizer steps of one pass over the weighted training split."""
        counts = read_index(self.root)["tasks"].get("train", {})
        samples = sum(self.weights.get(task, 0.0) * n for task, n in counts.items())
        if samples < 1:
            raise ValueError(
                f"{self.root}: no training sample of the tasks {', '.join(self.weights)}; has {dict(counts)}"
            )
        return max(1, int(samples / (self.config.data.batch_size * world_size * accumulate)))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's endless stream, `batches_done` batches in."""
        data, trainer = self.config.data, self.trainer
        assert trainer is not None
        self.steps_per_epoch(1, 1)  # raises when no shard holds a task of the mixture: the stream would never yield
        stream = TrainStream(
            split_shards(self.root, "train"),
            self.builder,
            self.weights,
            batch_size=data.batch_size,
            buffer=data.shuffle_buffer,
            rejects=reject_log(self.config),
            seed=self.config.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            workers=data.workers,
            done=self.batches_done,
            pool=data.pool_batches,
        )
        return DataLoader(stream, batch_size=None, num_workers=data.workers, persistent_workers=data.workers > 0)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the first `data.val_batches` validation batches, dealt to the ranks in turn, equally many each."""
        trainer = self.trainer
        assert trainer is not None
        data, shards = self.config.data, split_shards(self.root, "val")
        per_task = -(-data.val_batches * data.batch_size // max(len(self.weights), 1))
        rejects = reject_log(self.config)
        rows: list[Sequence] = []
        for task in self.weights:
            rows += evaluation_sequences(shards, self.builder, task, rejects, per_task)
        mine = rows[trainer.global_rank :: trainer.world_size][: len(rows) // trainer.world_size]
        batches = [
            collate(mine[i : i + data.batch_size], self.builder.vocabulary)
            for i in range(0, len(mine), data.batch_size)
        ]
        return DataLoader(_Batches(batches), batch_size=None, num_workers=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the rank-independent place in the stream (pitfalls: loader state must not live on rank 0 alone)."""
        trainer = self.trainer
        assert trainer is not None
        # `ready` counts the batch that is being trained on, which is done by the time a checkpoint is written.
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        data = self.config.data
        slots = {"world_size": trainer.world_size, "workers": data.workers}
        return {
            "seed": self.config.seed,
            "batches_done": done,
            "batch_size": data.batch_size,
            "pool_batches": data.pool_batches,
            **slots,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place in the stream; raises ValueError when the layout of ranks and workers has changed."""
        now = self.state_dict()
        changed = [k for k in now if k != "batches_done" and now[k] != state[k]]
        if changed:
            said = ", ".join(f"{k} {state[k]} -> {now[k]}" for k in changed)
            raise ValueError(f"resume: the data order depends on {said}; restore them, or start a new run with ckpt=")
        self.batches_done = int(state["batches_done"])


class _Batches(Dataset[Batch]):
    """A list of ready batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]
