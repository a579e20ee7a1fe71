"""Measure parts of the program on this machine, each beside its baseline in the same run.

    python tools/bench.py masks [--points 32]                          sampling, drawing and overlap of masks
    python tools/bench.py metrics [--count 2000]                       scoring of referring segmentation
    python tools/bench.py loader [key=value ...] [--per-image 5]       the training loader
    python tools/bench.py generate --ckpt RUN --root DIR               answers, with and without the grammar
    python tools/bench.py train [tokens=256 steps=10 key=value ...]    training steps of a configuration
    python tools/bench.py builders [--samples 600]                     building shards

What is compared takes turns, so that other work on the machine slows all alike; figures are medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from vistallm.coinit.build import BuildOptions, build
from vistallm.coinit.shards import read_raw, split_shards
from vistallm.coinit.sources import SOURCES
from vistallm.coinit.sources.base import SourceOptions
from vistallm.config import Config, load_config
from vistallm.data.datamodule import CoinItDataModule
from vistallm.data.sequence import build_codec, build_sequencer, collate
from vistallm.data.stream import RejectLog, evaluation_sequences, reject_log
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.benchmarks import load_benchmarks, score
from vistallm.evaluate.generate import Answerer
from vistallm.evaluate.grammar import rule_of
from vistallm.evaluate.predictions import Faults, read_predictions, write_predictions
from vistallm.model.checkpoint import load_run
from vistallm.model.vistallm import VistaLLM
from vistallm.regions import masks as mask_ops
from vistallm.regions.codec import RegionCodec
from vistallm.schema import Parsed, Prediction, Region
from vistallm.tasks import TASKS
from vistallm.train.optim import build_optimizer, keep_frozen_in_eval
from vistallm.train.plan import GIB, VICUNA_ROWS, Workload, made_batch, make_plan
from vistallm.train.run import prepare_model, quiet
from vistallm.train.strategy import resolve_precision

WIDTH, HEIGHT = 640, 480  # of the made images
TRAIN_SETTINGS = {"steps": 10, "warm": 3, "tokens": 192, "supervised": 64, "images": 1, "instruction": 32}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Calls = dict[str, Callable[[], Any]]


def now() -> float:
    """Seconds, once the accelerator has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(title: str, calls: Calls, amount: float, unit: str, rounds: int, clock: Callable[[], float] = now) -> None:
    """Print `amount` (or the number that a call returns) per second, and the speed relative to the first call's."""
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            returned = call()
            done = returned if isinstance(returned, int) else amount
            speeds[name].append(done / (clock() - start))
    print(title)
    for name, values in speeds.items():
        share = median(own / least for own, least in zip(values, next(iter(speeds.values())), strict=True))
        print(f"  {name:<34} {median(values):12,.1f} {unit}/s  {share:7.2f} of the first row")


def outline(rng: np.random.Generator, points: int = 60) -> np.ndarray:
    """(points, 2) float32 of a star-shaped polygon of 40 to 200 pixels radius in a made image."""
    angles = np.arange(points) * 2 * np.pi / points
    radius = rng.uniform(40, 200) * (1 + 0.3 * np.convolve(rng.normal(size=points), np.ones(5) / 5, "same"))
    centre = rng.uniform((100, 100), (WIDTH - 100, HEIGHT - 100))
    polygon = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.clip(polygon, 0, (WIDTH, HEIGHT)).astype(np.float32)


def bench_masks(options: argparse.Namespace) -> None:
    """Encoding beside findContours, drawing beside fillPoly (integer vertices), overlap beside pycocotools."""
    rng = np.random.default_rng(0)
    masks = [mask_ops.polygons_to_mask([outline(rng)], HEIGHT, WIDTH) for _ in range(options.count)]
    drawn = [(mask_ops.mask_to_polygons(mask, options.points), *mask.shape) for mask in masks]
    whole = [mask_ops.mask_to_rle(mask) for mask in masks]
    pairs = [(rle, mask_ops.polygons_to_rle(*row)) for rle, row in zip(whole, drawn, strict=True)]

    def contours(mask: np.ndarray) -> Any:
        return cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)

    def fill(parts: list[np.ndarray], height: int, width: int) -> Any:
        return cv2.fillPoly(np.zeros((height, width), np.uint8), [np.rint(p).astype(np.int32) for p in parts], 1)

    def bench(title: str, rows: list[tuple], functions: Calls) -> None:
        calls = {name: lambda call=call: [call(*row) for row in rows] for name, call in functions.items()}
        compare(title, calls, len(rows), "masks", options.rounds)

    encode = partial(mask_ops.mask_to_polygons, points=options.points)
    encoders: Calls = {name: partial(encode, sampler=name) for name in mask_ops.SAMPLERS}
    bench(f"encode at {options.points} points", [(mask,) for mask in masks], {"findContours": contours, **encoders})
    ours = {"polygons_to_mask": mask_ops.polygons_to_mask, "polygons_to_rle": mask_ops.polygons_to_rle}
    bench("draw", drawn, {"fillPoly": fill, **ours})
    bench("overlap", pairs, {"pycocotools": lambda a, b: coco.iou([a], [b], [0]), "rle_iou": mask_ops.rle_iou})


