"""Source folders + configuration -> the training mixture: which shards, and how often each (source, task) is seen."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.shards import UnreachableError, is_remote, join, read_index
from vistallm.config import Config, DataConfig
from vistallm.data.order import Column, Mixture, Shard
from vistallm.tasks import TASKS


@dataclass(frozen=True)
class Folder:
    """One source's shards."""

    source: str
    place: str
    index: dict[str, Any]
    weight: float = 1.0  # of all its samples

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, in index order."""
        return [
            Shard(join(self.place, name), self.source, row["tasks"], row["bytes"], row.get("images"))
            for name, row in self.index["shards"].items()
            if row["split"] == split
        ]


def find_folders(data: DataConfig, root: str) -> tuple[list[Folder], list[str]]:
    """The source folders of the mixture, and the names of those that are not there.

    A root with an index.json of its own is one source by itself, whatever `data.sources` says.
    """
    single = _index(root)
    if single is not None or not data.sources:
        return [Folder(".", root, single if single is not None else read_index(root))], []
    wanted = {name: weight for name, weight in data.sources.items() if weight > 0}
    indexes = {name: index for name in wanted if (index := _index(join(root, name))) is not None}
    folders = [Folder(name, join(root, name), index, wanted[name]) for name, index in indexes.items()]
    return folders, [name for name in wanted if name not in indexes]


def require_folders(data: DataConfig, root: str, dry: bool = False) -> list[Folder]:
    """The source folders; ValueError when one is missing, unless `data.missing_sources=skip` or in a dry run."""
    folders, missing = find_folders(data, root)
    if missing and not (folders and (dry or data.missing_sources == "skip")):
        raise ValueError(
            f"data.root={root}: {len(missing)} of {len(data.sources)} sources are missing: {', '.join(missing)}; build "
            "them with tools/build_coinit.py, give them weight 0, or set data.missing_sources=skip"
        )
    if missing and not dry:
        print(f"data.missing_sources=skip: training without {', '.join(missing)}")
    return folders


def _index(place: str) -> dict[str, Any] | None:
    """The index of a folder, None when there is none or it can't be reached: the caller names the source."""
    if not is_remote(place) and not (Path(place) / "index.json").is_file():
        return None
    try:
        return read_index(place)
    except UnreachableError:
        return None


def build_mixture(config: Config, folders: list[Folder]) -> Mixture:
    """The training mixture of a stage.

    The weight of a (source, task) is the source's times the task's; `data.temperature` T then turns a source's share
    s of an epoch into s^(1/T), rescaled to the same number of samples; `data.max_per_task` scales tasks down.

    Raises:
        ValueError: unknown task names, or no sample of positive weight.
    """
    data, caps = config.data, config.data.max_per_task
    counts: dict[Column, int] = {
        (folder.source, task): n for folder in folders for task, n in folder.index["tasks"].get("train", {}).items()
    }
    known = f"known: {', '.join(TASKS)}"
    if unknown := sorted(f"{source}:{task}" for source, task in counts if task not in TASKS):
        raise ValueError(f"unknown task(s) in the shards: {', '.join(unknown)}; {known}")
    if unknown := sorted(set(caps) - set(TASKS)):
        raise ValueError(f"data.max_per_task: unknown task(s) {', '.join(unknown)}; {known}")
    if data.temperature <= 0:
        raise ValueError(f"data.temperature={data.temperature}: expected a number above 0; 1 keeps the weights")
    tasks = stage_weights(data.weights, config.stage)
    own = {folder.source: folder.weight for folder in folders}
    counts = {column: n for column, n in counts.items() if column[1] in tasks}
    weights = {column: own[column[0]] * tasks[column[1]] for column in counts}
    size = _sizes(weights, counts, 0)
    total = sum(size.values())
    powers = {source: (n / total) ** (1 / data.temperature) for source, n in size.items() if n > 0}
    scale = {source: total * power / sum(powers.values()) / size[source] for source, power in powers.items()}
    weights = {column: weight * scale.get(column[0], 1.0) for column, weight in weights.items()}
    size = _sizes(weights, counts, 1)
    for column in weights:
        weights[column] *= min(1.0, caps.get(column[1], float("inf")) / max(size[column[1]], 1e-9))
    named = {(folder.source, task): 0.0 for folder in folders for task in tasks}  # for the message when none is there
    shards = [shard for folder in folders for shard in folder.shards("train")]
    return Mixture(shards, named | weights, data.fraction)


def _sizes(weights: dict[Column, float], counts: dict[Column, int], side: int) -> dict[str, float]:
    """Samples of an epoch by source (side 0) or by task (side 1)."""
    sizes: dict[str, float] = defaultdict(float)
    for column, n in counts.items():
        sizes[column[side]] += weights[column] * n
    return sizes


def stage_weights(weights: dict[str, float], stage: int | str) -> dict[str, float]:
    """The task weights: as given, or every single-image (stage 2: multi-image) task once."""
    if unknown := sorted(set(weights) - set(TASKS)):
        raise ValueError(f"data.weights: unknown task(s) {', '.join(unknown)}; known: {', '.join(TASKS)}")
    return dict(weights) or {name: 1.0 for name, task in TASKS.items() if task.multi_image == (stage == 2)}
