"""The one rule that joins a template and a text written by people: spaces, marks and case.

Datasets hold tokenised texts ("a person ' s jacket", "Two young , White males"), doubled spaces, phrases with a capital
and a full stop ("A man in red."), statements without one. Texts of one's own (`Sample.instruction`) stay as they are.
"""

from __future__ import annotations

import re

_SPACES = re.compile(r"[^\S\n]+")
_BEFORE_MARK = re.compile(r"(?<=[\w}\"')\]]) ([,.;!?]|(?<=[^\W\d] ):)(?=\s|$)")
_APOSTROPHE = re.compile(r"(?<=\w)(?: ' ?|' )(s|t|re|ve|ll|d|m)(?=[\s,.;:!?]|$)(?! ')")
_NOT = re.compile(r"(?<=\w) (n't)\b")
_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")
_STOPS = ".,;:"
_ENDS = (".", "!", "?", '"', "'", ":", ")", "…")
_INSIDE = re.compile(r"[^\W_],? $")  # what stands before a field in the middle of a sentence
# First words that are never a name, and so lose their capital inside a sentence.
_DETERMINER = re.compile(r"(?:A|An|The|This|That|These|Those|His|Her|Its|Their|My|Your|Our|Some|Two|Three|Four|Five) ")
_ASKS = re.compile(
    r"(?:what|which|who|whose|whom|where|when|why|how|is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b",
    re.IGNORECASE,
)


def tidy(text: str, tokenised: bool = False) -> str:
    """A text without doubled spaces and without the spaces of a tokeniser before marks and around apostrophes.

    Line breaks stay. `tokenised` also joins hyphens, for texts known to be split at them: elsewhere " - " is a dash.

    >>> tidy("Two young , White  males"), tidy("a person ' s jacket"), tidy("the candle - holder", tokenised=True)
    ('Two young, White males', "a person's jacket", 'the candle-holder')
    """
    text = _BEFORE_MARK.sub(r"\1", _SPACES.sub(" ", text).strip())
    text = _NOT.sub(r"\1", _APOSTROPHE.sub(r"'\1", text))
    return _HYPHEN.sub("-", text) if tokenised else text


def join(before: str, name: str, text: str, after: str) -> str:
    """The text of a field as it stands between two pieces of a template.

    A phrase inside a sentence loses its full stop and the capital of its determiner; a sentence before another one gets
    the mark that it lacks; a mark of the template is not doubled.

    >>> join("Where is ", "expr", "A man in black pants.", "? Give the box.")
    'a man in black pants'
    >>> join("", "statement", "One hand has the fingers uncovered", " True or False?")
    'One hand has the fingers uncovered.'
    """
    text, following = tidy(text), after.lstrip(" ")[:1]
    mark = after[:1] if after[:1] and after[:1] in ".,;:?!" else ""
    if name == "expr":
        if _DETERMINER.match(text) and _INSIDE.search(before):
            text = text[0].lower() + text[1:]
        if mark or following == '"' or following.islower():
            return text.rstrip(_STOPS + mark) or text
    elif name in ("question", "statement", "explanation", "answer"):
        if mark:
            return text.rstrip(_STOPS + mark) or text
        if text and name != "answer" and not text.endswith(_ENDS) and (following.isupper() or following in ("(", "{")):
            return text.rstrip(",;") + ("?" if name == "question" and _ASKS.match(text) else ".")
    return text
