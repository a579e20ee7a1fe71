"""Write benchmarks as tasks of lmms-eval, which any of its models can then answer.

python tools/lmms_tasks.py refcoco_val_res grefcoco_val_gres --root /data/coinit --out lmms
python -m lmms_eval --include_path lmms --tasks refcoco_val_res --model vistallm --model_args pretrained=RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vistallm.evaluate.benchmarks import load_benchmarks, select_benchmarks
from vistallm.evaluate.lmms import write_task

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", help="names in configs/benchmarks.yaml, of masks or boxes")
    parser.add_argument("--root", type=Path, required=True, help="folder of the shards (data.root of eval.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder for lmms-eval's --include_path")
    parser.add_argument("--limit", type=int, help="samples of each benchmark; default: all")
    words = parser.parse_args()
    try:
        for benchmark in select_benchmarks(load_benchmarks(), words.benchmarks, "").values():
            count = write_task(words.root, benchmark, words.out, words.limit)
            print(f"{words.out / benchmark.name}.yaml: {count} samples")
    except (OSError, ValueError) as error:
        sys.exit(f"lmms_tasks.py: {error}")
