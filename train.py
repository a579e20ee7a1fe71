"""Train one stage (1, 2 or rl): `python train.py stage=1 [model=mini] [data=mini] [key=value ...]`; see configs/."""

from __future__ import annotations

import sys

from vistallm.config import load_config
from vistallm.evaluate.rollouts import RolloutSampler
from vistallm.evaluate.run import validator
from vistallm.train.callbacks import PREEMPTED, Preempted
from vistallm.train.run import train

if __name__ == "__main__":
    try:
        train(load_config(sys.argv[1:]), validator, RolloutSampler)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    except Preempted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        sys.exit(PREEMPTED)
