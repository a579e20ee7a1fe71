"""Predictions of the mini test split: perfect answers, and answers spoilt in known ways."""

import copy

import pytest

from vistallm.evaluate.generate import read_answer, target_of
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.mini.tasks import MAKERS
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import Prediction
from vistallm.tasks import TASKS, render, split_placeholders

PER_TASK = 10


def write(text, sample, letterboxes, codec):
    """Text with its region placeholders written."""
    parts = []
    for part in split_placeholders(text):
        if isinstance(part, str):
            parts.append(part)
        else:
            chosen = [region for number in part.objects for region in sample.regions if region.object == number]
            parts.append(codec.encode(chosen, letterboxes, part.kind or chosen[0].kind))
    return "".join(parts)


def perfect(sample, codec):
    letterboxes = [Letterbox(i.width, i.height, 112) for i in sample.images]
    prompt, answer = (write(text, sample, letterboxes, codec) for text in render(sample, template=0))
    parsed, failure = read_answer(answer, letterboxes, codec, TASKS[sample.task])
    return Prediction(
        id=sample.id,
        benchmark=f"mini_{sample.task}",
        task=sample.task,
        prompt=prompt,
        text=answer,
        parsed=parsed,
        failure=failure,
        images=[{"width": i.width, "height": i.height} for i in sample.images],
        target=target_of(sample, answer),
    )


@pytest.fixture(scope="session", name="perfect")
def perfect_answer():
    """The function, for tests that make samples of their own."""
    return perfect


@pytest.fixture(scope="session")
def codec():
    return RegionCodec(num_bins=1001, points=32)


@pytest.fixture(scope="session")
def samples():
    return [make_sample(MiniRecipe(), "test", task, serial)[0] for task in MAKERS for serial in range(PER_TASK)]


@pytest.fixture(scope="session")
def _perfect_predictions(samples, codec):
    return [perfect(sample, codec) for sample in samples]


@pytest.fixture
def predictions(_perfect_predictions):
    """A fresh copy of the perfect answers."""
    return copy.deepcopy(_perfect_predictions)


@pytest.fixture
def unreadable(predictions):
    for prediction in predictions:
        prediction.text, prediction.parsed, prediction.failure = "<m_st>", None, "unclosed"
    return predictions
