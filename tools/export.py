"""Write a run as a small folder that `ckpt=`, eval.py and tools/predict.py load: weights alone, in bfloat16 by default.

    python tools/export.py runs/quickstart/stage2 my-model [--dtype bfloat16|float32]

The folder has a run's layout (config.yaml, vocabulary/, checkpoints/step-<n>.ckpt) without optimizer, loops and logs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from vistallm.train.checkpoint import find_checkpoint, read_state


def export(run: str, out: Path, dtype: torch.dtype) -> Path:
    """Write the newest checkpoint of `run` to the new folder `out` and return the file; ValueError when it exists."""
    run_dir, checkpoint = find_checkpoint(run)
    if out.exists():
        raise ValueError(f"{out}: exists already; expected the name of a new folder")
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in read_state(checkpoint).items()}
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(run_dir / "config.yaml", out / "config.yaml")
    shutil.copytree(run_dir / "vocabulary", out / "vocabulary")
    path = out / "checkpoints" / checkpoint.name
    torch.save({"state_dict": state}, path)
    return path


def main(argv: list[str]) -> None:
    """Export and say where and how large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    path = export(arguments.run, arguments.out, getattr(torch, arguments.dtype))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"export.py: {error}")