def bench_metrics(options: argparse.Namespace) -> None:
    """Scores of a file of one-polygon answers, beside polygon -> runs -> overlap and areas."""
    name, rng = "refcoco_val_res", np.random.default_rng(0)
    benchmarks, predictions, floors = {name: load_benchmarks()[name]}, list[Prediction](), list[tuple[Any, Any]]()
    for index in range(options.count):
        truth, polygon = mask_ops.polygons_to_rle([outline(rng)], HEIGHT, WIDTH), outline(rng, 24).round(3)
        parsed = Parsed("mask", [Region(0, "mask", polygons=[polygon])], "")
        target = {"regions": [Region(0, "mask", rle=truth).to_json()], "answer": "{regions:0}", "empty": False}
        target["meta"] = {"ref_id": index // 3}
        images = [{"width": WIDTH, "height": HEIGHT}]
        predictions.append(Prediction(f"{index:06d}", name, "res", "", "", parsed, None, images, target))
        floors.append((polygon.astype(float).ravel().tolist(), truth))

    def floor() -> None:
        for flat, truth in floors:
            drawn = coco.frPyObjects([flat], HEIGHT, WIDTH)[0]
            coco.area(coco.merge([drawn, truth], True)), coco.area(drawn), coco.area(truth)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        write_predictions(predictions, path)
        calls: Calls = {
            "pycocotools": floor,
            "all scores, from the file": lambda: score(read_predictions(path, Faults()), benchmarks),
        }
        compare(f"{options.count} masks of {WIDTH}x{HEIGHT}", calls, options.count, "answers", options.rounds)


def write_source(root: Path, count: int, per_image: int = 1) -> None:
    """A folder for the jsonl source: RES, REC, VQA and caption samples in turn, `per_image` of each image.

    Images have the spectrum of a photograph: noise at every scale, less at the finer ones.
    """
    root.mkdir(parents=True)
    rng, files, lines = np.random.default_rng(0), list[bytes](), list[str]()
    for _ in range(20):
        image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for octave in range(1, 9):
            grid = rng.normal(size=(max(2, HEIGHT * 2**octave // 512), max(2, WIDTH * 2**octave // 512), 3))
            image += 50 / octave * cv2.resize(grid.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        files.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    for i in range(count):
        if i % per_image == 0:  # a comment in the file makes each image another one
            data = files[i // per_image % len(files)]
            (root / f"{i}.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x0a%08d" % i + data[2:])
        words = " ".join(rng.choice(["the", "red", "small", "circle", "left", "two"], int(rng.integers(2, 14))))
        fields = {"expr": words, "question": f"{words}?", "answer": "red", "caption": words}
        polygon = outline(rng).round(2)
        region = {"polygons": [polygon.ravel().tolist()]}, {"box": [*polygon.min(0).tolist(), *polygon.max(0).tolist()]}
        image, task = f"{i // per_image * per_image}.jpg", ("res", "rec", "vqa", "caption")[i % 4]
        line = {"id": str(i), "task": task, "images": [image], "fields": fields}
        lines.append(json.dumps(line | {"regions": [region[i % 4]] if i % 4 < 2 else []}) + "\n")
    (root / "train.jsonl").write_text("".join(lines))


def build_source(root: Path, out: Path) -> None:
    """Shards of the source, anew, on one core."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        build("jsonl", SOURCES["jsonl"], SourceOptions(root, "train"), BuildOptions(out, 100, workers=1))


def bench_loader(options: argparse.Namespace) -> None:
    """The loader beside reading the same tars and decoding the same JPEGs in full; no mask is seen twice."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, root = Path(folder) / "made", Path(folder) / "shards"
        write_source(made, options.samples * options.per_image, options.per_image)
        build_source(made, root)
        # The real input size and region budget on the mini vocabulary.
        own = "model=mini model.encoder.image_size=224 num_bins=1001 points=32 target_iou=null data.batch_size=16"
        own += f" data.root={root} data.workers=0 data.pool_batches=32 data.weights.res=1 data.weights.rec=1"
        config = load_config([*own.split(), "data.weights.vqa=1", "data.weights.caption=1", *options.words])
        data = CoinItDataModule(config, Vocabulary.build(config.model, build_codec(config), config.links), root)
        data.builder.codec = RegionCodec(points=32, num_bins=1001, cache_size=0)
        rows, decoded = iter(data.stream(0, 1, 0, RejectLog(None, 0.0))), full_decoding(data)
        next(rows)
        pool = config.data.pool_batches  # what comes is dropped at once, as training does
        calls: Calls = {
            "read and decode in full": lambda: deque(islice(decoded, pool * config.data.batch_size), 0),
            "loader": lambda: deque(islice(rows, pool), 0),
        }
        title = f"{options.per_image} sample(s) of each photograph, one process, in its own processor time"
        compare(title, calls, pool * config.data.batch_size, "samples", options.rounds, time.process_time)


def full_decoding(data: CoinItDataModule) -> Iterator[None]:
    """Read every shard and decode every image, without end."""
    while True:
        for shard in data.mixture.shards:
            for raw in read_raw(shard.place):
                for image in raw.files.values():
                    cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                yield


def bench_generate(options: argparse.Namespace) -> None:
    """Answers by batch size beside transformers' plain `generate`, on all tasks' test samples, in its own order."""
    quiet()
    model, config, _ = load_run(options.ckpt)
    shards, builder = split_shards(options.root, "test"), build_sequencer(config, model.vocabulary)
    rows = (evaluation_sequences(shards, builder, task, reject_log(config), options.samples) for task in TASKS)
    sequences = [row for row in chain.from_iterable(rows) for _ in range(options.questions)]
    if not sequences:
        raise ValueError(f"--root {options.root}: no test sample of a known task")
    answerer = Answerer(model.to(DEVICE), config)
    text, rules = model.vocabulary.lm, {id(one): rule_of(one.sample, one.head) for one in sequences}

    def plain(size: int) -> None:
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            for first in range(0, len(sequences), size):
                part = sequences[first : first + size]
                batch = replace(collate(part, model.vocabulary, generation=True), first_copy=None).to(DEVICE)
                model.decoder.generate(
                    inputs_embeds=model.input_embeddings(batch),
                    attention_mask=batch.attention_mask,
                    max_new_tokens=max(answerer.grammars.compile(rules[id(one)]).limit for one in part),
                    do_sample=False,
                    eos_token_id=text.eos_token_id,
                    pad_token_id=text.pad_token_id,
                )

    def answer(size: int, grammar: bool) -> None:
        with patch.object(config.decode, "batch_size", size), patch.object(config.decode, "grammar", grammar):
            answerer.answer_all(sequences)

    for size in options.batches:
        calls: Calls = {
            "transformers' generate": partial(plain, size),
            "free decoding": partial(answer, size, False),
            "grammar": partial(answer, size, True),
        }
        title = f"{len(sequences)} answers in batches of {size}, {options.questions} question(s) about each image"
        compare(title, calls, len(sequences), "answers", options.rounds)


def random_model(config: Config) -> VistaLLM:
    """The model with random weights as training sets it up, with as many rows as Vicuna where it stands for it."""
    vicuna = config.model.decoder.weights is not None
    config.model.decoder.weights = config.model.tokenizer.weights = config.model.encoder.weights = None
    config.model.tokenizer.text_tokenizer = None
    vocabulary = Vocabulary.build(config.model, build_codec(config), config.links)
    if vicuna:
        vocabulary.lm.add_tokens([f"<filler {i}>" for i in range(VICUNA_ROWS - vocabulary.first_new)])
    with DEVICE:
        model, _ = prepare_model(config, vocabulary, None)
    model.train()
    keep_frozen_in_eval(model)
    return model


def matrix_speed(half: bool) -> float:
    """Operations per second of a large matrix product: the best of a few, the baseline of MFU."""
    size, seconds = 8192 if DEVICE.type == "cuda" else 2048, list[float]()
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if half else torch.float32)
    for _ in range(16):
        begin = now()
        a @ a
        seconds.append(now() - begin)
    return 2 * size**3 / min(seconds)


def train_step(model: VistaLLM, work: Workload, config: Config, steps: int, warm: int) -> float:
    """Median seconds of `steps` steps as training does them (autocast, clipping, AdamW), after `warm` more."""
    batch, seconds = made_batch(model, work).to(DEVICE), list[float]()
    optimizer, _ = build_optimizer(model, config.train, 1000)
    half, trained = resolve_precision(config) == "bf16-mixed", [p for p in model.parameters() if p.requires_grad]
    for _ in range(warm + steps):
        start = now()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = model(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - start)
    return median(seconds[warm:])


def bench_train(options: argparse.Namespace) -> None:
    """Steps on random weights and made batches beside matrix products, the memory peak beside the planner's."""
    own, words = dict(TRAIN_SETTINGS), [word.partition("=") for word in options.words]
    own |= {key: int(value) for key, _, value in words if key in own}
    config = load_config(["stage=1", *("".join(word) for word in words if word[0] not in own)])
    size = config.data.batch_size
    work = Workload(size, size * own["images"], own["tokens"], own["supervised"], own["instruction"])
    torch.manual_seed(0)
    plan, libraries = make_plan(config, work), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, name = random_model(config), "CPU"
    speed = matrix_speed(resolve_precision(config) == "bf16-mixed")
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()  # random weights were made in float32
    step = train_step(model, work, config, own["steps"], own["warm"])
    host = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else host
    print(f"{config.model.name}, {name}, {resolve_precision(config)}")
    print(f"{size} samples of {work.tokens} tokens, {work.supervised} supervised, {work.images} images a step")
    print(f"step {step:.3f} s: {size / step:.1f} samples/s, {size * work.tokens / step:,.0f} tokens/s")
    share = plan.model_operations / step / speed
    print(f"matrix products here: {speed / 1e12:.2f} T/s; MFU {share:.1%} of that")
    planned = sum(value for name, value in plan.memory.items() if name != "runtime") / GIB
    print(f"memory peak {peak / GIB:.2f} GiB; the planner expects {planned:.2f} GiB of weights to activations")


def bench_builders(options: argparse.Namespace) -> None:
    """Samples of photographs to the disk, beside a copy of the files."""
    with tempfile.TemporaryDirectory() as name:
        made, out, copied = (Path(name) / part for part in ("made", "out", "copy"))
        write_source(made, options.samples)
        calls: Calls = {
            "file copy": lambda: (shutil.copytree(made, copied, dirs_exist_ok=True), os.sync()),
            "builder": lambda: (build_source(made, out), os.sync()),
        }
        compare("photographs, one core, to the disk", calls, options.samples, "samples", options.rounds)


def main(argv: list[str]) -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="masks|metrics|loader|generate|train|builders")

    def command(run: Callable[[argparse.Namespace], None], rounds: int = 5) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.removeprefix("bench_"), description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--rounds", type=int, default=rounds)
        return added

    masks = command(bench_masks)
    masks.add_argument("--points", type=int, default=32)
    masks.add_argument("--count", type=int, default=200, help="of made masks")
    command(bench_metrics, 3).add_argument("--count", type=int, default=2000)
    loader = command(bench_loader, 7)
    loader.add_argument("--samples", type=int, default=600, help="of made images")
    loader.add_argument("--per-image", type=int, default=1, help="samples of each made image")
    generate = command(bench_generate, 3)
    generate.add_argument("--ckpt", required=True, help="run folder or checkpoint file")
    generate.add_argument("--root", type=Path, required=True, help="shard folder with a test split")
    generate.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    generate.add_argument("--samples", type=int, default=8, help="of every task")
    generate.add_argument("--questions", type=int, default=1, help="how often each sample is asked")
    train = command(bench_train)
    for one in (loader, train):
        one.add_argument("words", nargs="*", metavar="key=value", help="as for train.py")
    command(bench_builders, 3).add_argument("--samples", type=int, default=600)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
