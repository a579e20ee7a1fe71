"""Metric classes: docstring numbers, batches against one batch, one process against two."""

import doctest
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask

from vistallm import metrics
from vistallm.metrics import answers, box_metrics, mask_metrics


@pytest.mark.parametrize("module", [mask_metrics, box_metrics, answers])
def test_docstring_numbers(module):
    result = doctest.testmod(module)
    assert result.attempted > 3
    assert result.failed == 0


def mask_samples(count=24):
    rng = np.random.default_rng(0)
    masks = [
        coco_mask.encode(np.asfortranarray((rng.random((9, 7)) < rng.choice([0, 0.4, 1])).astype(np.uint8)))
        for _ in range(2 * count)
    ]
    return [None if i % 7 == 0 else m for i, m in enumerate(masks[:count])], masks[count:]


def box_samples(count=24):
    rng = np.random.default_rng(1)
    corner = rng.integers(0, 10, (2, count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 8, (2, count, 2))], -1).tolist()
    return [None if i % 5 == 0 else b for i, b in enumerate(boxes[0])], boxes[1]


def inputs(name):
    """(metric, predicted, target or None) by class name."""
    if name in ("CumulativeIoU", "MeanSampleIoU", "GeneralizedIoU"):
        return getattr(metrics, name)(), *mask_samples()
    if name == "PrecisionAtIoU":
        return metrics.PrecisionAtIoU(0.3), *mask_samples()
    if name == "BoxAccuracy":
        return metrics.BoxAccuracy(0.2), *box_samples()
    if name == "GeneralizedBoxPrecision":
        predicted, target = box_samples()
        sets = [None if b is None else [b][: i % 2] for i, b in enumerate(predicted)]
        return metrics.GeneralizedBoxPrecision(0.2), sets, [[b][: (i + i // 3) % 2] for i, b in enumerate(target)]
    if name == "AnswerAccuracy":
        return metrics.AnswerAccuracy(), [i / 30 for i in range(24)], None
    predicted = [None if i % 5 == 0 else i % 3 == 0 for i in range(24)]
    return getattr(metrics, name)(), predicted, [i % 2 == 0 for i in range(24)]


def updated(name, index):
    metric, predicted, target = inputs(name)
    chosen = [[values[i] for i in index] for values in (predicted, target) if values is not None]
    metric.update(*chosen)
    return metric


@pytest.mark.parametrize("name", metrics.__all__)
def test_any_split_into_batches_and_any_order_gives_the_same_bits(name):
    whole = updated(name, range(24)).compute()
    assert 0 < whole.item() < 1
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order, cuts = rng.permutation(24), np.sort(rng.integers(0, 25, rng.integers(1, 12)))
        metric, predicted, target = inputs(name)
        for part in np.split(order, cuts):
            metric.update(*[[values[i] for i in part] for values in (predicted, target) if values is not None])
        assert metric.compute().item() == whole.item(), (seed, cuts)


@pytest.mark.parametrize("name", metrics.__all__)
def test_no_sample_is_not_a_score(name):
    assert torch.isnan(updated(name, []).compute())


def test_states_are_int64_or_float64():
    for name in metrics.__all__:
        states = {state: getattr(updated(name, range(3)), state).dtype for state in ("numerator", "denominator")}
        assert states["denominator"] == torch.int64
        assert states["numerator"] in (torch.int64, torch.float64)


def test_polygons_and_rle_give_the_same_score():
    square = np.array([[1, 1], [5, 1], [5, 4], [1, 4]], np.float32)
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 1:5] = 1
    metric = metrics.MeanSampleIoU()
    metric.update([[square], []], [coco_mask.encode(np.asfortranarray(mask))] * 2)
    assert metric.compute().item() == 0.5


def _worker(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    # an uneven split: the shorter process must not weigh more
    results = {name: updated(name, range(0, 7) if rank == 0 else range(7, 24)).compute() for name in metrics.__all__}
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path / "scores.pt")), nprocs=2)
    for name, value in torch.load(tmp_path / "scores.pt").items():
        assert value.item() == updated(name, range(24)).compute().item(), name
