"""Build instruction shards from a source dataset, check them, or list the images of evaluation splits.

python tools/build_coinit.py SOURCE --root DIR [--images DIR] --split S --out DATA/SOURCE [--exclude IDS]
python tools/build_coinit.py SOURCE --help
python tools/build_coinit.py mini --out DIR [--seed N] [--train N --val N --test N] [--videos also|only] [--workers N]
python tools/build_coinit.py check DIR [DIR ...] [--exclude IDS]
python tools/build_coinit.py eval-images DIR [DIR ...] --out IDS

A build that was stopped goes on when the command is given again; the bytes do not depend on workers or stops.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vistallm.coinit.build import BuildOptions, build, read_ids
from vistallm.coinit.check import check, evaluation_images
from vistallm.coinit.shards import read_index
from vistallm.coinit.sources import SOURCES, describe_source
from vistallm.coinit.sources.base import SourceOptions
from vistallm.mini.build import MiniRecipe, ensure_mini


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    words = sys.argv[1:] if argv is None else argv
    text = describe_source(words[0]) if words and words[0] in SOURCES else __doc__
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"{', '.join(SOURCES)}, mini; or check, eval-images")
    parser.add_argument("folders", nargs="*", type=Path, help="check, eval-images: folders of shards")
    parser.add_argument("--out", type=Path, help="folder to write shards into (eval-images: file)")
    parser.add_argument("--root", type=Path, help="folder of the source's annotations")
    parser.add_argument("--images", type=Path, help="folder of its images (default: the usual place under --root)")
    parser.add_argument("--split", help="split, as the dataset names it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the source")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU); the bytes do not depend on it")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="about so many (default 1000)")
    parser.add_argument("--exclude", type=Path, help="file of image ids that no training sample may use")
    parser.add_argument("--max-rejects", type=float, default=0.01, help="accepted share of rejects (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--videos", choices=("also", "only"), help="mini: with the tasks of videos, or these alone")
    for name in ("train", "val", "test"):
        default = getattr(MiniRecipe, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"mini: samples (default {default})")
    return parser.parse_args(words)


def run_check(arguments: argparse.Namespace) -> int:
    """Print the counts and faults of shard folders; 1 when there is any fault."""
    exclude = read_ids(arguments.exclude) if arguments.exclude else frozenset()
    report = check(arguments.folders, exclude, arguments.workers)
    for (folder, split), counts in report.counts.items():
        print(f"{folder}, {split}: {counts.total()} samples")
        for task, number in sorted(counts.items()):
            print(f"  {task:<10}{number:>9}")
    for note in report.notes:
        print(f"note: {note}")
    for kind, texts in report.faults.items():
        print(f"FAULT {kind}: {n}" if (n := report.totals[kind]) else f"warning {kind}: {report.warnings[kind]}")
        print("".join(f"  {text}\n" for text in texts), end="")
    print(f"{report.totals.total()} fault(s)" if report.totals else "no fault", "in", *arguments.folders)
    return int(bool(report.totals))


def list_images(arguments: argparse.Namespace) -> int:
    """Write the image ids of all evaluation splits, one per line."""
    ids = sorted(evaluation_images(arguments.folders))
    if not ids:
        raise ValueError(f"{', '.join(map(str, arguments.folders))}: no evaluation split with image ids")
    arguments.out.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    print(f"{arguments.out}: {len(ids)} images")
    return 0


def build_mini(arguments: argparse.Namespace) -> int:
    """Build the mini set and print its counts."""
    started = time.perf_counter()
    choices = {name: getattr(arguments, name) for name in ("train", "val", "test")}
    choices |= {"videos": arguments.videos is not None, "images": arguments.videos != "only"}
    ensure_mini(arguments.out, seed=arguments.seed, workers=arguments.workers, **choices)
    tasks = read_index(arguments.out)["tasks"]
    counts = ", ".join(f"{split} {sum(numbers.values())}" for split, numbers in tasks.items())
    print(f"{arguments.out}: {counts} samples in {time.perf_counter() - started:.0f} s")
    return 0


def build_source(arguments: argparse.Namespace) -> int:
    """Build a split of a source and print its counts."""
    settings = dict(word.partition("=")[::2] for word in arguments.set)
    if arguments.root is None or arguments.split is None:
        raise ValueError(f"{arguments.source}: expected --root DIR and --split NAME")
    source = SourceOptions(arguments.root, arguments.split, arguments.images, arguments.seed, settings)
    names = ("out", "samples_per_shard", "exclude", "workers", "max_rejects")
    options = BuildOptions(**{name: getattr(arguments, name) for name in names})
    started = time.perf_counter()
    result = build(arguments.source, SOURCES[arguments.source], source, options)
    seconds = time.perf_counter() - started
    size = f"{result.samples} samples, {result.size / 1e6:.1f} MB"
    print(f"{arguments.out}: {arguments.split} has {size} ({seconds:.0f} s)")
    for reason, count in result.rejects.most_common():
        print(f"  rejected {reason:<16}{count:>9}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the user's is one line on stderr and exit code 1."""
    arguments = parse_arguments(argv)
    of_shards = {"check": run_check, "eval-images": list_images}
    commands = {"mini": build_mini, **dict.fromkeys(SOURCES, build_source), **of_shards}
    try:
        if arguments.source not in commands:
            raise ValueError(f"source: expected one of {', '.join(commands)}; got {arguments.source!r}")
        if arguments.source in of_shards and not arguments.folders:
            raise ValueError(f"{arguments.source}: expected a folder of shards")
        if arguments.source != "check" and arguments.out is None:
            raise ValueError(f"{arguments.source}: expected --out, a folder for shards (eval-images: a file)")
        return commands[arguments.source](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
