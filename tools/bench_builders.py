"""Speed and memory of building shards, on made RefCOCO-style sources in a temporary folder.

python tools/bench_builders.py [--samples N] [--photos N] [--rounds N] [--memory] [--folder DIR]

records: samples per second and core of the refcoco source with one small image for all, so that next to nothing is
spent on image bytes; its baseline is the same samples pushed through Python's own json and tarfile.
images: MB per second of a jsonl source of photo-sized files, against copying the same files with shutil; each until
the disk has the bytes (sync), and beside it until the kernel has them (with nothing to wait for, hashing shows).
memory (--memory): peak of a build of 200,000 samples, and of parsing its annotation files alone.
Rates are given by the clock and by processor time, which other work on the machine does not disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vistallm.coinit.build import BuildOptions, build
from vistallm.coinit.shards import read_shard
from vistallm.coinit.sources import SOURCES
from vistallm.coinit.sources.base import SourceOptions

PHOTO = 150_000  # bytes, about a COCO photo
SAMPLES_PER_REF = 7  # two and a third sentences, each REC, RES and REG


def write_refs(root: Path, samples: int) -> None:
    """A RefCOCO folder: refs in a protocol 2 pickle, instances.json with two-part polygons, one image file."""
    rng = np.random.default_rng(0)
    folder = root / "refcoco"
    folder.mkdir(parents=True)
    name = "COCO_train2014_000000000001.jpg"
    cv2.imwrite(str(root / name), np.full((480, 640, 3), 127, np.uint8))
    refs, annotations = [], []
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    for i in range(-(-samples // SAMPLES_PER_REF)):
        x, y, r = rng.uniform((100, 100, 20), (500, 380, 90))
        parts = [np.stack([x + s * r * np.cos(angle), y + s * r * np.sin(angle)], 1).round(2) for s in (1.0, 0.5)]
        texts = [f"the {word} one of row {i % 97}" for word in ("left", "red", "second")[: 2 + (i % 3 == 0)]]
        sentences = [{"sent_id": 3 * i + j, "sent": t, "raw": t, "tokens": t.split()} for j, t in enumerate(texts)]
        common = {"image_id": i // 3, "category_id": 1}
        refs.append({"ref_id": i, "ann_id": i, **common, "split": "train", "sentences": sentences})
        refs[-1] |= {"file_name": name, "sent_ids": [3 * i]}
        annotations.append({"id": i, **common, "bbox": [x - r, y - r, 2 * r, 2 * r], "area": 1.0, "iscrowd": 0})
        annotations[-1]["segmentation"] = [part.ravel().tolist() for part in parts]
    images = [{"id": i, "file_name": name, "height": 480, "width": 640} for i in range(len(refs) // 3 + 1)]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(record))


def write_photos(root: Path, count: int) -> None:
    """A jsonl folder of one sample per image; the files are as large as photos (JPEG data with a tail of noise)."""
    root.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    picture = cv2.imencode(".jpg", rng.integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(picture + rng.bytes(PHOTO - len(picture)))
        lines.append({"id": str(i), "task": "caption", "images": [f"{i}.jpg"], "fields": {"caption": f"picture {i}"}})
    (root / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def run(source: str, root: Path, out: Path, workers: int = 1) -> Any:
    """One build without its progress bar."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        return build(source, SOURCES[source], SourceOptions(root, "train"), BuildOptions(out, workers=workers))


def write_plainly(samples: list[tuple[Any, list[bytes]]], path: Path) -> None:
    """Finished samples through json and tarfile: no annotation is read, no mask drawn."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (sample, images) in enumerate(samples):
            for name, data in (("json", json.dumps(sample.to_json()).encode()), ("0.jpg", images[0])):
                member = tarfile.TarInfo(f"{i:08d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def interleave(rounds: int, *steps: Callable[[], Any]) -> list[tuple[float, float]]:
    """Median (seconds, processor seconds) of each step; they take turns, so that a busy machine slows all alike."""
    taken: list[list[tuple[float, float]]] = [[] for _ in steps]
    for _ in range(rounds):
        for times, step in zip(taken, steps, strict=True):
            started = time.perf_counter(), time.process_time()
            step()
            times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [(statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)) for times in taken]


def rates(amount: float, seconds: tuple[float, float]) -> str:
    """Amount per second by both clocks."""
    return f"{amount / seconds[0]:,.0f} ({amount / seconds[1]:,.0f} by processor time)"


def bench_speed(folder: Path, samples: int, photos: int, rounds: int) -> None:
    """Print samples per second and the share of plain file copy."""
    write_refs(folder / "refs", samples)
    out = folder / "out"
    count = run("refcoco", folder / "refs", out).samples
    finished = [pair for path in sorted(out.glob("*.tar")) for pair in read_shard(path)]
    image = len(finished[0][1][0])
    ours, plain = interleave(
        rounds,
        lambda: run("refcoco", folder / "refs", out),
        lambda: write_plainly(finished, folder / "plain.tar"),
    )
    print(f"records: {rates(count, ours)} samples/s on one core, of {count}; the image has {image} bytes")
    print(f"         json and tarfile alone, of finished samples: {rates(count, plain)}")
    pictures, copy, size = folder / "photos", folder / "copy", photos * PHOTO / 1e6
    write_photos(pictures, photos)
    run("jsonl", pictures, out)

    def copy_files() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(pictures, copy, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.jsonl"))

    for sync, where in ((os.sync, "disk"), (lambda: None, "kernel")):
        ours, copied = interleave(
            3 * rounds,
            lambda sync=sync: (run("jsonl", pictures, out), sync()),
            lambda sync=sync: (copy_files(), sync()),
        )
        print(f"images:  {rates(size, ours)} MB/s to the {where}, {photos} files of {PHOTO} bytes;")
        print(f"         file copy {rates(size, copied)}: {copied[0] / ours[0]:.0%} of it")


def in_child(step: Callable[[], Any]) -> float:
    """Peak memory in MB of a step in a forked process, its own children's largest included, beyond the start."""

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found.put((max(peaks) - before) / 1024)

    context = multiprocessing.get_context("fork")
    found, child = context.SimpleQueue(), context.Process(target=measure)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError("the measured process failed")
    return found.get()


def bench_memory(folder: Path, samples: int = 200_000) -> None:
    """Print the peak memory of a build and of parsing its annotation files alone."""
    in_child(lambda: write_refs(folder / "large", samples))
    files = folder / "large" / "refcoco" / "instances.json", folder / "large" / "refcoco" / "refs(unc).p"
    parsed = in_child(lambda: (json.loads(files[0].read_bytes()), pickle.loads(files[1].read_bytes())))
    peak = in_child(lambda: run("refcoco", folder / "large", folder / "large-out", workers=2))
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"memory:  {peak:,.0f} MB at its peak, {samples} samples; ", end="")
    print(f"parsing the files ({size:,.0f} MB) {parsed:,.0f} MB")


def main() -> int:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=7000, help="RefCOCO-style samples of the speed test")
    parser.add_argument("--photos", type=int, default=1000, help="images of the copying test")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over this many turns")
    parser.add_argument("--memory", action="store_true", help="also build 200,000 samples and print the peak memory")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.memory:  # first: a forked process starts with what its parent holds
            bench_memory(Path(folder))
        bench_speed(Path(folder), arguments.samples, arguments.photos, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
