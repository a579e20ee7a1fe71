"""Generated answer text -> what it says (Parsed), or why it can't be read.

Regions are read by the codec, words by one small reader per score family of the task. Nothing is repaired or guessed:
an answer that does not say what the task asks for is unreadable, is counted under a short reason, and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vistallm.metrics.words import read_words
from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import Parsed
from vistallm.tasks import Task

ONE_REGION = ("box", "candidates")


def read_answer(
    text: str, letterboxes: Sequence[Letterbox], codec: RegionCodec, task: Task
) -> tuple[Parsed | None, str | None]:
    """Read a generated answer: its text with markers, without the end token.

    Returns:
        (Parsed, None), with regions in original pixels and, for a text task, `answer` cut down to the answer itself
        ("B", "yes", "True", "red"); or (None, reason), the reason being the codec's ("unclosed", "odd-count", ...) or
        "no-region", "wrong-kind", "wrong-count", "empty", "no-choice", "no-yes-or-no", "no-true-or-false".
    """
    try:
        parsed = codec.decode(text, list(letterboxes), None if task.kind == "text" else task.kind)
    except RegionParseError as error:
        return None, error.reason
    for region in parsed.regions:  # rounded as in predictions.jsonl: the file scores exactly as the run behind it
        region.box, region.point = _rounded(region.box), _rounded(region.point)
        if region.polygons is not None:
            region.polygons = [polygon.astype(float).round(3).astype(np.float32) for polygon in region.polygons]
    if task.kind == "text":
        answer, failure = read_words(parsed.answer, task.metric)
        return (None, failure) if answer is None else (Parsed(parsed.kind, parsed.regions, answer), None)
    if parsed.kind == "text":
        return None, "no-region"
    if parsed.kind != task.kind and not (task.metric == "candidates" and parsed.kind == "point"):
        return None, "wrong-kind"
    if task.metric in ONE_REGION and len(parsed.regions) != 1:
        return None, "wrong-count"
    return parsed, None


def _rounded(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(round(float(value), 3) for value in values)
