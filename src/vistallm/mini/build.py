"""Mini CoinIt: a seed in, train/val/test shards of the mini world out (same bytes for any number of processes)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from vistallm.coinit import shards
from vistallm.coinit.build import run_forked
from vistallm.coinit.shards import EncodedImage, Row, read_index, write_index, write_shard
from vistallm.mini.link_tasks import LINK_MAKERS
from vistallm.mini.tasks import MAKERS
from vistallm.mini.videos import VIDEO_MAKERS
from vistallm.schema import ImageInfo, Sample
from vistallm.tasks import TASKS

SOURCE = "mini"
SPLITS = ("train", "val", "test")
# Training shares: masks and boxes need the most practice, texts are learnt from fewer.
TRAIN_WEIGHTS = {
    "caption": 5, "reg": 5, "vqa": 8, "rec": 11, "res": 14, "grec": 6, "gres": 10, "pointqa": 5, "boxqa": 5,
    "v7w": 5, "vcr": 4, "pope": 6, "nlvr2": 6, "coseg": 5, "attcoseg": 7,
}  # fmt: skip
# The tasks of links come on top, on the same scale.
LINK_WEIGHTS = {"det": 10, "insseg": 8, "semseg": 8, "count": 4, "interactive": 6, "incontext": 8, "pose": 10}
# And those of videos where they are asked for: a video takes as much room as eight images.
VIDEO_WEIGHTS = {"video_ref": 10, "video_grounding": 6, "video_qa": 10}
_ALL_MAKERS = MAKERS | LINK_MAKERS | VIDEO_MAKERS  # a task's place here seeds its samples
_JPEG_QUALITY, _PNG_SHARE = 92, 0.1


@dataclass(frozen=True)
class MiniRecipe:
    """What the bytes of a mini set depend on, beside the code; `train` samples are shared out by TRAIN_WEIGHTS.

    With `links` the tasks of links are added, with `videos` those of videos: the other tasks keep their samples, in
    another order. `images=False` leaves all but the videos away.
    """

    seed: int = 0
    train: int = 28000
    val: int = 600
    test: int = 1500
    samples_per_shard: int = 500
    links: bool = True
    videos: bool = False
    images: bool = True

    def digest(self) -> str:
        """Hash of the recipe and of the source files that carry it out: a change of either rebuilds the set."""
        facts = [vars(self), TRAIN_WEIGHTS, LINK_WEIGHTS, VIDEO_WEIGHTS]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(str(shards.__file__))):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def plan(self, split: str) -> list[tuple[str, int]]:
        """The split's samples as (task, serial number), in the order of the shards."""
        weights = TRAIN_WEIGHTS if split == "train" else dict.fromkeys(MAKERS, 1)
        share = getattr(self, split) / sum(weights.values())
        if self.links:
            weights = weights | (LINK_WEIGHTS if split == "train" else dict.fromkeys(LINK_MAKERS, 1))
        weights = weights if self.images else {}
        if self.videos:
            weights = weights | (VIDEO_WEIGHTS if split == "train" else dict.fromkeys(VIDEO_MAKERS, 1))
        samples = [(task, n) for task, weight in weights.items() for n in range(max(1, round(share * weight)))]
        order = np.random.default_rng([self.seed, SPLITS.index(split)]).permutation(len(samples))
        return [samples[i] for i in order.tolist()]


