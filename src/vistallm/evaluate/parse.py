"""Generated answer text -> what it says (Parsed), or why it can't be read.

Regions are read by the codec, words by one small reader per score family of the task. Nothing is repaired or guessed:
an answer that does not say what the task asks for is unreadable, is counted under a short reason, and scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import Parsed
from vistallm.tasks import Task

Read = tuple[str | None, str | None]
"""What was read and None, or None and the reason it could not be read."""

_LETTER = re.compile(r"\(\s*([A-Z])\s*\)|\b([A-Z])\b")


def _read_all(text: str) -> Read:
    return (text, None) if text else (None, "empty")


def _read_short(text: str) -> Read:
    """Cut "... the answer is X." down to X; a text without those words is the answer itself."""
    start = text.lower().rfind("answer is")
    short = text[start + len("answer is") :] if start >= 0 else text
    return _read_all(short.strip(" :").removesuffix(".").strip())


def _read_choice(text: str) -> Read:
    match = _LETTER.search(_read_short(text)[0] or "")
    return (match[1] or match[2], None) if match else (None, "no-choice")


def _read_yes_no(text: str) -> Read:
    """POPE's own reading ("not" means no, first sentence only), but a text with neither word is no silent "yes"."""
    said = set(re.findall(r"[a-z]+", text.split(".")[0].lower()))
    if said & {"no", "not"}:
        return "no", None
    return ("yes", None) if "yes" in said else (None, "no-yes-or-no")


def _read_truth(text: str) -> Read:
    said = {word.capitalize() for word in re.findall(r"[a-z]+", text.lower())} & {"True", "False"}
    return (said.pop(), None) if len(said) == 1 else (None, "no-true-or-false")


READERS: dict[str, Callable[[str], Read]] = {
    "caption": _read_all,
    "vqa": _read_short,
    "exact": _read_short,
    "choice": _read_choice,
    "yesno": _read_yes_no,
    "truth": _read_truth,
}
ONE_REGION = ("box", "candidates")


def read_words(text: str, family: str) -> Read:
    """Read an answer in words (a generated one, or a target's) by the reader of a text family."""
    return READERS[family](text.strip())


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
