"""Super links: routing tokens in an answer, K slots behind each, and a decoder that reads the slots' hidden states.

A link is written as `[GRD][GRD_1]..[GRD_K]` where the text head would write region tokens. The slot tokens' rows in the
language model's embedding are the learned queries (VisionLLM v2's super-link queries, arXiv 2406.08394).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vistallm.config import LinkConfig

LINKS = ("DET", "GRD", "SEG", "POSE")
SCENE_LINKS = ("DET", "POSE")  # all links of one image share object queries; of the others each link has its own
REGION_TOKEN = "<region>"  # in a prompt: a region that the region encoder reads
_LINK = re.compile(rf"\[({'|'.join(LINKS)})\]", re.IGNORECASE)
_WRITTEN = re.compile(rf"\s*{_LINK.pattern}(?:\s*\[\w+_\d+\])*", re.IGNORECASE)  # with its slots
_IMAGE = re.compile(r"\b(?:image|frame)\s*(\d+)\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """One link of an answer's text."""

    kind: str  # one of LINKS
    image: int  # index in the sample, from 0
    phrase: str  # the words before it


def routing_token(kind: str) -> str:
    """The token that opens a link of this kind."""
    return f"[{kind}]"


def slot_tokens(kind: str, config: LinkConfig) -> list[str]:
    """The K slot tokens behind the routing token of this kind."""
    name = kind if config.tables == "separate" else "LINK"
    return [f"[{name}_{k}]" for k in range(1, config.queries + 1)]


def link_tokens(config: LinkConfig) -> list[str]:
    """All tokens that links add to a vocabulary, each once: routing tokens, slots, the region token."""
    slots = [token for kind in LINKS for token in slot_tokens(kind, config)]
    return list(dict.fromkeys([*map(routing_token, LINKS), *slots, REGION_TOKEN]))


def write_link(kind: str, config: LinkConfig) -> str:
    """A link as text: its routing token and slots."""
    return routing_token(kind) + "".join(slot_tokens(kind, config))


def read_links(text: str) -> list[Link]:
    """The links of an answer's text, in order; one that names no image is of the first.

    >>> read_links("star [DET][DET_1], red cross [DET][DET_1]")
    [Link(kind='DET', image=0, phrase='star'), Link(kind='DET', image=0, phrase='red cross')]
    """
    links, end = list[Link](), 0
    for match in _LINK.finditer(text):
        before, end = text[end : match.start()], match.end()
        named = _IMAGE.findall(before)
        phrase = re.split(r"[\[\],.:]", _IMAGE.sub("", before))[-1].strip()
        links.append(Link(match[1].upper(), int(named[-1]) - 1 if named else 0, phrase))
    return links


def number_links(text: str, objects: Sequence[Sequence[int] | None]) -> str:
    """An answer with the numbers of what each link found in its place; None leaves a link away.

    >>> number_links("star [DET][DET_1] , red cross [DET][DET_1].", [[0, 2], []])
    'star [0, 2], red cross [].'
    """
    numbers = iter(objects)

    def name(match: re.Match[str]) -> str:
        return "" if (found := next(numbers)) is None else f" {list(found)}"

    return re.sub(r"\s+(?=[.,:])", "", _WRITTEN.sub(name, text)).strip()
