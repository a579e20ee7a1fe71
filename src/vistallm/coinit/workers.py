"""Forked worker processes: a function and its arguments in, its results out as they are done.

Workers share what the function refers to (a loaded source) with the parent, so nothing but results is pickled.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_function: list[Callable[[Any], Any]] = []  # set in a worker alone, before its first call


def _begin(function: Callable[[Any], Any]) -> None:
    """Keep the function, and end this process when the parent is killed: it would wait for work for ever."""
    _function.append(function)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(argument: Any) -> Any:
    return _function[0](argument)


def run_forked(function: Callable[[Any], Any], arguments: Sequence[Any], workers: int | None) -> Iterator[Any]:
    """Yield `function` of each argument, in any order.

    Args:
        function: runs in a forked process; with one worker, here.
        arguments: picklable, one per call.
        workers: processes; None = one per CPU.

    Raises:
        ValueError: a worker was killed. Whatever the function raises ends the whole.
    """
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), len(arguments)))
    if workers == 1:
        yield from map(function, arguments)
        return
    gc.collect()
    gc.freeze()  # the collector would write into pages that the workers share
    context = multiprocessing.get_context("fork")
    # An executor, unlike a multiprocessing pool, notices when a worker is killed.
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,)) as executor:
        futures = [executor.submit(_call, argument) for argument in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker was killed (out of memory?); lower --workers and run the command again"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)
            gc.unfreeze()
