"""Evaluation from a command line: predictions on every device at hand, resumable, then scores, report and exports.

Each process answers its own units of samples and appends them to a file of its own in `parts/`; what is there already
is not answered again. When all are there they are joined in the order of the data, and every process scores a share.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from vistallm.coinit.shards import read_index
from vistallm.config import Config, apply_overrides, config_from_file, load_config, save_config
from vistallm.data.datamodule import MINI_ROOT, data_root
from vistallm.data.sequence import build_codec
from vistallm.data.stream import reject_log
from vistallm.evaluate import generate as gen
from vistallm.evaluate.benchmarks import (
    Benchmark,
    Scores,
    from_all,
    load_benchmarks,
    rank_and_size,
    read_scores,
    score,
    select_benchmarks,
    write_scores,
)
from vistallm.evaluate.conventions import write_conventions
from vistallm.evaluate.export import write_exports
from vistallm.evaluate.foreign import read_foreign
from vistallm.evaluate.gallery import shown
from vistallm.evaluate.predictions import Faults, read_predictions, write_predictions
from vistallm.evaluate.report import write_report
from vistallm.metrics.scores import NamedScores, labelled
from vistallm.model.checkpoint import find_checkpoint, load_run
from vistallm.model.vistallm import VistaLLM
from vistallm.schema import Prediction
from vistallm.train.run import quiet

PROGRESS_SECONDS = 30
DEVICES: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}  # the keys of `trainer.*` in use
# settings that no answer depends on: a run may go on under others
FREE = {"run_dir", "name", "ckpt", "resume", "benchmarks", "predictions", "trainer", "log", "checkpoint", "val"}
FREE |= {"answer", "compare", "format", "foreign"}
LAUNCHER = "VISTALLM_LAUNCHER"  # environment variable: id of the process that started the others of this machine


def run(argv: list[str]) -> int:
    """Score a predictions file, or generate predictions with a checkpoint and score them; returns the exit code.

    Writes predictions.jsonl (before any score), scores.json, report.html and submission files (exports/) into run_dir=.
    A benchmark that fails leaves the others; the exit code is then 1.

    Raises:
        ValueError: for settings, data or a checkpoint that can't be used, before anything is generated.
    """
    quiet()
    config, known, faults, pace = evaluation_config(argv), load_benchmarks(), Faults(), gen.Pace()
    out, beside = Path(str(config.run_dir)), {label: read_scores(Path(file)) for label, file in config.compare.items()}
    out.mkdir(parents=True, exist_ok=True)
    if config.predictions is not None and config.format == "vistallm":
        predictions = read_predictions(Path(config.predictions), faults)
    elif config.predictions is not None:
        if config.benchmarks is None:
            raise ValueError(f"format={config.format}: expected the file's benchmarks=[...], got none")
        predictions = read_foreign(config, *find_data(config, known, faults), faults)
        write_predictions(predictions, out / "predictions.jsonl")
    else:
        root, chosen = find_data(config, known, faults)
        fabric = launch(config)
        if fabric.global_rank == 0 and not (out / "config.yaml").is_file():
            save_config(config, out / "config.yaml")  # scoring the file again then uses the same coordinates
        predictions, pace = generate(config, fabric.device, root, chosen, out / "parts", faults)
        if fabric.global_rank == 0:
            write_predictions(predictions, out / "predictions.jsonl")
    codec = build_codec(config) if config.format == "vistallm" else None  # the ceiling is that of our tokens
    scores = score(predictions, known, codec, faults)
    if rank_and_size()[0] > 0:
        return 0  # the first process prints how it went
    if config.predictions is None or config.format != "vistallm":
        write_predictions(predictions, out / "predictions.jsonl")  # with each one's score
    write_results(config, known, scores, predictions, faults, pace, beside)
    if config.predictions is not None:
        write_conventions(out / "conventions.md", known, predictions, faults)
    elif not faults.found:
        shutil.rmtree(out / "parts")
    return 1 if faults.found else 0


def evaluation_config(argv: list[str]) -> Config:
    """The run's own configuration under `ckpt=`, else the defaults, with the words of `argv` on top.

    Results go beside the checkpoint or the predictions unless `argv` names a run_dir (a later word wins). Only the
    `trainer.*` words of `argv` count: the devices of training need not be here.
    """
    asked = load_config([word for word in argv if word.startswith(("ckpt=", "predictions="))])
    if asked.ckpt is not None:
        folder = find_checkpoint(asked.ckpt)[0]
        own = config_from_file(folder / "config.yaml")
        return apply_overrides(dataclasses.replace(own, trainer={}), [f"run_dir={folder}", *argv])
    if asked.predictions is None:
        raise ValueError("expected ckpt=RUN_OR_FILE or predictions=FILE.jsonl, got neither")
    path = Path(asked.predictions)
    if not path.exists():
        raise ValueError(f"predictions={path}: no such file")
    if any(word.startswith("format=") and word != "format=vistallm" for word in argv):
        return load_config([f"run_dir={path.with_suffix('')}-scores", *argv])
    file, words = path.parent / "config.yaml", [f"run_dir={path.parent}", *argv]
    return apply_overrides(config_from_file(file), words) if file.is_file() else load_config(words)


def find_data(config: Config, known: Mapping[str, Benchmark], faults: Faults) -> tuple[Path, dict[str, Benchmark]]:
    """Return the data folder and the benchmarks to run: those asked for by name, or all that `data.root` has.

    One that is asked for and has no data is a fault; raises ValueError where none is left.
    """
    root = data_root(config) if config.data.root is None else Path(config.data.root)
    chosen = select_benchmarks(known, config.benchmarks, config.data.name, config)
    absent = {name: why for name, one in chosen.items() if (why := missing(root, one)) is not None}
    for name, why in absent.items() if config.benchmarks is not None else ():
        faults.add(name, why)
    if len(absent) == len(chosen):
        none = f"answer={config.answer} leaves none, and model.links={config.model.links}"
        reasons = "; ".join(dict.fromkeys(absent.values())) or none
        raise ValueError(f"no benchmark to run, found none of {len(absent)}: {reasons}")
    if absent and config.benchmarks is None:
        print(f"{len(absent)} benchmark(s) have no data in {root} and are left out: {', '.join(absent)}")
    return root, {name: one for name, one in chosen.items() if name not in absent}


def missing(root: Path, benchmark: Benchmark) -> str | None:
    """Return what a benchmark's data lacks in `root`, or None when its shards hold samples of its task."""
    folder, task, split = root / benchmark.shards, benchmark.task, benchmark.split
    try:
        tasks = read_index(folder)["tasks"]
    except ValueError as error:
        return str(error)
    had = ", ".join(tasks.get(split, {})) or f"nothing; its splits are {', '.join(tasks)}"
    expected = f"{folder}: expected {task} samples in split {split}, it has {had}"
    return None if task in tasks.get(split, {}) else expected


