"""Kill a training run with SIGKILL at random moments, start it again, and compare its weights with an unbroken run's.

python tools/kill_training.py --out DIR [--kills 20] [--steps 40] [key=value ...]      (words as for train.py)

Each of the kills has a run of its own: killed once at a random moment after training has begun, resumed to its end.
Prints one line per run: where it was killed, from which step it went on, whether all weights are equal bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from vistallm.config import load_config
from vistallm.train.run import train

FORK = multiprocessing.get_context("fork")  # a run then starts without loading the libraries again


def start(run_dir: Path, words: list[str]) -> multiprocessing.process.BaseProcess:
    """Start what train.py does in a process group of its own, its output in a file."""

    def run() -> None:
        os.setsid()
        with (run_dir / "output.txt").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        train(load_config([*words, f"run_dir={run_dir}"]))

    run_dir.mkdir(parents=True, exist_ok=True)
    process = FORK.Process(target=run)
    process.start()
    return process


def rows(run_dir: Path) -> int:
    """Steps in metrics.csv."""
    path = run_dir / "metrics.csv"
    return max(len(path.read_text().splitlines()) - 1, 0) if path.is_file() else 0


def weights(run_dir: Path, steps: int) -> dict[str, torch.Tensor]:
    """The weights after the last step; raises ValueError with the run's last words when it did not get there."""
    path = run_dir / "checkpoints" / f"step-{steps:06d}.ckpt"
    if not path.is_file():
        raise ValueError(f"{run_dir}: no {path.name}; it said: {(run_dir / 'output.txt').read_text()[-500:]}")
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def killed_run(run_dir: Path, words: list[str], steps: int, rng: random.Random) -> tuple[int, int]:
    """Train, kill after a random part of the steps, resume; returns (steps at the kill, step resumed from)."""
    process, target = start(run_dir, words), rng.randrange(steps - 1)
    while process.is_alive() and rows(run_dir) < target:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.5)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)  # the loader's workers with it
    process.join()
    done = rows(run_dir)
    found = sorted((run_dir / "checkpoints").glob("step-*.ckpt"))
    start(run_dir, words).join()
    return done, int(found[-1].stem.removeprefix("step-")) if found else 0


def main(argv: list[str]) -> int:
    """Run the table; returns 1 when a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args(argv)
    words = [*arguments.words, f"trainer.max_steps={arguments.steps}"]
    rng, different = random.Random(arguments.seed), 0
    start(arguments.out / "whole", words).join()
    whole = weights(arguments.out / "whole", arguments.steps)
    print("| run | killed after step | resumed from step | weights equal |\n|---|---|---|---|")
    for number in range(1, arguments.kills + 1):
        run_dir = arguments.out / f"run-{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        done, resumed = killed_run(run_dir, words, arguments.steps, rng)
        state = weights(run_dir, arguments.steps)
        equal = all(torch.equal(value, state[key]) for key, value in whole.items())
        different += not equal
        print(f"| {number} | {done} | {resumed} | {'yes' if equal else 'NO'} |", flush=True)
    print(f"{arguments.kills - different} of {arguments.kills} equal")
    return int(different > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"kill_training.py: {error}")
