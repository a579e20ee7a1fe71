from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vistallm.coinit.build import run_forked

PROGRAM = """
import os, time
from vistallm.coinit.build import run_forked

def work(number):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.2 if number < 3 else 600)

list(run_forked(work, range(6), 3))
"""


def test_results_of_all_arguments():
    assert sorted(run_forked(lambda n: n * n, range(20), 3)) == [n * n for n in range(20)]


def test_workers_end_when_their_parent_is_killed():
    """Also those at work; a worker that waited for ever would hold the annotations in memory."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    workers = {int(process.stdout.readline()) for _ in range(6)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if not left:
            break
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 3
    assert not left


def test_a_killed_worker_ends_the_run():
    with pytest.raises(ValueError, match=r"a worker was killed .*lower --workers"):
        list(run_forked(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 5 else n, range(10), 3))


def test_arguments_sent_in_chunks_keep_their_order():
    assert list(run_forked(lambda n: -n, range(2500), 3, chunk=1000)) == [-n for n in range(2500)]