def make_sample(recipe: MiniRecipe, split: str, task: str, serial: int) -> tuple[Sample, list[EncodedImage]]:
    """Sample number `serial` of a task and its images (JPEG, now and then PNG): a pure function of the arguments.

    `meta["scenes"]` lists the objects of each image: shape, colour, size, texture, box.
    """
    paired = task in ("vcr", "nlvr2")  # one draw gives two samples: question and reason, true and false
    draw = serial // 2 if paired else serial
    rng = np.random.default_rng([recipe.seed, SPLITS.index(split), list(_ALL_MAKERS).index(task), draw])
    # Several images seldom all lack held-out pairs, so some multi-image samples are drawn as in training.
    look = "train" if TASKS[task].multi_image and rng.random() < 0.4 else split
    made = list(_ALL_MAKERS[task](rng, look, draw))[serial % 2 if paired else 0]
    files: list[EncodedImage] = []
    for scene in made.scenes:
        suffix = "png" if rng.random() < _PNG_SHARE else "jpg"
        settings = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == "jpg" else []
        files.append((cv2.imencode(f".{suffix}", scene.render()[0][:, :, ::-1], settings)[1].tobytes(), suffix))
    infos = [ImageInfo(f"{i}.{files[i][1]}", scene.width, scene.height) for i, scene in enumerate(made.scenes)]
    meta: dict[str, Any] = {"held_out": any(scene.held_out for scene in made.scenes), **made.meta}
    if paired:
        meta["group"] = f"{split}-{task}-{draw:06d}"
    meta["scenes"] = [[[*o.attributes.values(), *o.box] for o in scene.objects] for scene in made.scenes]
    name = f"mini-{split}-{task}-{serial:06d}"
    return Sample(name, task, SOURCE, infos, fields=made.fields, regions=made.regions, meta=meta), files


def build_mini(
    out: Path | str, seed: int = 0, workers: int | None = None, links: bool = True, **choices: Any
) -> dict[str, Any]:
    """Write the mini set's shards and index.json into the folder `out` and return the index.

    `workers`: processes, None = one per CPU. `choices`: further fields of MiniRecipe.
    """
    recipe, out = MiniRecipe(seed=seed, links=links, **choices), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    planned = []
    for split in SPLITS:
        plan, size = recipe.plan(split), recipe.samples_per_shard if split == "train" else recipe.samples_per_shard // 2
        planned += [(split, i, plan[i * size : (i + 1) * size]) for i in range(-(-len(plan) // size))]

    def write(shard: tuple[str, int, list[tuple[str, int]]]) -> tuple[str, Row]:
        split, number, samples = shard
        return write_shard(out, split, number, (make_sample(recipe, split, *sample) for sample in samples), False)

    cv2.setNumThreads(1)  # its threads do not survive a fork
    rows = dict(tqdm(run_forked(write, planned, workers), "mini", len(planned), unit="shard"))
    return write_index(out, rows, source=SOURCE, recipe=recipe.digest(), seed=seed)


def ensure_mini(
    root: Path | str, seed: int = 0, workers: int | None = None, links: bool = True, **choices: Any
) -> Path:
    """Build the mini set at `root` if it is missing or of another recipe; several processes may call it at once.

    Raises:
        ValueError: `root` holds something that is not a mini set; it is left untouched.
    """
    root, recipe = Path(root), MiniRecipe(seed=seed, links=links, **choices)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed
        if root.exists() and any(root.iterdir()):
            index = read_index(root) if (root / "index.json").is_file() else {}
            if index.get("source") != SOURCE:
                raise ValueError(f"{root}: expected a mini set or no files, got something else; choose another folder")
            files = {path.name: path.stat().st_size for path in root.glob("*.tar")}
            whole = files == {name: row["bytes"] for name, row in index["shards"].items()}
            if whole and index.get("recipe") == recipe.digest():
                return root
        print(f"building the mini set in {root} (about 30 s on two cores)", file=sys.stderr, flush=True)
        building = root.parent / f".{root.name}.building"
        shutil.rmtree(building, ignore_errors=True)
        # In a fresh interpreter: forked workers can hang after torch has started threads.
        words = {"out": str(building), "seed": seed, "workers": workers, "links": links, **choices}
        subprocess.run([sys.executable, "-m", "vistallm.mini.build", json.dumps(words)], check=True)
        shutil.rmtree(root, ignore_errors=True)
        building.rename(root)
    return root


if __name__ == "__main__":  # of ensure_mini
    build_mini(**json.loads(sys.argv[1]))
