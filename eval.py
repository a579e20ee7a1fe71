"""Evaluate: `python eval.py ckpt=RUN [benchmarks=[...]] [key=value ...]` or `python eval.py predictions=FILE.jsonl`.

Runs on every device at hand (`trainer.devices=`); the same command goes on after a kill. See docs/evaluation.md.
"""

from __future__ import annotations

import sys

from vistallm.evaluate.run import run

if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
