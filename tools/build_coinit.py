"""Build instruction shards from a source, or check a folder of them.

python tools/build_coinit.py mini --out DIR [--seed N] [--train N --val N --test N] [--workers N]
python tools/build_coinit.py check DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vistallm.coinit.mini import MiniRecipe, ensure_mini
from vistallm.coinit.shards import read_index
from vistallm.coinit.verify import verify

SOURCES = ("mini",)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"one of {', '.join(SOURCES)}; or check")
    parser.add_argument("folder", nargs="?", type=Path, help="for check: the folder of shards")
    parser.add_argument("--out", type=Path, help="folder to write shards into")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU); the bytes do not depend on it")
    for name, default in vars(MiniRecipe()).items():
        if name != "samples_per_shard":
            parser.add_argument(f"--{name}", type=int, default=default, help=f"mini: {name} (default {default})")
    return parser.parse_args(argv)


def check(folder: Path | None) -> int:
    """Print the counts and faults of a shard folder; 1 when there is any fault."""
    if folder is None:
        raise ValueError("check: expected a folder, as in `build_coinit.py check DIR`")
    report = verify(folder)
    for split, counts in report.counts.items():
        print(f"{split}: {counts.total()} samples")
        for task, number in sorted(counts.items()):
            print(f"  {task:<10}{number:>8}")
    for fault in report.faults:
        print(f"FAULT {fault}")
    print(f"{len(report.faults)} fault(s) in {folder}" if report.faults else f"no fault in {folder}")
    return int(bool(report.faults))


def build(arguments: argparse.Namespace) -> int:
    """Build the shards of a source."""
    if arguments.source not in SOURCES:
        raise ValueError(f"source {arguments.source!r}: expected one of {', '.join(SOURCES)}, or check")
    if arguments.out is None:
        raise ValueError(f"{arguments.source}: expected --out DIR")
    started = time.perf_counter()
    sizes = {name: getattr(arguments, name) for name in ("train", "val", "test")}
    ensure_mini(arguments.out, seed=arguments.seed, workers=arguments.workers, **sizes)
    tasks = read_index(arguments.out)["tasks"]
    counts = ", ".join(f"{split} {sum(numbers.values())}" for split, numbers in tasks.items())
    print(f"{arguments.out}: {counts} samples in {time.perf_counter() - started:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the user's is one line on stderr and exit code 1."""
    arguments = parse_arguments(argv)
    try:
        return check(arguments.folder) if arguments.source == "check" else build(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
