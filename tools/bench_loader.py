"""Samples per second of the training loader beside its floor in the same run, by part, with workers; memory over time.

python tools/bench_loader.py [--samples 600] [--workers 0 2]     made 640x480 photographs, masks, boxes, questions
python tools/bench_loader.py --root DIR                          your own shards (one source folder)
python tools/bench_loader.py --minutes 120                       also: memory while batches are read for that long

The floor reads the same tars and decodes the same JPEGs in full, and nothing else. It takes turns with the loader and
with a loader that decodes in full, so that a busy machine slows all: the median ratio counts. Rounds are of whole pools
(512 samples), and no mask is met again. OMP_NUM_THREADS=1 is the fair setting.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import median
from unittest import mock

import cv2
import numpy as np
from torch.utils.data import DataLoader

from vistallm.coinit.shards import RawSample, read_raw, write_index, write_shard
from vistallm.config import Config, load_config
from vistallm.data import stream
from vistallm.data.datamodule import CoinItDataModule, build_codec
from vistallm.data.images import decode_sample
from vistallm.data.sequence import collate
from vistallm.data.stream import RejectLog
from vistallm.data.vocabulary import Vocabulary
from vistallm.regions.codec import RegionCodec
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Batch, ImageInfo, Region, Sample

WIDTH, HEIGHT, PER_SHARD = 640, 480, 100


def photo(rng: np.random.Generator) -> np.ndarray:
    """(480, 640, 3) uint8 with the spectrum of a photograph: noise at every scale, less at the finer ones."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for octave in range(1, 9):
        grid = rng.normal(size=(max(2, HEIGHT * 2**octave // 512), max(2, WIDTH * 2**octave // 512), 3))
        image += cv2.resize(grid.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) / octave
    return np.clip(128 + 50 * image, 0, 255).astype(np.uint8)


def blob(rng: np.random.Generator) -> np.ndarray:
    """(480, 640) bool: an outline of 60 vertices."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = rng.uniform(40, 150) * (1 + 0.3 * np.convolve(rng.normal(size=60), np.ones(5) / 5, "same"))
    centre = rng.uniform((160, 160), (WIDTH - 160, HEIGHT - 160))
    points = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [points.astype(np.int32)], 1)
    return mask.astype(bool)


def made_sample(number: int, rng: np.random.Generator) -> tuple[Sample, list[tuple[bytes, str]]]:
    """A RES, REC, VQA or caption sample with its JPEG, one after another."""
    data = cv2.imencode(".jpg", photo(rng), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    mask, regions = blob(rng), list[Region]()
    task = ("res", "rec", "vqa", "caption")[number % 4]
    words = " ".join(rng.choice(["the", "red", "small", "circle", "left", "two"], int(rng.integers(2, 14))))
    if task == "res":
        regions = [Region(0, "mask", rle=mask_to_rle(mask))]
    elif task == "rec":
        ys, xs = np.nonzero(mask)
        regions = [Region(0, "box", box=tuple(map(float, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))))]
    fields = {"expr": words, "question": f"{words}?", "answer": "red", "caption": words}
    sample = Sample(f"s{number}", task, "made", [ImageInfo("0.jpg", WIDTH, HEIGHT)], fields=fields, regions=regions)
    return sample, [(data, "jpg")]


def make_shards(root: Path, samples: int) -> None:
    """Write the made samples as shards."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = [made_sample(i, rng) for i in range(samples)]
    numbers = range(-(-samples // PER_SHARD))
    write_index(root, dict(write_shard(root, "train", n, made[PER_SHARD * n : PER_SHARD * (n + 1)]) for n in numbers))


def floor(data: CoinItDataModule) -> Iterator[int]:
    """Read every shard and decode every image; yields 1 per sample."""
    while True:
        for shard in data.mixture.shards:
            for raw in read_raw(shard.place):
                for image in raw.files.values():
                    cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                yield 1


def seconds(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def parts(data: CoinItDataModule, raws: list[RawSample]) -> dict[str, float]:
    """Milliseconds per sample by part."""
    size, n = data.builder.image_size, len(raws) / 1e3
    decoded = [decode_sample(raw, size) for raw in raws]
    sequences = [data.builder.build(sample) for sample in decoded]
    masked = [s for s in decoded if any(r.kind == "mask" for r in s.regions)]
    batch = data.config.data.batch_size
    return {
        "read": seconds(lambda: list(islice(read_raw(raws[0].shard), len(raws)))) / n,
        "decode (full size)": seconds(lambda: [decode_sample(raw) for raw in raws]) / n,
        "decode (reduced)": seconds(lambda: [decode_sample(raw, size) for raw in raws]) / n,
        "sequence (resize, tokens, masks)": seconds(lambda: [data.builder.build(s) for s in decoded]) / n,
        "  of which a sample with a mask": seconds(lambda: [data.builder.build(s) for s in masked])
        / max(len(masked), 1)
        * 1e3,
        "collate": seconds(
            lambda: [collate(sequences[i : i + batch], data.builder.vocabulary) for i in range(0, len(raws), batch)]
        )
        / n,
    }


def resident(pid: str) -> list[float]:
    """MiB of a process in memory: all, and what is its own and no file (other programs share those)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 2**10 for name in ("VmRSS", "RssAnon")]


def memory() -> np.ndarray:
    """`resident` of this process, then of its children together."""
    tasks = Path("/proc/self/task").iterdir()
    children = [resident(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return np.array(resident("self") + np.sum(children, 0).tolist() if children else resident("self") + [0.0, 0.0])


def batches(data: CoinItDataModule, workers: int) -> Iterator[Batch]:
    """The run's batches in this process or through the loader's workers."""
    read = data.stream(0, 1, workers, RejectLog(None, 0.0))
    return iter(DataLoader(read, batch_size=None, num_workers=workers) if workers else read)


def compare(data: CoinItDataModule, workers: int, count: int, rounds: int) -> None:
    """Print loader and floors, taking turns."""
    loader, size = batches(data, workers), data.config.data.batch_size
    plain = batches(data, 0)
    next(loader), next(plain)
    decoded, number = floor(data), max(count // size, 1)
    in_full = mock.patch.object(stream, "decode_sample", lambda raw, size, most: decode_sample(raw, None, most))
    runs = {
        "loader": lambda: sum(map(len, islice(loader, number))),
        "floor": lambda: sum(islice(decoded, count)),
        "full-size decoding": lambda: sum(map(len, islice(plain, number))),
    }
    # One process is measured by its own processor time, which other programs disturb less.
    clock = time.perf_counter if workers else time.process_time
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            with in_full if name == "full-size decoding" else nullcontext():
                start = clock()
                done = run()
                rates[name].append(done / (clock() - start))
    for name, values in rates.items():
        where = f"{workers} workers" if name == "loader" and workers else "1 process"
        share = median(mine / least for mine, least in zip(values, rates["floor"], strict=True))
        print(f"  {name:<18} {where:<10} {median(values):>8.0f} samples/s   {share:>6.2f} of the floor")


def watch(data: CoinItDataModule, workers: int, minutes: float, step: float) -> None:
    """Print the memory of parent and workers while batches are read, one every `step` seconds or slower.

    A worker's memory rises and falls with its pool of batches: each row is the median of a twentieth of the time, and
    drift is against the second row, after 5% of it.
    """
    loader, start, read, base = batches(data, workers), time.monotonic(), 0, np.zeros(4)
    print("MiB: resident, and without files; drift against the second row")
    print("  minutes    samples" + "".join(f"{who:>26}" for who in ("parent", "its own", "workers", "their own")))
    for part in range(20):
        seen = []
        while time.monotonic() - start < (part + 1) / 20 * minutes * 60:
            read += len(next(loader))
            time.sleep(step)
            seen.append(memory())
        now = np.median(seen, axis=0)
        base = now if part < 2 else base
        drift = now / np.maximum(base, 1e-9) - 1
        cells = "".join(f"{value:18.1f} {change:+7.1%}" for value, change in zip(now, drift, strict=True))
        print(f"  {(time.monotonic() - start) / 60:7.1f} {read:>10,}{cells}", flush=True)


def configuration(words: list[str], root: Path) -> Config:
    """The real input size and region budget on the mini vocabulary."""
    base = ["model=mini", "model.encoder.image_size=224", "num_bins=1001", "points=32", "target_iou=null"]
    base += [f"data.root={root}", "data.batch_size=16", "data.workers=0", "data.pool_batches=32"]
    tasks = [f"data.weights.{task}=1" for task in ("res", "rec", "vqa", "caption")]
    return load_config([*base, *tasks, *words])


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=512, help="samples of one round")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--step-ms", type=float, default=0.0, help="sleep per batch, as a training step takes")
    parser.add_argument("words", nargs="*", help="key=value, as for train.py")
    arguments = parser.parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or Path(folder) / "made"
        if arguments.root is None:
            make_shards(root, arguments.samples)
        config = configuration(arguments.words, root)
        data = CoinItDataModule(config, Vocabulary.build(config.model, build_codec(config)), root)
        data.builder.codec = RegionCodec(points=config.points, num_bins=config.num_bins, cache_size=0)  # all masks new
        print("milliseconds per sample, one process")
        for name, value in parts(data, list(read_raw(data.mixture.shards[0].place))).items():
            print(f"  {name:<34} {value:7.3f}")
        for workers in arguments.workers:
            print(f"loader with {workers} workers beside the floor")
            compare(data, workers, arguments.count, arguments.rounds)
        if arguments.minutes:
            print(f"memory over {arguments.minutes} minutes, {arguments.workers[-1]} workers")
            watch(data, arguments.workers[-1], arguments.minutes, arguments.step_ms / 1e3)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"bench_loader.py: {error}")
