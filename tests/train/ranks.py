"""One process of several on this machine: trains each of the word lists of a JSON file in turn.

`{rank}` in a word becomes the rank, so that processes can be given files of their own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(runs, world, folder, script=__file__):
    """Start `world` processes of `script` as torchrun does, over gloo, and wait for them."""
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    processes, logs = [], [folder / f"rank-{rank}.txt" for rank in range(world)]
    for rank, log in enumerate(logs):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            command = [sys.executable, str(script), str(folder / "runs.json")]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(log.read_text()[-4000:] for log in logs)
    assert not any(codes), said
    return said


def main():
    from vistallm.config import load_config
    from vistallm.evaluate.rollouts import RolloutSampler
    from vistallm.evaluate.run import validator
    from vistallm.train.run import train

    for words in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config([word.replace("{rank}", os.environ["RANK"]) for word in words]), validator, RolloutSampler)


if __name__ == "__main__":
    main()
