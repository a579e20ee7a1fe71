"""Runs in, finished run folders with scores out: train.py and eval.py as processes, several at a time, resumable.

A run's folder is locked while a process works in it, and the lock is handed down to that process. So a runner that was
killed and started again waits for what the first one left running, takes up what is unfinished where its checkpoint
stands, and skips what is done; several runners (an array job) share one output folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vistallm.ablation.arms import Run
from vistallm.config import CONFIG_ROOT

ROOT = CONFIG_ROOT.parent
PREEMPTED = 75  # exit code of train.py after a signal and its checkpoint
Job = tuple[Run, int]  # a run and its seed


class Stopped(Exception):
    """A signal has ended the runs; starting the same command again goes on."""


class Runner:
    """Runs jobs in `out`, `jobs` at a time.

    Each gets an equal share of the cores as OMP_NUM_THREADS (unless that is set) and, where CUDA_VISIBLE_DEVICES names
    at least `jobs` devices, one of them for itself.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.stopped = out, False
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        for slot in range(jobs):
            own = {"CUDA_VISIBLE_DEVICES": devices[slot]} if jobs > 1 and len(devices) >= jobs else {}
            self._slots.put(os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | own)
        self._pool = ThreadPoolExecutor(jobs)
        self._started: set[subprocess.Popen[bytes]] = set()
        self._failed: dict[Path, str] = {}  # not tried again for each run that starts from them
        self._print = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Finish all jobs and what they start from; returns the failures, folder of the scores -> reason.

        SIGTERM and SIGUSR1 are handed down to the runs, which then write their checkpoints; raises Stopped.
        """
        former = {sign: signal.signal(sign, self._stop) for sign in (signal.SIGTERM, signal.SIGUSR1)}
        failures: dict[str, str] = {}
        try:
            futures = {self._pool.submit(self._finish, job): self.scores(job).parent for job in jobs}
            for number, future in enumerate(as_completed(futures), 1):
                place = futures[future].relative_to(self.out)
                if (error := future.exception()) is None:
                    self._say(f"[{number}/{len(futures)}] {place} is done")
                elif isinstance(error, ValueError):
                    failures[str(place)] = str(error)
                    self._say(f"[{number}/{len(futures)}] {error}")
                elif not isinstance(error, Stopped):
                    raise error
        finally:
            for sign, handler in former.items():
                signal.signal(sign, handler)
        if self.stopped:
            raise Stopped
        return failures

    def folder(self, job: Job) -> Path:
        """The run folder of a job."""
        return self.out / job[0].name / f"seed{job[1]}"

    def scores(self, job: Job) -> Path:
        """The scores file of a job, whether there or not."""
        return self.folder(job) / job[0].scores / "scores.json"

    def _finish(self, job: Job) -> None:
        self._train(job)
        with self._locked(self.folder(job)) as lock:
            if not self.scores(job).is_file():
                words = [f"ckpt={self.folder(job)}", f"run_dir={self.scores(job).parent}", *job[0].decode]
                words += [f"benchmarks=[{','.join(job[0].benchmarks)}]"]
                self._call("eval.py", words, self.folder(job), lock)

    def _train(self, job: Job) -> None:
        run, seed = job
        if run.start:
            self._train((run.start, seed))
        folder = self.folder(job)
        with self._locked(folder) as lock:
            words = [*run.words, f"seed={seed}"]
            if folder in self._failed:
                raise ValueError(self._failed[folder])
            _same_words(folder, words)
            words += [f"run_dir={folder}", "trainer.enable_progress_bar=false"]
            words += [f"ckpt={self.folder((run.start, seed))}"] if run.start else []
            if not (done := folder / "trained").is_file():
                start = time.monotonic()
                self._call("train.py", words, folder, lock)
                done.write_text(f"{time.monotonic() - start:.0f} s\n", encoding="utf-8")

    def _call(self, script: str, words: list[str], folder: Path, lock: IO[str]) -> None:
        """Run a command in a free slot, its output in the folder's log; ValueError when it fails."""
        environment = self._slots.get()
        try:
            if self.stopped:
                raise Stopped
            with (folder / "output.txt").open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / script), *words],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],
                )
                self._started.add(process)
                code = process.wait()
                self._started.discard(process)
        finally:
            self._slots.put(environment)
        if code == PREEMPTED or (code and self.stopped):
            self.stopped = True
            raise Stopped
        if code:
            last = (folder / "output.txt").read_text(errors="replace").strip().rpartition("\n")[2]
            self._failed[folder] = f"{folder}: {script} ended with {code}: {last}; see output.txt there"
            raise ValueError(self._failed[folder])

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[IO[str]]:
        """Hold the folder's lock, waiting for another process that has it."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"{folder.relative_to(self.out)}: waiting for the process that works there")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def _stop(self, sign: int, _: object) -> None:
        self.stopped = True
        for process in list(self._started):
            process.send_signal(sign)

    def _say(self, text: str) -> None:
        with self._print:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def in_order(runs: Sequence[Run], seeds: int) -> list[Job]:
    """Each run once per seed: seed by seed, and what others start from first."""
    unique = {(run.name, run.scores): run for run in sorted(runs, key=lambda run: len(run.chain))}
    return [(run, seed) for seed in range(seeds) for run in unique.values()]


def _same_words(folder: Path, words: list[str]) -> None:
    """Note what a folder's run was started with; ValueError when that is something else."""
    path = folder / "words.json"
    if not path.is_file():
        path.write_text(json.dumps(words), encoding="utf-8")
    elif (there := json.loads(path.read_text(encoding="utf-8"))) != words:
        changed = sorted(set(there) ^ set(words))
        raise ValueError(
            f"{folder}: holds a run with other words ({', '.join(changed)}); use another out=, or delete the folder"
        )
