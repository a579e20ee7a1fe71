"""An answer in words -> the answer itself ("B", "yes", "True", "red"), or why there is none.

A generated answer and a target are read by the same rule, that of the metric that scores them.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def _short(text: str) -> str:
    """Cut "... the answer is X." down to X; a text without those words is the answer itself."""
    start = text.lower().rfind("answer is")
    short = text[start + len("answer is") :] if start >= 0 else text
    return short.strip(" :").removesuffix(".").strip()


def _letter(text: str) -> str | None:
    match = re.search(r"\(\s*([A-Z])\s*\)|\b([A-Z])\b", _short(text))
    return (match[1] or match[2]) if match else None


def _yes_or_no(text: str) -> str | None:
    """POPE's own reading ("not" means no, first sentence only), but a text with neither word is no silent "yes"."""
    words = set(re.findall(r"[a-z]+", text.split(".")[0].lower()))
    return "no" if words & {"no", "not"} else "yes" if "yes" in words else None


def _true_or_false(text: str) -> str | None:
    words = {word.capitalize() for word in re.findall(r"[a-z]+", text.lower())} & {"True", "False"}
    return words.pop() if len(words) == 1 else None


READERS: dict[str, tuple[Callable[[str], str | None], str]] = {  # the reader, and why it finds no answer
    "caption": (str, "empty"),
    "vqa": (_short, "empty"),
    "exact": (_short, "empty"),
    "choice": (_letter, "no-choice"),
    "yesno": (_yes_or_no, "no-yes-or-no"),
    "truth": (_true_or_false, "no-true-or-false"),
}


def read_words(text: str, family: str) -> tuple[str | None, str | None]:
    """Read an answer in words (a generated one, or a target's): it and None, or None and why it can't be read."""
    read, reason = READERS[family]
    answer = read(text.strip())
    return (answer, None) if answer else (None, reason)