def launch(config: Config) -> Fabric:
    """Start a process per device: all at hand, or those of `trainer.accelerator`, `.devices` and `.num_nodes`."""
    devices = DEVICES | config.trainer
    if unknown := set(devices) - set(DEVICES):
        raise ValueError(f"trainer.{min(unknown)}: evaluation takes only trainer.{', trainer.'.join(DEVICES)}")
    fabric = Fabric(**devices)
    if fabric.world_size > 1:  # a process waits for the others as long as their last unit takes
        fabric = Fabric(**devices, strategy=DDPStrategy(timeout=timedelta(days=1)))

    def end_with_launcher() -> None:  # a process would wait for one that is gone, and keep its device
        while os.getppid() == int(os.environ[LAUNCHER]):
            time.sleep(1)
        os._exit(1)

    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LAUNCHER] = str(os.getpid())  # Lightning's launcher hands it to the processes that it starts
    elif LAUNCHER in os.environ:
        threading.Thread(target=end_with_launcher, daemon=True).start()
    fabric.launch()
    return fabric


def generate(
    config: Config, device: torch.device, root: Path, chosen: Mapping[str, Benchmark], parts: Path, faults: Faults
) -> tuple[list[Prediction], gen.Pace]:
    """Answer this process's share of the units that are not in `parts` yet.

    Returns:
        The predictions of all processes, in the order of the data, and what they took, earlier starts included.
    """
    answerer, (rank, size) = gen.Answerer(load_run(str(config.ckpt), config)[0].to(device), config), rank_and_size()
    forced = dataclasses.replace(answerer, forced=True) if config.decode.teacher_forced else None
    parts.mkdir(exist_ok=True)
    stamps = {name: stamp(config, root, one) for name, one in chosen.items()}
    done, failed, printed = read_parts(parts), dict[str, str](), time.monotonic()
    keys: dict[str, list[str]] = {name: [] for name in chosen}
    rejects, window = {name: reject_log(config) for name in chosen}, gen.WINDOW * config.decode.batch_size
    with (parts / f"{time.time_ns()}-{rank}.jsonl").open("w", encoding="utf-8") as file:
        units = gen.read_units(root, chosen.values(), window, config.decode.limit, failed)
        for turn, unit in enumerate(units):
            name = unit.benchmark.name
            key = f"{stamps[name]}-{unit.number}"
            keys[name].append(key)
            if turn % size != rank or key in done or name in failed:
                continue
            try:
                predictions, pace = answerer.answer_unit(unit, rejects[name])
                if forced is not None and unit.benchmark.head == "link":
                    predictions += forced.answer_unit(unit, reject_log(config))[0]
            except (ValueError, RuntimeError, OSError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            record = {"unit": key, "pace": pace, "predictions": [one.to_json() for one in predictions]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            if rank == 0 and time.monotonic() - printed > PROGRESS_SECONDS:
                printed = time.monotonic()
                print(f"{name}: {len(predictions)} samples answered in {pace['milliseconds'] / 1000:.0f} s", flush=True)
    failed |= {name: f"{root}: found no {chosen[name].task} sample" for name, some in keys.items() if not some}
    for name, why in sorted({pair for some in from_all(failed) for pair in some.items()}):  # all are here from now on
        faults.add(name, why)
    done = read_parts(parts)
    answered = [done[key] for name, some in keys.items() if name not in faults.found for key in some]
    total = sum((gen.Pace(unit["pace"]) for unit in answered), gen.Pace())
    return [Prediction.from_json(record) for unit in answered for record in unit["predictions"]], total


def stamp(config: Config, root: Path, benchmark: Benchmark) -> str:
    """Return a hash of what a benchmark's answers depend on: settings, checkpoint, shards and the benchmark itself."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    checkpoint = find_checkpoint(str(config.ckpt))[1]
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    versions = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    index = (root / benchmark.shards / "index.json").read_text(encoding="utf-8")
    facts = [settings, versions, [benchmark.name, benchmark.task, benchmark.split, benchmark.head], index]
    return hashlib.blake2b(json.dumps(facts, default=str).encode(), digest_size=12).hexdigest()


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the answered units by their key; a line that a kill has cut short is left out."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines(keepends=True)]
    units = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {unit["unit"]: unit for unit in reversed(units)}


def write_results(
    config: Config,
    known: Mapping[str, Benchmark],
    scores: Scores,
    predictions: list[Prediction],
    faults: Faults,
    pace: gen.Pace,
    beside: Mapping[str, Mapping[str, NamedScores]],
) -> None:
    """Write scores.json, the report and the submission files, and print the headlines and all faults."""
    out, seconds = Path(str(config.run_dir)), pace["milliseconds"] / 1000
    facts: dict[str, Any] = {"checkpoint": config.ckpt or "none", "samples": len(predictions)}
    if config.predictions is None:
        facts["rejected samples"] = pace["rejected"]
    if faults.found:
        facts["incomplete"] = ", ".join(filter(None, faults.found))
    write_scores(scores, out / "scores.json", facts)
    if seconds:  # of all processes together
        cpu = f"CPU, {torch.get_num_threads()} threads"
        facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        facts |= {"seconds of generation": round(seconds, 1), "seconds per image": round(seconds / pace["images"], 4)}
        facts |= {f"{what} per second": round(pace[what] / seconds, 1) for what in ("samples", "tokens")}
    scored = [one for one in predictions if not one.forced and (one.score is not None or not labelled([one]))]
    write_report(
        out / "report.html",
        scores,
        scored,
        gen.picked_images(Path(config.data.root or MINI_ROOT), known, shown(scored)),
        history=histories(config.ckpt),
        run=facts,
        config=(out / "config.yaml").read_text() if (out / "config.yaml").is_file() else "",
        beside=beside,
    )
    for one in scores.values():
        value = one.scores[one.headline]
        share = "no sample counts" if value is None else f"{100 * value:6.1f}"
        counts = f"n {one.n}, unreadable {100 * one.unreadable:.1f}%, cut {one.cut}, unlabelled {one.unlabelled}"
        columns = {"teacher-forced": {one.name: one.teacher_forced or {}}, **beside}
        found = {label: named.get(one.name, {}).get(one.headline) for label, named in columns.items()}
        others = "".join(f", {label} {100 * other:.1f}" for label, other in found.items() if other is not None)
        incomplete = ", INCOMPLETE" if one.faults else ""
        print(f"{one.name:<26} {one.headline:<16} {share}   {counts}{others}{incomplete}")
        if (kind := known[one.name].export) is not None:
            try:
                own = [prediction for prediction in predictions if prediction.benchmark == one.name]
                print(f"wrote {write_exports(out / 'exports', kind, one.name, own)}")
            except ValueError as error:
                print(f"eval.py: no submission file of {one.name}: {error}", file=sys.stderr)
    print(f"look at {out / 'report.html'}")
    for name, fault in ((name, fault) for name, some in faults.found.items() for fault in some):
        state = "incomplete" if name in scores else "no score"
        print(f"eval.py: {name or 'no benchmark'}: {state}: {fault}", file=sys.stderr)


def histories(ckpt: str | None) -> dict[str, Path]:
    """Return label -> metrics.csv of the run and of those it started from, as far back as they are still on disk."""
    runs: dict[str, Path] = {}
    while ckpt is not None and Path(ckpt).exists():
        run_dir = find_checkpoint(ckpt)[0]
        config = config_from_file(run_dir / "config.yaml")
        runs = {f"Stage {config.stage}": run_dir / "metrics.csv", **runs}
        ckpt = config.ckpt if config.ckpt != ckpt else None
    return runs


def validator(config: Config, root: Path) -> Callable[[VistaLLM], dict[str, float]]:
    """Return a function that generates answers on `val.benchmarks` and scores them, for use during training.

    Every process calls it and gets the same scores; each answers its own share of the first `val.samples` samples. They
    come from the `val` split where the shards have one (a checkpoint must not be chosen on test data), else from the
    benchmark's own. The model keeps its mode. Under strategy=fsdp all processes generate in step, and `generate` must
    be a forward method (`torch.distributed.fsdp.register_fsdp_forward_method`).

    Returns:
        model -> {"val/<task>_<score>": share in [0, 1]}; with the benchmark's name where two of them have one task.

    Raises:
        ValueError: a benchmark is unknown, or `root` has no data of it.
    """
    chosen = select_benchmarks(load_benchmarks(), config.val.benchmarks, config.data.name, config)
    on_val = {name: dataclasses.replace(one, split="val") for name, one in chosen.items()}
    chosen |= {name: one for name, one in on_val.items() if missing(root, one) is None}
    if absent := [f"{name}: {why}" for name, one in chosen.items() if (why := missing(root, one))]:
        raise ValueError("val.benchmarks: " + "; ".join(absent))
    return functools.partial(_validate, config, root, chosen)


def _validate(config: Config, root: Path, chosen: Mapping[str, Benchmark], model: VistaLLM) -> dict[str, float]:
    sharded, limit = config.strategy == "fsdp", math.ceil(config.val.samples / len(chosen))
    answerer, (rank, size), failed = gen.Answerer(model, config, sharded), rank_and_size(), dict[str, str]()
    units = list(gen.read_units(root, chosen.values(), config.decode.batch_size, limit, failed))
    if failed:
        raise ValueError("; ".join(failed.values()))
    metrics, rejects = {name: one.new_metric() for name, one in chosen.items()}, reject_log(config)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for turn in range(math.ceil(len(units) / size)):
        # the last turn may lack a unit: in step with the others means that some then answer one for nothing
        number = turn * size + rank
        if number < len(units) or sharded:
            unit = units[min(number, len(units) - 1)]
            predictions, _ = answerer.answer_unit(unit, rejects)
            metrics[unit.benchmark.name].update(predictions if number < len(units) else [])
    for module, training in modes:
        module.training = training
    tasks, values = [one.task for one in chosen.values()], dict[str, float]()
    for name, one in chosen.items():
        label = one.task if tasks.count(one.task) == 1 else name
        scores = metrics[name].compute()
        values |= {f"val/{label}_{key}": value for key, value in scores.items() if value is not None}
    return values
