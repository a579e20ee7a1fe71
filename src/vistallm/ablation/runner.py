"""Runs in, finished run folders with scores out: train.py and eval.py as processes, several at a time, resumable.

One runner works in a run's folder at a time (a file lock); whoever needs the same run waits. Finished runs are skipped,
interrupted ones resume from their checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vistallm.ablation.arms import Run
from vistallm.config import CONFIG_ROOT
from vistallm.train.callbacks import PREEMPTED

ROOT = CONFIG_ROOT.parent
Trial = tuple[Run, int]  # a run and its seed


class Stopped(Exception):
    """A signal has ended the runs; the same command resumes them."""


class Runner:
    """Finishes trials in `out`, `jobs` at a time.

    Each process gets an equal share of the cores as OMP_NUM_THREADS (unless that is set) and, where
    CUDA_VISIBLE_DEVICES names at least `jobs` devices, a device of its own.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.stopped = out, False
        self._pool = ThreadPoolExecutor(jobs)
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()  # environments of the processes
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        for slot in range(jobs):
            own = {"CUDA_VISIBLE_DEVICES": devices[slot]} if jobs > 1 and len(devices) >= jobs else {}
            self._slots.put(os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | own)
        self._started: set[subprocess.Popen[bytes]] = set()
        self._failed: dict[Path, str] = {}  # a start that failed is not tried again for each run that needs it

    def folder(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.out / trial[0].name / f"seed{trial[1]}"

    def scores(self, trial: Trial) -> Path:
        """The scores file of a trial, which may not exist yet."""
        return self.folder(trial) / trial[0].evaluation / "scores.json"

    def run(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Finish all trials and what they start from; returns the failures, folder of the scores -> reason.

        SIGINT, SIGTERM and SIGUSR1 are passed on to the processes, which then write their checkpoints; raises Stopped.
        """
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        former = {number: signal.signal(number, self._stop) for number in signals}
        failures: dict[str, str] = {}
        try:
            futures = {self._pool.submit(self._finish, trial): self.scores(trial).parent for trial in trials}
            for number, future in enumerate(as_completed(futures), 1):
                name = str(futures[future].relative_to(self.out))
                try:
                    future.result()
                except Stopped:
                    continue
                except ValueError as error:
                    failures[name] = str(error)
                clock, words = time.strftime("%H:%M:%S"), failures.get(name, f"{name} is done")
                print(f"{clock} [{number}/{len(futures)}] {words}", flush=True)
        finally:
            for sign, handler in former.items():
                signal.signal(sign, handler)
        if self.stopped:
            raise Stopped
        return failures

    def _stop(self, number: int, _: object) -> None:
        self.stopped = True
        for process in list(self._started):
            process.send_signal(number)

    def _finish(self, trial: Trial) -> None:
        """Train the runs of the chain that are not trained, then evaluate the last one."""
        run, seed = trial
        for link in run.chain:
            folder = self.folder((link, seed))
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "runner.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._train(link, seed, folder)
                if link is run and not self.scores(trial).is_file():
                    own = [f"benchmarks=[{','.join(run.benchmarks)}]", *run.decode]
                    self._call("eval.py", [f"ckpt={folder}", f"run_dir={self.scores(trial).parent}", *own], folder)

    def _train(self, run: Run, seed: int, folder: Path) -> None:
        if folder in self._failed:
            raise ValueError(self._failed[folder])
        record, done, overrides = folder / "overrides.json", folder / "trained", [*run.overrides, f"seed={seed}"]
        if not record.is_file():
            record.write_text(json.dumps(overrides), encoding="utf-8")
        if changed := set(json.loads(record.read_text(encoding="utf-8"))) ^ set(overrides):
            words = ", ".join(sorted(changed))
            raise ValueError(f"{folder}: holds a run with other overrides ({words}); use another --out, or delete it")
        if not done.is_file():
            start = [f"ckpt={self.folder((run.start, seed))}"] if run.start else []
            places = [f"run_dir={folder}", "trainer.enable_progress_bar=false"]
            self._call("train.py", overrides + places + start, folder)
            done.touch()

    def _call(self, script: str, overrides: list[str], folder: Path) -> None:
        """Run a command in a free slot, its output in the folder's log; ValueError when it fails."""
        environment, log = self._slots.get(), folder / "output.txt"
        command = [sys.executable, str(ROOT / script), *overrides]
        try:
            if self.stopped:
                raise Stopped
            with log.open("ab") as out:  # process_group: Ctrl-C reaches the process once, through `_stop`
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, process_group=0)
            self._started.add(process)
            code = process.wait()
            self._started.discard(process)
        finally:
            self._slots.put(environment)
        if code == PREEMPTED or (code and self.stopped):
            self.stopped = True
            raise Stopped
        if code:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            self._failed[folder] = f"{folder}: {script} ended with {code}: {last}; see output.txt there"
            raise ValueError(self._failed[folder])


def in_order(runs: Sequence[Run], seeds: int) -> list[Trial]:
    """Each run once per seed: seed by seed, and first what others start from."""
    unique = {(run.name, run.evaluation): run for run in sorted(runs, key=lambda run: len(run.chain))}
    return [(run, seed) for seed in range(seeds) for run in unique.values()]
