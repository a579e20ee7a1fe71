"""The processes of a run, as torch.distributed knows them; one process alone needs none of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of items that every process has."""
    rank, size = rank_and_size()
    return items[rank::size]


def from_all(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def exchange_device() -> torch.device:
    """Return the device that tensors must be on to be exchanged."""
    return torch.device("cuda" if dist.is_initialized() and "nccl" in dist.get_backend() else "cpu")
